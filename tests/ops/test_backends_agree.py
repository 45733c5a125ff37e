"""Random sizes, dtypes, degrees, groups and forms: every backend against float64, forward and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsae_triton import FusedRationalSAE, RationalGate
from rsae_triton.ops.encode import rational_encode
from rsae_triton.ops.reference import AMPLITUDES, BACKWARDS, DOMAINS, FORMS

# Of each output's norm, on top of twice what plain PyTorch in the same dtype is off by.
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@st.composite
def cases(draw):
    form = draw(st.sampled_from(FORMS))
    p, q = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    groups = draw(st.sampled_from([1, 1, 2, 3, 6, 30]))
    gate = {
        "form": form, "degree": (p, q), "groups": groups,
        "domain": draw(st.sampled_from(DOMAINS if p <= 5 else DOMAINS[:1])),
        "backward": draw(st.sampled_from(BACKWARDS)),
        "amplitude": draw(st.sampled_from(AMPLITUDES if form == "gated" else AMPLITUDES[:1])),
    }  # fmt: skip
    return gate, draw(st.integers(1, 40)), draw(st.integers(1, 20)), draw(st.booleans()), draw(st.integers(0, 10**6))


def make(gate, d_in, dtype, backend, subtract, seed):
    g = torch.Generator().manual_seed(seed)
    (p, q), groups, d_sae = gate["degree"], gate["groups"], 30

    def uniform(low, high, *shape):
        return torch.rand(shape, generator=g) * (high - low) + low

    options = {name: value for name, value in gate.items() if name != "degree"}
    own = RationalGate(
        d_sae, (p, q), uniform(-1, 1, groups, p + 1), uniform(-1, 1, groups, q), centre=uniform(-0.2, 0.2, groups),
        input_scale=uniform(0.7, 1.6, groups), output_scale=uniform(0.5, 1.5, groups),
        threshold=uniform(0.05, 0.5, d_sae), activity_threshold=uniform(0.05, 0.3, d_sae), **options,
    )  # fmt: skip
    sae = FusedRationalSAE(
        d_in, d_sae, gate=own, generator=g, apply_b_dec_to_input=subtract, backend="eager", dtype=torch.float32
    )
    with torch.no_grad():
        sae.b_enc.copy_(uniform(-0.3, 0.3, d_sae))
        sae.b_dec.copy_(uniform(-0.3, 0.3, d_in))
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):  # what the narrow dtype can hold
            one = getattr(sae, name)
            one.copy_(one.to(dtype))
    sae = sae.to(torch.float64) if backend == "float64" else sae.to(dtype)
    sae.backend = "eager" if backend == "float64" else backend
    return sae


def encode(sae, x, rounded):
    """The code, its counts and sums. rounded: of float64, from h in the narrow dtype, with or without the bias."""
    if rounded is None:
        return sae.encode_with_sums(x)
    dtype, bias_too = rounded
    product = (x - sae.b_dec if sae.apply_b_dec_to_input else x) @ sae.W_enc
    h = product + sae.b_enc
    kept = h.to(dtype).double() if bias_too else product.to(dtype) + sae.b_enc
    h = h + (kept - h).detach()
    one, zero = torch.eye(sae.d_sae, dtype=h.dtype), torch.zeros_like(sae.b_enc)
    return rational_encode(h, one, zero, None, sae.gate.tensors(), sae.gate.spec(True), "eager")


def outputs(sae, x, seed, rounded=None):
    """z, counts, x_hat, and the gradient of a random function of them by x and every parameter."""
    x = x.to(sae.W_enc.dtype).requires_grad_()
    z, counts, l1 = encode(sae, x, rounded)
    x_hat = sae.decode(z)
    g = torch.Generator().manual_seed(seed)
    total = sum(
        (one.double() * torch.randn(one.shape, generator=g, dtype=torch.float64)).sum()
        for one in ((z, x_hat, l1, counts) if sae.gate.form == "gated" else (z, x_hat, l1))
    )
    leaves = {"x": x, **dict(sae.named_parameters())}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    found = {"z": z, "counts": counts, "x_hat": x_hat}
    return found | {f"d {name}": one for name, one in zip(leaves, grads, strict=True)}


def off(value, truth):
    return float((value.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp_min(1))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(case=cases())
def test_backends_agree(dtype, case):
    gate, n_tokens, d_in, subtract, seed = case
    x = torch.randn(n_tokens, d_in, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    found = {
        backend: outputs(make(gate, d_in, dtype, backend, subtract, seed), x, seed)
        for backend in ("float64", "eager", "cpu", "triton")
    }
    truth = found.pop("float64")
    # Backends keep h for the backward pass in the narrow dtype. Beside a kink (the clip's end, B = 0, a threshold) its
    # slope is then the other side's: as right, and not near the exact one.
    sae = make(gate, d_in, dtype, "float64", subtract, seed)
    others = [outputs(sae, x, seed, (dtype, bias_too)) for bias_too in (True, False)] if dtype != torch.float32 else []
    for name, exact in truth.items():
        allowed = 2 * off(found["eager"][name], exact) + BOUND[dtype]
        for backend in ("cpu", "triton"):
            value = found[backend][name]
            assert value.shape == exact.shape
            nearest = min(off(value, one) for one in (exact, *(other[name] for other in others)))
            assert nearest <= allowed, (backend, name)
