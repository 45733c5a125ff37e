"""Feature absorption on first letters, by SAEBench's definition (arXiv:2409.14507, arXiv:2503.09532).

A feature "begins with L" should be active on every word that begins with L. Sparsity rewards an SAE for keeping it
silent where a feature of the word itself can carry the letter too: that feature has *absorbed* it. A linear probe on
the activations says what there is to carry, features found by sparse probes are the letter's main ones, and what the
main ones leave to others, aligned with the probe, is absorbed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rsae_triton.activations import HostModel
from rsae_triton.common.errors import ConfigError, SourceError
from rsae_triton.common.install import advice
from rsae_triton.evaluation.probe_items import Items

PROMPT = "\n apple has the first letter: A\n river has the first letter: R\n"
"""Stands before every word, so that the model has a reason to know the word's first letter."""
TEST = 0.2
"""Share of the words that neither the probes nor the choice of features see."""
LEAST_F1 = 0.6
"""Letters that the probe on the activations tells apart less well are left out."""
MOST_MAIN, JUMP = 10, 0.03
"""A letter's main features are at most so many; each must raise the F1 of the sparse probe by more than JUMP."""
LEAST_COSINE, LEAST_COSINE_FULL = 0.1, 0.025
"""An absorbing feature's decoder row has at least this cosine with the probe."""
LEAST_SHARE, MOST_ABSORBING = 0.4, 3
"""So few features must carry at least this share of the word's projection on the probe."""
_SPARSITY = 0.01  # of the probe that ranks features, per unit of weight, beside its mean loss
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Letters:
    """Probes for the first letters of words.

    Attributes:
        letters: int [n_words], 0 for a. test: bool [n_words], the words held out.
        directions: [26, d_in], of norm 1; zeros for letters without a probe. scores: [n_words, 26], above 0 where the
            probe says yes.
        f1: of the probe on the words held out, by letter; the letters that are evaluated.
    """

    letters: _Array
    test: _Array
    directions: _Array
    scores: _Array
    f1: dict[int, float]


def letter_words(host: HostModel, *, per_letter: int = 200, seed: int = 0) -> Items:
    """Returns words of one token, a space before them, behind `PROMPT`: at most `per_letter` of each letter.

    `labels` are the letters (0 for a), `units` the words in lower case.

    Raises:
        ConfigError: the tokenizer has fewer than 100 such tokens.
    """
    words: dict[int, str] = {}
    for token, index in host.tokenizer.get_vocab().items():
        word = token[1:]
        if token[:1] in ("Ġ", "▁", " ") and len(word) > 1 and word.isascii() and word.isalpha():
            words[index] = word.lower()
    if len(words) < 100:
        raise ConfigError(f"the tokenizer of {host.name} has {len(words)} words of one token; first letters need 100")
    ids = np.array(sorted(words))
    letters = np.array([ord(words[index][0]) - ord("a") for index in ids])
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(letters == letter))[:per_letter] for letter in range(26)]
    keep = np.concatenate(chosen)
    before = [host.bos_token_id, *host.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]
    tokens = torch.tensor([[*before, int(index)] for index in ids[keep]])
    pooled = torch.zeros_like(tokens, dtype=torch.bool)
    pooled[:, -1] = True
    return Items(tokens, pooled, letters[keep], [words[index] for index in ids[keep]])


