"""The screened product: what its kernels make, what it misses, what that is noticed by, and training with it."""

import json
import math
import shutil

import pytest
import torch
from test_support_step import D_SAE, NAMES, SPEC, TOLERANCE, WANTED, errors, given, without_size

import rsae_triton as rt
from rsae_triton import FusedRationalSAE
from rsae_triton.kernels import narrow_rows
from rsae_triton.kernels.support_mark import support_mark
from rsae_triton.ops import pieces, screening, support_triton
from rsae_triton.ops.cost import Step as Size
from rsae_triton.ops.reference import GateTensors
from rsae_triton.ops.screening import FLOAT8, Screen
from rsae_triton.ops.step import Step
from rsae_triton.ops.workspace import StepMemory
from rsae_triton.teachers import JumpReluSAE
from rsae_triton.training.memory import plan_memory
from rsae_triton.training.processes import Alone
from rsae_triton.training.recipes import recipe_for
from rsae_triton.training.run import Run
from rsae_triton.training.settings import TrainSettings

NARROW = [FLOAT8, torch.bfloat16]


def step(inputs, device, screen, dtype=torch.float32, capacity=None):
    """A step's results on the CPU, under this screen; None for a whole product."""
    on = [
        GateTensors(*(t.to(device) for t in one)) if isinstance(one, GateTensors) else one.to(device) for one in inputs
    ]
    memory = StepMemory()
    memory.screen = screen
    room = len(inputs[0]) * len(inputs[3]) if capacity is None else capacity
    with memory:
        made = support_triton.run(Step(*on, SPEC, 0.1, 0.2, True, None, None, dtype, WANTED), room)
    return [one.cpu() for one in made]


def far_from_limits(inputs):
    """The inputs, with rows of both factors of random lengths, so that scales matter."""
    generator = torch.Generator().manual_seed(1)
    x, W_enc, b_enc, W_dec, b_dec, gate = inputs
    longer = torch.exp(torch.randn(len(x), 1, generator=generator))
    return x * longer, W_enc * 1.7, b_enc, W_dec, b_dec, gate


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 48), (33, 100)], ids=str)
def test_rows_are_rounded_as_pytorch_does(shape, dtype, device):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10
    if len(matrix) > 3:
        matrix[1], matrix[2], matrix[3] = 0, torch.nan, 1e-3 * matrix[3]
    made = narrow_rows(matrix.to(device), dtype)
    scales = matrix.abs().amax(1) / 448 if dtype == FLOAT8 else torch.ones(len(matrix))
    scales = torch.where(scales > 0, scales, 1)  # of the row of zeros, and of the one with NaN
    expected = (matrix / scales[:, None]).clamp(-448, 448).to(dtype).float()
    assert torch.equal(made.rows.cpu().float().nan_to_num(7.0), expected.nan_to_num(7.0))
    torch.testing.assert_close(made.scales.cpu(), scales)
    torch.testing.assert_close(made.norms.cpu(), matrix.norm(dim=1), equal_nan=True)
    with pytest.raises(ValueError, match="16384"):
        narrow_rows(torch.zeros(1, 20_000, device=device), dtype)


@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_the_error_is_what_the_margin_takes_it_for(narrow, device):
    """Its standard deviation, on numbers of all sizes, one of them large in every token as in a language model."""
    generator = torch.Generator().manual_seed(0)
    x, rows = torch.randn(64, 96, generator=generator), torch.randn(128, 96, generator=generator)
    x[:, 3] *= 5
    screen = Screen(narrow)
    h, (features, tokens) = screen.product(rows.to(device), x.to(device))
    exact = rows.double() @ x.double().T
    error = ((h.cpu().double() - exact).abs() - 2.0**-8 * exact.abs()).clamp(min=0)  # h itself is in bfloat16
    deviations = error / (features.cpu()[:, None] * tokens.cpu() / screen.sigmas)
    assert float((deviations > screen.sigmas).double().mean()) < 0.05
    if narrow == FLOAT8:
        assert 0.6 < float(deviations.square().mean().sqrt()) < 1.3


