"""What the interpreter cannot show: CUDA graphs, streams, several devices, tensors of 2^31 elements, real compilers."""

import pytest
import torch
from gate_cases import flags, random_gate, to

from rsae_triton import kernels
from rsae_triton.ops.autoencode import rational_autoencode
from rsae_triton.ops.reference import GateSpec, GateTensors, rational_gate

SPEC = GateSpec(3, 2, form="gated", backward="rational")


def inputs(n_tokens=256, d_in=64, d_sae=512, dtype=torch.bfloat16, device="cuda", seed=0):
    g = torch.Generator().manual_seed(seed)
    x, W_enc, b_enc, W_dec, b_dec = (
        (torch.randn(*shape, generator=g) / 8).to(device, dtype)
        for shape in ((n_tokens, d_in), (d_in, d_sae), (d_sae,), (d_sae, d_in), (d_in,))
    )
    return x, (W_enc, b_enc, W_dec, b_dec), to(random_gate(3, 2, d_sae, 1), device)


def step(x, weights, gate, backend):
    parameters = [one.detach().requires_grad_() for one in (*weights, *gate[:6])]
    own = GateTensors(*parameters[4:], gate[6])
    loss = rational_autoencode(x, *parameters[:4], own, SPEC, l1_weight=0.1, chunk_tokens=128, backend=backend)
    return [loss.total, *torch.autograd.grad(loss.total, parameters, materialize_grads=True)]


@pytest.mark.parametrize("backend", ["triton:split", "triton:fused"])
def test_a_step_can_be_captured_in_a_graph(backend):
    x, weights, gate = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile, and let cuBLAS take its workspace, outside of the graph
        for _ in range(3):
            step(x, weights, gate, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, weights, gate, backend)
    other, _, _ = inputs(seed=1)
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip(captured, step(other, weights, gate, backend), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["triton:split", "triton:fused"])
def test_bits_are_the_same_in_every_run(backend):
    first, again = (step(*inputs(n_tokens=1000, d_sae=3000), backend) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_kernels_run_on_the_current_stream():
    x, (W, b, *_), gate = inputs(n_tokens=4096, d_sae=8192)
    expected = kernels.encode_forward(x, W, b, gate, **flags(SPEC))[0]
    torch.cuda.synchronize()
    late = torch.zeros_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)  # on another stream the kernel would read zeros
        found = kernels.encode_forward(late, W, b, gate, **flags(SPEC))[0]
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_tensor_decides_which_device_computes():
    found = []
    for device in ("cuda:0", "cuda:1"):
        x, (W, b, *_), gate = inputs(device=device)
        z = kernels.encode_forward(x, W, b, gate, **flags(SPEC))[0]
        assert z.device == torch.device(device)
        found.append(z.cpu())
    assert torch.equal(*found)


def test_codes_of_more_than_2_to_the_31_elements():
    n_tokens, d_in, d_sae = 32768 + 16, 16, 65536 + 32
    wanted = 5 * n_tokens * d_sae * 2
    free, _ = torch.cuda.mem_get_info()
    if free < wanted:
        pytest.skip(f"needs {wanted >> 30} GiB of free GPU memory, {free >> 30} are free")
    x, (W, b, W_dec, _), gate = inputs(n_tokens, d_in, d_sae)
    z, h, _, _ = kernels.encode_forward(x, W, b, gate, save_h=x.dtype, **flags(SPEC))
    dh, _, grads = kernels.encode_backward(x, W_dec, h, None, None, gate, **flags(SPEC, True))
    apart, apart_grads = kernels.rational_backward(h, W_dec @ x.T, None, None, gate, inplace=True, **flags(SPEC, True))
    for features in (slice(0, 8), slice(d_sae - 8, d_sae)):
        own = GateTensors(*(one[features] if len(one) > 1 else one for one in gate))
        true_h = (x.double() @ W[:, features].double() + b[features].double()).T
        torch.testing.assert_close(h[features].double(), true_h, rtol=1e-2, atol=1e-2)
        code, _ = rational_gate(h[features].T.float(), own, SPEC)
        # z was made of the h before rounding: compare where that decides nothing.
        sure = (h[features].float() - own.threshold[:, None]).abs() > 0.02
        torch.testing.assert_close(z[features].float() * sure, code.T * sure, rtol=5e-2, atol=5e-2)
        torch.testing.assert_close(dh[features].float(), apart[features].float(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(grads.threshold[features], apart_grads.threshold[features], rtol=2e-2, atol=0.5)


def test_torch_compile_of_the_whole_step():
    x, weights, gate = inputs()
    compiled = torch.compile(lambda x: rational_autoencode(x, *weights, gate, SPEC).total, fullgraph=True)
    torch.testing.assert_close(compiled(x), rational_autoencode(x, *weights, gate, SPEC).total)


def test_autotune_measures_and_remembers(monkeypatch, tmp_path):
    monkeypatch.setenv("RSAE_AUTOTUNE", "1")
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path))
    h, gate = torch.randn(64, 512, device="cuda").bfloat16(), to(random_gate(3, 2, 64, 1), "cuda")
    found = kernels.rational_forward(h, gate, **flags(SPEC))[0]
    [file] = (tmp_path / "autotune").iterdir()
    assert file.name.startswith("rational_forward")
    monkeypatch.delenv("RSAE_AUTOTUNE")
    assert torch.equal(found, kernels.rational_forward(h, gate, **flags(SPEC))[0])
