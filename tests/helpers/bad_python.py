"""Bad arguments to SAEs, gates and codes: (what it tries, the call, the error, what its message must say).

The message names the argument and says what is wanted; `test_bad_input.py` runs them. `bad_jobs.py` holds the
functions that do something with an SAE, `bad_odd.py` what nobody would write on purpose.
"""

import torch

from rsae_triton import (
    FusedRationalSAE,
    RationalGate,
    SparseCode,
    TopKRationalSAE,
    decode_sparse,
    encode_sparse,
    fit_gate,
    train,
)
from rsae_triton.common.errors import (
    ConfigError,
    NumericsError,
    ResourceError,
    ShapeError,
)
from rsae_triton.ops.autoencode import rational_autoencode
from rsae_triton.ops.encode import rational_encode
from rsae_triton.sae.export import to_jumprelu
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE

D_IN, D_SAE = 4, 8
NAN, INF = float("nan"), float("inf")
X = torch.randn(16, D_IN, generator=torch.Generator().manual_seed(0))
INTEGERS = torch.zeros(16, D_IN, dtype=torch.int64)
RELU = ReluSAE(D_IN, D_SAE, generator=torch.Generator().manual_seed(1))
NOT_AN_SAE = torch.nn.Linear(D_IN, D_SAE)


def sae(**options):
    return FusedRationalSAE(D_IN, D_SAE, **{"form": "gated", **options})


def gate(d_sae=D_SAE, degree=(1, 0), a=(0.0, 1.0), b=(), **options):
    return RationalGate(d_sae, degree, a, b, **options)


def by_token(k=2, **options):
    return TopKRationalSAE(D_IN, D_SAE, k=k, **{"gate": gate(form="gated"), **options})


def with_nan(value=NAN):
    x = X.clone()
    x[3, 1] = value
    return x


def broken(one):
    with torch.no_grad():
        one.W_enc[1, 2] = NAN
    return one


def later(**attributes):
    one = sae()
    for name, value in attributes.items():
        setattr(one, name, value)
    return one


def trained(activations=X, one=None, **options):
    return train(one or sae(), activations, **{"steps": 1, "batch_size": 8, "progress": False, **options})


def loss(**options):
    one = sae()
    names = ("x", "W_enc", "b_enc", "W_dec", "b_dec", "gate", "spec")
    values = dict(
        zip(names, (X, one.W_enc, one.b_enc, one.W_dec, one.b_dec, one.gate.tensors(), one.gate.spec()), strict=True)
    )
    values.update({name: options.pop(name) for name in names if name in options})
    return rational_autoencode(*values.values(), **options)


def code(values=1.0, index=0, count=1, width=1):
    indices, counts = torch.full((1, width), index), torch.full((1,), count)
    return SparseCode(torch.full((1, width), values), indices, counts)


JUMP = fit_gate("jumprelu", (9, 8), theta=0.1, margin=0.02)