def test_marks_with_a_margin_and_among_others(device):
    generator = torch.Generator().manual_seed(0)
    for n, features in ((1, 1), (45, 33), (128, 64)):
        h = torch.randn(features, n, generator=generator).bfloat16()
        theta, width, bias = torch.full((features,), 1.503), torch.full((1,), 0.5), torch.zeros(features)
        margin = torch.rand(features, generator=generator), torch.rand(n, generator=generator)
        given = (one.to(device) for one in (theta, width, bias))
        theta, width, bias = given
        first = support_mark(h.to(device), theta, width, bias, margin=tuple(one.to(device) for one in margin))
        raised = h.float() + margin[0][:, None] * margin[1]
        low = 1.003 - 2.003 * 2.0**-8 - 2.003 * 2.0**-21  # what rounding to bfloat16, and float32, takes
        assert torch.equal(first.in_support.cpu(), (raised > low).sum(1))
        second = support_mark(h.to(device), theta, width, bias, among=first.support)
        assert torch.equal(second.in_support.cpu(), (h.float() > 1.003).sum(1))
        assert torch.equal(second.counts.cpu(), (h.float() > 1.503).sum(1))
        nothing = support_mark(h.to(device), theta, width, bias, among=torch.zeros_like(first.support))
        assert not nothing.support.any()
        assert not nothing.active.any()
        assert int(nothing.in_support.sum()) == int(nothing.counts.sum()) == 0


@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_screened_step_equals_the_dense_step_in_float64(dtype, narrow, device):
    if dtype != torch.float32 and narrow == torch.bfloat16:
        pytest.skip("not narrower")
    inputs = far_from_limits(given(D_SAE))
    double = [
        GateTensors(*(t.double() for t in one)) if isinstance(one, GateTensors) else one.double() for one in inputs
    ]
    if dtype != torch.float32:  # whose rounding of x and h is not at issue
        inputs, double = given(D_SAE), None
    whole = step(inputs, device, None, dtype)
    found = step(inputs, device, Screen(narrow), dtype)
    assert max(errors(without_size(found), without_size(whole)).values()) <= TOLERANCE[dtype]
    assert found[6] == whole[6] > 0
    if double is not None:
        dense = pieces.run(Step(*double, SPEC, 0.1, 0.2, True, None, None, torch.float64, WANTED), 0, 0, "eager")
        assert max(errors(without_size(found), dense).values()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("keep", [(1, 1), (3, 1), (1, 5), (14, 33)], ids=str)
def test_ragged_shapes_and_one_feature(keep, device):
    n, features = keep
    x, W_enc, b_enc, W_dec, b_dec, gate = given(D_SAE)
    gate = GateTensors(*(one[:features] for one in gate))
    inputs = (x[:n], W_enc[:, :features], b_enc[:features], W_dec[:features], b_dec, gate)
    found, whole = (step(inputs, device, one) for one in (Screen(FLOAT8), None))
    assert found[6] == whole[6]
    made = [one for one in zip(without_size(found), without_size(whole), strict=True) if one[0].numel()]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in made)


def test_nan_in_a_token_reaches_that_token_only(device):
    inputs = list(given())
    inputs[0] = inputs[0].clone()
    inputs[0][4, 2] = torch.nan
    x_hat = step(inputs, device, Screen(FLOAT8))[NAMES.index("x_hat")]
    clean = step(given(), device, Screen(FLOAT8))[NAMES.index("x_hat")]
    assert x_hat[4].isnan().all()
    others = torch.arange(len(x_hat)) != 4
    torch.testing.assert_close(x_hat[others], clean[others])


def test_candidates_need_room_too(device):
    """More of them than fit: the results are NaN, and the size says so, although the support itself would fit."""
    inputs = far_from_limits(given())
    screen = Screen(FLOAT8)
    screen.sigmas = 1000.0
    size = int(step(inputs, device, None)[6])
    found = step(inputs, device, screen, capacity=size)
    assert int(found[6]) > size
    assert found[0].isnan()
    assert int(step(inputs, device, screen)[6]) == size


def missing(device, sigmas):
    """The entries that a step misses with this margin, and what its check has found."""
    inputs = far_from_limits(given())
    screen = Screen(FLOAT8)
    screen.sigmas = sigmas
    whole = step(inputs, device, None)
    found = step(inputs, device, screen)
    counts = NAMES.index("counts")
    return whole[counts], found[counts], screen.found.cpu().tolist()


