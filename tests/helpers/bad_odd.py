"""Bad arguments that nobody means: rows as in `bad_python.py`, found by trying to break the doors from outside."""

import os

import numpy as np
import torch
from bad_python import D_IN, D_SAE, INF, JUMP, NAN, NOT_AN_SAE, RELU, X, broken, code, gate, sae, trained

from rsae_triton import FusedRationalSAE, RationalGate, SparseCode, fit_gate, load_teacher, upgrade
from rsae_triton.activations import ActivationStore, load_corpus
from rsae_triton.activations.from_tensor import store_tensor
from rsae_triton.common.errors import (
    ConfigError,
    ConvergenceError,
    FormatError,
    NumericsError,
    ResourceError,
    ShapeError,
    SourceError,
    StorageError,
)
from rsae_triton.evaluation import compare
from rsae_triton.evaluation.matching import match_features
from rsae_triton.evaluation.reconstruction import reconstruction
from rsae_triton.integrations.splicing import splice
from rsae_triton.sae.export import to_jumprelu
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE

META, SPARSE = X.to("meta"), X.to_sparse()
GOOGOL = 10**400  # no float holds it
ENDLESS = 10**5000  # and Python does not print it


class Batches:
    """Looks like a store and gives `given`, then nothing."""

    d_in = D_IN

    def __init__(self, *given):
        self.given = given

    def batches(self, batch_size, *, seed):
        yield from self.given


def in_inference_mode(**options):
    with torch.inference_mode():
        return trained(**options)


def made_in_inference_mode():
    with torch.inference_mode():
        return sae()


def refuse(t):
    raise ZeroDivisionError("nobody divides by it")


def spliced(model=None, one=RELU, **options):
    with splice(model or torch.nn.Sequential(torch.nn.Linear(D_IN, D_IN)), one, "0", **options):
        pass


def batch(at, size=4, **options):
    return next(ActivationStore(at / "store").batches(size, **options))


SAES = [
    ("a generator that is a seed", lambda _: sae(generator=3), ConfigError, "generator is 3; give torch.Generator"),
    (
        "a flag of text",
        lambda _: sae(apply_b_dec_to_input="no"),
        ConfigError,
        "apply_b_dec_to_input is 'no'; give True",
    ),
    ("weights of eight bits", lambda _: sae(dtype=torch.float8_e4m3fn), ConfigError, "dtype is torch.float8"),
    ("a size that nobody can print", lambda _: ReluSAE(ENDLESS, 0), ConfigError, "d_sae is 0"),
    ("a degree without order", lambda _: sae(degree={3, 2}), ConfigError, "degree"),
    ("a degree of truth values", lambda _: sae(degree=(True, False)), ConfigError, "degree"),
    ("a threshold of text", lambda _: JumpReluSAE(4, 8, threshold="x"), ConfigError, "threshold is 'x'"),
    ("a threshold of None", lambda _: JumpReluSAE(4, 8, threshold=None), ConfigError, "threshold is None"),
    ("an infinite threshold", lambda _: JumpReluSAE(4, 8, threshold=INF), ConfigError, "threshold must be a finite"),
    (
        "a threshold without data",
        lambda _: JumpReluSAE(4, 8, threshold=META[0, 0]),
        ConfigError,
        "threshold is on meta",
    ),
    (
        "a complex threshold",
        lambda _: JumpReluSAE(4, 8, threshold=torch.tensor(1j)),
        ConfigError,
        "threshold is torch.c",
    ),
    ("a rectangle of text", lambda _: JumpReluSAE(4, 8, bandwidth="x"), ConfigError, "bandwidth is 'x'"),
    ("an endless memory", lambda _: BatchTopKSAE(4, 8, k=2, memory=1.5), ConfigError, "memory is 1.5"),
    ("relu of text", lambda _: TopKSAE(4, 8, k=2, relu="no"), ConfigError, "relu is 'no'"),
    (
        "a scale no float holds",
        lambda _: sae().fold_activation_scale_(GOOGOL),
        NumericsError,
        "activation scale is 1000",
    ),
    ("a scale no weight holds", lambda _: sae().fold_activation_scale_(1e300), NumericsError, "cannot take it"),
    ("a scale of True", lambda _: sae().fold_activation_scale_(True), NumericsError, "activation scale is True"),
    ("a gate on no device", lambda _: gate(device="x"), ConfigError, "device 'x'"),
    ("sparse coefficients", lambda _: gate(a=torch.ones(2).to_sparse()), ConfigError, "a is torch.sparse_coo"),
    ("coefficients without data", lambda _: gate(a=torch.ones(2, device="meta")), ConfigError, "a is on meta"),
    ("complex coefficients", lambda _: gate(a=np.array([1j, 1])), ConfigError, "a is complex128; give real"),
    ("coefficients no float holds", lambda _: gate(a=[GOOGOL, 1]), ConfigError, r"a is \[1000"),
    ("a gate beyond any memory", lambda _: gate(d_sae=2**60), ResourceError, "d_sae=1152921504606846976"),
    ("thresholds of text", lambda _: RationalGate.from_fit(JUMP, 8, thresholds="x"), ConfigError, "thresholds is 'x'"),
    ("scales in a list", lambda _: gate().scale_features_([1.0] * 8), ShapeError, "scale is a list"),
    ("an infinite scale", lambda _: gate().scale_features_(torch.full((8,), INF)), ShapeError, "scale has shape"),
]

