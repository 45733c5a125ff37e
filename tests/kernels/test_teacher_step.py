"""The sparse step of teachers by Triton kernels, against the dense loss in float64."""

import copy

import pytest
import torch

from rsae_triton.kernels.support_list import Entries
from rsae_triton.kernels.support_threshold import threshold_backward, threshold_forward
from rsae_triton.ops import teacher_triton
from rsae_triton.ops.across import Across
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE
from rsae_triton.training.on_entries import losses_on_entries
from rsae_triton.training.recipes import Recipe, losses

N, D_IN, D_SAE = 14, 6, 33
KINDS = {
    "relu": (ReluSAE, {}),
    "jumprelu": (JumpReluSAE, {"bandwidth": 0.7}),
    "jumprelu-to-h": (JumpReluSAE, {"bandwidth": 0.7, "slope_to_h": True}),
    "topk": (TopKSAE, {"k": 5}),
    "signed topk": (TopKSAE, {"k": 20, "relu": False}),
    "batchtopk": (BatchTopKSAE, {"k": 4}),
}
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
ROOM = N * D_SAE


def made(kind, sizes=(D_IN, D_SAE), seed=0, **options):
    """An SAE whose h are eighths on the tokens of `tokens`, a token's all different: no decision depends on a dtype."""
    d_in, d_sae = sizes
    make, own = KINDS[kind]
    if "k" in own:
        own = {**own, "k": min(own["k"], d_sae)}
    generator = torch.Generator().manual_seed(seed)
    sae = make(d_in, d_sae, **{**own, **options}).train()
    with torch.no_grad():
        for row in sae.W_enc:
            row.copy_((torch.randperm(d_sae, generator=generator) - d_sae // 2) / 8)
        sae.W_dec.normal_(generator=generator)
        sae.b_dec.copy_(torch.arange(d_in) / 4)
        if kind.startswith("jump"):
            sae.threshold.copy_(0.5 + torch.randint(0, 8, (d_sae,), generator=generator) / 8 + 1 / 16)
    return sae


def tokens(n=N, d_in=D_IN, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.eye(d_in)[torch.randint(0, d_in, (n,), generator=generator)]
    return x + torch.arange(d_in) / 4


def outcome(sae, x, sparsity="none", dead=None, dtype=None, room=ROOM, across=None, dense=False):
    """total, mse, l0, counts and every gradient; `entries` of the kernels."""
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype not in (None, torch.float32)):
        if dense:
            found = losses(sae, x, Recipe("test", sparsity, aux_k=4), 0.3, dead)
        else:
            found = losses_on_entries(
                sae, x, sparsity=sparsity, weight=0.3, aux_k=4, dead=dead, most=room, across=across, kernels=True
            )
    named = dict(sae.named_parameters())
    grads = torch.autograd.grad(found.total, list(named.values()), allow_unused=True, materialize_grads=True)
    numbers = {name: getattr(found, name).detach() for name in ("total", "mse", "l0", "counts")}
    return {**numbers, **dict(zip(named, grads, strict=True))}, None if dense else found.entries


def check(sae, x, device, *, tolerance=2e-6, **options):
    truth, _ = outcome(copy.deepcopy(sae).double(), x.double(), dense=True, **options)
    options = {k: v for k, v in options.items() if k != "dense"}
    if "dead" in options and options["dead"] is not None:
        options["dead"] = options["dead"].to(device)
    dtype = options.pop("dtype", None)
    found, entries = outcome(copy.deepcopy(sae).to(device), x.to(device), dtype=dtype, **options)
    for name, true in truth.items():
        one = found[name].cpu().double()
        assert one.shape == true.shape, name
        if one.numel():
            assert float((one - true).abs().max() / true.abs().max().clamp(min=1e-2)) <= tolerance, name
    return found, entries


@pytest.mark.parametrize(
    ("kind", "sparsity"),
    [(kind, one) for kind in KINDS for one in ("l1", "tanh")] + [("jumprelu", "l0"), ("jumprelu-to-h", "l0")],
)
def test_the_sparse_teacher_step_equals_the_dense_step(kind, sparsity, device):
    check(made(kind), tokens(), device, sparsity=sparsity)


@pytest.mark.parametrize(("kind", "normalize"), [("jumprelu", "layer_norm"), ("topk", "constant_norm_rescale")])
def test_tokens_that_are_normalised(kind, normalize, device):
    x = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(3))
    check(made(kind, normalize_activations=normalize), x, device, sparsity="l1", tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["jumprelu", "topk", "batchtopk"])
def test_every_dtype(kind, dtype, device):
    sae, x = made(kind), tokens()
    truth, _ = outcome(copy.deepcopy(sae).double(), x.double(), "l1", dense=True)
    found, _ = outcome(sae.to(device), x.to(device), "l1", dtype=dtype)
    for name, true in truth.items():
        worst = float((found[name].cpu().double() - true).abs().max() / true.abs().max().clamp(min=1e-2))
        assert worst <= TOLERANCE[dtype], name
    assert torch.equal(found["counts"].cpu().double(), truth["counts"].double())


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_dead_features_reconstruct_the_residual(kind, device):
    dead = torch.arange(D_SAE) % 4 == 0
    check(made(kind), tokens(), device, dead=dead)
    check(made(kind, normalize_activations="layer_norm"), tokens() + 0.1 * torch.randn(N, D_IN), device, dead=dead,
          tolerance=1e-5)  # fmt: skip
    check(made(kind), tokens(), device, dead=torch.zeros(D_SAE, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(1, 1, 1), (130, 3, 1), (16, 2, 64)], ids=str)
@pytest.mark.parametrize("kind", ["jumprelu", "topk", "batchtopk"])
def test_ragged_shapes(kind, shape, device):
    n, *sizes = shape
    sae, x = made(kind, sizes), tokens(n, sizes[0])
    check(sae, x, device, sparsity="l1", room=n * sizes[1])


@pytest.mark.parametrize("shift", [-100.0, 100.0])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "signed topk", "batchtopk"])
def test_all_active_and_none(kind, shift, device):
    sae = made(kind)
    with torch.no_grad():
        sae.b_enc.fill_(shift)
    found, _ = check(sae, tokens(), device, sparsity="l1", tolerance=1e-5)
    counts = found["counts"].sum()
    if kind in ("relu", "jumprelu"):
        assert counts == (N * D_SAE if shift > 0 else 0)
    elif kind == "signed topk" or shift > 0:
        assert counts == N * sae.k or kind == "batchtopk"  # which keeps what is equal
    else:
        assert counts == 0


