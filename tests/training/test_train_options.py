"""What a run can be asked for: pieces of a batch, precisions, optimisers, decoder norms, trackers."""

import copy
import json
import sys
import types

import pytest
import torch
from workers import small_sae

from rsae_triton import train
from rsae_triton.common import progress
from rsae_triton.common.errors import ConfigError, NumericsError
from rsae_triton.teachers import ReluSAE, TopKSAE
from rsae_triton.training.metrics import progress_bar
from rsae_triton.training.optimizer import make_optimizer
from rsae_triton.training.recipes import RECIPES, Recipe
from rsae_triton.training.settings import KEPT_BY, TrainSettings

QUIET = {"progress": False, "batch_size": 128, "log_every": 1}


@pytest.mark.parametrize("kind", ["gated", "direct", "relu"])
def test_a_batch_in_pieces_is_the_batch(activations, kind):
    found = []
    for accumulate in (1, 3):
        sae = small_sae(kind)
        found.append((train(sae, activations, steps=12, accumulate=accumulate, **QUIET), sae))
    (whole, one), (pieces, other) = found
    assert pieces.mse == pytest.approx(whole.mse, rel=1e-4)
    assert pieces.l0 == pytest.approx(whole.l0, rel=1e-3)
    assert torch.allclose(one.W_enc, other.W_enc, atol=1e-4)


def test_bf16_products_keep_float32_weights_and_train_the_gate(activations):
    exact, low = small_sae("gated"), small_sae("gated")
    settings = {"recipe": Recipe("own", "l0", weight=0.002, lr_scale={"threshold": 30.0}), "lr": 3e-3}
    reference = train(exact, activations, steps=60, **settings, **QUIET)
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    original = torch.Tensor.__matmul__

    def watched(self, other):
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(self, other)

    torch.Tensor.__matmul__ = watched
    try:
        log = train(low, activations, steps=60, precision="bf16", **settings, **QUIET)
    finally:
        torch.Tensor.__matmul__ = original
        hook.remove()
    assert all(seen)
    assert all(one.dtype == torch.float32 for one in low.parameters())
    assert log.mse[-1] == pytest.approx(reference.mse[-1], rel=0.03)
    assert log.mse != reference.mse
    assert not torch.equal(low.gate.threshold, small_sae("gated").gate.threshold)
    narrow = small_sae("gated").bfloat16()  # trained in float32, and given back as it was
    train(narrow, activations, steps=1, precision="bf16", **QUIET)
    assert narrow.W_enc.dtype == torch.bfloat16


def test_adamw_decays_the_weights_alone(activations):
    sae = small_sae("gated")
    optimizer = make_optimizer(sae, RECIPES["hard"], TrainSettings(steps=1, optimizer="adamw", weight_decay=0.5))
    names = {id(one): name for name, one in sae.named_parameters()}
    decayed = {names[id(one)] for group in optimizer.param_groups if group["weight_decay"] for one in group["params"]}
    assert isinstance(optimizer, torch.optim.AdamW)
    assert decayed == {"W_enc", "W_dec"}
    assert optimizer.defaults["fused"]
    plain, shrunk = small_sae("relu"), small_sae("relu")
    train(plain, activations, steps=30, lr=1e-3, **QUIET)
    train(shrunk, activations, steps=30, lr=1e-3, optimizer="adamw", weight_decay=10.0, **QUIET)
    assert shrunk.W_enc.norm() < 0.9 * plain.W_enc.norm()


def test_the_norm_of_the_decoder_is_kept_or_one_or_free(activations):
    start = small_sae("relu")
    with torch.no_grad():
        start.W_dec.mul_(torch.linspace(0.5, 2, 64)[:, None])
    norms = {}
    for choice in ("keep", "unit", "free"):
        sae = copy.deepcopy(start)
        with pytest.warns(UserWarning, match="evade") if choice == "free" else warnings_are_errors():
            train(sae, activations, steps=20, lr=1e-2, decoder_norm=choice, **QUIET)
        norms[choice] = sae.W_dec.detach().norm(dim=1)
    assert torch.allclose(norms["keep"], start.W_dec.norm(dim=1), rtol=1e-5)
    assert torch.allclose(norms["unit"], torch.ones(64), rtol=1e-5)
    assert (norms["free"] - norms["keep"]).abs().max() > 0.01


class warnings_are_errors:  # noqa: N801
    def __enter__(self):
        import warnings

        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("error")

    def __exit__(self, *info):
        return self.caught.__exit__(*info)


