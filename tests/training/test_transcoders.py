"""Transcoders through everything: pairs of activations, upgrade, training, scores, splicing, files."""

import copy

import pytest
import tiny_models
import torch

from rsae_triton import compare, evaluate, splice, train, upgrade
from rsae_triton.activations import ActivationStore, Document, PairedStore, extract, extract_pair_splits, extract_pairs
from rsae_triton.activations.host import HostModel
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.evaluation.held_out import load_sae
from rsae_triton.sae.transcoder import JumpReluTranscoder, RationalTranscoder, ReluTranscoder, TopKTranscoder
from rsae_triton.teachers import JumpReluSAE, load_teacher
from rsae_triton.training.on_entries import probed_share, support_share
from rsae_triton.training.recipes import losses, recipe_for

INSIDE, OUTSIDE = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
D, F = tiny_models.D_MODEL, 96
FAST = {"batch_size": 128, "progress": False}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return HostModel(tiny_models.llama(), tiny_models.tokenizer(tmp_path_factory.mktemp("model")), "tiny")


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, tiny_models.VOCABULARY, (16, 400), generator=generator).tolist()
    return [Document(" ".join(f"w{w}" for w in row), "s", f"d{i}", {}, f"s/{i}") for i, row in enumerate(words)]


@pytest.fixture(scope="module")
def splits(host, documents, tmp_path_factory):
    sizes = {"n_train": 3000, "n_validation": 200, "n_test": 300, "context": 32, "dtype": "float32"}
    root = tmp_path_factory.mktemp("stores")
    return extract_pair_splits(host, documents, INSIDE, OUTSIDE, root=root, progress=False, **sizes)


def made(kind=JumpReluTranscoder, seed=0, **options):
    options |= {"threshold": 0.3} if kind is JumpReluTranscoder else {"k": 8} if kind is TopKTranscoder else {}
    return kind(D, F, generator=torch.Generator().manual_seed(seed), **options)


@pytest.fixture(scope="module")
def teacher(splits):
    sae = made(skip=True)
    train(sae, splits.train, steps=150, lr=1e-3, **FAST)
    return sae


# -- pairs


def test_rows_of_a_pair_are_the_same_tokens_in_units_of_their_own(host, splits):
    store = splits.train
    (scale, scale_out), mlp = store.scales, host.model.model.layers[1].mlp
    x, y = store.tensor().split(D, dim=1)
    torch.testing.assert_close(mlp(x / scale) * scale_out, y, rtol=1e-4, atol=1e-4)
    for side in (x, y):
        assert float(side.norm(dim=1).mean()) == pytest.approx(D**0.5, rel=0.05)
    batch = next(store.batches(64, seed=1))
    torch.testing.assert_close(mlp(batch[:, :D] / scale) * scale_out, batch[:, D:], rtol=1e-4, atol=1e-4)
    assert torch.equal(batch, next(PairedStore(store.inputs.folder, store.targets.folder).batches(64, seed=1)))
    assert store.manifest["hook_name_out"] == OUTSIDE


def test_outliers_are_told_by_what_is_read_at_both_places(host, documents, tmp_path):
    """Each place by its own norms would keep other tokens of each."""
    options = {"n_tokens": 1500, "context": 32, "drop_outliers": 1.05, "progress": False, "root": tmp_path}
    inside = "blocks.1.hook_resid_pre"  # what an MLP reads is normed: all of one length
    pairs = extract_pairs(host, documents, inside, OUTSIDE, **options)
    assert pairs.inputs.manifest["outliers_dropped"] == pairs.targets.manifest["outliers_dropped"] > 0
    alone = [extract(host, documents, name, **options) for name in (inside, OUTSIDE)]
    # A norm may lie at the limit to rounding, and then one pass keeps a token that another drops: counted, not ranked.
    kept = [torch.bincount(one.tokens.long(), minlength=tiny_models.VOCABULARY) for one in (pairs.inputs, *alone)]
    assert int((kept[1] - kept[0]).abs().sum()) <= 6
    assert int((kept[2] - kept[0]).abs().sum()) > 60
    with pytest.raises(ConfigError, match="not of the same tokens"):
        PairedStore(*alone)
    with pytest.raises(ConfigError, match="one place"):
        extract_pairs(host, documents, OUTSIDE, OUTSIDE, **options)


