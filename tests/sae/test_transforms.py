"""Derivatives through torch.func and forward mode: those of the eager formulas, or an RsaeError; never zeros."""

import pytest
import torch
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from rsae_triton import FusedRationalSAE
from rsae_triton.common.errors import RsaeError
from rsae_triton.sae.gate import RationalGate, smooth_step
from rsae_triton.sae.topk_rational import TopKRationalSAE
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE

D, F = 5, 12
X = torch.randn(7, D, generator=torch.Generator().manual_seed(3))
V = torch.randn(7, D, generator=torch.Generator().manual_seed(4))


def sae(kind):
    options = {"generator": torch.Generator().manual_seed(0)}
    if kind in ("gated", "gated soft", "direct"):
        gated = {"backward": "rational"} if kind == "gated" else {}
        made = FusedRationalSAE(D, F, form=kind.split()[0], **gated, **options)
        with torch.no_grad():
            made.gate.threshold.fill_(0.05 if made.gate.form == "gated" else 0.0)
        return made
    if kind == "rational topk":
        gate = RationalGate(F, (2, 2), *smooth_step(), form="gated", threshold=0.0)
        return TopKRationalSAE(D, F, k=3, gate=gate, **options)
    kinds = {"relu": (ReluSAE, {}), "topk": (TopKSAE, {"k": 3}), "batchtopk": (BatchTopKSAE, {"k": 3}),
             "jumprelu": (JumpReluSAE, {"threshold": 0.3, "bandwidth": 0.5, "slope_to_h": True})}  # fmt: skip
    made, more = kinds[kind]
    return made(D, F, **more, **options)


KINDS = ("gated", "gated soft", "direct", "rational topk", "relu", "jumprelu", "topk", "batchtopk")


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_a_derivative_gives_the_same(kind):
    one = sae(kind)
    x = X.clone().requires_grad_()

    def loss(x):
        return (one(x) * V).sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    assert bool(expected.any())
    near = {"rtol": 1e-4, "atol": 1e-5}
    assert torch.allclose(grad(loss)(X), expected, **near)
    assert torch.allclose(vjp(loss, X)[1](torch.ones(()))[0], expected, **near)
    assert torch.allclose(jvp(loss, (X,), (V,))[1], (expected * V).sum(), **near)
    assert torch.allclose(jacrev(loss)(X), expected, **near)
    assert torch.allclose(jacfwd(loss)(X), expected, **near)
    assert torch.allclose(vmap(one)(X), one(X), **near)
    by_row = vmap(grad(lambda row, v: (one(row) * v).sum()))(X, V)
    assert torch.allclose(by_row, expected, **near)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, V)
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent, (expected * V).sum(), **near)


@pytest.mark.parametrize("kind", ["gated", "direct", "relu", "jumprelu", "topk"])
def test_derivatives_of_parameters(kind):
    one = sae(kind)
    weights = dict(one.named_parameters())

    def loss(weights):
        return (functional_call(one, weights, (X,)) * V).sum()

    expected = torch.autograd.grad(loss(weights), list(weights.values()), allow_unused=True)
    found = grad(loss)({name: weight.detach() for name, weight in weights.items()})
    for (name, value), wanted in zip(found.items(), expected, strict=True):
        assert torch.allclose(value, torch.zeros_like(value) if wanted is None else wanted, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("kind", ["gated", "direct", "relu", "jumprelu", "topk", "rational topk"])
def test_a_row_alone_is_encoded_as_among_others(kind):
    one = sae(kind)
    assert torch.allclose(one.encode(X[0]), one.encode(X)[0], atol=1e-6)
    assert torch.equal(one.encode_with_counts(X[0])[1], (one.encode(X[0]) != 0).float())


def test_transforms_of_an_encoder_with_two_rounds_equal_autograd():
    one = sae("gated")
    from rsae_triton.sae.adding import with_rounds

    two = with_rounds(one, 2, X.repeat(20, 1))
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad((two(x) * V).sum(), x)
    assert torch.allclose(grad(lambda x: (two(x) * V).sum())(X), expected, rtol=1e-3, atol=1e-4)
    assert torch.allclose(jvp(two, (X,), (V,))[1], jacfwd(two)(X).flatten(2).mul(V.flatten()).sum(-1), atol=1e-4)


@pytest.mark.parametrize("what", ["encode_sparse", "autoencode"])
def test_functions_without_transform_rules_raise(what):
    one = sae("gated")

    def loss(x):
        made = getattr(one, what)(x)
        return made.total if what == "autoencode" else made.values.sum()

    for transform in (lambda: jvp(loss, (X,), (V,)), lambda: grad(loss)(X), lambda: jacfwd(loss)(X)):
        with pytest.raises(RsaeError, match=r"torch\.func"):
            transform()
