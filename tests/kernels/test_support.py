"""The sparse step's kernels, from h to every gradient, against the dense gate in float64."""

from importlib import import_module

import pytest
import torch
from gate_cases import DTYPES, doubtful, error, magnitudes, name_of, oracle, random_gate, to

from rsae_triton.kernels.support_gate import entry_gate_backward, entry_gate_forward
from rsae_triton.kernels.support_list import Entries, list_entries, list_rows
from rsae_triton.kernels.support_mark import support_mark
from rsae_triton.kernels.support_products import entry_dots, support_decode
from rsae_triton.kernels.support_sums import feature_sums
from rsae_triton.ops.reference import GateSpec

SHAPE = (21, 5, 33)  # n_tokens, d_in, n_features: nothing divides a tile
KEYS = ("counts", "x_hat", "dW_dec", "dW_enc", "db_enc", "dthreshold", "l1", "along", "squares")
# Of the largest value, or of the largest sum of absolute terms: float32 sums of some ten terms; 16-bit codes are
# rounded before they are decoded, as the dense step's are.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def spec_of(degree=(3, 2), backward="rational", amplitude="rational"):
    return GateSpec(*degree, form="gated", backward=backward, amplitude=amplitude)


def inputs(gate, spec, dtype=torch.float32, shape=SHAPE, seed=0):
    """h without its bias [F, n], the bias, h [n, F] as the kernels see it, x and g [n, d], W_dec, b_dec, and the
    gradients of counts (all the same) and l1; no h so near to a decision that rounding could turn it."""
    (n, d, features), generator = shape, torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    bias = (0.3 * normal(features)).to(dtype)
    raw = torch.zeros(features, n, dtype=dtype)
    near = torch.ones(n, features, dtype=torch.bool)
    for _ in range(30):
        raw = torch.where(near.T, (normal(features, n) - 1.2).to(dtype), raw)
        near = doubtful(raw.T.float() + bias.float(), gate, spec, 1e-5)
    assert not near.any()
    raw = raw.contiguous()
    x, g = (normal(n, d).to(dtype) for _ in range(2))
    W_dec, b_dec = (normal(features, d) / d**0.5).to(dtype), normal(d).to(dtype)
    return (
        raw,
        bias,
        raw.T.float() + bias.float(),
        x,
        g,
        W_dec,
        b_dec,
        normal(1).expand(features),
        0.7 * normal(features).abs(),
    )


def sparse(gate, spec, given, device, capacity=None, sums=True):
    """The step's kernels in their order."""
    raw, bias, _, x, g, W_dec, b_dec, dcounts, dl1 = (one.to(device) for one in given)
    gate = to(gate, device)
    flags = {"p": spec.p, "q": spec.q, "identity": spec.amplitude == "identity"}
    capacity = raw.numel() if capacity is None else capacity
    marks = support_mark(raw, gate.threshold, gate.input_scale, bias)
    entries = list_entries(raw, marks, capacity)
    scratch = raw.clone()
    z = entry_gate_forward(entries, gate, scratch, **flags)
    rows = list_rows(scratch, marks, capacity)
    x_hat = support_decode(rows, W_dec, b_dec)
    dz = entry_dots(g, W_dec, entries)
    dcount, l1 = (float(dcounts[0]) if len(dcounts) else 0.0, 0.7) if sums else (0.0, 0.0)
    dh, dt = entry_gate_backward(
        entries, dz, dcount, l1, dl1 / 0.7, gate, **flags, backward_rational=spec.backward == "rational"
    )
    found = feature_sums(entries, z, dz, dh, dt, g, x)
    outcome = {
        "counts": marks.counts, "x_hat": x_hat, "dW_dec": found.decoder, "dW_enc": found.encoder, "db_enc": found.dh,
        "dthreshold": found.dtheta, "l1": found.l1, "along": found.along, "squares": found.squares.sum(0).sqrt(),
    }  # fmt: skip
    return {name: one.cpu() for name, one in outcome.items()}, marks, entries, rows, z


def dense(gate, spec, given, sums=True):
    """The same in float64, every product whole."""
    _, _, h, x, g, W_dec, b_dec, dcounts, dl1 = (one.double() for one in given)
    found = oracle(h, g @ W_dec.T, dcounts if sums else None, dl1 if sums else None, gate, spec, torch.float64)
    return {
        "counts": found["counts"], "x_hat": found["z"] @ W_dec + b_dec, "dW_dec": found["z"].T @ g,
        "dW_enc": found["dh"].T @ x, "db_enc": found["db_enc"], "dthreshold": found["dthreshold"], "l1": found["l1"],
        "along": ((found["z"].T @ g) * W_dec).sum(1),
        "squares": torch.stack([(found["z"].T @ g).norm(dim=1), (found["dh"].T @ x).norm(dim=1)]),
    }  # fmt: skip


