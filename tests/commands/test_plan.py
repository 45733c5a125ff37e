"""`rsae plan`: the table is arithmetic that can be done by hand, and agrees with what training does."""

import io

import pytest
from rich.console import Console

from rsae_triton.commands.cli import main
from rsae_triton.commands.plan import LINKS, Plan, estimates, run_plan
from rsae_triton.common.errors import ConfigError
from rsae_triton.ops.cost import CEILINGS, Step, cost
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.training.memory import plan_memory

MILLION = Plan(d_in=4096, d_sae=1 << 20, tokens=8192, gpus=8)


def pick(found, layout, strategy):
    return next(one for one in found if (one.tokens_over, one.features_over) == layout and one.strategy == strategy)


def test_a_million_features_on_eight_gpus():
    found = estimates(MILLION)
    assert len(found) == 4 * 5
    sparse, best = found[0], pick(found, (1, 8), "saved")
    assert (sparse.tokens_over, sparse.features_over, sparse.strategy) == (1, 8, "sparse")
    assert sparse.flops == best.flops / 5
    assert sparse.compute < 0.3 * best.compute
    assert estimates(Plan(d_in=64, d_sae=4096, l0=4000))[0].strategy != "sparse"
    assert all(one.strategy != "sparse" for one in estimates(Plan(d_in=64, d_sae=4096, form="direct")))
    matrix = 4096 * 2**20
    assert best.weights == pytest.approx(4 * 2 * matrix / 8, rel=1e-3)
    assert best.optimiser == 3 * best.weights
    assert best.copies == 2 * 2 * matrix / 8
    assert best.activations == pytest.approx(3 * 2 * 8192 * 2**20 / 8, rel=0.1)
    assert best.flops == 10 * 8192 * matrix / 8
    assert best.compute >= best.flops / CEILINGS["H100"].products[2]
    # Only x_hat's partial sums cross, and b_dec's gradient.
    assert best.sent == pytest.approx(2 * 7 / 8 * 4 * 8192 * 4096, rel=0.01)
    assert best.communication == pytest.approx(best.sent / LINKS["H100"].inside, rel=0.1)
    # Whole SAEs on every GPU do not fit; nor does eager PyTorch on any layout.
    assert not any(one.fits for one in found if one.features_over == 1 or one.strategy == "eager")
    assert pick(found, (1, 8), "streamed").flops == pytest.approx(1.2 * best.flops)


def test_between_nodes_gradients_cost_more_than_sums():
    found = estimates(Plan(d_in=4096, d_sae=1 << 20, tokens=8192, gpus=64))
    all_features, eight = pick(found, (1, 64), "saved"), pick(found, (8, 8), "saved")
    assert all_features.seconds < eight.seconds
    gradients = 2 * 7 / 8 * 4 * 2 * 4096 * 2**20 / 8
    assert eight.sent == pytest.approx(gradients, rel=0.02)
    assert eight.communication == pytest.approx(gradients / LINKS["H100"].between, rel=0.02)


def test_the_plan_on_paper_is_the_plan_of_training():
    sae = FusedRationalSAE(64, 4096, form="gated", degree=(3, 2))
    for memory in ("saved", "chunked", "streamed"):
        found = pick(estimates(Plan(d_in=64, d_sae=4096, tokens=1024, precision="float32")), (1, 1), memory)
        training = plan_memory(sae, 1024, memory, free=60e9)
        assert found.activations == training.need
        assert found.weights == pytest.approx(training.weights, rel=0.01)
        assert found.optimiser == pytest.approx(training.optimiser, rel=0.01)
    step = Step(1024, 64, 4096, 3, 2, True, "gated", 4)
    assert found.compute == cost(step, "streamed", chunk_features=2048).seconds(CEILINGS["H100"])
    shown = str(plan_memory(sae, 1024, "streamed", free=60e9))
    for part in (
        "streamed, 2048 features at a time",
        "weights 2.13 MB",
        "gradients and optimiser 6.3",
        "60.00 GB free",
    ):
        assert part in shown


def test_teachers_and_rounds_have_their_own_ways():
    sizes = {"d_in": 768, "d_sae": 24576, "tokens": 4096}
    ours = {one.strategy: one for one in estimates(Plan(**sizes))}
    for family in ("relu", "jumprelu", "topk", "batchtopk"):
        found = {one.strategy: one for one in estimates(Plan(**sizes, family=family))}
        assert set(found) == {"sparse", "eager"}
        assert found["sparse"].compute < found["eager"].compute / 1.5
        assert found["sparse"].flops == found["eager"].flops / 5 == ours["sparse"].flops
        assert found["sparse"].weights < ours["sparse"].weights
    [two], [three] = (estimates(Plan(**sizes, rounds=rounds)) for rounds in (2, 3))
    assert two.strategy == "rounds"
    assert ours["sparse"].compute < two.compute < three.compute
    assert three.weights - two.weights == 4 * 5 * 24576
    assert two.activations > 4096 * 24576 * 2  # h, in which the candidates are looked for
    assert {one.features_over for one in estimates(Plan(**sizes, rounds=2, gpus=2))} == {1}
    assert {one.features_over for one in estimates(Plan(**sizes, family="topk", gpus=2))} == {1}
    assert {one.features_over for one in estimates(Plan(**sizes, family="relu", gpus=2))} == {1, 2}


def test_the_command_prints_what_fits_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    assert main(["plan", "--d-in", "4096", "--d-sae", "1048576", "--tokens", "8192", "--gpus", "8"]) == 0
    shown = capsys.readouterr().out
    assert "not measured" in shown
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    assert "1 x 8" in rows[0]
    assert "yes" in rows[0]
    assert "eager" in rows[-1]
    assert "no" in rows[-1]
    assert "--features-over 8 --memory auto" in shown
    assert main(["plan", "--d-in", "4096", "--d-sae", "16777216", "--gpus", "2"]) == 0
    assert "nothing fits" in capsys.readouterr().out


def test_the_table_fits_a_terminal_of_80_columns():
    console = Console(width=80, force_terminal=True, color_system=None, file=io.StringIO())
    run_plan(Plan(d_in=2304, d_sae=16384, tokens=4096), console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 or all("rsae train" in line for line in lines if len(line) > 80)
    row = next(line for line in lines if "chunked (2048 tokens)" in line)
    assert len(row.split("│")) == 8
    assert "…" not in row


@pytest.mark.parametrize(
    "options", [{"d_sae": 0}, {"degree": "three"}, {"gpus": 7, "tokens": 100, "d_sae": 100}, {"l0": 0},
                {"family": "batchtopk", "gpus": 2}, {"family": "relu", "rounds": 2}, {"rounds": 0}]
)  # fmt: skip
def test_bad_sizes_are_named(options):
    with pytest.raises(ConfigError):
        estimates(Plan(**{"d_in": 64, "d_sae": 64, **options}))
