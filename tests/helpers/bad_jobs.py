"""Bad arguments to what is done with an SAE: upgrade, train, score, fit, load and save. Rows as in `bad_python.py`."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from bad_python import INF, INTEGERS, NAN, NOT_AN_SAE, RELU, X, broken, sae, trained, with_nan

from rsae_triton import FusedRationalSAE, evaluate, fit_gate, load_host, load_teacher, upgrade
from rsae_triton.activations import ActivationStore, check_corpus, load_corpus
from rsae_triton.activations.from_tensor import store_tensor
from rsae_triton.common.errors import ConfigError, FormatError, NumericsError, ShapeError, SourceError, StorageError
from rsae_triton.evaluation import compare
from rsae_triton.evaluation.reconstruction import at_l0, reconstruction
from rsae_triton.sae.export import to_jumprelu
from rsae_triton.teachers import ReluSAE

UPGRADES = [
    ("a teacher that is none", lambda _: upgrade(NOT_AN_SAE, X), ConfigError, "a Linear cannot be upgraded"),
    ("a teacher that is upgraded", lambda _: upgrade(sae(), X), ConfigError, "cannot be upgraded"),
    ("one row", lambda _: upgrade(RELU, X[0]), ShapeError, "activations have shape"),
    ("another width", lambda _: upgrade(RELU, torch.zeros(5, 5)), ShapeError, "d_in=4"),
    ("no rows", lambda _: upgrade(RELU, X[:0]), ShapeError, "no activations"),
    ("NaN", lambda _: upgrade(RELU, with_nan()), NumericsError, r"activations holds 1 NaN"),
    ("None", lambda _: upgrade(RELU, None), ShapeError, "activations is a NoneType"),
    ("a list", lambda _: upgrade(RELU, [[1.0] * 4]), ShapeError, "activations is a list"),
    ("integers", lambda _: upgrade(RELU, INTEGERS), ConfigError, "activations is torch.int64"),
    ("no such form", lambda _: upgrade(RELU, X, form="x"), ConfigError, "form is 'x'"),
    ("no degree", lambda _: upgrade(RELU, X, degree="x"), ConfigError, "degree is 'x'"),
    ("three degrees", lambda _: upgrade(RELU, X, degree="1,2,3"), ConfigError, "degree"),
    ("one degree", lambda _: upgrade(RELU, X, degree=3), ConfigError, "degree is 3"),
    ("degree 20", lambda _: upgrade(RELU, X, degree=(20, 2)), ConfigError, "0 to 12"),
    ("no such coefficients", lambda _: upgrade(RELU, X, coefficients="x"), ConfigError, "coefficients is 'x'"),
    ("no groups", lambda _: upgrade(RELU, X, coefficients=0), ConfigError, "coefficients is 0"),
    ("more groups than features", lambda _: upgrade(RELU, X, coefficients=9), ConfigError, "coefficients is 9"),
    ("a bool of groups", lambda _: upgrade(RELU, X, coefficients=True), ConfigError, "coefficients is True"),
    ("no such thresholds", lambda _: upgrade(RELU, X, thresholds="x"), ConfigError, "thresholds is 'x'"),
    ("token thresholds of a ReLU", lambda _: upgrade(RELU, X, thresholds="token"), ConfigError, "thresholds='token'"),
    ("a tolerance that is NaN", lambda _: upgrade(RELU, X, tolerance=NAN), ConfigError, "tolerance is nan"),
    ("no tolerance at all", lambda _: upgrade(RELU, X, tolerance=0), NumericsError, "raise tolerance"),
    ("no tokens", lambda _: upgrade(RELU, X, n_tokens=0), ConfigError, "n_tokens is 0"),
    ("half a token", lambda _: upgrade(RELU, X, n_tokens=1.5), ConfigError, "n_tokens is 1.5"),
    ("no such backend", lambda _: upgrade(RELU, X, backend="x"), ConfigError, "backend"),
    ("a seed of text", lambda _: upgrade(RELU, X, seed="x"), ConfigError, "seed is 'x'"),
    ("weights with NaN", lambda _: upgrade(broken(ReluSAE(4, 8)), X), NumericsError, r"W_enc holds 1 NaN.*\[1, 2\]"),
    ("steps below 0", lambda _: trained(steps=-1), ConfigError, "steps is -1"),
    ("half a step", lambda _: trained(steps=1.5), ConfigError, "steps is 1.5"),
    ("no batch", lambda _: trained(batch_size=0), ConfigError, "batch_size is 0"),
    ("fewer tokens than a batch", lambda _: trained(batch_size=17), ShapeError, "lower batch_size"),
    ("lr is 0", lambda _: trained(lr=0), ConfigError, "lr is 0"),
    ("lr is NaN", lambda _: trained(lr=NAN), ConfigError, "lr is nan"),
    ("lr is text", lambda _: trained(lr="x"), ConfigError, "lr is 'x'"),
    ("warmup below 0", lambda _: trained(warmup=-1), ConfigError, "warmup is -1"),
    ("decay above 1", lambda _: trained(decay=2), ConfigError, "decay is 2"),
    ("decay is NaN", lambda _: trained(decay=NAN), ConfigError, "decay is nan"),
    ("sparsity_warmup below 0", lambda _: trained(sparsity_warmup=-1), ConfigError, "sparsity_warmup is -1"),
    ("clip is 0", lambda _: trained(clip=0), ConfigError, "clip is 0"),
    ("dead_after below 0", lambda _: trained(dead_after=-1), ConfigError, "dead_after is -1"),
    ("log_every is 0", lambda _: trained(log_every=0), ConfigError, "log_every is 0"),
    ("a seed of text, training", lambda _: trained(seed="x"), ConfigError, "seed is 'x'"),
    ("l0 of 0", lambda _: trained(target_l0=0), ConfigError, "target_l0 is 0"),
    ("l0 of text", lambda _: trained(target_l0="x"), ConfigError, "target_l0 is 'x'"),
    ("no such recipe", lambda _: trained(recipe="x"), ConfigError, "recipe is 'x'"),
    ("a recipe that is none", lambda _: trained(recipe=3), ConfigError, "recipe is a int"),
    ("a recipe for others", lambda _: trained(one=ReluSAE(4, 8), recipe="hard"), ConfigError, "recipe 'hard'"),
    ("no such memory", lambda _: trained(memory="x"), ConfigError, "memory is 'x'"),
    ("training, another width", lambda _: trained(torch.zeros(16, 5)), ShapeError, "d_in=5"),
    ("training, three dimensions", lambda _: trained(torch.zeros(16, 3, 4)), ShapeError, "activations have shape"),
    ("training, None", lambda _: trained(None), ShapeError, "activations is a NoneType"),
    ("training, integers", lambda _: trained(INTEGERS), ConfigError, "activations is torch.int64"),
    ("training, NaN", lambda _: trained(with_nan(), batch_size=16), NumericsError, "holds 1 NaN.*the first at"),
    ("training, no rows", lambda _: trained(X[:0]), ShapeError, "0 tokens are fewer"),
    ("training, no SAE", lambda _: trained(one=NOT_AN_SAE), ConfigError, "sae is a Linear"),
]

SCORES = [
    ("one row", lambda _: reconstruction(RELU, X[0]), ShapeError, "activations have shape"),
    ("no rows", lambda _: reconstruction(RELU, X[:0]), ShapeError, "no activations"),
    ("infinity", lambda _: reconstruction(RELU, with_nan(INF)), NumericsError, r"1 NaN or infinite.*inf.*\[3, 1\]"),
    ("None", lambda _: reconstruction(RELU, None), ShapeError, "activations is a NoneType"),
    ("no SAE", lambda _: reconstruction(NOT_AN_SAE, X), ConfigError, "sae is a Linear"),
    ("l0 of 0", lambda _: at_l0(RELU, X, 0), ConfigError, "l0 is 0"),
    ("l0 of text", lambda _: at_l0(RELU, X, "x"), ConfigError, "l0 is 'x'"),
    ("nothing to compare", lambda _: compare({}, X), ConfigError, "saes is empty"),
    ("no names", lambda _: compare(RELU, X), ConfigError, "saes is empty or no dictionary"),
    ("measured something else", lambda _: compare({"a": RELU}, X, measured={}), ConfigError, "measured is of nothing"),
    ("contexts too few", lambda _: compare({"a": RELU}, X, contexts=torch.zeros(3)), ShapeError, "contexts has 3"),
    ("a host alone", lambda _: compare({"a": RELU}, X, host=object()), ConfigError, "tokens, splice and mean"),
    ("compare at no l0", lambda _: compare({"a": RELU}, X, l0=-1), ConfigError, "l0 is -1"),
    ("evaluated on a tensor", lambda _: evaluate(RELU, None, X), ConfigError, "activations is a Tensor"),
    ("exported from one row", lambda _: to_jumprelu(sae(), X[:1]), ShapeError, "activations have shape"),
    ("exported with NaN", lambda _: to_jumprelu(sae(), with_nan()), NumericsError, r"activations holds 1.*\[3, 1\]"),
    ("exported, no rational", lambda _: to_jumprelu(RELU, X), ConfigError, "sae is a ReluSAE"),
    ("exported from None", lambda _: to_jumprelu(sae(), None), ShapeError, "activations is a NoneType"),
]

FITS = [
    ("no such target", lambda _: fit_gate("x", (3, 2)), ConfigError, "target 'x'"),
    ("a target that is a number", lambda _: fit_gate(3, (3, 2)), ConfigError, "target must be"),
    ("no degree", lambda _: fit_gate("relu", "x"), ConfigError, "degree"),
    ("degree above 12", lambda _: fit_gate("relu", (13, 2)), ConfigError, "degree"),
    ("degree is None", lambda _: fit_gate("relu", None), ConfigError, "degree"),
    ("half a degree", lambda _: fit_gate("relu", (3.5, 2)), ConfigError, "degree"),
    ("theta of a ReLU", lambda _: fit_gate("relu", (3, 2), theta=0.1), ConfigError, "theta must be 0"),
    ("theta outside", lambda _: fit_gate("jumprelu", (3, 2), theta=2), ConfigError, "theta must lie"),
    ("theta is NaN", lambda _: fit_gate("jumprelu", (3, 2), theta=NAN), ConfigError, "theta is nan"),
    ("theta is text", lambda _: fit_gate("jumprelu", (3, 2), theta="x"), ConfigError, "theta is 'x'"),
    ("margin below 0", lambda _: fit_gate("step", (3, 2), margin=-1), ConfigError, "margin is -1"),
    ("no margin", lambda _: fit_gate("jumprelu", (3, 2), theta=0.1), ConfigError, "margin=0"),
    ("no domain left", lambda _: fit_gate("step", (3, 2), theta=0.1, margin=0.95), ConfigError, "margin=0.95"),
    ("no such method", lambda _: fit_gate("relu", (3, 2), method="x"), ConfigError, "method 'x'"),
    ("three points", lambda _: fit_gate("relu", (3, 2), points=3), ConfigError, "points is 3"),
    ("half a point", lambda _: fit_gate("relu", (3, 2), points=200.5), ConfigError, "points is 200.5"),
    ("more points than memory", lambda _: fit_gate("relu", (3, 2), points=2**62), ConfigError, "points is 46"),
    ("tol is 0", lambda _: fit_gate("relu", (3, 2), tol=0), ConfigError, "tol is 0"),
    ("tol is NaN", lambda _: fit_gate("relu", (3, 2), tol=NAN), ConfigError, "tol is nan"),
    ("no samples", lambda _: fit_gate("relu", (3, 2), samples=np.zeros(0)), ConfigError, "samples is empty"),
    ("samples with NaN", lambda _: fit_gate("relu", (3, 2), samples=np.array([NAN])), NumericsError, "samples holds 1"),
    ("samples of text", lambda _: fit_gate("relu", (3, 2), samples="x"), ConfigError, "samples is a str"),
    ("three weights", lambda _: fit_gate("relu", (3, 2), weight=np.zeros(3)), ConfigError, "weight"),
    ("negative weights", lambda _: fit_gate("relu", (3, 2), weight=lambda t: -t * t), ConfigError, "weight must be"),
    ("weights of text", lambda _: fit_gate("relu", (3, 2), weight="x"), ConfigError, "weight is a str"),
    ("a target that is NaN", lambda _: fit_gate(lambda t: t * NAN, (3, 2)), NumericsError, "target is not finite"),
    ("a target of one number", lambda _: fit_gate(lambda t: 1.0, (3, 2)), ConfigError, "target must be vectorised"),
]

FILES = [
    ("a source of None", lambda _: load_teacher(None), ConfigError, "name an SAE by source"),
    ("a source of nothing", lambda _: load_teacher(""), FormatError, "source is ''"),
    ("no such folder", lambda at: load_teacher(at / "nowhere"), FormatError, "nowhere does not exist"),
    ("a path too long", lambda _: load_teacher("/" + "a" * 5000), FormatError, "cannot be a path"),
    ("no such format", lambda at: load_teacher(at, format="x"), ConfigError, "format is 'x'"),
    ("k is negative", lambda at: load_teacher(at, k=-1), ConfigError, "k is -1"),
    ("a scale of 0", lambda at: load_teacher(at, activation_scale=0), ConfigError, "activation_scale is 0"),
    ("an empty folder", lambda at: load_teacher(at / "empty"), FormatError, "holds nothing"),
    ("the wrong class", lambda at: ReluSAE.from_pretrained(at / "good"), FormatError, "architecture 'rational'"),
    ("no such class of source", lambda _: FusedRationalSAE.from_pretrained(None), FormatError, "source is None"),
    (
        "no such backend, loading",
        lambda at: FusedRationalSAE.from_pretrained(at / "good", backend="x"),
        ConfigError,
        "backend",
    ),
    (
        "no such device, loading",
        lambda at: FusedRationalSAE.from_pretrained(at / "good", device="x"),
        ConfigError,
        "device 'x'",
    ),
    ("saving NaN", lambda at: broken(sae()).save_pretrained(at / "good"), NumericsError, r"W_enc holds 1 NaN"),
    (
        "saving what JSON cannot hold",
        lambda at: sae(metadata={"a": object()}).save_pretrained(at / "good"),
        ConfigError,
        "metadata holds",
    ),
    ("saving into a file", lambda at: sae().save_pretrained(at / "good" / "cfg.json"), StorageError, "cfg.json"),
    ("a store that is none", lambda at: ActivationStore(at / "empty"), FormatError, "holds no manifest.json"),
    ("a store that is not there", lambda at: ActivationStore(at / "nowhere"), FormatError, "holds no manifest.json"),
    ("text that is not there", lambda at: load_corpus(at / "nowhere.txt"), SourceError, "nowhere.txt"),
    ("no text", lambda _: check_corpus([]), ConfigError, "--text is empty"),
    ("a folder without text", lambda at: load_corpus(at / "empty"), FormatError, "empty holds no .txt"),
    ("no such model", lambda at: load_host(str(at / "nowhere")), SourceError, "nowhere"),
    ("a model in no dtype", lambda at: load_host(str(at / "good"), dtype="x"), ConfigError, "dtype 'x'"),
]

JOBS = [
    (f"{door}: {case[0]}", *case[1:])
    for door, cases in (("upgrade and train", UPGRADES), ("scores", SCORES), ("fit_gate", FITS), ("files", FILES))
    for case in cases
]


def make_files(at: Path) -> None:
    """What the cases find: a good SAE under good/, others with another cfg.json, a store, and an empty folder."""
    (at / "empty").mkdir()
    sae(generator=torch.Generator().manual_seed(2)).save_pretrained(at / "good")
    store_tensor(X, at / "store")
    (at / "some.txt").write_text("some text")
    for name, change in {
        "flag": {"apply_b_dec_to_input": "no"}, "float8": {"dtype": "float8_e4m3fn"},
        "seed": {"metadata": {"split_seed": "x"}},
    }.items():  # fmt: skip
        shutil.copytree(at / "good", at / name)
        config = json.loads((at / name / "cfg.json").read_text()) | change
        (at / name / "cfg.json").write_text(json.dumps(config))
