"""The formulas of cost.py against small steps counted operator by operator."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from counting import Launches, LiveBytes, Traffic
from torch.utils.flop_counter import FlopCounterMode

from rsae_triton.common.errors import ConfigError
from rsae_triton.ops import autoencode, reference, support_triton
from rsae_triton.ops import cost as cost_model
from rsae_triton.ops import encode as ops
from rsae_triton.ops import rounds as rounds_ops
from rsae_triton.ops import step as ops_step
from rsae_triton.ops.autoencode import Autoencoded
from rsae_triton.ops.cost import CEILINGS, STRATEGIES, Step, cost, optimizer_seconds
from rsae_triton.ops.cost_kernels import backward_instructions, forward_instructions
from rsae_triton.ops.pieces import run
from rsae_triton.ops.reference import GateSpec, GateTensors
from rsae_triton.ops.screening import Screen
from rsae_triton.ops.workspace import StepMemory

N, D, F = 256, 2, 1024
DEGREES = [(1, 0), (3, 2), (9, 2), (9, 8), (12, 12)]


def leaves_of(n, d_in, d_sae, p, q, shared, dtype):
    sets = 1 if shared else d_sae
    weights = [torch.randn(d_in, d_sae), torch.zeros(d_sae), torch.randn(d_sae, d_in), torch.zeros(d_in)]
    gate = [torch.randn(sets, p + 1), torch.rand(sets, q), *(torch.ones(sets) for _ in range(3)), torch.zeros(d_sae)]
    leaves = [one.requires_grad_() for one in (*(one.to(dtype) for one in weights), *gate)]
    return torch.randn(n, d_in, dtype=dtype), leaves, torch.full((d_sae,), 0.1)


def spec_of(form, p, q):
    return GateSpec(p, q, form, backward="rational" if form == "gated" else "soft")


def eager_step(n, d_in, d_sae, p, q, shared, form, dtype, mode, encode=reference.encode):
    x, (W_enc, b_enc, W_dec, b_dec, *gate), activity = leaves_of(n, d_in, d_sae, p, q, shared, dtype)
    gate = GateTensors(*gate, activity)
    with mode:
        z, counts, l1 = encode(x, W_enc, b_enc, b_dec, gate, spec_of(form, p, q))
        loss = (x - (z @ W_dec + b_dec)).square().sum(-1).mean()
        if form == "direct":
            loss = loss + 0.1 * (l1 @ W_dec.norm(dim=1).to(l1.dtype)) / n
        else:
            loss = loss + 0.1 * counts.sum() / n
        loss.backward()
    return mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["direct", "gated"])
def test_eager_traffic_and_memory_are_as_counted(form, dtype):
    for p, q in DEGREES:
        for shared in (True, False):
            paper = cost(Step(N, D, F, p, q, shared, form, dtype.itemsize), "eager")
            shape = (N, D, F, p, q, shared, form, dtype)
            counted = eager_step(*shape, Traffic())
            pointwise = sum(kernel.bytes for kernel in paper.kernels if not kernel.flops)
            assert counted.pointwise == pytest.approx(pointwise, rel=0.03)
            assert counted.products == pytest.approx(paper.total("bytes") - pointwise, rel=0.02)
            assert eager_step(*shape, LiveBytes()).peak == pytest.approx(paper.peak_bytes, rel=0.05)


def test_the_operator_keeps_h_beside_z_and_dz():
    shape = (N, 8, F, 3, 2, True, "gated", torch.float32)

    def encode(*arguments):
        return ops.rational_encode(*arguments, "cpu")

    paper = cost(Step(N, 8, F, form="gated", itemsize=4), "split")
    assert eager_step(*shape, LiveBytes(), encode).peak == pytest.approx(paper.peak_bytes, rel=0.1)


def test_products_are_as_counted():
    n, d_in, d_sae = 64, 8, 128
    step = Step(n, d_in, d_sae, itemsize=4)
    eager = eager_step(n, d_in, d_sae, 3, 2, True, "direct", torch.float32, FlopCounterMode(display=False))
    assert eager.get_total_flops() == cost(step, "eager").total("flops") == cost(step, "compiled").total("flops")
    for strategy, tokens, features in (("split", 0, 0), ("chunked", 16, 0), ("streamed", 0, 32)):
        counted = pieces(n, d_in, d_sae, tokens, features, FlopCounterMode(display=False))
        paper = cost(step, strategy, chunk_tokens=tokens, chunk_features=features)
        assert counted.get_total_flops() == paper.total("flops")
    assert cost(step, "fused").total("flops") == cost(step, "split").total("flops")


def pieces(n, d_in, d_sae, tokens, features, mode):
    x, (W_enc, b_enc, W_dec, b_dec, *gate), activity = leaves_of(n, d_in, d_sae, 3, 2, True, torch.float32)
    gate = GateTensors(*gate, activity)
    wanted = [False, *[True] * 10]
    made = ops_step.Step(
        x, W_enc, b_enc, W_dec, b_dec, gate, GateSpec(3, 2), 0.1, 0.0, True, None, None, torch.float32, wanted
    )
    with torch.no_grad(), mode:
        run(made, tokens, features, "cpu")
    return mode


@pytest.mark.parametrize(("tokens", "features"), [(0, 0), (128, 0), (0, 512), (128, 512)])
def test_memory_of_pieces_is_as_counted(tokens, features, monkeypatch):
    monkeypatch.setenv("RSAE_CPU_ENGINE", "tiled")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    n, d_in, d_sae = 512, 16, 4096
    counted = pieces(n, d_in, d_sae, tokens, features, LiveBytes()).peak
    torch.set_num_threads(threads)
    paper = cost(Step(n, d_in, d_sae, itemsize=4), "streamed", chunk_tokens=tokens, chunk_features=features).peak_bytes
    gradients, scratch = 4 * d_sae * (2 * d_in + 30), 4 * 13 * 30720
    assert paper <= counted <= 1.05 * paper + gradients + scratch


def test_predictions_are_in_the_order_that_traffic_implies():
    """And near what was predicted before this model was written (issue: eager 21.7 and 49 ms, compiled 1.8 to 3)."""
    for (p, q, shared), eager in (((3, 2, True), 21.7e-3), ((9, 8, False), 49e-3)):
        step = Step(4096, 768, 24576, p, q, shared)
        seconds = {one: cost(step, one).seconds(CEILINGS["H100"]) for one in STRATEGIES}
        assert seconds["eager"] == pytest.approx(eager, rel=0.2)
        assert seconds["eager"] > 8 * seconds["compiled"]
        assert seconds["compiled"] > 1.15 * seconds["split"]
        assert 1.2e-3 < seconds["split"] < 2e-3
        # The fused backward's tiles are small, for its many sums: the L2 cache holds its product up.
        assert seconds["split"] < seconds["fused"] < 1.3 * seconds["split"]


def test_the_table_of_the_kernels_page_is_what_is_predicted():
    """A failure shows the line that belongs into docs/kernels.md."""
    page, on = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(), CEILINGS["H200"]
    for n, d_in, d_sae in ((4096, 768, 24576), (8192, 2304, 65536), (16384, 4096, 131072)):
        active = 64 / d_sae
        step = Step(n, d_in, d_sae, form="gated", active=active, support=2.1 * active)
        jump, topk = replace(step, family="jumprelu", support=1.3 * active), replace(step, family="topk")
        ways = [(step, "split"), (step, "fused"), (step, "sparse"), (jump, "sparse"), (topk, "sparse")]
        seconds = [10 * step.codes * d_in / on.products[2]]
        seconds += [cost(*way).seconds(on) for way in (*ways, (replace(step, rounds=2), "rounds"))]
        seconds += [optimizer_seconds(step, on, rows=rows) for rows in (False, True)]
        shown = [f"{1e3 * one:.{2 if one < 2e-3 else 1 if one < 20e-3 else 0}f}" for one in seconds]
        shown[3] = f"**{shown[3]}**"
        assert f"\n| {n} x {d_in} x {d_sae} | {' | '.join(shown)} |\n" in page


def test_instructions_are_those_of_the_machine_code():
    assert [forward_instructions(*pq) for pq in ((3, 2), (5, 4), (9, 8))] == [18, 28, 37]
    assert [backward_instructions(*pq) for pq in ((3, 2), (5, 4), (9, 8))] == [53, 68, 97]
    assert 0 < forward_instructions(0, 0) < 18
    assert backward_instructions(12, 12) > 97


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ConfigError, match="split, fused"):
        cost(Step(1, 1, 1), "magic")


def test_flop_counters_see_into_the_operators():
    n, d_in, d_sae = 64, 8, 128
    unit = n * d_in * d_sae

    def encode(*arguments):
        return ops.rational_encode(*arguments, "cpu")

    shape = (n, d_in, d_sae, 3, 2, True, "direct", torch.float32)
    assert eager_step(*shape, FlopCounterMode(display=False), encode).get_total_flops() == 10 * unit
    x, (W_enc, b_enc, W_dec, b_dec, *gate), activity = leaves_of(n, d_in, d_sae, 3, 2, True, torch.float32)
    gate, spec = GateTensors(*gate, activity), GateSpec(3, 2)
    for chunk_features, x_wanted, expected in ((None, False, 10), (32, False, 12), (32, True, 14)):
        x.requires_grad_(x_wanted)
        with FlopCounterMode(display=False) as counted:
            total = autoencode.rational_autoencode(
                x, W_enc, b_enc, W_dec, b_dec, gate, spec, chunk_features=chunk_features, backend="cpu"
            ).total
            total.backward()
        assert counted.get_total_flops() == expected * unit
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        autoencode.rational_autoencode(x, W_enc, b_enc, W_dec, b_dec, gate, spec, backend="cpu")
    assert counted.get_total_flops() == 4 * unit


GATHERS = ("support_decode", "entry_dots", "feature_sums", "long_runs", "round_search", "round_search_back")
"""Kernels that gather rows of matrices; the two-dimensional loads of others are of bits and of h."""


def sparse_case(family, rounds, screen=None):
    """A step's loss on the support, by the kernels, and what the model takes for it. The codes have room for all, and
    the optimiser has left the norms of W_dec."""
    from rsae_triton import RationalGate, fit_gate
    from rsae_triton.sae.rational import FusedRationalSAE
    from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE
    from rsae_triton.training.on_entries import losses_on_entries

    n, d_in, d_sae = 32, 192, 96
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d_in, generator=generator)
    if family == "rational":
        gate = RationalGate.from_fit(fit_gate("ramp", (3, 2)), d_sae, form="gated", backward="rational", threshold=14.0,
                                     input_scale=5.0)  # fmt: skip
        sae = FusedRationalSAE(d_in, d_sae, gate=gate, rounds=rounds, backend="triton", generator=generator)
        for name in ("alpha", "beta", "centre", "log_input_scale"):
            getattr(sae.gate, name).requires_grad_(False)
        if rounds > 1:
            with torch.no_grad():
                sae.refinement.threshold.fill_(14.0)
    else:
        kind, own = {"relu": (ReluSAE, {}), "jumprelu": (JumpReluSAE, {"bandwidth": 2.0, "threshold": 16.0}),
                     "topk": (TopKSAE, {"k": 12}), "batchtopk": (BatchTopKSAE, {"k": 12})}[family]  # fmt: skip
        sae = kind(d_in, d_sae, generator=generator, **own).train()
    with torch.no_grad():
        sae.W_dec.normal_(generator=generator)
        sae.W_enc.data = sae.W_dec.detach().clone().t()
        if family == "relu":
            sae.b_enc.fill_(-16.0)

    memory = StepMemory()
    memory.screen = screen
    memory.know_norms(sae.W_dec, sae.W_dec.detach().norm(dim=1))

    def loss():
        with memory:
            return computed()

    def computed():
        if rounds > 1:
            return sae.autoencode(x, l0_weight=0.1)
        if family == "rational":
            gate, weights = sae.gate.tensors(), (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
            wanted = [False, *[True] * 4, *[False] * 5, True]
            step = ops_step.Step(x, *weights, gate, sae.gate.spec(), 0.0, 0.1, True, None, None, torch.float32, wanted)
            with torch.no_grad():  # not through the operator, into which no mode sees
                return Autoencoded(*support_triton.run(step, n * d_sae)[:7])
        sparsity = {"relu": "l1", "jumprelu": "l0"}.get(family, "none")
        return losses_on_entries(sae, x, sparsity=sparsity, weight=0.1, most=n * d_sae, kernels=True)

    return loss, Step(n, d_in, d_sae, form="gated", itemsize=4, family=family, rounds=rounds)


@pytest.mark.parametrize(
    ("family", "rounds"), [("rational", 1), ("relu", 1), ("jumprelu", 1), ("topk", 1), ("batchtopk", 1),
                           ("rational", 2), ("rational", 3)], ids=str,
)  # fmt: skip
def test_a_sparse_step_moves_and_launches_what_is_counted(family, rounds, monkeypatch):
    """Kernel by kernel in the interpreter: rows that are gathered, all other bytes, and launches."""
    monkeypatch.setattr("rsae_triton.ops.cost.SECTOR", 4)  # which operators do not know
    monkeypatch.setattr("rsae_triton.ops.cost.RANKING", 1)
    loss, step = sparse_case(family, rounds)
    opened, search = [], rounds_ops.search

    def searched(z, weight, on, *rest, **more):
        opened.append(int(on.sum()))
        return search(z, weight, on, *rest, **more)

    monkeypatch.setattr(rounds_ops, "search", searched)
    with Launches(monkeypatch) as counted:
        found = loss()
        if found.total.requires_grad:
            found.total.backward()
    share = 1 / step.codes
    active = sum(opened) / rounds if opened else float(found.counts.sum())  # rounds: the mean over them
    step = replace(step, active=active * share, support=float(found.entries) * share)
    assert 0.05 < step.active <= step.support < 0.4
    paper = cost(step, "rounds" if rounds > 1 else "sparse")
    rows = sum(counted.gathered[name] for name in GATHERS)
    # The rows of W_dec that the dots read are one feature's for many entries: beside L2 they are read once.
    in_cache = counted.gathered["entry_dots"] / 2 - (step.weights * 4 if "entry_dots" in counted.launched else 0)
    assert paper.total("l2_bytes") == pytest.approx(rows - in_cache, rel=0.06)
    others = sum(counted.flat.values()) + sum(bytes for name, bytes in counted.gathered.items() if name not in GATHERS)
    assert paper.total("bytes") == pytest.approx(others + counted.moved, rel=0.03)
    assert paper.total("launches") == counted.operators + sum(counted.launched.values())
    assert paper.total("flops") == 2 * step.codes * step.d_in


def test_a_screen_adds_what_is_counted(monkeypatch):
    """In bfloat16, whose product the CPU makes as a GPU does; the difference to a whole product, without a check."""
    monkeypatch.setattr(cost_model, "SECTOR", 4)
    monkeypatch.setitem(cost_model.PASSED, 2, 1.0)  # of so few, hardly one more passes
    counts, papers = [], []
    for narrow in (None, torch.bfloat16):
        screen = None if narrow is None else Screen(narrow)
        if screen is not None:
            screen._steps = 1
        loss, step = sparse_case("rational", 1, screen)
        with monkeypatch.context() as patch, Launches(patch) as counted:
            found = loss()
        share = 1 / step.codes
        step = replace(step, active=float(found.counts.sum()) * share, support=float(found.entries) * share,
                       screen=0 if narrow is None else 2)  # fmt: skip
        flat = sum(counted.flat.values()) + sum(v for k, v in counted.gathered.items() if k not in GATHERS)
        flat -= 0 if narrow is None else step.codes * 4 * 31 / 32  # 32 threads that read one word of bits
        launches = counted.operators + sum(counted.launched.values())
        counts.append((counted.gathered["entry_dots"], flat + counted.moved, launches))
        papers.append(cost(step, "sparse"))
    dots, moved, launches = (b - a for a, b in zip(*counts, strict=True))
    one, other = papers
    assert dots == pytest.approx(counts[0][0], rel=0.05)
    assert other.total("l2_bytes") - one.total("l2_bytes") == pytest.approx(dots / 2 + step.weights * 4, rel=0.06)
    assert other.total("bytes") - one.total("bytes") == pytest.approx(moved, rel=0.15)
    assert other.total("launches") - one.total("launches") == pytest.approx(launches, abs=4)
