"""Sparse probing on data whose answer is planted, and the windows it is done on."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from rsae_triton.activations import Document
from rsae_triton.common.errors import ConfigError, NumericsError, ShapeError
from rsae_triton.evaluation.probe_items import Items, Rows, make_items, read_rows, representations
from rsae_triton.evaluation.probe_tasks import TASKS, labelled
from rsae_triton.evaluation.probing import average, sparse_probe
from rsae_triton.sae.sparse import SparseCode
from rsae_triton.teachers import ReluSAE

N, GROUPS = 400, 40


@pytest.fixture
def planted():
    """400 items of 40 groups; feature 7 of 50 is the label with noise, feature 3 a weaker copy, the rest is noise."""
    rng = np.random.default_rng(0)
    groups = np.arange(N) % GROUPS
    labels = groups % 2 == 0
    x = rng.normal(size=(N, 50))
    x[:, 7] += 2.5 * labels
    x[:, 3] += 1.0 * labels
    return x, labels, groups


def test_planted_features_are_found_and_told_apart(planted):
    x, labels, groups = planted
    probed = sparse_probe({"code": x}, labels, groups, ks=(1, 2, 5))
    assert probed.features["code", 1] == [[7]] * 5
    assert all(chosen[:2] == [7, 3] for chosen in probed.features["code", 5])
    # Two unit normals 2.5 apart: the best accuracy is Phi(1.25) = 0.894; with the second, Phi(sqrt(7.25) / 2) = 0.911.
    assert probed.score("code", 1)["accuracy"][0] == pytest.approx(0.894, abs=0.04)
    assert probed.score("code", 2)["accuracy"][0] == pytest.approx(0.911, abs=0.04)
    assert probed.chance == 0.5


def test_scores_are_scikit_learns_and_inside_their_intervals(planted):
    x, labels, groups = planted
    probed = sparse_probe({"code": x, "weak": x[:, [3, 4, 5]]}, labels, groups, ks=(1, 2))
    for key, predicted in probed.predictions.items():
        score = probed.score(*key)
        assert score["accuracy"][0] == pytest.approx(accuracy_score(labels, predicted))
        assert score["f1"][0] == pytest.approx(f1_score(labels, predicted, average="macro"))
        for value, low, high in score.values():
            assert low < value < high
    difference = probed.difference("code", "weak", 1)["accuracy"]
    assert difference[0] == pytest.approx(
        probed.score("code", 1)["accuracy"][0] - probed.score("weak", 1)["accuracy"][0]
    )
    assert difference[1] > 0
    assert probed.difference("code", "code", 1)["accuracy"] == [0, 0, 0]


def test_shuffled_labels_give_chance(planted):
    """Also with features to choose from: a choice made on the test items would show here."""
    _, _, groups = planted
    scores = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.arange(GROUPS) % 2 == 0)[groups]
        noise = rng.normal(size=(N, 500))
        scores.append(sparse_probe({"code": noise}, labels, groups, ks=(16,)).score("code", 16)["accuracy"][0])
    assert abs(np.mean(scores) - 0.5) < 0.04


def test_no_group_is_trained_and_tested_on():
    """Features that name the group, and nothing else, must not help: the groups of the test fold are new."""
    groups = np.repeat(np.arange(20), 20)
    labels = groups % 2 == 0
    x = np.eye(20)[groups] + 0.01 * np.random.default_rng(0).normal(size=(400, 20))
    assert sparse_probe({"code": x}, labels, groups, ks=(16,)).score("code", 16)["accuracy"][0] < 0.6


def test_the_scale_of_a_feature_does_not_matter(planted):
    x, labels, groups = planted
    scaled = x * np.geomspace(1e-4, 1e4, 50)
    probed = sparse_probe({"code": x, "scaled": scaled}, labels, groups, ks=(5,))
    assert probed.features["code", 5] == probed.features["scaled", 5]
    assert np.array_equal(probed.predictions["code", 5], probed.predictions["scaled", 5])


def test_intervals_resample_groups_not_items():
    """Every item thrice in its group, the same thrice: no narrower for it."""
    rng = np.random.default_rng(0)
    groups = np.arange(100)
    labels = groups % 2 == 0
    x = rng.normal(size=(100, 1)) + 1.0 * labels[:, None]
    width = []
    for times in (1, 3):
        repeated = [np.repeat(one, times, axis=0) for one in (x, labels, groups)]
        _, low, high = sparse_probe({"code": repeated[0]}, *repeated[1:], ks=(1,)).score("code", 1)["accuracy"]
        width.append(high - low)
    assert width[1] == pytest.approx(width[0], rel=0.1)
    assert width[0] == pytest.approx(2 * 1.96 * (0.69 * 0.31 / 100) ** 0.5, rel=0.25)


def test_means_over_tasks_are_surer_than_each(planted):
    x, labels, groups = planted
    other = x + 2 * np.random.default_rng(1).normal(size=x.shape)
    both = [sparse_probe({"a": x, "b": other}, labels, groups, ks=(1,), seed=seed) for seed in (0, 1)]
    mean = average(both, "a", 1)["accuracy"]
    assert mean[0] == pytest.approx(np.mean([one.score("a", 1)["accuracy"][0] for one in both]))
    assert mean[2] - mean[1] < min(high - low for _, low, high in (one.score("a", 1)["accuracy"] for one in both))
    assert average(both, "a", 1, "b")["accuracy"][0] == pytest.approx(mean[0] - average(both, "b", 1)["accuracy"][0])


def test_dead_and_few_features_are_no_trouble(planted):
    _, labels, groups = planted
    probed = sparse_probe({"dead": np.zeros((N, 3))}, labels, groups, ks=(1, 16))
    assert probed.score("dead", 16)["accuracy"][0] <= 0.55
    assert probed.features["dead", 16][0] == [0, 1, 2]


def test_bad_probes_are_named(planted):
    x, labels, groups = planted
    with pytest.raises(ShapeError, match="399 labels"):
        sparse_probe({"code": x}, labels[1:], groups)
    with pytest.raises(ShapeError, match=r"code has shape \(50, 400\)"):
        sparse_probe({"code": x.T}, labels, groups)
    with pytest.raises(ConfigError, match="1 and 39 groups"):
        sparse_probe({"code": x}, groups > 0, groups)
    with pytest.raises(ConfigError, match="at least 1"):
        sparse_probe({"code": x}, labels, groups, ks=(0,))
    x[3, 3] = np.nan
    with pytest.raises(NumericsError, match="code holds NaN"):
        sparse_probe({"code": x}, labels, groups)


# -- tasks and windows


class Words:
    """A host whose tokens are words, and whose residual at a position is the word's number, repeated in 4 dims."""

    name, default_hook, dtype, bos_token_id = "words", "blocks.0.hook_resid_pre", torch.float32, 0
    device = torch.device("cpu")

    def __init__(self):
        self.vocabulary = {}
        self.calls = 0

    def tokenizer(self, text, **_):
        return {"input_ids": [self.vocabulary.setdefault(word, len(self.vocabulary) + 1) for word in text.split()]}

    def fingerprint(self):
        return "words"

    def residual(self, tokens):
        self.calls += 1
        return tokens[..., None].float().expand(*tokens.shape, 4).clone()

    def words(self, items):
        names = {number: word for word, number in self.vocabulary.items()}
        return [[names[int(token)] for token in row[1:]] for row in items.tokens]


