"""Sparse training steps: the same trajectory as dense ones for every family, chosen by the support, resumed across."""

import json

import pytest
import torch

from rsae_triton.common.errors import ConfigError, NumericsError
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE
from rsae_triton.training import memory, route
from rsae_triton.training.loop import train
from rsae_triton.training.memory import MemoryPlan
from rsae_triton.training.on_entries import losses_on_entries, probed_share, support_share
from rsae_triton.training.recipes import RECIPES, losses
from rsae_triton.training.route import Route

D, F = 16, 96


def made(kind, dtype=torch.float32, **options):
    options = {"generator": torch.Generator().manual_seed(0), "dtype": dtype, **options}
    if kind == "rational":
        return FusedRationalSAE(D, F, form="gated", backward="rational", **options)
    if kind == "relu":
        return ReluSAE(D, F, **options)
    if kind == "jumprelu":
        return JumpReluSAE(D, F, threshold=0.1, bandwidth=0.2, **options)
    if kind == "jumprelu-to-h":
        return JumpReluSAE(D, F, threshold=0.1, bandwidth=0.2, slope_to_h=True, **options)
    if kind == "topk":
        return TopKSAE(D, F, k=6, **options)
    if kind == "topk-negative":
        return TopKSAE(D, F, k=6, relu=False, **options)
    return BatchTopKSAE(D, F, k=6, **options)


FAMILIES = {
    "rational": {"recipe": "hard"},
    "relu": {},
    "jumprelu": {},
    "jumprelu-to-h": {"recipe": "jumprelu-tanh"},
    "topk": {"dead_after": 2000},
    "topk-negative": {"dead_after": 2000},
    "batchtopk": {"dead_after": 2000},
}


@pytest.fixture
def any_share(monkeypatch):
    """Sparse however dense it is."""
    monkeypatch.setattr(memory, "MOST_SHARE", 2.0)


@pytest.mark.usefixtures("any_share")
@pytest.mark.parametrize("kind", FAMILIES)
def test_two_hundred_steps_are_those_of_the_dense_way(kind, activations, tmp_path):
    logs = []
    for mode in ("saved", "sparse"):
        sae = made(kind)
        logs.append(
            train(
                sae, activations, steps=200, batch_size=128, memory=mode, progress=False, out=tmp_path / mode,
                **FAMILIES[kind],
            )
        )  # fmt: skip
        rows = [json.loads(line) for line in (tmp_path / mode / "metrics.jsonl").read_text().splitlines()]
        assert {row["sparse"] for row in rows} == {int(mode == "sparse")}
    dense, sparse = logs
    assert sparse.mse == pytest.approx(dense.mse, rel=1e-3)
    assert sparse.l0 == pytest.approx(dense.l0, rel=1e-2)
    assert sparse.dead == dense.dead