SAES = [
    ("d_in is text", lambda _: FusedRationalSAE("4", 8), ConfigError, r"d_in is '4'; give an integer"),
    ("d_in is 0", lambda _: FusedRationalSAE(0, 8), ConfigError, "d_in is 0"),
    ("d_sae is a float", lambda _: FusedRationalSAE(4, 8.0), ConfigError, "d_sae is 8.0"),
    ("d_sae is a bool", lambda _: ReluSAE(4, True), ConfigError, "d_sae is True"),
    ("more than 2^63 weights", lambda _: ReluSAE(2**32, 2**32), ShapeError, "d_in=4294967296"),
    ("a size beyond int64", lambda _: ReluSAE(2**64, 2), ShapeError, "d_in"),
    ("more than any address space", lambda _: ReluSAE(2**20, 2**30), ResourceError, "TiB"),
    ("weights of integers", lambda _: sae(dtype=torch.int32), ConfigError, "dtype is torch.int32"),
    ("a dtype by name", lambda _: sae(dtype="float32"), ConfigError, "dtype is 'float32'"),
    ("no such device", lambda _: sae(device="nonsense"), ConfigError, "device 'nonsense'"),
    ("no such backend", lambda _: sae(backend="x"), ConfigError, "backend"),
    ("a backend set later", lambda _: later(backend="x").encode(X), ConfigError, "backend"),
    ("degree of three", lambda _: sae(degree=(3, 2, 1)), ConfigError, "degree"),
    ("degree of one", lambda _: sae(degree=3), ConfigError, "degree"),
    ("degree above 12", lambda _: sae(degree=(13, 2)), ConfigError, "degree"),
    ("degree below 0", lambda _: sae(degree=(-1, 2)), ConfigError, "degree"),
    ("no such form", lambda _: sae(form="x"), ConfigError, "form is 'x'"),
    ("no such domain", lambda _: sae(domain="x"), ConfigError, "domain is 'x'"),
    ("no such amplitude", lambda _: sae(amplitude="x"), ConfigError, "amplitude is 'x'"),
    ("no such backward", lambda _: sae(backward="x"), ConfigError, "backward is 'x'"),
    ("groups do not divide d_sae", lambda _: sae(groups=3), ConfigError, "groups=3 does not divide d_sae=8"),
    ("groups is 0", lambda _: sae(groups=0), ConfigError, "groups is 0"),
    ("groups is text", lambda _: sae(groups="shared"), ConfigError, "groups is 'shared'"),
    ("no such normalisation", lambda _: sae(normalize_activations="x"), ConfigError, "normalize_activations is 'x'"),
    ("a gate of another size", lambda _: sae(gate=gate(d_sae=4)), ConfigError, "gate has d_sae=4"),
    ("a gate that is none", lambda _: sae(gate="relu"), ConfigError, "gate is a str"),
    ("metadata that is no dictionary", lambda _: sae(metadata=[1]), ConfigError, "metadata is a list"),
    ("k above d_sae", lambda _: TopKSAE(4, 8, k=9), ConfigError, "k is 9"),
    ("k is 0", lambda _: BatchTopKSAE(4, 8, k=0), ConfigError, "k is 0"),
    ("k of a rational above d_sae", lambda _: by_token(k=9), ConfigError, "k is 9"),
    ("k of a rational is a float", lambda _: by_token(k=2.0), ConfigError, "k is 2.0"),
    ("thresholds by token, direct", lambda _: by_token(gate=gate()), ConfigError, "need form='gated'"),
    ("thresholds by token in pieces", lambda _: by_token().autoencode(X), ConfigError, "memory='saved'"),
    ("thresholds by token, sparse", lambda _: encode_sparse(by_token(), X), ConfigError, "thresholds='feature'"),
    ("thresholds by token as a JumpReLU", lambda _: to_jumprelu(by_token(), X), ConfigError, "thresholds='feature'"),
    ("thresholds by token, other x", lambda _: by_token().encode(X[:, :3]), ShapeError, "x has shape"),
    ("a negative threshold", lambda _: JumpReluSAE(4, 8, threshold=-1.0), ConfigError, "threshold"),
    ("a threshold that is NaN", lambda _: JumpReluSAE(4, 8, threshold=NAN), ConfigError, "threshold"),
    ("three thresholds", lambda _: JumpReluSAE(4, 8, threshold=torch.ones(3)), ShapeError, "threshold has shape"),
    ("a rectangle of no width", lambda _: JumpReluSAE(4, 8, bandwidth=0), ConfigError, "bandwidth"),
    ("an activation scale of 0", lambda _: sae().fold_activation_scale_(0), NumericsError, "scale is 0"),
    ("an infinite activation scale", lambda _: sae().fold_activation_scale_(INF), NumericsError, "scale is inf"),
    ("an activation scale of text", lambda _: sae().fold_activation_scale_("x"), NumericsError, "scale is 'x'"),
]

