"""KL in the loss: its value and gradients, that it lowers what splicing costs, and that the host is left as it was."""

import copy

import pytest
import torch
from tiny_models import llama, text, tokenizer

from rsae_triton import train
from rsae_triton.activations import HostModel, extract, load_corpus
from rsae_triton.common.errors import ConfigError
from rsae_triton.evaluation.compare import evaluate
from rsae_triton.teachers import ReluSAE, TopKSAE
from rsae_triton.training.language import LanguageLoss, language_memory, only_the_sae
from rsae_triton.training.memory import plan_memory
from rsae_triton.training.settings import TrainSettings

QUIET = {"progress": False, "batch_size": 64, "log_every": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, and what it computes on random text."""
    folder = tmp_path_factory.mktemp("language")
    host = HostModel(llama(), tokenizer(folder), "tiny", default_hook="blocks.2.hook_resid_pre")
    documents = load_corpus([str(text(folder, n_files=4, n_words=300))])
    options = {"n_tokens": 900, "context": 32, "dtype": "float32", "root": folder / "store", "progress": False}
    return host, extract(host, documents, None, **options)


def sae_of(store, kind=TopKSAE, **options):
    made = kind(store.d_in, 64, generator=torch.Generator().manual_seed(0), **({"k": 4} if kind is TopKSAE else {}))
    with torch.no_grad():
        made.b_dec.copy_(store.mean)
    return made


def test_the_loss_is_the_kl_that_splicing_measures(place):
    host, store = place
    sae = sae_of(store)
    term = LanguageLoss(host, store, TrainSettings(steps=5, kl_sequences=len(store.sequences.tokens)))
    found = term.backward(sae, 0, mse=2.0)
    tokens, counted = term.batch(0)
    # BOS between documents is left as it is, too.
    left = term.splice.left(tokens, host.bos_token_id)
    assert int(left.sum()) > len(tokens)
    through = term.splice.replacement(lambda x: sae(x).detach(), left)
    measured = host.splice(tokens, term.splice.hook_name, {"": through}, kl=True)[""].kl
    assert found == pytest.approx(float((measured * counted).sum() / counted.sum()), rel=1e-5)
    assert found > 0.01


def test_gradients_reach_the_sae_alone_and_are_those_of_finite_differences(place):
    host, store = place
    model = copy.deepcopy(host.model).double().requires_grad_()
    wide = HostModel(model, host.tokenizer, "tiny", default_hook="blocks.2.hook_resid_pre")
    sae = sae_of(store, ReluSAE).double()
    term = LanguageLoss(wide, store, TrainSettings(steps=5, kl_sequences=2, kl_weight=3.0))
    # The units of the splice are float32; its replacement is not differentiated numerically finer than that.
    with only_the_sae(wide):
        value = term.backward(sae, 0, mse=2.0)
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    factor = 3.0 * 2.0 / value
    direction = torch.randn(sae.b_dec.shape, generator=torch.Generator().manual_seed(1)).double()
    step, ends = 1e-3, []
    for sign in (1, -1):
        moved = copy.deepcopy(sae)
        with torch.no_grad():
            moved.b_dec.add_(sign * step * direction)
        ends.append(LanguageLoss(wide, store, TrainSettings(steps=5, kl_sequences=2)).backward(moved, 0, mse=1.0))
    slope = (ends[0] - ends[1]) / (2 * step)
    assert float((sae.b_dec.grad * direction).sum()) / factor == pytest.approx(slope, rel=2e-2)


def test_the_language_objective_lowers_delta_ce(place):
    host, store = place
    start = sae_of(store)
    train(start, store, steps=150, lr=3e-3, recipe="topk", **QUIET)
    with_kl, without = copy.deepcopy(start), copy.deepcopy(start)
    options = {"steps": 60, "lr": 1e-3, "recipe": "topk", **QUIET}
    log = train(with_kl, store, objective="mse+kl", host=host, kl_weight=2.0, **options)
    train(without, store, **options)
    scores = [evaluate(one, host, store)["kl"] for one in (with_kl, without)]
    assert scores[0] < 0.8 * scores[1]
    assert len(log.step) == 60


def test_a_run_goes_on_to_the_same_bits(place, tmp_path):
    host, store = place
    options = {"objective": "mse+kl", "kl_sequences": 2, "kl_from": 0.5, "recipe": "relu", "host": host, **QUIET}
    whole, parts = sae_of(store, ReluSAE), sae_of(store, ReluSAE)
    train(whole, store, steps=6, out=tmp_path / "whole", checkpoint_every=4, **options)
    seen = []
    original = torch.optim.Adam.step

    def stop(self, *arguments, **named):
        seen.append(1)
        if len(seen) > 5:
            raise KeyboardInterrupt
        return original(self, *arguments, **named)

    try:
        torch.optim.Adam.step = stop
        with pytest.raises(KeyboardInterrupt):
            train(parts, store, steps=6, out=tmp_path / "parts", checkpoint_every=4, **options)
    finally:
        torch.optim.Adam.step = original
    fresh = sae_of(store, ReluSAE)
    train(fresh, store, steps=6, out=tmp_path / "parts", checkpoint_every=4, resume=True, **options)
    assert torch.equal(whole.W_enc, fresh.W_enc)
    rows = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert ['"kl"' in row for row in rows] == [False] * 3 + [True] * 3


def test_the_language_objective_needs_a_host_and_a_store(place):
    host, store = place
    with pytest.raises(ConfigError, match="host=load_host"):
        train(sae_of(store), store, steps=1, objective="mse+kl", **QUIET)
    with pytest.raises(ConfigError, match="ActivationStore"):
        train(sae_of(store), store.tensor(), steps=1, objective="mse+kl", host=host, **QUIET)
    with pytest.raises(ConfigError, match="objective"):
        TrainSettings(steps=1, objective="kl")
    cost = language_memory(host, 4, 32)
    plan = plan_memory(sae_of(store), 64, free=1e9, language=float(sum(cost)))
    assert plan.language == sum(cost) > 0
    assert "the language model" in str(plan)