def test_the_auxiliary_loss_revives_dead_features(activations):
    """Features too weak for any token's k largest stay dead without it; with it the gradient brings them back."""
    start = TopKSAE(16, 64, k=4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        start.W_enc[:, :20] *= 1e-3
    dead = {}
    for aux_k in (0, 32):
        sae = copy.deepcopy(start)
        recipe = Recipe("own", "none", weight=0.0, aux_k=aux_k)
        log = train(sae, activations, steps=200, lr=3e-3, recipe=recipe, dead_after=1000, **QUIET)
        dead[aux_k] = log.dead[-1]
        moved = (sae.W_enc - start.W_enc).detach()[:, :20].abs().amax()
        assert (moved > 0.01) == (aux_k > 0)
    assert dead[32] <= dead[0] - 5


def test_deterministic_algorithms_are_on_only_while_training(activations):
    seen = []

    class Watching(ReluSAE):
        def encode(self, x):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().encode(x)

    for wanted in (True, False):
        train(Watching(16, 32), activations, steps=1, deterministic=wanted, recipe="relu", **QUIET)
        assert not torch.are_deterministic_algorithms_enabled()
    assert seen == [True, False]


def test_determinism_asked_for_after_the_first_products_says_what_to_set(activations, monkeypatch):
    """On a GPU torch looks at the variable once, at the first product, and then refuses every product."""

    class Refusing:
        def __matmul__(self, other):
            raise RuntimeError("Deterministic behavior was enabled with ..., but this operation is not deterministic")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, device: Refusing())
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts"):
        train(ReluSAE(16, 32), activations, steps=1, deterministic=True, recipe="relu", **QUIET)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("where", ["W_dec", "the gradient of W_enc"])
def test_infinite_weights_and_activations_are_refused_with_their_place(activations, where):
    sae = small_sae("relu")
    if where == "W_dec":
        with torch.no_grad():
            sae.W_dec[3, 2] = torch.inf
    else:
        sae.W_enc.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), torch.nan))
    before = sae.W_enc.detach().clone()
    with pytest.raises(NumericsError, match=rf"step 0: {where} holds \d+ NaN or infinite of 1024 .* no checkpoint"):
        train(sae, activations, steps=3, decoder_norm="free" if where == "W_dec" else "keep", **QUIET)
    assert torch.equal(sae.W_enc, before)