def test_what_is_missed_is_counted_right(device):
    """The margin is made so small that entries are missed: the check, which looks at all tokens here, counts each."""
    whole, found, (missed, checked) = missing(device, -40.0)
    assert checked == whole.sum()
    assert missed == whole.sum() - found.sum() > 0
    whole, found, (missed, checked) = missing(device, screening.SIGMAS)
    assert torch.equal(whole, found)
    assert (missed, checked) == (0, whole.sum())


def test_checks_take_turns_over_the_tokens(device, monkeypatch):
    monkeypatch.setattr(screening, "TOKENS", 32)
    monkeypatch.setattr(screening, "EVERY", 2)
    screen, inputs, checked = Screen(FLOAT8), given(), []
    inputs = (inputs[0].repeat(3, 1), *inputs[1:])  # 42 tokens
    for _ in range(2 * screening.EVERY):
        assert screen.starts(0.0)
        step(inputs, device, screen)
        if screen.found is not None:
            checked.append(int(screen.found[1]))
    counts = [int(step((inputs[0][k : k + 32], *inputs[1:]), device, None)[NAMES.index("counts")].sum())
              for k in (0, 32)]  # fmt: skip
    assert checked == counts


def test_the_margin_widens_and_the_screen_turns_itself_off(caplog):
    screen = Screen(FLOAT8, most=0.01)
    screen.saw(0, 4000, 0), screen.saw(1, 4000, 10)  # one may be chance
    assert screen.sigmas == screening.SIGMAS
    assert screen.row() == {"missed": 1 / 8000}
    with caplog.at_level("WARNING"):
        screen.saw(1, 4000, 20)
        assert (screen.sigmas, screen.missed, screen.checked) == (2 * screening.SIGMAS, 0, 0)
        assert "2 of 12000 active entries" in caplog.text
        screen.saw(2, 10**6, 30)  # few enough
        screen.saw(9000, 10**6, 40), screen.saw(9000, 10**6, 50)
    assert screen.off
    assert "step 50" in caplog.text
    assert not screen.starts(0.0)
    assert screen.row() == {}
    assert not Screen(FLOAT8, most=0.01).starts(0.02)


def test_the_state_goes_into_checkpoints():
    screen = Screen(FLOAT8)
    screen.saw(7, 100, 0), screen.saw(0, 5000, 1)
    other = Screen(FLOAT8)
    other.restore(json.loads(json.dumps(screen.state())))
    assert other.state() == screen.state()
    for state in (None, {}, {**screen.state(), "sigmas": "wide"}, [3]):
        other.restore(state)
        assert other.state() == screen.state()
    screen.off = True
    other.restore(screen.state())
    assert not other.starts(0.0)


def test_it_is_taken_only_where_it_is_predicted_to_pay(monkeypatch):
    def chosen(size, dtype, name="H200"):
        monkeypatch.setattr(screening.routing, "device_name", lambda _: f"NVIDIA {name}")
        monkeypatch.setattr(screening, "float8_works", lambda _: "H" in name)
        found = screening.screen_for(Size(*size), dtype, torch.device("cuda"))
        return found.dtype, found.most

    large = (16384, 4096, 131072)
    for dtype in (torch.bfloat16, torch.float32):
        narrow, most = chosen(large, dtype)
        assert narrow == FLOAT8
        assert 2.1 * 64 / 131072 < most < 0.01
    assert chosen((4096, 768, 24576), torch.bfloat16)[0] is None
    assert chosen((64, 16, 24), torch.float32)[0] is None
    assert chosen(large, torch.bfloat16, "A100")[0] is None  # which has no float8
    assert chosen(large, torch.float32, "A100")[0] == torch.bfloat16
    assert chosen((16384, 4090, 131072), torch.float32)[0] == torch.bfloat16  # rows that float8 products cannot read
    assert chosen((16384, 16400, 131072), torch.float32)[0] is None  # too long for `narrow_rows`
    assert chosen(large, torch.float32, "something else")[0] is None
    assert chosen(large, torch.float16, "A100")[0] is None