def check(gate, spec, device, dtype=torch.float32, shape=SHAPE, sums=True):
    given = inputs(gate, spec, dtype, shape)
    found, *more = sparse(gate, spec, given, device, sums=sums)
    truth = dense(gate, spec, given, sums=sums)
    g_z = given[4].double() @ given[5].double().T
    scale = magnitudes(given[2], g_z, *(given[7:] if sums else (None, None)), gate, spec)
    for name in KEYS:
        allowed = TOLERANCE[dtype if name == "x_hat" else torch.float32]
        largest = scale[name].max() if name in scale else None
        assert error(found[name], truth[name], largest) <= allowed, name
    return found, *more


@pytest.mark.parametrize("amplitude", ["rational", "identity"])
@pytest.mark.parametrize("backward", ["soft", "rational"])
def test_every_flavour(backward, amplitude, device):
    spec = spec_of(backward=backward, amplitude=amplitude)
    sums = backward == "rational"
    check(random_gate(3, 2, 33, 1 if sums else 33), spec, device, sums=sums)


@pytest.mark.parametrize("degree", [(0, 0), (9, 8), (12, 12)], ids=name_of)
def test_every_degree(degree, device):
    check(random_gate(*degree, 33, 33), spec_of(degree), device, shape=(9, 4, 33))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_dtype(dtype, device):
    check(random_gate(5, 4, 33, 1), spec_of((5, 4)), device, dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 33), (130, 3, 1), (16, 2, 64), (16, 520, 2)], ids=str)
def test_ragged_shapes(shape, device):
    check(random_gate(3, 2, shape[2], 1), spec_of(), device, shape=shape)


def test_groups_of_coefficients(device):
    """Grouped coefficients reach the kernels as sets per feature."""
    few = random_gate(3, 2, 33, 11)
    spread = {name: getattr(few, name).repeat_interleave(3, 0) for name in few._fields[:5]}
    check(few._replace(**spread), spec_of(), device)


@pytest.mark.parametrize(("threshold", "low", "high"), [(-100.0, 21, 21), (100.0, 0, 0), (0.0, 0, 20)])
def test_all_active_none_active_and_thresholds_of_zero(threshold, low, high, device):
    gate = random_gate(3, 2, 33, 1)._replace(threshold=torch.full((33,), threshold))
    found, marks, entries, rows, _ = check(gate, spec_of(), device)
    assert found["counts"].min() >= low
    assert found["counts"].max() <= high
    assert int(rows.offsets[-1]) == found["counts"].sum()
    assert int(entries.offsets[-1]) == marks.in_support.sum() >= found["counts"].sum()


def test_lists_are_in_order(device):
    gate = random_gate(3, 2, 33, 1)
    given = inputs(gate, spec_of())
    _, _, entries, rows, z = sparse(gate, spec_of(), given, device)
    low = gate.threshold - gate.input_scale
    features, tokens = (given[2] > low).T.nonzero(as_tuple=True)
    nnz = int(entries.offsets[-1])
    assert torch.equal(entries.features[:nnz].cpu().long(), features)
    assert torch.equal(entries.tokens[:nnz].cpu().long(), tokens)
    assert torch.equal(entries.values[:nnz].cpu(), given[2][tokens, features])
    tokens, features = (given[2] > gate.threshold).nonzero(as_tuple=True)
    used = int(rows.offsets[-1])
    assert torch.equal(rows.features[:used].cpu().long(), features)
    assert torch.equal(rows.offsets.cpu().diff(), torch.bincount(tokens, minlength=21))
    active = (z[:nnz] != 0).sum()
    assert active == used


def test_what_is_beyond_the_capacity_is_left_out_and_counted(device):
    gate = random_gate(3, 2, 33, 1)
    given = inputs(gate, spec_of())
    raw, marks = given[0].to(device), support_mark(*(one.to(device) for one in (given[0], *gate[5:2:-2], given[1])))
    whole = list_entries(raw, marks, raw.numel())
    for capacity in (0, 1, 100):
        entries, rows = list_entries(raw, marks, capacity), list_rows(raw, marks, capacity)
        assert torch.equal(entries.offsets, whole.offsets)
        assert int(entries.offsets[-1]) > 100
        for name in ("tokens", "features", "values"):
            assert torch.equal(getattr(entries, name), getattr(whole, name)[:capacity])
        assert len(rows.values) == capacity
    # The whole step with too little room: wrong numbers that nobody uses, and no memory touched that is not its own.
    sparse(gate, spec_of(), given, device, capacity=33)


