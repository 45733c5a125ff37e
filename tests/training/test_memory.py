"""The plan of a step: what fits is taken, what is asked for is done, and training in pieces is training."""

import copy

import pytest
import torch
from workers import peak_of_a_run, small_sae

from rsae_triton import train
from rsae_triton.common.errors import ConfigError
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.teachers import ReluSAE, TopKSAE
from rsae_triton.training.memory import _cgroup, free_memory, plan_memory
from rsae_triton.training.recipes import RECIPES, Recipe, losses, recipe_for

GENEROUS, GB = 1e15, 1e9


def rsae(d_in=16, d_sae=64, **options):
    return FusedRationalSAE(d_in, d_sae, generator=torch.Generator().manual_seed(0), **options)


def test_auto_takes_the_first_that_fits():
    sae = rsae(64, 8192)
    later = 3 * 4 * sum(one.numel() for one in sae.parameters())
    whole = plan_memory(sae, 4096, free=GENEROUS)
    assert (whole.mode, whole.chunk_tokens, whole.chunk_features) == ("saved", None, None)
    order, chunks = [], []
    for free in (1e9, 5e8, 2e8, 1e8, 3e7, 2e7, 1e7, 1e6):
        plan = plan_memory(sae, 4096, free=later + free)
        order.append(plan.mode)
        chunks.append((plan.chunk_tokens or 4096) * (plan.chunk_features or 8192))
        assert plan.need <= 0.8 * free or free < 1e7
    assert order == sorted(order, key=["saved", "chunked", "streamed"].index)
    assert set(order) == {"saved", "chunked", "streamed"}
    assert chunks == sorted(chunks, reverse=True)


def test_a_mode_that_is_asked_for_is_used():
    sae = rsae(64, 8192)
    assert plan_memory(sae, 4096, "saved", free=1.0).mode == "saved"
    chunked = plan_memory(sae, 4096, "chunked", free=GENEROUS)
    assert (chunked.mode, chunked.chunk_tokens) == ("chunked", 2048)
    assert "2048 tokens at a time" in str(chunked)
    streamed = plan_memory(sae, 4096, "streamed", free=GENEROUS)
    assert (streamed.mode, streamed.chunk_tokens, streamed.chunk_features) == ("streamed", None, 4096)


@pytest.mark.parametrize(
    ("sae", "memory", "aux_k", "message"),
    [
        (rsae(), "fast", 0, "choose one of"),
        (ReluSAE(16, 64), "chunked", 0, "Rational SAEs"),
        (rsae(), "streamed", 32, "auxiliary loss"),
        (small_sae("token"), "chunked", 0, "thresholds per feature; a rational_topk SAE"),
    ],
)
def test_impossible_memory_modes_are_refused(sae, memory, aux_k, message):
    with pytest.raises(ConfigError, match=message):
        plan_memory(sae, 64, memory, aux_k=aux_k)


def test_teachers_are_never_cut():
    assert plan_memory(TopKSAE(16, 64, k=4), 64, free=1.0).mode == "saved"


def test_thresholds_by_token_are_never_cut(activations):
    """Little memory once chose "chunked" for them, which fails in the first step."""
    sae = small_sae("token")
    plan = plan_memory(sae, 64, free=1.0)
    assert plan.mode == "saved"
    terms = losses(sae, activations[:64], recipe_for(sae), 0.0, None, plan)
    terms.total.backward()
    assert float(sae.W_dec.grad.norm()) > 0


def test_memory_of_this_machine_is_known():
    assert 1e6 < free_memory(torch.device("cpu")) < 1e15


def test_a_containers_limit_counts(tmp_path):
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup(str(tmp_path)) is None
    (tmp_path / "memory.max").write_text("5000000\n")
    assert _cgroup(str(tmp_path)) == 4e6
    assert _cgroup(str(tmp_path / "nowhere")) is None


@pytest.mark.parametrize("name", ["hard", "paper"])
@pytest.mark.parametrize("memory", ["chunked", "streamed"])
def test_a_step_in_pieces_has_the_same_loss_and_gradients(name, memory):
    recipe = RECIPES[name]
    sae = rsae(form="gated" if name == "hard" else "direct", backward="rational" if name == "hard" else "soft")
    x = 3 * torch.randn(600, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for mode in ("saved", memory):
        terms = losses(sae, x, recipe, 0.3, plan=plan_memory(sae, len(x), mode))
        gradients = torch.autograd.grad(terms.total, list(sae.parameters()), allow_unused=True, materialize_grads=True)
        found.append([terms.total, terms.mse, terms.l0, terms.counts, *gradients])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=2e-4, atol=2e-5)


def test_training_in_pieces_follows_training_whole(activations, capsys):
    start = rsae(form="gated", backward="rational")
    logs, weights = {}, {}
    for memory in ("auto", "saved", "chunked", "streamed"):
        sae = copy.deepcopy(start)
        options = {"recipe": Recipe("own", "l0", weight=0.005), "batch_size": 512, "log_every": 5}
        shown = memory == "chunked"
        logs[memory] = train(sae, activations, steps=20, memory=memory, progress=shown, **options)
        weights[memory] = sae.W_enc.detach()
    assert torch.equal(weights["auto"], weights["saved"])
    for memory in ("chunked", "streamed"):
        assert logs[memory].mse == pytest.approx(logs["saved"].mse, rel=1e-3)
        assert torch.allclose(weights[memory], weights["saved"], atol=2e-3)
    assert "chunked, 256 tokens at a time" in capsys.readouterr().out


def test_a_streamed_run_takes_no_more_memory_for_more_features_than_their_weights():
    """Peaks that the system saw, of whole runs in processes of their own, at 4k, 16k and 64k features."""
    n, d_in = 512, 32
    beside = {}
    for d_sae in (4096, 16384, 65536):
        held = 5 * 4 * (2 * d_in * d_sae + 2 * d_sae)  # weights, gradients, two moments, the last step's kept weights
        beside[d_sae] = peak_of_a_run(n, d_in, d_sae, "streamed") - held
    one_code = 4 * n * 65536
    assert max(beside.values()) - min(beside.values()) < one_code / 3
    assert max(beside.values()) < one_code / 2
    # The way it is measured sees what is not flat.
    assert peak_of_a_run(n, d_in, 65536, "saved") - held > 1.5 * one_code