CODES = [
    ("nested", lambda _: sae().encode(torch.nested.nested_tensor([X, X])), ShapeError, "x is a nested tensor"),
    ("capacity beyond any memory", lambda _: sae().encode_sparse(X, 2**60), ShapeError, "capacity=1152921504606846976"),
    ("dense beyond any memory", lambda _: code().to_dense(2**50), ResourceError, "d_sae=1125899906842624"),
    ("codes without data", lambda _: SparseCode.from_dense(META), ConfigError, "feature_acts is on meta"),
    ("a chunk beyond 64 bits", lambda _: sae().autoencode(X, chunk_tokens=2**70), ConfigError, "chunk_tokens is 1180"),
    ("an l1 no float holds", lambda _: sae().autoencode(X, l1_weight=GOOGOL), ConfigError, "l1_weight is 1000"),
]

TRAINING = [
    ("in inference mode", lambda _: in_inference_mode(), ConfigError, "inference_mode"),
    ("made in inference mode", lambda _: trained(one=made_in_inference_mode()), ConfigError, "inference_mode"),
    ("all frozen", lambda _: trained(one=sae().requires_grad_(False)), ConfigError, "every parameter of sae is frozen"),
    ("an SAE without data", lambda _: trained(one=sae().to("meta")), ConfigError, "sae.W_dec is on meta"),
    ("activations without data", lambda _: trained(META), ConfigError, "activations is on meta"),
    ("sparse activations", lambda _: trained(SPARSE), ShapeError, "activations is torch.sparse_coo"),
    ("settings that are none", lambda _: trained(settings=5), ConfigError, "settings is a int"),
    ("a folder that is a number", lambda _: trained(out=3), ConfigError, "out is 3"),
    ("a folder of no name", lambda _: trained(out=""), ConfigError, "out is ''"),
    ("a folder that no file can be", lambda _: trained(out="a\0b"), ConfigError, "out is 'a"),
    ("into a file", lambda at: trained(out=str(at / "good" / "cfg.json")), StorageError, "cfg.json"),
    ("resume of text", lambda _: trained(resume="no"), ConfigError, "resume is 'no'"),
    ("deterministic of text", lambda _: trained(deterministic="no"), ConfigError, "deterministic is 'no'"),
    ("lr that no float holds", lambda _: trained(lr=GOOGOL), ConfigError, "lr is 1000"),
    ("steps that nobody prints", lambda _: trained(steps=-ENDLESS), ConfigError, "steps is a very long int"),
    ("more l0 than features", lambda _: trained(target_l0=9), ConfigError, "target_l0 is 9; there are 8 features"),
    ("too few tokens, a folder", lambda at: trained(batch_size=17, out=at / "new"), ShapeError, "lower batch_size"),
    ("no batches", lambda _: trained(Batches()), ShapeError, "gave no more at step 0"),
    ("batches that end", lambda _: trained(Batches(X), steps=3), ShapeError, "gave no more at step 1"),
    ("batches of lists", lambda _: trained(Batches([1, 2])), ShapeError, "gave a list at step 0"),
    ("batches of another width", lambda _: trained(Batches(X[:, :3])), ShapeError, "d_in=4"),
    ("upgraded without data", lambda _: upgrade(RELU, META), ConfigError, "activations is on meta"),
    ("a teacher without data", lambda _: upgrade(ReluSAE(4, 8, device="meta"), X), ConfigError, "W_enc is on meta"),
    ("a decoder with NaN", lambda _: upgrade(nan_in_decoder(), X), NumericsError, r"W_dec holds 1 NaN.*\[2, 1\]"),
    ("nothing but zeros", lambda _: upgrade(RELU, torch.zeros(16, 4)), NumericsError, "activations.*all zero"),
    ("zeros, direct", lambda _: upgrade(RELU, 0 * X, form="direct"), NumericsError, "activations.*all zero"),
    ("half a degree", lambda _: upgrade(RELU, X, degree=(3.9, 2.2)), ConfigError, r"degree is \(3.9, 2.2\)"),
    ("a degree of truth", lambda _: upgrade(RELU, X, degree=(True, False)), ConfigError, r"degree is \(True"),
    ("endless coefficients", lambda _: upgrade(RELU, X, coefficients="9" * 5000), ConfigError, "coefficients is '9999"),
]