def test_a_feature_with_many_entries_is_summed_in_runs(device, monkeypatch):
    monkeypatch.setattr(import_module("rsae_triton.kernels.support_sums"), "RUN", 4)
    gate = random_gate(3, 2, 33, 1)
    for threshold in (gate.threshold, torch.where(torch.arange(33) % 9 == 0, -100.0, 3.0)):
        check(gate._replace(threshold=threshold), spec_of(), device, shape=(13, 3, 33))


def test_nan_stays_in_its_token(device):
    gate, spec = random_gate(3, 2, 33, 1), spec_of()
    raw, *rest = inputs(gate, spec)
    clean = sparse(gate, spec, (raw, *rest), device)[0]
    raw[:, 7] = torch.nan
    found = sparse(gate, spec, (raw, *rest), device)[0]
    others = torch.arange(21) != 7
    assert found["x_hat"][7].isnan().all()
    assert torch.equal(found["x_hat"][others], clean["x_hat"][others])
    assert (found["counts"] <= clean["counts"]).all()


def test_bit_reproducible(device):
    gate, spec = random_gate(3, 2, 33, 33), spec_of()
    given = inputs(gate, spec, torch.bfloat16)
    first, again = (sparse(gate, spec, given, device)[0] for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in KEYS)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0), (3, 0, 5)], ids=str)
def test_nothing_to_do(shape, device):
    n, d, features = shape
    raw, bias = torch.zeros(features, n), torch.zeros(features)
    given = (
        raw,
        bias,
        raw.T,
        torch.ones(n, d),
        torch.ones(n, d),
        torch.ones(features, d),
        torch.ones(d),
        *torch.zeros(2, features),
    )
    gate = random_gate(3, 2, features, 1)._replace(threshold=torch.full((features,), 100.0))
    found = sparse(gate, spec_of(), given, device)[0]
    assert torch.equal(found["x_hat"], torch.ones(n, d))
    assert torch.equal(found["dW_dec"], torch.zeros(features, d))


@pytest.mark.parametrize("one_feature", [False, True])
def test_both_sums_in_one_matrix_and_in_addition(one_feature, device):
    """Also where a feature has more entries than a run."""
    n, d, features = (600, 3, 1) if one_feature else SHAPE
    generator = torch.Generator().manual_seed(5)
    there = (torch.rand(features, n, generator=generator) < (1 if one_feature else 0.3)).to(device)
    at, tokens = (one.to(torch.int32) for one in there.nonzero(as_tuple=True))
    values, others, g, x, held = (
        torch.randn(size, generator=generator).to(device)
        for size in ((len(tokens),), (len(tokens),), (n, d), (n, d), (features, d))
    )
    offsets = torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0))
    entries = Entries(tokens, at, values, offsets)
    wanted = torch.zeros(2, features, n, dtype=torch.float64, device=device)
    wanted[0, at.long(), tokens.long()], wanted[1, at.long(), tokens.long()] = values.double(), others.double()
    wanted = wanted[0] @ g.double() + wanted[1] @ x.double()
    for add in (False, True):
        into = held.clone()
        found = feature_sums(entries, values, values, others, values, g, x, into=into, add=add)
        assert found.decoder is found.encoder is into
        assert error(into.cpu(), (wanted + held if add else wanted).cpu()) <= 1e-6
    with pytest.raises(ValueError, match="two widths"):
        feature_sums(entries, values, values, others, values, g, x[:, 1:], into=into)


def test_what_does_not_fit_is_refused(device):
    gate, spec = to(random_gate(3, 2, 33, 1), device), spec_of()
    raw, bias, _, x, g, W_dec, *_ = (one.to(device) for one in inputs(gate, spec))
    with pytest.raises(ValueError, match="do not fit"):
        support_mark(raw, gate.threshold[1:], gate.input_scale, bias)
    with pytest.raises(ValueError, match="contiguous"):
        support_mark(raw.T.contiguous().T, gate.threshold, gate.input_scale, bias)
    entries = list_entries(raw, support_mark(raw, gate.threshold, gate.input_scale, bias), 50)
    with pytest.raises(ValueError, match="do not fit"):
        entry_dots(g, W_dec[1:], entries)
    narrow = gate._replace(threshold=gate.threshold[1:], activity_threshold=bias[1:])
    with pytest.raises(ValueError, match="32 features"):
        entry_gate_forward(entries, narrow, raw, p=3, q=2, identity=False)
    with pytest.raises(ValueError, match="numbers of tokens"):
        feature_sums(entries, *[entries.values] * 4, g, x[1:])
    with pytest.raises(ValueError, match="contiguous memory"):
        feature_sums(entries, *[entries.values] * 4, g, x, decoder=W_dec.T)