def test_thresholds_of_zero(device):
    sae = made("jumprelu")
    with torch.no_grad():
        sae.threshold.zero_()
        sae.b_enc.fill_(1 / 16)  # no h is at a threshold, or at an end of the rectangle
    check(sae, tokens(), device, sparsity="l0")


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "batchtopk"])
def test_an_empty_batch(kind, device):
    found, entries = outcome(made(kind).to(device), tokens(0).to(device), "l1")
    assert float(found["mse"]) == float(entries) == 0
    assert not any(one.any() for name, one in found.items() if name.startswith("W"))


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "batchtopk"])
def test_entries_without_room_make_the_loss_nan_and_say_so(kind, device):
    sae = made(kind).to(device)
    if kind == "batchtopk":  # its room is for ties: let everything be one
        with torch.no_grad():
            sae.W_enc.zero_(), sae.b_enc.fill_(1.0), sae.topk_threshold.fill_(0.5)
        x = tokens(60).to(device)
    else:
        x = tokens().to(device)
    found, entries = outcome(sae, x, "l1", room=3)
    if "topk" in kind and kind != "batchtopk":  # as many as there are places for
        assert int(entries) == N * sae.k
        assert found["total"].isfinite()
        return
    assert entries == torch.inf
    assert found["total"].isnan()
    assert found["W_dec"].isnan().any()
    if kind == "batchtopk":
        assert float(sae.topk_threshold) == 0.5  # the dense step, which follows, will set it