def letter_probes(x: _Array, items: Items, *, seed: int = 0) -> Letters:
    """Fits a logistic regression for each letter against all others, on four fifths of the words.

    All words stand in the same context, so their activations share a large mean. The probes have no part of it:
    projections on them are of what tells the words apart.

    Args:
        x: activations [n_words, d_in].

    Raises:
        SourceError: scikit-learn is not installed. ConfigError: no letter can be told apart.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import f1_score
    except ImportError as error:
        raise SourceError(f"probing needs the package scikit-learn; install it with: {advice('probe')}") from error
    names = sorted(set(items.units))  # a word with and without a capital is on one side
    held = set(np.random.default_rng(seed).permutation(names)[: round(TEST * len(names))])
    test = np.array([name in held for name in items.units])
    letters = np.asarray(items.labels)
    mean = x[~test].mean(0, dtype=np.float64)
    mean /= np.linalg.norm(mean)
    rows = x - (x @ mean)[:, None] * mean
    rows *= np.sqrt(x.shape[1]) / np.linalg.norm(x, axis=1).mean()
    directions, scores, f1 = np.zeros((26, x.shape[1])), np.full((len(x), 26), -1.0), {}
    for letter in range(26):
        wanted = letters == letter
        if min(wanted[test].sum(), wanted[~test].sum()) < 5:
            continue
        probe = LogisticRegression(C=0.1, max_iter=2000, class_weight="balanced").fit(rows[~test], wanted[~test])
        scores[:, letter] = probe.decision_function(rows)
        found = float(f1_score(wanted[test], scores[test, letter] > 0))
        if found >= LEAST_F1:
            f1[letter] = found
            directions[letter] = probe.coef_[0] / np.linalg.norm(probe.coef_[0])
    if not f1:
        raise ConfigError(f"at this place no first letter is predicted with an F1 of {LEAST_F1}; try another layer")
    return Letters(letters, test, directions, scores, f1)


def absorption(codes: _Array, rows: _Array, x: _Array, probes: Letters) -> dict[str, _Array]:
    """Measures absorption in a code, by letter.

    Args:
        codes: z [n_words, d_sae]. rows: W_dec [d_sae, d_in]. x: the activations that were encoded, in the same units.

    Returns:
        By measure, one value for each letter of `probes.f1`: "fraction" (how much of the projection is absorbed, in the
        mean over the held-out words that the probe gets right; SAEBench's mean absorption fraction), "full" (share of
        them with silent main features and a single feature instead; its full absorption rate), "silent" (share of them
        on which no main feature is active), "carried" and "by_main" (the share of their projection that all features
        and the main ones carry: where little is carried, little can be absorbed), "main" (number of main features),
        "f1" (of the probe on these) and "f1_one" (of the probe on the first of them).
    """
    norms = np.linalg.norm(rows, axis=1)
    scale = np.sqrt(x.shape[1]) / np.linalg.norm(x, axis=1).mean()  # the probes' penalties mean the same in any units
    x, sizes = scale * x, scale * codes * norms
    units = rows / np.maximum(norms, 1e-12)[:, None]
    names = ("fraction", "full", "silent", "carried", "by_main", "main", "f1", "f1_one")
    found: dict[str, list[float]] = {name: [] for name in names}
    find = main_features(sizes, probes.test)
    for letter in probes.f1:
        main, f1 = find(probes.letters == letter)
        words = probes.test & (probes.letters == letter) & (probes.scores[:, letter] > 0)
        direction = probes.directions[letter]
        own, cosines, projection = sizes[words], units @ direction, x[words] @ direction
        fraction, full = _absorbed(own, cosines, projection, main)
        shares = [(own[:, some] @ cosines[some]).sum() / projection.sum() for some in (slice(None), main)]
        silent = (own[:, main] == 0).all(1).mean()
        values = (fraction.mean(), full.mean(), silent, *shares, len(main), f1[-1], f1[0])
        for name, value in zip(found, values, strict=True):
            found[name].append(float(value))
    return {name: np.array(values) for name, values in found.items()}


def _absorbed(sizes: _Array, cosines: _Array, projection: _Array, main: list[int]) -> tuple[_Array, _Array]:
    """Returns the absorbed fraction of each word, and whether one feature stands for silent main ones entirely."""
    parts = sizes * cosines
    of_main = parts[:, main].sum(1)
    others = np.where(cosines >= LEAST_COSINE, parts, 0.0).clip(min=0)
    others[:, main] = 0.0
    absorbing = np.sort(others, axis=1)[:, -MOST_ABSORBING:].sum(1)
    positive = np.maximum(projection, 1e-12)
    counts = (projection > 0) & (of_main < projection) & (absorbing >= LEAST_SHARE * positive)
    taken = np.minimum(absorbing, projection - of_main)
    shared = np.where(of_main <= 0, 1.0, taken / np.maximum(taken + of_main, 1e-12))
    first = parts.argmax(1)
    alone = parts[np.arange(len(parts)), first] >= LEAST_SHARE * positive
    full = (sizes[:, main] == 0).all(1) & (cosines[first] >= LEAST_COSINE_FULL) & (projection > 0) & alone
    return np.where(counts, shared, 0.0), full


def main_features(sizes: _Array, test: _Array) -> Callable[[_Array], tuple[list[int], list[float]]]:
    """Returns a function of a label (bool [n_words]) that gives the features that stand for it, and the F1 on the test
    words with the first of them, the first two, ...: features are ranked by a probe with an l1 penalty, positive
    weights only, and are added while F1 jumps."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    train, held = sizes[~test], sizes[test]
    active = np.flatnonzero(train.any(0))
    entries = csr_matrix(train[:, active], dtype=np.float64)
    # From 1.8 on scikit-learn calls the penalty by another name, and later it drops the old one.
    l1: dict[str, Any] = {"penalty": "l1"} if LogisticRegression().l1_ratio is None else {"l1_ratio": 1.0}
    ranking = LogisticRegression(
        C=2 / (_SPARSITY * len(train)), solver="liblinear", intercept_scaling=10.0, class_weight="balanced",
        max_iter=200, random_state=0, **l1,
    )  # fmt: skip

    def of(wanted: _Array) -> tuple[list[int], list[float]]:
        if not len(active):
            return [], [0.0]
        order = active[np.argsort(-ranking.fit(entries, wanted[~test]).coef_[0], kind="stable")]
        scores = [-1.0]
        for k in range(1, min(MOST_MAIN, len(order)) + 1):
            chosen = order[:k]
            probe = LogisticRegression(class_weight="balanced", max_iter=500).fit(train[:, chosen], wanted[~test])
            score = float(f1_score(wanted[test], probe.predict(held[:, chosen])))
            if score <= scores[-1] + JUMP:
                break
            scores.append(score)
        return order[: len(scores) - 1].tolist(), scores[1:]

    return of
