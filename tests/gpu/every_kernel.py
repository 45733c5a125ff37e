"""Every kernel once, on small ragged shapes, in each dtype: what compute-sanitizer watches. Run as a script."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))


def run(device: str) -> list[torch.Tensor]:
    """All outputs of all kernels."""
    from gate_cases import flags, random_gate, to

    from rsae_triton import kernels
    from rsae_triton.ops.reference import GateSpec

    found = []
    for dtype, n_tokens, d_in, n_features in (
        (torch.bfloat16, 48, 32, 64),
        (torch.float16, 45, 50, 37),
        (torch.float32, 33, 24, 70),
    ):
        g = torch.Generator().manual_seed(0)
        x, W, b, back = (
            torch.randn(*shape, generator=g).div(4).to(device, dtype)
            for shape in ((n_tokens, d_in), (d_in, n_features), (n_features,), (n_tokens, d_in))
        )
        dcounts, dl1 = torch.randn(2, n_features, generator=g).to(device)
        for sets, form in ((1, "direct"), (n_features, "gated")):
            gate, spec = to(random_gate(5, 4, n_features, sets), device), GateSpec(5, 4, form=form)
            forward, backward = flags(spec), flags(spec, backward=True)
            z, h, counts, l1 = kernels.encode_forward(x, W, b.float(), gate, save_h=dtype, **forward)
            found += [z, h, counts, l1, *kernels.rational_forward(h, gate, **forward)]
            dh, code, grads = kernels.encode_backward(
                back, W.T.contiguous(), h, dcounts, dl1, gate, z_dtype=dtype, **backward
            )
            found += [dh, code, *grads]
            dh, grads = kernels.rational_backward(h, torch.ones_like(h), dcounts, dl1, gate, **backward)
            found += [dh, *grads]
            forward.pop("hard")
            for k in (None, 5):
                rows = kernels.sparse_encode(x, W, b.float(), gate, capacity=n_features, k=k, **forward)
                counts = rows.counts.clamp(max=rows.values.shape[1])
                decoder = W.T.contiguous()
                found += [*rows, kernels.sparse_decode(rows.values, rows.indices, counts, decoder, back[0])]
                found.append(kernels.sparse_decode_dvalues(back, rows.values, rows.indices, counts, decoder))
                found.append(kernels.sparse_decode_dweight(back, rows.values, rows.indices, counts, decoder))
    return found


if __name__ == "__main__":
    outputs = run("cuda" if torch.cuda.is_available() else "cpu")
    assert all(one.isfinite().all() for one in outputs)
    print(f"{len(outputs)} outputs, all finite")