def nan_in_decoder():
    one = ReluSAE(D_IN, D_SAE)
    one.W_dec.data[2, 1] = NAN
    return one


SCORES = [
    ("without data", lambda _: reconstruction(RELU, META), ConfigError, "activations is on meta"),
    (
        "of weights with NaN",
        lambda _: reconstruction(broken(ReluSAE(4, 8)), X),
        NumericsError,
        r"W_enc holds 1.*\[1, 2\]",
    ),
    ("exported without data", lambda _: to_jumprelu(sae(), META), ConfigError, "activations is on meta"),
    ("contexts in a list", lambda _: compare({"a": RELU}, X, contexts=[0] * 16), ShapeError, "contexts is a list"),
    ("measured is a number", lambda _: compare({"a": RELU}, X, measured=3), ConfigError, "measured is a int"),
    ("matched with no SAE", lambda _: match_features(3, RELU, X), ConfigError, "teacher is a int"),
    ("matched, no SAE", lambda _: match_features(RELU, NOT_AN_SAE, X), ConfigError, "sae is a Linear"),
    ("matched in half pairs", lambda _: match_features(RELU, RELU, X, pairs=64.5), ConfigError, "pairs is 64.5"),
    ("spliced into text", lambda _: spliced("gpt2"), ConfigError, "model is a str"),
    ("spliced, no SAE", lambda _: spliced(one=3), ConfigError, "sae is a int"),
    ("spliced below NaN", lambda _: spliced(norm_limit=NAN), ConfigError, "norm_limit is nan"),
]

FITS = [
    ("a target that fails", lambda _: fit_gate(refuse, (3, 2)), ConfigError, "target.*nobody divides"),
    ("a target of torch", lambda _: fit_gate(torch.relu, (3, 2)), ConfigError, "target must be a function of a numpy"),
    ("a target of text", lambda _: fit_gate(lambda t: "x", (3, 2)), ConfigError, "target.*could not convert"),
    ("a complex target", lambda _: fit_gate(lambda t: 1j * t, (3, 2)), ConfigError, "target.*complex"),
    ("a weight that fails", lambda _: fit_gate("relu", (3, 2), weight=refuse), ConfigError, "weight.*nobody divides"),
    ("complex samples", lambda _: fit_gate("relu", (3, 2), samples=np.ones(4) * 1j), ConfigError, "samples.*complex"),
    ("a margin of nothing", lambda _: fit_gate("step", (3, 2), margin=1e-300), ConvergenceError, "margin=1e-300"),
    ("a theta no float holds", lambda _: fit_gate("step", (3, 2), theta=GOOGOL), ConfigError, "theta is 1000"),
]


def loop(at, name="loop"):
    """A link to itself."""
    if not (at / name).is_symlink():
        (at / name).symlink_to(name)
    return at / name


def pipe(at):
    if not (at / "pipe").exists():
        os.mkfifo(at / "pipe")
    return at / "pipe"