def task(name):
    return next(one for one in TASKS if one.name == name)


def test_tasks_are_of_many_kinds_and_name_what_they_tell_apart():
    assert len({one.name for one in TASKS}) == len(TASKS) >= 6
    assert len({one.kind for one in TASKS}) >= 3


def test_windows_are_balanced_and_hold_their_documents_text():
    documents = []
    for president, count in (("William J Clinton", 60), ("George W Bush", 900)):
        for year in range(3):
            text = " ".join(f"{president[:1]}{year}w{i}" for i in range(count))
            labels = {"president": president, "year": "2000", "party": "x"}
            documents.append(Document(text, "sotu", f"{president} {year}", labels, f"sotu/{president}"))
    host = Words()
    items = make_items(task("Clinton or G. W. Bush"), documents, host, per_label=20, context=16)
    assert items.labels.sum() == len(items) / 2
    # 60 words of 4 or 5 letters are 349 characters: places begin 96 apart, and the fourth is too short for 15 words.
    assert len(items) == 2 * 3 * 3
    assert not items.pooled[:, 0].any()
    assert items.pooled[:, 1:].all()
    assert (items.tokens[:, 0] == 0).all()
    seen = set()
    for words, unit, label in zip(host.words(items), items.units, items.labels, strict=True):
        start = ("G" if label else "W") + unit[-1]
        assert all(word.startswith(start) for word in words)
        assert seen.isdisjoint(words)
        seen.update(words)
    again = make_items(task("Clinton or G. W. Bush"), documents, Words(), per_label=20, context=16)
    assert again.units == items.units