GATES = [
    ("no features", lambda _: gate(d_sae=0), ConfigError, "d_sae is 0"),
    ("d_sae is a float", lambda _: gate(d_sae=8.0), ConfigError, "d_sae is 8.0"),
    ("a of another length", lambda _: gate(a=[1.0]), ShapeError, r"a has shape \(1, 1\)"),
    ("a of three dimensions", lambda _: gate(a=torch.zeros(2, 2, 2)), ShapeError, "a has shape"),
    ("a is text", lambda _: gate(a="x"), ConfigError, "a is 'x'"),
    ("a is None", lambda _: gate(a=None), ConfigError, "a is None"),
    ("a holds NaN", lambda _: gate(a=[NAN, 1.0]), NumericsError, r"a holds 1 NaN or infinite.*\[0, 0\]"),
    ("b of another length", lambda _: gate(b=[1.0]), ShapeError, "b has shape"),
    ("degree is None", lambda _: gate(degree=None), ConfigError, "degree is None"),
    ("degree of floats", lambda _: gate(degree=(1.0, 0)), ConfigError, "degree is 1.0"),
    ("input_scale is 0", lambda _: gate(input_scale=0.0), NumericsError, "input_scale must be positive"),
    ("input_scale is infinite", lambda _: gate(input_scale=INF), NumericsError, "input_scale holds"),
    ("input_scale of three", lambda _: gate(input_scale=[1.0, 2.0, 3.0]), ShapeError, "input_scale has shape"),
    ("threshold of two", lambda _: gate(threshold=[1.0, 2.0]), ShapeError, "threshold has shape"),
    ("a gated threshold below 0", lambda _: gate(threshold=-1.0, form="gated"), NumericsError, "threshold must not"),
    ("activity below 0", lambda _: gate(activity_threshold=-1.0), NumericsError, "activity_threshold must not"),
    ("a scale of 0", lambda _: gate(numerator_scale=[0.0, 1.0]), NumericsError, "numerator_scale must be positive"),
    ("group_of too short", lambda _: gate(groups=2, group_of=[0, 1]), ShapeError, "group_of"),
    ("group_of of floats", lambda _: gate(groups=2, group_of=torch.zeros(8)), ShapeError, "group_of"),
    ("a group that is not there", lambda _: gate(groups=2, group_of=torch.full((8,), 2)), ConfigError, "group_of"),
    ("group_of is text", lambda _: gate(groups=2, group_of="ab"), ConfigError, "group_of is 'ab'"),
    ("identity of a direct gate", lambda _: gate(amplitude="identity"), ConfigError, "amplitude='identity'"),
    ("pre-activations of another width", lambda _: gate()(torch.zeros(3)), ShapeError, "hidden_pre ends in"),
    ("pre-activations as a list", lambda _: gate()([1.0] * 8), ShapeError, "hidden_pre is a list"),
    ("integer pre-activations", lambda _: gate()(torch.zeros(8).long()), ConfigError, "hidden_pre is torch.int64"),
    ("a fit that is none", lambda _: RationalGate.from_fit(None, 8), ConfigError, "fit is a NoneType"),
    (
        "thresholds of a ReLU fit",
        lambda _: RationalGate.from_fit(fit_gate("relu", (3, 2)), 8, thresholds=torch.ones(8)),
        ConfigError,
        "thresholds",
    ),
    (
        "thresholds below 0",
        lambda _: RationalGate.from_fit(JUMP, 8, thresholds=-torch.ones(8)),
        ConfigError,
        "thresholds",
    ),
    ("thresholds of 7", lambda _: RationalGate.from_fit(JUMP, 8, thresholds=torch.ones(7)), ShapeError, "input_scale"),
]