@pytest.mark.usefixtures("any_share")
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("kind", [name for name in FAMILIES if name != "rational"])
@pytest.mark.parametrize("sparsity", ["l1", "l0", "tanh", "none"])
def test_every_gradient_is_exact_in_float64(kind, sparsity, normalize, activations):
    x = activations[:40].double() + 0.1
    dead = torch.zeros(F, dtype=torch.bool)
    dead[::7] = True
    sae = made(kind, torch.float64, normalize_activations=normalize)
    sae.train()
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        sae.b_dec.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    trains_l0 = sparsity != "l0" or kind.startswith("jumprelu")
    recipe = RECIPES["relu"].__class__("test", sparsity if trains_l0 else "none", aux_k=5)
    terms = losses(sae, x, recipe, 0.3, dead)
    names = [name for name, _ in sae.named_parameters()]
    truth = torch.autograd.grad(terms.total, list(sae.parameters()), allow_unused=True, materialize_grads=True)
    found = losses_on_entries(sae, x, sparsity=recipe.sparsity, weight=0.3, aux_k=5, dead=dead)
    for name in ("total", "mse", "l0", "counts"):
        # The counts of teachers are float32, and so is what is made of them.
        torch.testing.assert_close(getattr(found, name).double(), getattr(terms, name).double(), rtol=1e-7, atol=1e-7)
    gradients = torch.autograd.grad(found.total, list(sae.parameters()), allow_unused=True, materialize_grads=True)
    for name, one, true in zip(names, gradients, truth, strict=True):
        # A threshold is a parameter in float32, and so is what comes back through counts.
        within = 1e-5 if name == "threshold" else 1e-6 if sparsity == "l0" else 1e-10
        torch.testing.assert_close(one, true, rtol=within, atol=within, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("any_share")
@pytest.mark.parametrize("kind", ["rational", "relu"])
def test_bf16_products_stay_near(kind, activations):
    logs = [
        train(
            made(kind), activations, steps=40, batch_size=128, memory=mode, precision="bf16", progress=False,
            **FAMILIES[kind],
        )
        for mode in ("saved", "sparse")
    ]  # fmt: skip
    assert logs[1].mse == pytest.approx(logs[0].mse, rel=2e-2)


def sparser(level):
    sae = made("rational")
    with torch.no_grad():
        sae.gate.threshold.fill_(level)
        sae.gate.log_input_scale.fill_(-2.0)
    return sae


def test_auto_chooses_sparse_steps_by_the_measured_support(activations, tmp_path, caplog):
    x = activations / activations.norm(dim=1).mean() * D**0.5
    with caplog.at_level("INFO", logger="rsae_triton.training.route"):
        train(sparser(2.8), x, steps=12, batch_size=128, progress=False, out=tmp_path / "thin", log_every=1)
        train(sparser(0.0), x, steps=12, batch_size=128, progress=False, out=tmp_path / "thick", log_every=1)
    for name, way in (("thin", 1), ("thick", 0)):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert {row["sparse"] for row in rows} == {way}
        assert all((0 < row["support"] < route.LIMITS["tiled"][0]) == bool(way) for row in rows)
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert "from step 0 on, steps are sparse" in caplog.text


def test_a_step_whose_support_is_too_large_is_made_densely(activations):
    dense, sparse = (
        train(sparser(0.0), activations, steps=3, progress=False, memory=one) for one in ("saved", "sparse")
    )
    assert sparse.mse == pytest.approx(dense.mse, rel=1e-5)


def plan(support):
    return MemoryPlan("saved", None, None, 0.0, None, support=support)


def test_ways_change_with_hysteresis():
    one, looks = Route(plan("auto")), []
    between = (one.below + one.above) / 2

    def look(share):
        return lambda: looks.append(share) or share

    assert one.plan(0, look(between)).mode == "saved"  # a run starts densely unless it is clearly better
    assert one.plan(1, look(0.001)).mode == "saved"  # not looked at yet
    assert one.plan(route.EVERY, look(0.001)).mode == "sparse"
    one.saw(between, 11)
    assert one.plan(12, look(1.0)).mode == "sparse"
    one.saw(0.5, 12)
    assert one.plan(13, look(0.001)).mode == "saved"
    assert looks == [between, 0.001]
    again = Route(plan("auto"))
    again.restore(one.state())
    assert (again.sparse, again.share) == (False, 0.5)
    assert Route(plan("always")).plan(0, look(1.0)).mode == "sparse"
    assert Route(plan("never")).plan(0, look(0.0)).mode == "saved"


@pytest.mark.parametrize("modes", [("saved", "sparse"), ("sparse", "saved"), ("auto", "auto")])
def test_a_run_can_switch_between_dense_and_sparse_steps(modes, activations, tmp_path):
    options = {"batch_size": 128, "progress": False, "recipe": "hard", "steps": 30, "decay": 0.0, "warmup": 0}
    whole = train(sparser(1.0), activations, memory="saved", **options)
    first, second = sparser(1.0), sparser(1.0)
    out = tmp_path / "run"
    stopped = {**options, "steps": 30, "checkpoint_every": 15, "out": out}
    train(first, activations, memory=modes[0], **stopped)
    for path in (out / "checkpoints").iterdir():
        if path.name == "step-00000030":
            for file in sorted(path.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            path.rmdir()
    log = train(second, activations, memory=modes[1], resume=True, **stopped)
    assert log.mse == pytest.approx(whole.mse, rel=1e-3)
    within = {"rtol": 1e-3, "atol": 1e-4} if modes != ("auto", "auto") else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(second.W_dec, first.W_dec, **within)


@pytest.mark.parametrize(
    ("sae", "options", "message"),
    [
        (lambda: FusedRationalSAE(D, F), {}, "direct, free or soft"),
        (lambda: made("rational"), {"recipe": "hard-trained"}, "trained gate coefficients"),
        (lambda: made("rational", backend="eager"), {"recipe": "hard"}, "eager"),
    ],
)
def test_sparse_steps_without_a_support_are_refused_with_the_reason(sae, options, message, activations):
    with pytest.raises(ConfigError, match=message):
        train(sae(), activations, steps=1, memory="sparse", progress=False, **options)


def test_nan_stops_a_sparse_run_as_it_does_a_dense_one(activations):
    x = activations.clone()
    x[:, 3] = torch.nan
    for kind in ("rational", "topk", "batchtopk", "relu"):
        with pytest.raises(NumericsError, match="the batch holds"):
            train(made(kind), x, steps=2, memory="sparse", progress=False)


@pytest.mark.parametrize("kind", ["rational", "relu", "jumprelu"])
def test_the_probed_share_equals_the_support_share(kind, activations):
    sae = made(kind)
    assert float(probed_share(sae, activations)) == pytest.approx(support_share(sae, activations), abs=2e-4)
    assert 0 < support_share(sae, activations) < 1