def test_a_killed_extraction_of_pairs_goes_on_with_the_same_rows(host, documents, tmp_path, monkeypatch):
    from rsae_triton.activations import writing

    monkeypatch.setattr(writing, "_PAIRED_ROWS", 500)
    monkeypatch.setattr(writing, "_MEDIAN_CONTEXTS", 8)
    options = {"n_tokens": 2000, "context": 32, "progress": False}
    whole = extract_pairs(host, documents, INSIDE, OUTSIDE, root=tmp_path / "whole", **options)
    saves = [0]
    own = writing.Extraction._save

    def killed(self, state, pending):
        saves[0] += 1
        if saves[0] == 4:  # the inputs have two shards, the targets one
            raise KeyboardInterrupt
        own(self, state, pending)

    monkeypatch.setattr(writing.Extraction, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        extract_pairs(host, documents, INSIDE, OUTSIDE, root=tmp_path / "parts", **options)
    monkeypatch.setattr(writing.Extraction, "_save", own)
    again = extract_pairs(host, documents, INSIDE, OUTSIDE, root=tmp_path / "parts", **options)
    assert len(again.inputs.manifest["shards"]) > 2
    assert torch.equal(again.tensor(), whole.tensor())


# -- upgrade


@pytest.mark.parametrize("kind", [ReluTranscoder, JumpReluTranscoder, TopKTranscoder])
def test_an_upgraded_transcoder_is_its_teacher(splits, kind):
    own = made(kind, skip=True)
    with torch.no_grad():
        own.W_skip.normal_(0, 0.1)
    rsae = upgrade(own, splits.train)
    assert type(rsae) is RationalTranscoder
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
        assert torch.equal(getattr(rsae, name), getattr(own, name))
    if kind is not TopKTranscoder:  # thresholds by feature are another code than TopK's
        assert rsae.metadata["stage1"]["relative_error"] < 0.0085
        x = splits.test.inputs.tensor()
        z = own.encode(x)
        assert float((rsae.encode(x) - z).norm() / z.norm()) < 0.01
    x, y = splits.train.inputs.tensor(), splits.train.targets.tensor()
    plain = upgrade(own, x, targets=y)
    torch.testing.assert_close(plain(x), rsae(x), rtol=1e-4, atol=1e-4)


def test_missing_or_mismatched_targets_are_errors(splits):
    x, y = splits.train.inputs.tensor(), splits.train.targets.tensor()
    for function in (upgrade, lambda sae, *a, **k: train(sae, *a, steps=1, **FAST, **k)):
        with pytest.raises(ConfigError, match="targets="):
            function(made(), x)
        with pytest.raises(ShapeError, match="row by row"):
            function(made(), x, targets=y[:-1])
        with pytest.raises(ShapeError, match="width"):
            function(made(), x, targets=y[:, :-1])
        with pytest.raises(ConfigError, match="for transcoders"):
            function(JumpReluSAE(D, F), x, targets=y)
        with pytest.raises(ConfigError, match="for transcoders"):
            function(JumpReluSAE(D, F), splits.train)
        with pytest.raises(ConfigError, match="leave targets out"):
            function(made(), splits.train, targets=y)
    with pytest.raises(ConfigError, match="thresholds='token' is for SAEs"):
        upgrade(made(TopKTranscoder), splits.train, thresholds="token")
    elsewhere = made()
    elsewhere.metadata["hook_name_out"] = "blocks.0.hook_mlp_out"
    with pytest.raises(ConfigError, match="read at"):
        upgrade(elsewhere, splits.train)


# -- training


@pytest.mark.parametrize("skip", [False, True])
def test_the_loss_in_pieces_and_on_the_support_has_the_gradients_of_the_plain_one(splits, teacher, skip):
    rsae = upgrade(made(skip=skip), splits.train)
    if skip:
        with torch.no_grad():
            rsae.W_skip.normal_(0, 0.2)
    for name in ("alpha", "beta", "centre", "log_input_scale"):
        getattr(rsae.gate, name).requires_grad_(False)
    rows = splits.train.tensor()[:200]
    x, y = rsae.sides(rows)
    plain = losses(rsae, rows, recipe_for(rsae), 0.3)
    plain.total.backward()
    expected = {name: one.grad.clone() for name, one in rsae.named_parameters() if one.grad is not None}
    assert ("W_skip" in expected) == skip
    for options in ({"chunk_tokens": 64}, {"chunk_features": 32}, {"memory": "sparse"}):
        rsae.zero_grad(set_to_none=True)
        cut = rsae.autoencode(x, target=y, l0_weight=0.3, **options)
        cut.total.backward()
        torch.testing.assert_close(cut.total.detach(), plain.total.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cut.x_hat, rsae(x), rtol=1e-4, atol=1e-4)
        for name, gradient in expected.items():
            torch.testing.assert_close(dict(rsae.named_parameters())[name].grad, gradient, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("d_out", [D, 20])
def test_training_lowers_the_error_of_what_is_written_and_holds_l0(splits, d_out):
    x, y = splits.train.inputs.tensor(), splits.train.targets.tensor()[:, :d_out]
    sae = made(d_out=d_out)
    log = train(sae, x, targets=y, steps=80, lr=1e-3, **FAST)
    assert log.mse[-1] < 0.5 * log.mse[0]
    rsae = upgrade(sae, x, targets=y)
    l0 = rsae.metadata["stage1"]["train_l0"]
    log = train(rsae, x, targets=y, steps=80, **FAST)
    assert log.mse[-1] <= log.mse[0]
    assert log.l0[-1] == pytest.approx(l0, rel=0.4)


def test_a_run_is_saved_resumed_and_exported(splits, teacher, tmp_path):
    from rsae_triton.commands.train import export

    def run(sae, out, **options):
        train(sae, splits.train, steps=8, checkpoint_every=4, out=tmp_path / out, **FAST, **options)
        return sae

    whole, part = (upgrade(teacher, splits.train) for _ in range(2))
    run(whole, "whole")
    checkpoints = sorted((tmp_path / "whole").rglob("step-*"))
    exported = load_sae(export(tmp_path / "whole", tmp_path / "sae"))
    x = splits.test.inputs.tensor() / splits.test.scales[0]
    whole.to_units_(1.0)
    torch.testing.assert_close(exported(x), whole(x), rtol=1e-4, atol=1e-4)
    assert type(exported) is RationalTranscoder
    assert len(checkpoints) == 2
    with pytest.raises(ConfigError, match="resume"):
        run(part, "whole")
    run(part, "whole", resume=True)
    part.to_units_(1.0)
    torch.testing.assert_close(part(x), whole(x), rtol=1e-4, atol=1e-4)


# -- scores


def test_scores_are_of_what_is_written(host, splits, teacher):
    x, y = splits.test.tensor().split(D, dim=1)
    found = evaluate(teacher, host, splits.test, n_sequences=4)
    y_hat = teacher(x)
    assert found["mse"] == pytest.approx(float((y - y_hat).square().sum(1).mean()), rel=1e-4)
    assert found["fvu"] == pytest.approx(found["mse"] / float((y - y.mean(0)).square().sum(1).mean()), rel=1e-4)
    assert found["l0"] == pytest.approx(float((teacher.encode(x) != 0).sum(1).float().mean()), rel=1e-4)
    # Downstream: the model with the MLP's output replaced, by hand.
    tokens, limit = splits.test.sequences.tokens[:4], splits.test.manifest["norm_limit"]
    own = copy.deepcopy(teacher).to_units_(1.0)

    def by_hand(module, inputs, output):
        seen = inputs[0].norm(dim=-1) <= limit
        seen[:, 0] = False
        return torch.where(seen[..., None], own(inputs[0]), output)

    layer = host.model.model.layers[1].mlp
    handle = layer.register_forward_hook(by_hand)
    logits = host.model(tokens).logits
    handle.remove()
    ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    counted = splits.test.sequences.counted[:4].float()
    expected = ((ce.view_as(counted) * counted).sum(1) / counted.sum(1)).mean()
    assert found["ce"] == pytest.approx(float(expected), abs=1e-4)


def test_transcoders_are_compared_at_equal_l0(splits, teacher):
    rsae = upgrade(teacher, splits.train)
    train(rsae, splits.train, steps=20, **FAST)
    for x in (splits.test, splits.test.tensor()):
        found = compare({"teacher": teacher, "rsae": rsae}, x, contexts=splits.test.contexts)
        matched = found["matched_l0"]
        assert matched["rsae"]["l0"] <= matched["teacher"]["l0"] + 0.01
        assert len(found["paired"]["matched_l0"]["rsae"]["teacher"]["mse"]) == 3
    with pytest.raises(ConfigError, match="for transcoders"):
        compare({"teacher": teacher, "sae": JumpReluSAE(D, F)}, splits.test)


def test_a_transcoder_is_spliced_between_its_two_places(host, splits, teacher, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    bridge = tiny_models.bridge(host.model, folder)
    tokens = splits.test.sequences.tokens[:2]
    own = load_teacher(copy.deepcopy(teacher).save_pretrained(tmp_path / "saved"))
    assert own.units == 1.0
    assert type(own) is JumpReluTranscoder
    layer = host.model.model.layers[1].mlp
    handle = layer.register_forward_hook(lambda module, inputs, output: own(inputs[0]))
    expected = host.model(tokens).logits
    handle.remove()
    clean = host.model(tokens).logits
    for model in (host.model, bridge):
        for sae in (own, teacher):  # in the model's units, and in the store's
            with splice(model, sae):
                found = model(tokens)
            torch.testing.assert_close(getattr(found, "logits", found), expected, rtol=1e-3, atol=1e-3)
        with splice(model, own, use_error_term=True):
            found = model(tokens)
        torch.testing.assert_close(getattr(found, "logits", found), clean, rtol=1e-3, atol=1e-3)


def test_units_of_both_sides_travel_along(splits, teacher, tmp_path):
    assert teacher.all_units == splits.train.scales
    rsae = upgrade(teacher, splits.train)
    assert rsae.all_units == splits.train.scales
    x = splits.test.inputs.tensor()
    expected = rsae(x)
    saved = RationalTranscoder.from_pretrained(rsae.save_pretrained(tmp_path))
    assert saved.all_units == (1.0, 1.0)
    scale, scale_out = splits.test.scales
    torch.testing.assert_close(saved(x / scale) * scale_out, expected, rtol=1e-4, atol=1e-4)
    assert evaluate(saved, None, splits.test)["mse"] == pytest.approx(
        evaluate(rsae, None, splits.test)["mse"], rel=1e-4
    )
    assert saved.all_units == (1.0, 1.0)
    with pytest.raises(ConfigError, match="two units"):
        saved.to_units_(2.0)
    assert isinstance(splits.train.inputs, ActivationStore)


def test_the_support_share_of_a_transcoder_comes_from_its_inputs(splits):
    """On a GPU it is found beside a dense step's other numbers."""
    sae, x, y = made(), splits.train.inputs.tensor()[:64], splits.train.targets.tensor()[:64]
    rows = torch.cat([x, y], dim=1)
    assert float(probed_share(sae, rows)) == pytest.approx(support_share(sae, rows), abs=1e-3)


def test_commands_score_and_match_saved_transcoders(tmp_path, capsys, monkeypatch):
    import json

    from rsae_triton.commands.cli import main

    monkeypatch.setenv("RSAE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "text").mkdir()
    tiny_models.saved(tiny_models.llama(), tmp_path / "model")
    tiny_models.text(tmp_path / "text", n_files=4)
    for seed, name in enumerate("ab"):
        sae = made(seed=seed, skip=True)
        sae.metadata.update(model_name=str(tmp_path / "model"), hook_name=INSIDE, hook_name_out=OUTSIDE)
        sae.save_pretrained(tmp_path / name)
    text = ["--text", str(tmp_path / "text"), "--whole-text", "--tokens", "300"]
    both, out = [str(tmp_path / name) for name in "ab"], tmp_path / "scores.json"
    assert main(["eval", *both, *text, "--sequences", "2", "--out", str(out)]) == 0
    scores = json.loads(out.read_text())
    assert scores["matched_l0"]["b"]["l0"] <= scores["saes"]["a"]["l0"] + 0.01
    assert "delta_ce" in scores["saes"]["a"]
    assert main(["match", *both, *text]) == 0
    JumpReluSAE(D, F, metadata={"model_name": str(tmp_path / "model"), "hook_name": INSIDE}).save_pretrained(
        tmp_path / "c"
    )
    assert main(["eval", both[0], str(tmp_path / "c"), *text, "--sequences", "0"]) == 2
    assert "evaluate them apart" in " ".join(capsys.readouterr().err.split())
