"""What a language model listens to: the gradient, its mean over tokens, and the rounds that a model chooses."""

import copy

import pytest
import torch
from tiny_models import llama, text, tokenizer

from rsae_triton import dimension_weights, train, upgrade
from rsae_triton.activations import HostModel, extract, load_corpus
from rsae_triton.common.errors import ConfigError, NumericsError
from rsae_triton.evaluation.downstream import Spliced, splice_of
from rsae_triton.sae.transcoder import ReluTranscoder
from rsae_triton.teachers import JumpReluSAE
from rsae_triton.upgrading import asking

DEAF = 5
"""A dimension that the model's layers do not read."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model with a large dimension that it does not read, and what it computes on random text."""
    folder = tmp_path_factory.mktemp("listening")
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, DEAF] *= 10
        for name, one in model.named_parameters():
            if name.endswith("norm.weight"):
                one[DEAF] = 0.0
    host = HostModel(model, tokenizer(folder), "tiny", default_hook="blocks.2.hook_resid_pre")
    documents = load_corpus([str(text(folder, n_files=4, n_words=400))])
    options = {"n_tokens": 1200, "context": 32, "dtype": "float32", "root": folder / "store", "progress": False}
    return host, extract(host, documents, None, **options)


@pytest.fixture(scope="module")
def teacher(place):
    _, store = place
    made = JumpReluSAE(store.d_in, 96, threshold=1.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.b_dec.copy_(store.mean)
    return made


def test_the_gradient_is_that_of_finite_differences(place):
    host, store = place
    wide = HostModel(copy.deepcopy(host.model).double(), host.tokenizer, "tiny", default_hook="blocks.2.hook_resid_pre")
    tokens, counted = store.sequences.tokens[:2], store.sequences.counted[:2]
    found = wide.loss_gradient(tokens, "blocks.2.hook_resid_pre", counted)
    assert found.shape == (2, 32, store.d_in)

    def loss(token, dimension, by):
        def shifted(value):
            value[1, token, dimension] += by
            return value

        nll = wide.next_token_loss(tokens, "blocks.2.hook_resid_pre", shifted)
        return float((nll.double() * counted).sum())

    for token, dimension in ((3, 0), (17, 7), (30, 31)):
        numeric = (loss(token, dimension, 1e-2) - loss(token, dimension, -1e-2)) / 2e-2
        assert float(found[1, token, dimension]) == pytest.approx(numeric, rel=0.02, abs=1e-4)
    assert bool(found[:, :-1].any())
    assert not bool(found[:, -1].any())  # the last token predicts nothing


def test_weights_are_the_root_mean_square_over_the_tokens_that_an_sae_sees(place):
    host, store = place
    found = dimension_weights(host, store, n_sequences=3)
    tokens, counted = store.sequences.tokens[:3], store.sequences.counted[:3]
    splice = splice_of(store)
    gradient = host.loss_gradient(tokens, splice.hook_name, counted)[~splice.left(tokens, host.bos_token_id)]
    wanted = gradient.double().square().mean(0).sqrt().float()
    torch.testing.assert_close(found, wanted / wanted.mean(), rtol=1e-3, atol=2e-3)
    assert float(found.mean()) == pytest.approx(1.0)
    assert int(found.argmin()) == DEAF
    assert all(one.grad is None for one in host.model.parameters())


def test_what_cannot_be_measured_is_said(place):
    host, store = place
    with pytest.raises(ConfigError, match="give an ActivationStore"):
        dimension_weights(host, torch.zeros(10, store.d_in))
    with pytest.raises(ConfigError, match="what load_host returns"):
        dimension_weights(None, store)
    silent = HostModel(copy.deepcopy(host.model), host.tokenizer, "tiny", default_hook="blocks.2.hook_resid_pre")
    torch.nn.init.zeros_(silent.model.lm_head.weight)
    with pytest.raises(NumericsError, match="zero or not finite"):
        dimension_weights(silent, store)


@pytest.mark.parametrize(("losses", "rounds", "weighed"), [
    ({"teacher": 3.0, "plain": 2.9, "weighed": 2.8}, 2, True),
    ({"teacher": 3.0, "plain": 2.8, "weighed": 2.9}, 2, False),
    ({"teacher": 3.0, "plain": 3.1, "weighed": 3.2}, 1, None),
])  # fmt: skip
def test_the_model_chooses_the_rounds(place, teacher, losses, rounds, weighed, monkeypatch):
    host, store = place
    noise = torch.linspace(-1e-3, 1e-3, 8, dtype=torch.float64)

    def spliced(host, codecs, store, scale):
        assert set(codecs) == set(losses)
        return {f"sae:{name}": Spliced(value + noise, noise) for name, value in losses.items()}

    monkeypatch.setattr(asking, "spliced_losses", spliced)
    if rounds == 1:
        with pytest.warns(UserWarning, match=r"loss is 0\.1000 nats higher"):
            assert upgrade(teacher, store, host=host).rounds == 1
    rsae = upgrade(teacher, store, host=host, rounds="auto" if rounds > 1 else 2)
    assert rsae.rounds == 2
    facts = rsae.metadata["rounds"]
    assert facts["weighed"] == bool(weighed)
    assert (rsae.refinement.weights is not None) == bool(weighed)
    best = losses["weighed" if weighed else "plain"]
    assert facts["delta_ce"] == pytest.approx(best - losses["teacher"])
    assert f"the model's loss {best - losses['teacher']:+.4f} nats" in rsae.metadata["stage1"]["summary"]


def test_training_puts_weighed_rounds_back(place, teacher):
    host, store = place
    weights = dimension_weights(host, store)
    rsae = upgrade(teacher, store, rounds=1).with_rounds(2, store, weights=weights)
    train(rsae, store, steps=3, batch_size=64, progress=False)
    torch.testing.assert_close(rsae.refinement.weights, weights)
    assert rsae.metadata["rounds"]["weighed"]


def test_a_model_that_chooses_is_run(place, teacher):
    host, store = place
    rsae = upgrade(teacher, store, host=host, rounds=2)
    assert rsae.metadata["rounds"]["delta_ce"] == pytest.approx(0, abs=5)
    assert all(torch.equal(getattr(rsae, name), getattr(teacher, name)) for name in ("W_enc", "W_dec", "b_enc"))
    for options in ({"rounds": 1}, {"form": "direct"}):
        with pytest.raises(ConfigError, match="host chooses rounds"):
            upgrade(teacher, store, host=host, **options)
    with pytest.raises(ConfigError, match="give an ActivationStore"):
        upgrade(teacher, store.tensor(), host=host)
    transcoder = ReluTranscoder(store.d_in, 96, d_out=store.d_in)
    with pytest.raises(ConfigError, match="host chooses rounds"):
        upgrade(transcoder, store.tensor(), targets=store.tensor(), host=host)
    other = HostModel(host.model, host.tokenizer, "gpt2", default_hook="blocks.2.hook_resid_pre")
    with pytest.raises(ConfigError, match="the host is gpt2, and the activations were read from tiny"):
        upgrade(teacher, store, host=other)
    # sequences are read from a store, whatever the validation text is
    assert upgrade(teacher, store, host=host, validation=store.tensor(), rounds=2).rounds == 2


@pytest.mark.parametrize("units", ["store", "tensor"])
def test_a_validation_store_may_have_another_scale(place, teacher, units):
    host, store = place
    other = copy.copy(store)
    other.scale = 10 * store.scale
    teacher = copy.deepcopy(teacher)
    teacher.units, teacher.metadata["hook_name"] = store.scale, "blocks.2.hook_resid_pre"
    own = store if units == "store" else store.tensor()
    found, same = (upgrade(teacher, own, host=host, validation=one, rounds=2) for one in (other, store))
    for name in ("delta_ce", "l0", "mse"):
        assert found.metadata["rounds"][name] == pytest.approx(same.metadata["rounds"][name], rel=1e-3, abs=1e-5)
    elsewhere = copy.copy(store)
    elsewhere.manifest = {**store.manifest, "hook_name": "blocks.1.hook_resid_pre"}
    with pytest.raises(ConfigError, match=r"the activations were read at blocks\.1"):
        upgrade(teacher, own, validation=elsewhere)