CODES = [
    ("x is a list", lambda _: sae().encode([1.0] * 4), ShapeError, "x is a list"),
    ("x is an array", lambda _: sae().encode(X.numpy()), ShapeError, "x is a ndarray"),
    ("x is None", lambda _: RELU.encode(None), ShapeError, "x is a NoneType"),
    ("x of integers", lambda _: sae().encode(INTEGERS), ConfigError, "x is torch.int64"),
    ("x of integers, ReLU", lambda _: RELU.encode(INTEGERS), ConfigError, "x is torch.int64"),
    ("x is complex", lambda _: sae().encode(X.to(torch.complex64)), ConfigError, "x is torch.complex64"),
    ("x is sparse", lambda _: sae().encode(X.to_sparse()), ShapeError, "x is torch.sparse_coo"),
    ("x in float64", lambda _: sae().encode(X.double()), ConfigError, "x is torch.float64"),
    ("x in float64, ReLU", lambda _: RELU.encode(X.double()), ConfigError, "x is torch.float64"),
    ("x in float64", lambda _: sae()(X.double()), ConfigError, "x is torch.float64"),
    ("x on another device", lambda _: sae().encode(X.to("meta")), ConfigError, "x is on meta"),
    ("x on another device, ReLU", lambda _: RELU.encode(X.to("meta")), ConfigError, "x is on meta"),
    ("x is a number", lambda _: sae().encode(torch.tensor(1.0)), ShapeError, "x has shape"),
    ("x of another width", lambda _: sae().encode(torch.zeros(2, 5)), ShapeError, r"d_in=4"),
    ("codes of another width", lambda _: sae().decode(torch.zeros(2, 4)), ShapeError, "feature_acts has shape"),
    ("codes in float64", lambda _: sae().decode(torch.zeros(2, 8).double()), ConfigError, "feature_acts is torch.f"),
    ("codes of integers", lambda _: sae().decode(torch.zeros(2, 8).long()), ConfigError, "feature_acts is torch.int64"),
    ("codes elsewhere", lambda _: RELU.decode(torch.zeros(2, 8, device="meta")), ConfigError, "feature_acts is on"),
    ("codes are None", lambda _: RELU.decode(None), ShapeError, "feature_acts is a NoneType"),
    (
        "normalised, decoded alone",
        lambda _: sae(normalize_activations="layer_norm").decode(torch.zeros(2, 8)),
        ConfigError,
        "normalises every token",
    ),
    (
        "normalised, other activations",
        lambda _: sae(normalize_activations="layer_norm").decode(torch.zeros(2, 8), torch.zeros(3, 4)),
        ShapeError,
        "x has shape",
    ),
    ("capacity is 0", lambda _: sae().encode_sparse(X, 0), ConfigError, "capacity is 0"),
    ("capacity is text", lambda _: sae().encode_sparse(X, "3"), ConfigError, "capacity is '3'"),
    ("k is negative", lambda _: sae().encode_sparse(X, k=-1), ConfigError, "k is -1"),
    ("k is a float", lambda _: sae().encode_sparse(X, k=1.5), ConfigError, "k is 1.5"),
    ("sparse, another width", lambda _: sae().encode_sparse(torch.zeros(2, 5)), ShapeError, "x has shape"),
    ("sparse, in float64", lambda _: encode_sparse(RELU, X.double()), ConfigError, "x is torch.float64"),
    ("sparse, NaN", lambda _: sae().encode_sparse(with_nan()), NumericsError, "token 3"),
    ("sparse, no SAE", lambda _: encode_sparse(NOT_AN_SAE, X), ConfigError, "sae is a Linear"),
    ("decoded by no SAE", lambda _: decode_sparse(NOT_AN_SAE, code()), ConfigError, "sae is a Linear"),
    ("an index above d_sae", lambda _: sae().decode_sparse(code(index=8)), ShapeError, "indices run from 8"),
    ("an index below 0", lambda _: sae().decode_sparse(code(index=-1)), ShapeError, "indices run from -1"),
    ("more places than there are", lambda _: sae().decode_sparse(code(count=2)), ShapeError, "counts run from 2"),
    ("a code that is none", lambda _: sae().decode_sparse((1, 2, 3)), ShapeError, "code is a tuple"),
    ("a code of None", lambda _: sae().decode_sparse(None), ShapeError, "code is a NoneType"),
    (
        "float indices",
        lambda _: sae().decode_sparse(code()._replace(indices=torch.zeros(1, 1))),
        ShapeError,
        "indices torch.float32",
    ),
    (
        "a code elsewhere",
        lambda _: sae().decode_sparse(SparseCode(*(part.to("meta") for part in code()))),
        ConfigError,
        "code.values is on meta",
    ),
    ("made dense, too narrow", lambda _: code(index=5).to_dense(2), ShapeError, "d_sae is 2"),
    ("made dense, no width", lambda _: code().to_dense("8"), ConfigError, "d_sae is '8'"),
    ("from a number", lambda _: SparseCode.from_dense(torch.tensor(1.0)), ShapeError, "feature_acts is a scalar"),
    ("from dense, no room", lambda _: SparseCode.from_dense(torch.ones(2, 2), -1), ConfigError, "capacity is -1"),
    ("no tokens at a time", lambda _: sae().autoencode(X, chunk_tokens=0), ConfigError, "chunk_tokens is 0"),
    ("features as a float", lambda _: sae().autoencode(X, chunk_features=1.5), ConfigError, "chunk_features is 1.5"),
    ("rounds in pieces", lambda _: sae(form="gated", rounds=2).autoencode(X, chunk_tokens=2), ConfigError, "one round"),
    ("a negative l1", lambda _: sae().autoencode(X, l1_weight=-1), ConfigError, "l1_weight is -1"),
    ("an l1 of text", lambda _: sae().autoencode(X, l1_weight="1"), ConfigError, "l1_weight is '1'"),
    ("an infinite l0", lambda _: sae().autoencode(X, l0_weight=INF), ConfigError, "l0_weight is inf"),
    ("no x", lambda _: loss(x=None), ShapeError, "x is a NoneType"),
    ("no decoder", lambda _: loss(W_dec=None), ShapeError, "W_dec is a NoneType"),
    ("a decoder on its side", lambda _: loss(W_dec=torch.zeros(4, 8)), ShapeError, r"W_dec has shape \(4, 8\)"),
    ("b_dec too long", lambda _: loss(b_dec=torch.zeros(5)), ShapeError, "b_dec has shape"),
    ("no gate", lambda _: loss(gate=None), ConfigError, "gate is a NoneType"),
    ("no spec", lambda _: loss(spec=None), ConfigError, "spec a NoneType"),
    ("a target too short", lambda _: loss(target=torch.zeros(3, 4)), ShapeError, "target has shape"),
    ("a target elsewhere", lambda _: loss(target=X.to("meta")), ConfigError, "target is on meta"),
    ("scales too few", lambda _: loss(residual_scale=torch.ones(3)), ShapeError, "residual_scale has shape"),
    ("no such backend for a loss", lambda _: loss(backend="x"), ConfigError, "backend"),
    (
        "a gate of another degree",
        lambda _: rational_encode(
            X, RELU.W_enc, RELU.b_enc, None, sae().gate.tensors(), sae(degree=(5, 4)).gate.spec()
        ),
        ShapeError,
        "a has shape",
    ),
    (
        "weights elsewhere",
        lambda _: rational_encode(X, RELU.W_enc.to("meta"), RELU.b_enc, None, sae().gate.tensors(), sae().gate.spec()),
        ConfigError,
        "W_enc is on meta",
    ),
]

TABLE = [
    (f"{door}: {case[0]}", *case[1:])
    for door, cases in (("SAE", SAES), ("gate", GATES), ("code", CODES))
    for case in cases
]