def test_nouns_and_verbs_come_in_pairs_of_one_word():
    filler = " ".join(f"x{i}" for i in range(20))
    text = " ".join(
        f"{filler} {before} {word} {filler}"
        for word, befores in {"love": ("the", "my", "will"), "hope": ("shall", "must"), "fear": ("no", "would")}.items()
        for before in befores
    )
    documents = [Document(text, "kjv", f"book {i}", {}, f"kjv/book {i}") for i in range(3)]
    host = Words()
    items = make_items(task("noun or verb"), documents, host, context=12)
    last = [words[-2:] for words in host.words(items)]
    nouns, verbs = last[: len(last) // 2], last[len(last) // 2 :]
    assert {before for before, _ in nouns} <= {"the", "my", "no"}
    assert {before for before, _ in verbs} == {"will", "would"}
    assert sorted(word for _, word in nouns) == sorted(word for _, word in verbs)
    assert len(items) == 2 * (3 + 3)  # hope is a verb only, and left out
    assert (items.pooled.nonzero()[:, 1] == 11).all()


def test_parameters_and_arguments_are_told_by_the_grammar():
    code = """
import os

def first(alpha, beta=gamma(delta), *rest, key: Kind = None):
    x = call(alpha, [eps], name=zeta, beta + 1)
    with open(path) as f, thing.other(mode)[inner]:
        return (alpha, beta), print(self, eta)

class Some(Base):
    def method(self, theta, iota):
        if (kappa): pass
"""
    document = Document(code, "python_code", "m", {}, "python/m")
    found = [
        (code[:end].split()[-1].split("(")[-1], label) for end, label in task("parameter or argument").find(document)
    ]
    assert [name for name, label in found if not label] == ["alpha", "beta", "key", "theta", "iota"]
    assert [name for name, label in found if label] == ["delta", "alpha", "beta", "path", "mode", "eta"]
    assert list(task("parameter or argument").find(Document("def f(alpha", "kjv", "t"))) == []
    assert [
        label for _, label in task("parameter or argument").find(Document("def f(alpha,\n", "python_code", "t"))
    ] == [False]


def test_your_own_labels_must_be_two():
    documents = [Document("t", "mine", str(i), {"mood": mood}) for i, mood in enumerate(["good", "bad", "good"])]
    own = labelled(documents, "mood")
    assert own.classes == ("bad", "good")
    assert [label for document in documents for _, label in own.find(document)] == [True, False, True]
    with pytest.raises(ConfigError, match=r"no document has a label 'tone'.*mood, source"):
        labelled(documents, "tone")
    with pytest.raises(ConfigError, match="takes 1 values"):
        labelled(documents[:1], "mood")


def test_too_little_text_is_named():
    with pytest.raises(ConfigError, match="needs more text"):
        make_items(task("Luke or John"), [Document("short", "kjv", "Luke 1", {"book": "Luke"})], Words())


def test_items_are_the_means_of_their_positions_and_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path))
    tokens = torch.tensor([[0, 1, 2, 3], [0, 4, 5, 6], [0, 2, 2, 2], [0, 1, 1, 1]])
    pooled = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    items = Items(tokens, pooled, np.array([False, True, False, True]), list("abcd"))
    host = Words()
    sae = ReluSAE(4, 3, apply_b_dec_to_input=False)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.W_enc[0] = torch.tensor([1.0, -1.0, 1.0])
        sae.b_enc.copy_(torch.tensor([0.0, 2.0, -2.0]))  # codes of a residual v: v, relu(2 - v), relu(v - 2)
    done = []
    rows = read_rows(items, host, batch=3, progress=done.append)
    found = representations({"sae": sae}, rows)
    assert found["raw"].tolist() == [[2] * 4, [6] * 4, [2] * 4, [1] * 4]
    expected = [[2, 1 / 3, 1 / 3], [6, 0, 4], [2, 0, 0], [1, 1, 0]]
    assert np.allclose(found["sae"], expected)
    assert (host.calls, sum(done)) == (2, 4)
    assert np.array_equal(representations({}, read_rows(items, host, progress=done.append))["raw"], found["raw"])
    assert (host.calls, sum(done)) == (2, 8)
    next((tmp_path / "probes").glob("*.safetensors")).write_bytes(b"broken")
    assert np.array_equal(representations({}, read_rows(items, host))["raw"], found["raw"])
    monkeypatch.setattr(host, "residual", lambda tokens: torch.full((*tokens.shape, 4), torch.nan))
    host.default_hook = "another"
    with pytest.raises(NumericsError, match="another holds NaN"):
        read_rows(items, host)