FILES = [
    ("saved to a number", lambda _: sae().save_pretrained(3), ConfigError, "folder is 3"),
    ("saved to nothing", lambda _: sae().save_pretrained(""), ConfigError, "folder is ''"),
    ("saved to no name", lambda _: sae().save_pretrained("a\0b"), ConfigError, "folder is 'a"),
    ("saved to half a letter", lambda at: sae().save_pretrained(at / "\ud800"), ConfigError, "folder is "),
    ("trained into no UTF-8", lambda at: trained(out=at / "\udcff"), ConfigError, "out is Posix"),
    ("saved to a loop", lambda at: sae().save_pretrained(loop(at)), StorageError, "loop cannot be made"),
    ("saved without data", lambda at: sae().to("meta").save_pretrained(at / "good"), ConfigError, "W_enc is on meta"),
    ("scores in a list", lambda at: sae().save_pretrained(at / "good", metrics=[1]), ConfigError, "metrics is not"),
    ("scores of scores", lambda at: sae().save_pretrained(at / "good", metrics={"rsae": 3}), ConfigError, "metrics is"),
    ("a loop", lambda at: load_teacher(loop(at)), FormatError, "loop does not exist"),
    ("of nobody", lambda _: load_teacher("~nosuchuser/x"), FormatError, "~nosuchuser/x does not exist"),
    ("a list of formats", lambda at: load_teacher(at / "good", format=["x"]), ConfigError, r"format is \['x'\]"),
    ("a flag of text in a file", lambda at: FusedRationalSAE.from_pretrained(at / "flag"), FormatError, "is 'no'"),
    ("eight bits in a file", lambda at: FusedRationalSAE.from_pretrained(at / "float8"), FormatError, "torch.float8"),
    ("a store of a list", lambda at: store_tensor([[1.0]], at / "new"), ShapeError, "x is a list"),
    ("a store of integers", lambda at: store_tensor(X.long(), at / "new"), ConfigError, "x is torch.int64"),
    ("a complex store", lambda at: store_tensor(X * 1j, at / "new"), ConfigError, "x is torch.complex64"),
    ("a store of infinity", lambda at: store_tensor(X * INF, at / "new"), NumericsError, r"x holds 64.*\[0, 0\]"),
    (
        "a store of no shards",
        lambda at: store_tensor(X, at / "new", rows_per_shard=0),
        ConfigError,
        "rows_per_shard is 0",
    ),
    ("a store of no width", lambda at: store_tensor(X[:, :0], at / "new"), ShapeError, r"x has shape \(16, 0\)"),
    ("a store below a file", lambda at: store_tensor(X, at / "good" / "cfg.json" / "x"), StorageError, "cfg.json"),
    ("provenance of objects", lambda at: store_tensor(X, at / "new", provenance={"a": X}), ConfigError, "provenance"),
    ("a store of None", lambda _: ActivationStore(None), ConfigError, "folder is None"),
    ("a share of text", lambda at: ActivationStore(at / "store", shards="x"), ConfigError, "shards is 'x'"),
    ("a batch of text", lambda at: batch(at, "4"), ConfigError, "batch_size is '4'"),
    ("a batch of True", lambda at: batch(at, True), ConfigError, "batch_size is True"),
    ("a batch before the first", lambda at: batch(at, start=-1), ConfigError, "start is -1"),
    ("nobody's part of a batch", lambda at: batch(at, part=(2, 2)), ConfigError, "rank of part is 2"),
    ("a batch of no seed", lambda at: batch(at, seed="x"), ConfigError, "seed is 'x'"),
    ("a batch on no device", lambda at: batch(at, device="x"), ConfigError, "device 'x'"),
    ("a batch of integers", lambda at: batch(at, dtype=torch.int32), ConfigError, "dtype is torch.int32"),
    (
        "rows of integers",
        lambda at: ActivationStore(at / "store").tensor(torch.int32),
        ConfigError,
        "dtype is torch.int",
    ),
    ("text of None", lambda _: load_corpus(None), ConfigError, "spec is None"),
    ("text of no name", lambda _: load_corpus(""), ConfigError, "spec is ''"),
    ("text from a pipe", lambda at: load_corpus(pipe(at)), SourceError, "pipe is neither a file nor a folder"),
    ("text in no lines", lambda at: load_corpus(at / "some.txt", max_documents=-1), ConfigError, "max_documents is -1"),
]

ODD = [
    (f"{door}, odd: {case[0]}", *case[1:])
    for door, cases in (
        ("SAE", SAES), ("code", CODES), ("training", TRAINING), ("scores", SCORES), ("fit_gate", FITS),
        ("files", FILES),
    )
    for case in cases
]  # fmt: skip