def test_metrics_go_to_jsonl_and_to_trackers(activations, tmp_path, monkeypatch):
    """The trackers' own libraries are stood in for: what is checked is what they are told."""
    told = {"scalars": [], "logs": [], "started": []}

    class SummaryWriter:
        def __init__(self, folder):
            told["folder"] = folder

        def add_text(self, name, text):
            told["text"] = json.loads(text)

        def add_scalar(self, name, value, step):
            told["scalars"].append((name, value, step))

        def close(self):
            told["closed"] = True

    class Run:
        def log(self, row, step):
            told["logs"].append((row, step))

        def finish(self):
            told["finished"] = True

    def init(**options):
        told["started"].append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    options = {**QUIET, "out": tmp_path, "track": ("tensorboard", "wandb"), "resume": True, "checkpoint_every": 2}
    log = train(small_sae("relu"), activations, steps=4, **options)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["mse"] for row in rows] == log.mse
    names = {
        "step",
        "tokens",
        "mse",
        "l0",
        "weight",
        "lr",
        "grad_norm",
        "dead",
        "alive",
        "seconds",
        "sparse",
        "support",
    }
    assert names == set(rows[0])
    assert ("mse", log.mse[3], 3) in told["scalars"]
    assert told["logs"] == [(row, row["step"]) for row in rows]
    assert told["closed"]
    assert told["finished"]
    assert told["text"]["steps"] == told["started"][0]["config"]["steps"] == 4
    train(small_sae("relu"), activations, steps=4, **options)
    assert told["started"][0]["id"] == told["started"][1]["id"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        train(small_sae("relu"), activations, steps=4, **{**options, "out": tmp_path / "new"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer"),
        ({"precision": "fp8"}, "precision"),
        ({"accumulate": 513}, "accumulate"),
        ({"clip": 0.0}, "clip"),
        ({"decay": 1.5}, "decay"),
        ({"keep": 0}, "keep"),
        ({"track": ("paper",)}, "tensorboard and wandb"),
        ({"track": ("wandb",)}, "set `out`"),
        ({"checkpoint_every": 0, "out": "x"}, "checkpoint_every"),
        ({"trainable": "decoder"}, "all, encoder, gate"),
        ({"trainable": "gate", "decoder_norm": "unit"}, "keeps the decoder"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainSettings(steps=1, **settings)


def test_the_progress_bar_shows_speed_time_left_and_the_state_of_the_sae_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(progress, "EVERY", 0.0)
    for alive in (1.0, 0.9):
        with progress_bar("  rectangle, two rounds", 3, 0, 512, True) as advance:
            for _ in range(3):
                advance({"mse": 139.5, "l0": 131.9, "alive": alive})
        shown = capsys.readouterr().out
        assert "…" not in shown
        assert ("alive 90%" in shown) == (alive < 1)
        for part in ("rectangle, two rounds", "3/3", "tok/s", "mse 139.5", "l0 131.9"):
            assert part in shown


def test_training_shows_its_progress_and_memory(activations, capsys):
    train(small_sae("gated"), activations, steps=3, batch_size=64)
    shown = capsys.readouterr().out
    for part in ("memory of a step (saved)", "3/3"):
        assert part in shown


def test_a_run_that_ends_far_from_its_l0_says_so(activations, capsys):
    train(small_sae("gated"), activations, steps=3, batch_size=64, target_l0=1.0)
    assert "1.0 was to be held" in capsys.readouterr().out
    for options in ({"target_l0": None}, {"target_l0": 1.0, "validation": activations[:500]}):
        train(small_sae("gated"), activations, steps=3, batch_size=64, **options)
        assert "to be held" not in capsys.readouterr().out


@pytest.mark.parametrize("memory", ["saved", "chunked", "streamed"])
@pytest.mark.parametrize(("trainable", "kept"), list(KEPT_BY.items()))
def test_parameters_that_are_not_trained_stay_bit_equal(activations, trainable, kept, memory):
    """Also where the decoder's rows have other norms than one, and where an optimiser would decay them."""
    sae = small_sae("gated")
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 64)[:, None])
    before = {name: one.detach().clone() for name, one in sae.named_parameters()}
    options = {"optimizer": "adamw", "target_l0": 8.0, "trainable": trainable, "memory": memory, **QUIET}
    train(sae, activations, steps=12, **options)
    changed = {name for name, one in sae.named_parameters() if not torch.equal(one, before[name])}
    trained = {"W_enc", "b_enc", "W_dec", "b_dec", "gate.threshold"} - set(kept)
    assert changed == trained
    assert all(one.requires_grad for one in sae.parameters())


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_controls_keep_their_dictionary_too(activations, kind):
    sae, other = small_sae(kind), small_sae(kind)
    train(sae, activations, steps=6, trainable="encoder", **QUIET)
    assert torch.equal(sae.W_dec, other.W_dec)
    assert torch.equal(sae.b_dec, other.b_dec)
    assert not torch.equal(sae.W_enc, other.W_enc)
    if kind == "jumprelu":
        train(other, activations, steps=6, trainable="gate", **QUIET)
        assert torch.equal(other.W_enc, small_sae(kind).W_enc)
        assert not torch.equal(other.threshold, small_sae(kind).threshold)
    else:
        with pytest.raises(ConfigError, match=f"leaves nothing of this {sae.architecture} SAE to train"):
            train(other, activations, steps=6, trainable="gate", **QUIET)


def test_a_run_with_a_kept_decoder_goes_on_to_the_same_bits(activations, tmp_path):
    whole, parts = small_sae("gated"), small_sae("gated")
    options = {"recipe": "hard", "target_l0": 8.0, "trainable": "encoder", **QUIET}
    train(whole, activations, steps=8, decay=0.0, out=tmp_path / "whole", **options)
    run = {"steps": 8, "decay": 0.0, "out": tmp_path / "parts", "checkpoint_every": 4, **options}
    seen = []

    def stop(*_):
        seen.append(1)
        if len(seen) > 5:
            raise KeyboardInterrupt

    original = torch.optim.Adam.step
    try:
        torch.optim.Adam.step = lambda self, *a, **k: (stop(), original(self, *a, **k))[1]
        with pytest.raises(KeyboardInterrupt):
            train(parts, activations, **run)
    finally:
        torch.optim.Adam.step = original
    with pytest.raises(ConfigError, match="trainable='encoder'"):
        train(parts, activations, **{**run, "trainable": "all", "resume": True})
    train(parts, activations, **{**run, "resume": True})
    assert torch.equal(whole.gate.threshold, parts.gate.threshold)
    assert torch.equal(whole.W_enc, parts.W_enc)