def test_a_cpu_and_an_older_gpu_have_no_float8(monkeypatch):
    works = screening.float8_works.__wrapped__
    monkeypatch.setattr(screening.backends, "unsupported", lambda _: None)
    for capability, calls in (((8, 0), 0), ((9, 0), 1), ((12, 0), 0)):
        tried = []
        monkeypatch.setattr(screening.backends, "capability", lambda _, own=capability: own)
        monkeypatch.setattr(torch, "linspace", lambda *_, tried=tried, **__: tried.append(1) or 1 / 0)
        assert not works(torch.device("cuda"))  # also where the product raises
        assert len(tried) == calls


def sae_and_tokens(family):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 16, generator=generator)
    if family == "rational":
        sae = FusedRationalSAE(16, 32, generator=generator, form="gated", backend="triton")
        with torch.no_grad():
            sae.gate.threshold.fill_(0.8)
    else:
        sae = JumpReluSAE(16, 32, generator=generator, threshold=0.8)
    return sae, x


def trained(family, device, monkeypatch, narrow, **options):
    monkeypatch.setattr("rsae_triton.training.run.screen_of", lambda *_: Screen(narrow))
    monkeypatch.setattr("rsae_triton.training.loop.by_triton", lambda *_: True)
    sae, x = sae_and_tokens(family)
    made = []
    product = Screen.product
    monkeypatch.setattr(Screen, "product", lambda *a: made.append(1) or product(*a))
    options = {"steps": 2, "batch_size": 16, "lr": 0.01, "memory": "sparse", "progress": False, **options}
    log = rt.train(sae.to(device), x.to(device), **options)
    return sae, log, len(made)


@pytest.mark.parametrize("family", ["rational", "jumprelu"])
def test_training_is_the_same_with_it(family, device, monkeypatch, tmp_path):
    monkeypatch.setattr("rsae_triton.training.memory.capacity_for", lambda places: places)
    whole, log, none = trained(family, device, monkeypatch, None)
    sae, found, made = trained(family, device, monkeypatch, FLOAT8, out=tmp_path, log_every=1)
    assert (none, made) == (0, 2)
    assert found.mse[-1] == pytest.approx(log.mse[-1], rel=1e-3)
    for one, other in zip(sae.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["missed"]) for row in rows)


def test_a_run_resumes_with_its_margin(device, monkeypatch, tmp_path):
    monkeypatch.setattr("rsae_triton.training.memory.capacity_for", lambda places: places)
    monkeypatch.setattr(screening, "SIGMAS", -40.0)  # so small that it misses, and is doubled in the first step
    options = {"out": tmp_path, "checkpoint_every": 1, "steps": 2, "batch_size": 8}
    trained("rational", device, monkeypatch, FLOAT8, **options)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    seen = []
    restore = Screen.restore
    monkeypatch.setattr(Screen, "restore", lambda own, state: restore(own, state) or seen.append(own.state()))
    trained("rational", device, monkeypatch, FLOAT8, **options, resume=True)
    assert [(one["sigmas"], one["steps"], one["off"]) for one in seen] == [(-80.0, 1, False)]


@pytest.mark.parametrize(("batch", "accumulate", "processes", "tokens"), [
    (32, 1, 1, [32]), (48, 3, 1, [16]), (49, 3, 1, []), (64, 2, 2, [16]), (40, 1, 5, [8]),
])  # fmt: skip
def test_it_is_planned_for_the_pieces_that_a_process_multiplies(batch, accumulate, processes, tokens, monkeypatch):
    """A float8 product of a number of tokens that 16 does not divide is an error on a GPU."""
    seen = []
    monkeypatch.setattr("rsae_triton.training.run.screen_of", lambda _, __, n, ___: seen.append(n) or Screen(None))
    sae, _ = sae_and_tokens("jumprelu")
    settings = TrainSettings(steps=1, batch_size=batch, accumulate=accumulate)
    together = Alone()
    together.data = (0, processes)
    Run(sae, settings, recipe_for(sae), plan_memory(sae, 8, "saved"), together, "", torch.float32)
    assert seen == tokens