def test_means_of_rows_are_those_of_codes():
    codes = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).relu()
    rows = Rows(torch.ones(9, 2), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2]), 3)
    parts = iter((codes[:4], codes[4:8], codes[8:]) * 2)
    dense = rows.means(lambda _: next(parts), 4)
    found = rows.means(lambda _: SparseCode.from_dense(next(parts)), 4, width=5)
    assert np.allclose(found, dense)
    assert found.shape == (3, 5)


def test_outlier_positions_are_left_out_of_means():
    values = torch.ones(10, 2)
    values[3], values[7:] = 1000, 500  # one position of item 0; all of item 1
    rows = Rows(values, torch.tensor([0] * 7 + [1] * 3), 2)
    assert rows.means(lambda x: x).tolist() == [[1, 1], [500, 500]]


def test_every_pair_of_labels_of_the_built_in_tasks_is_found_in_its_text():
    """With documents as the demo's corpus labels them: each task that is about documents labels some of each class."""
    presidents = {"William J Clinton": ("Democratic", 1995), "George W Bush": ("Republican", 2003),
                  "Grover Cleveland": ("Democratic", 1886), "Benjamin Harrison": ("Republican", 1890),
                  "Theodore Roosevelt": ("Republican", 1905), "William H Taft": ("Republican", 1910),
                  "Andrew Jackson": ("Democratic", 1830)}  # fmt: skip
    documents = [
        Document("t", "sotu", f"{name} {year}", {"president": name, "party": party, "year": str(year)}, f"sotu/{name}")
        for name, (party, year) in presidents.items()
    ]
    documents += [Document("t", "kjv", f"{book} 1", {"book": book}, f"kjv/{book}") for book in
                  ("Luke", "John", "Romans", "James", "Joshua", "Isaiah", "Psalms")]  # fmt: skip
    documents += [Document("t", "shakespeare", title) for title in ("Hamlet", "Twelfth Night", "King John")]
    for one in TASKS:
        if one.of_words:
            continue
        labels = [label for document in documents for _, label in one.find(document)]
        assert set(labels) == {False, True}, one.name
        assert len(labels) <= 4, one.name
    assert not list(itertools.chain(*(task("comedy or tragedy").find(one) for one in documents[-1:])))