def test_batchtopk_remembers_the_smallest_value_it_kept(device):
    sae, other = made("batchtopk").to(device), made("batchtopk")
    for seed in (1, 2):
        outcome(sae, tokens(seed=seed).to(device))
        other.encode(tokens(seed=seed))
    assert float(sae.topk_threshold) == pytest.approx(float(other.topk_threshold), rel=1e-6)
    assert float(other.topk_threshold) > 0


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "batchtopk"])
def test_nan_reaches_its_token_alone(kind, device, monkeypatch):
    """A token's reconstruction is looked at where it is made."""
    seen = []
    kernels = teacher_triton.kernels()
    decode = kernels.support_residual
    monkeypatch.setattr(kernels, "support_residual", lambda *a, **more: seen.append(decode(*a, **more)) or seen[-1])
    x = tokens()
    for row in (None, 5):
        if row is not None:
            x[row] = torch.nan
        found, _ = outcome(made(kind).to(device), x.to(device))
    clean, hurt = (one.x_hat.cpu() for one in seen)
    assert found["total"].isnan()
    assert hurt[5].isnan().all()
    others = torch.arange(N) != 5
    if kind != "batchtopk":  # which has no threshold then, and goes the dense way
        assert torch.equal(hurt[others], clean[others])


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "batchtopk"])
def test_bit_reproducible(kind, device):
    x = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(3)).to(device)
    dead = torch.ones(D_SAE, dtype=torch.bool, device=device) if kind in ("topk", "batchtopk") else None
    first, again = (outcome(made(kind).to(device), x, "l1", dead)[0] for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kind", ["jumprelu"])
def test_processes_that_share_the_features_make_the_whole_step(kind, device):
    """What crosses is x_hat alone."""
    sae, x = made(kind).to(device), tokens().to(device)
    whole, _ = outcome(sae, x, "l1")
    halves = []
    for own in (slice(0, 11), slice(11, 20), slice(20, D_SAE)):
        part = made(kind, (D_IN, own.stop - own.start)).to(device)
        with torch.no_grad():
            for name, one in part.named_parameters():
                whole_one = getattr(sae, name)
                one.copy_(whole_one[:, own] if name == "W_enc" else whole_one if name == "b_dec" else whole_one[own])
        halves.append(part)
    sums, parts = [], []
    for together in (lambda part: sums.append(part.clone()) or part, lambda part: sums[0] + sums[1] + sums[2]):
        parts = [outcome(one, x, "l1", across=Across(together, rank == 0))[0] for rank, one in enumerate(halves)]
    for part in parts:
        torch.testing.assert_close(part["mse"], whole["mse"])
    for name, axis in (("W_dec", 0), ("W_enc", 1), ("b_enc", 0), ("counts", 0)):
        torch.testing.assert_close(torch.cat([one[name] for one in parts], axis), whole[name])
    torch.testing.assert_close(parts[0]["b_dec"] + parts[1]["b_dec"] + parts[2]["b_dec"], whole["b_dec"])


def test_many_entries_are_summed_in_runs(device, monkeypatch):
    from importlib import import_module

    monkeypatch.setattr(import_module("rsae_triton.kernels.support_sums"), "RUN", 4)
    for sparsity in ("l1", "tanh"):
        check(made("relu"), tokens(), device, sparsity=sparsity)
    check(made("topk"), tokens(), device)


def test_what_does_not_fit_is_refused(device):
    one = torch.zeros(3, device=device)
    entries = Entries(one.int(), one.int(), one, torch.zeros(6, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="5 features"):
        threshold_forward(entries, one, one.new_zeros(5, 2))
    with pytest.raises(ValueError, match="float64"):
        threshold_backward(entries, one.new_zeros(5).double(), one, 0.0, 0.0, None)
    with pytest.raises(ValueError, match="norms"):
        threshold_backward(entries, one.new_zeros(5), one, 0.0, 0.0, None, bounded=0.1)
