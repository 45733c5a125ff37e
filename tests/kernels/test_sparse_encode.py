"""sparse_encode: the codes that are not zero, as encode_forward computes them, and the k largest of them."""

from importlib import import_module

import pytest
import torch
from gate_cases import DTYPES, FLAVOURS, assert_as_good_as_torch, doubtful, flags, name_of, oracle, random_gate, to

from rsae_triton.kernels import configs, encode_forward, sparse_encode
from rsae_triton.ops.reference import GateSpec, GateTensors

SHAPE = (21, 20, 75)  # n_tokens, d_in, n_features: nothing divides a tile, and the last word is not full
HARD = [f for f in FLAVOURS if f["backward"] == "soft" and f["hard"]]
RANKED = GateSpec(0, 0, "gated", amplitude="identity")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs and several runs of tokens, and steps of two words, at a size the interpreter can do."""

    def use(sub=2):
        for table in configs.MATMUL.values():
            for key in table:
                monkeypatch.setitem(table, key, configs.MatmulTile(32, 16, 16, sub, 4, 2, group=2))
        monkeypatch.setattr(configs, "SPECIALISED", 1)  # keep `sub` although the tests' sizes are ragged
        encode = import_module("rsae_triton.kernels.sparse_encode")
        monkeypatch.setattr(encode, "SCRATCH", 1)
        monkeypatch.setattr(encode, "rows_tile", lambda n_words: configs.RowsTile(2, 32, 16, 4))

    return use


def inputs(dtype, shape=SHAPE, seed=0):
    n_tokens, d_in, n_features = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, d_in, generator=g).to(dtype)
    W = (torch.randn(d_in, n_features, generator=g) / max(d_in, 1) ** 0.5).to(dtype)
    return x, W, 0.1 * torch.randn(n_features, generator=g)


def sparse_gate(p, q, sets, n_features=75):
    """A random gate that few pre-activations open."""
    gate = random_gate(p, q, n_features, sets)
    return gate._replace(threshold=gate.threshold + 1, activity_threshold=gate.activity_threshold + 1)


def hard(spec):
    return {name: value for name, value in flags(spec).items() if name != "hard"}


def dense(rows, n_features):
    """The rows put back in place; on the way, that they are in order and zero where not in use."""
    values, indices, counts = (t.cpu() for t in rows)
    used = torch.arange(values.shape[1]) < counts[:, None]
    assert indices.dtype == torch.int64
    assert (values[~used] == 0).all()
    assert (indices[~used] == 0).all()
    assert ((indices.diff(dim=1) > 0) | ~used[:, 1:]).all()
    return values.new_zeros(len(values), n_features).scatter_add(1, indices, values)


def check(spec, gate, dtype, device, shape=SHAPE, capacity=None, arrange=lambda x: x):
    x, W, b = inputs(dtype, shape)
    arguments = (arrange(x.to(device)), arrange(W.to(device)), b.to(device), to(gate, device))
    rows = sparse_encode(*arguments, **hard(spec), capacity=capacity or shape[2])
    z = encode_forward(*arguments, **flags(spec))[0].T.cpu()
    assert rows.values.dtype == dtype
    assert torch.equal(dense(rows, shape[2]), z)
    assert torch.equal(rows.counts.cpu(), (z != 0).sum(1).int())
    h = x.double() @ W.double() + b.double()
    truth = oracle(h, None, None, None, gate, spec, torch.float64)["z"]
    torchs = oracle(x.float() @ W.float() + b, None, None, None, gate, spec, torch.float32)["z"].to(dtype)
    sure = ~doubtful(h, gate, spec, 2e-5)
    assert_as_good_as_torch("sparse z", dense(rows, shape[2]) * sure, truth * sure, torchs * sure, 4e-6)


@pytest.mark.parametrize("flavour", HARD, ids=name_of)
@pytest.mark.parametrize("per_feature", [False, True], ids=["shared", "per_feature"])
def test_every_flavour(flavour, per_feature, device, small_tiles):
    small_tiles()
    check(GateSpec(3, 2, **flavour), sparse_gate(3, 2, 75 if per_feature else 1), torch.float32, device)


@pytest.mark.parametrize("sub", [1, 2, 4])
@pytest.mark.parametrize("form", ["direct", "gated"])
def test_every_epilogue(form, sub, device, small_tiles):
    small_tiles(sub)
    check(GateSpec(9, 8, form=form), sparse_gate(9, 8, 75), torch.float32, device)


@pytest.mark.parametrize("form", ["direct", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_dtype(dtype, form, device, small_tiles):
    small_tiles()
    check(GateSpec(3, 2, form=form), sparse_gate(3, 2, 1), dtype, device)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 33), (33, 1, 1), (32, 16, 64), (40, 40, 200)], ids=str)
def test_ragged_shapes_with_the_shipped_tiles(shape, device):
    check(GateSpec(3, 2), sparse_gate(3, 2, 1, shape[2]), torch.float32, device, shape=shape)


def test_strides(device, small_tiles):
    small_tiles()

    def spread(t):
        return t.new_zeros(2 * t.shape[0], 3 * t.shape[1])[::2, ::3].copy_(t)

    for arrange in (lambda t: t.T.contiguous().T, spread):
        check(GateSpec(3, 2), sparse_gate(3, 2, 1), torch.bfloat16, device, arrange=arrange)


def test_a_full_row_is_cut_and_counted(device, small_tiles):
    """Beyond the capacity nothing is written, into no other row either, and the count tells how many there were."""
    small_tiles()
    spec, gate = GateSpec(3, 2, form="gated"), sparse_gate(3, 2, 1)
    x, W, b = (t.to(device) for t in inputs(torch.float32))
    b[::2] += 20
    b[:, None][1::2] -= 20
    W[:, 7] = 0
    b[7] = 0.49 + gate.threshold[7]
    gate = to(gate, device)
    whole = sparse_encode(x, W, b, gate, **hard(spec), capacity=75)
    assert whole.counts.unique().tolist() == [39]
    cut = sparse_encode(x, W, b, gate, **hard(spec), capacity=5)
    assert torch.equal(cut.counts, whole.counts)
    assert torch.equal(cut.values, whole.values[:, :5])
    assert torch.equal(cut.indices, whole.indices[:, :5])


@pytest.mark.parametrize(("shift", "active"), [(-50.0, 0), (50.0, 75)])
def test_none_and_all_active(shift, active, device, small_tiles):
    small_tiles()
    gate = sparse_gate(3, 2, 1)
    x, W, b = inputs(torch.float32)
    rows = sparse_encode(
        *(t.to(device) for t in (x, W, b + shift)), to(gate, device), **hard(GateSpec(3, 2, form="gated")), capacity=80
    )
    assert rows.counts.tolist() == [active] * 21
    assert torch.equal(rows.indices[:, :active].cpu(), torch.arange(active).expand(21, -1))


@pytest.mark.parametrize("k", [None, 4])
def test_nan_is_not_zero(k, device, small_tiles):
    """A NaN in x is in every code of its token, and the largest of them; no other token sees it."""
    small_tiles()
    gate, (x, W, b) = sparse_gate(3, 2, 1), inputs(torch.float32)
    x[3, 2] = torch.nan
    rows = sparse_encode(*(t.to(device) for t in (x, W, b)), to(gate, device), **hard(GateSpec(3, 2)), capacity=75, k=k)
    assert rows.values.isnan().any(1).nonzero().flatten().tolist() == [3]
    assert rows.values[3].isnan().all()
    assert rows.counts[3] == k or 75


def test_negative_nan_is_not_lost_to_the_ranking(device):
    x = torch.tensor([[-float("nan"), 1.0], [1.0, 1.0]], device=device)
    gate = to(identity_gate(40), device)
    rows = sparse_encode(x, torch.ones(2, 40, device=device), gate.threshold, gate, **hard(RANKED), capacity=40, k=2)
    assert rows.values.isnan().all(1).tolist() == [True, False]


def identity_gate(n_features):
    """TopK's and ReLU's: h where h > 0."""
    one, zero, zeros = torch.ones(1), torch.zeros(1), torch.zeros(n_features)
    return GateTensors(one[None], torch.empty(1, 0), zero, one, one, zeros, zeros)


def largest(z, k):
    """The k largest positive codes of every row; of equal ones the first, which a stable sort keeps."""
    values, order = z.clamp(min=0).sort(dim=1, descending=True, stable=True)
    return torch.zeros_like(z).scatter(1, order[:, :k], values[:, :k])


@pytest.mark.parametrize("k", [1, 5, 75])
@pytest.mark.parametrize("form", ["direct", "gated"])
def test_the_k_largest(form, k, device, small_tiles):
    small_tiles()
    spec, gate = GateSpec(3, 2, form=form), to(sparse_gate(3, 2, 75), device)
    x, W, b = (t.to(device) for t in inputs(torch.float32))
    z = encode_forward(x, W, b, gate, **flags(spec))[0].T
    rows = sparse_encode(x, W, b, gate, **hard(spec), capacity=75, k=k)
    assert rows.values.shape == rows.indices.shape == (21, k)
    assert torch.equal(dense(rows, 75), largest(z, k).cpu())


@pytest.mark.parametrize("k", [1, 5, 60])
def test_equal_codes_are_taken_by_lowest_index(k, device, small_tiles):
    """Pre-activations of a few whole numbers: most are tied, across words, blocks and programs."""
    small_tiles()
    g = torch.Generator().manual_seed(k)
    x = torch.randint(-1, 2, (21, 6), generator=g).float()
    W = torch.randint(-1, 2, (6, 75), generator=g).float()
    gate = identity_gate(75)
    rows = sparse_encode(
        x.to(device), W.to(device), gate.threshold.to(device), to(gate, device), **hard(RANKED), capacity=75, k=k
    )
    want = largest(x @ W, k)
    assert torch.equal(dense(rows, 75), want)
    assert ((want > 0).sum(1) == k).any() or k == 60
    assert ((x @ W).sort(dim=1, descending=True).values[:, k - 1 : k + 1].diff() == 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_ranking_is_done_before_rounding(dtype, device, small_tiles):
    """In 16 bits these pre-activations are all the same; in float32 the last are the largest."""
    small_tiles()
    gate = identity_gate(75)
    b = 1 + torch.arange(75) * 1e-6
    arguments = (torch.zeros(9, 4, dtype=dtype), torch.zeros(4, 75, dtype=dtype), b, gate)
    rows = sparse_encode(*(t.to(device) for t in arguments[:3]), to(gate, device), **hard(RANKED), capacity=75, k=4)
    assert rows.values.dtype == dtype
    assert torch.equal(rows.indices.cpu(), torch.arange(71, 75).expand(9, -1))


def test_a_code_that_rounds_to_zero_is_no_code(device):
    gate, b = identity_gate(40), torch.full((40,), 1e-9)
    b[30] = 1.0
    half = {"dtype": torch.float16, "device": device}
    for k in (None, 3):
        rows = sparse_encode(
            torch.zeros(2, 4, **half), torch.zeros(4, 40, **half), b.to(device), to(gate, device), **hard(RANKED),
            capacity=40, k=k,
        )  # fmt: skip
        assert rows.counts.tolist() == [1, 1]
        assert rows.indices[:, 0].tolist() == [30, 30]


def test_too_many_candidates_are_told_not_dropped(device, small_tiles):
    """All codes tie: every one is a candidate, and the caller learns how many places they need."""
    small_tiles()
    gate, x, W = identity_gate(75), torch.ones(9, 4), torch.ones(4, 75)
    x[4:] = 0
    arguments = (x.to(device), W.to(device), gate.threshold.to(device), to(gate, device))
    rows = sparse_encode(*arguments, **hard(RANKED), capacity=10, k=3)
    assert rows.counts.tolist() == [75] * 4 + [0] * 5
    rows = sparse_encode(*arguments, **hard(RANKED), capacity=75, k=3)
    assert rows.counts.tolist() == [3] * 4 + [0] * 5
    assert rows.indices[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("k", [None, 7])
def test_bit_reproducible(k, device, small_tiles):
    small_tiles()
    x, W, b = (t.to(device) for t in inputs(torch.float32))
    gate, flavour = to(sparse_gate(3, 2, 1), device), hard(GateSpec(3, 2))
    first = sparse_encode(x, W, b, gate, **flavour, capacity=75, k=k)
    again = sparse_encode(x, W, b, gate, **flavour, capacity=75, k=k)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0), (3, 0, 5)], ids=str)
def test_nothing_to_do(shape, device):
    n_tokens, d_in, n_features = shape
    gate = to(random_gate(3, 2, n_features, 1), device)
    x, W = torch.zeros(n_tokens, d_in, device=device), torch.zeros(d_in, n_features, device=device)
    b = torch.zeros(n_features, device=device)
    rows = sparse_encode(x, W, b, gate, **hard(GateSpec(3, 2)), capacity=5)
    assert rows.values.shape == rows.indices.shape == (n_tokens, 5)
    if n_features:
        z = encode_forward(x, W, b, gate, **flags(GateSpec(3, 2)))[0].T
        assert torch.equal(dense(rows, n_features), z.cpu())


def test_wrong_input_is_refused_with_a_reason(device):
    spec, gate = hard(GateSpec(3, 2)), to(random_gate(3, 2, 5, 1), device)
    x, W, b = torch.zeros(2, 4, device=device), torch.zeros(4, 5, device=device), torch.zeros(5, device=device)
    with pytest.raises(ValueError, match="same dtype"):
        sparse_encode(x.bfloat16(), W, b, gate, **spec, capacity=5)
    with pytest.raises(ValueError, match="do not fit"):
        sparse_encode(x, W[1:], b, gate, **spec, capacity=5)
    for capacity, k in ((0, None), (4, 5), (5, 0)):
        with pytest.raises(ValueError, match="capacity"):
            sparse_encode(x, W, b, gate, **spec, capacity=capacity, k=k)
