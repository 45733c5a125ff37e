"""`rsae bench`: results are read back, compared by ratios, and shown whole; the suite itself runs at tiny sizes."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rsae_triton.commands.bench import Bench, render, run_bench
from rsae_triton.commands.cli import main
from rsae_triton.common.errors import ConfigError, FormatError
from rsae_triton.report.speed import exponents, guard, load_results, read_result, tables, write_result

ROOT = Path(__file__).parents[2]
README = "# x\n<!-- speed table: here -->\nold\n<!-- /speed table -->\nrest\n"


def contender(seconds, memory=1e6, **more):
    times = {"median_s": seconds, "p20_s": 0.9 * seconds, "p80_s": 1.1 * seconds, "turns": 3}
    return {"status": "ok", "peak_bytes": memory, "error": 1e-6, **times, **more}


def case(n_tokens=2048, d_sae=18432, degree=(3, 2), groups=1, sweep="", scale=1.0, **contenders):
    named = {
        "eager, Horner": contender(8 * scale, 2e9 * scale),
        "eager, powers": contender(9 * scale, 2.5e9 * scale),
        "ours": contender(4 * scale, 4e8 * scale),
        "ours, streamed": contender(5 * scale, 3e7),
        "bare products": contender(3 * scale, 0),
        "sparsify TopK": {"status": "out of memory", "turns": 0},
    }
    return {
        "work": "step", "n_tokens": n_tokens, "d_in": 576, "d_sae": d_sae, "degree": list(degree), "groups": groups,
        "form": "direct", "dtype": "fp32", "tf32": False, "compiled": True, "sweep": sweep, "floor_s": 2.5 * scale,
        "contenders": named | contenders,
    }  # fmt: skip


def result(*cases, kind="cpu", name="Test CPU"):
    return {
        "schema": 1,
        "device": {"kind": kind, "name": name, "cores": 2, "threads": 1},
        "versions": {"python": "3.11", "cuda": None},
        "ceilings": {"products": {"4": 1e11}, "bandwidth": 4e10},
        "clock": "process time", "commit": "abc", "minutes": 3.0, "load_average_before": 1.0,
        "load_average_after": 2.0, "cases": list(cases), "other": [],
    }  # fmt: skip


def test_results_round_trip_whole_or_not_at_all(tmp_path):
    made = result(case())
    made["cases"][0]["contenders"]["ours"]["error"] = float("inf")
    path = tmp_path / "new" / "speed-a.json"
    write_result(path, made)
    found = load_results(tmp_path / "new")["a"]
    assert found["cases"][0]["contenders"]["eager, Horner"]["median_s"] == 8
    assert found["cases"][0]["contenders"]["ours"]["error"] is None
    path.write_text(json.dumps({"schema": 7}))
    with pytest.raises(FormatError, match=r"speed-a\.json"):
        read_result(path)


def test_guard_compares_ratios_not_times():
    old = result(case(), case(degree=(9, 8)))
    slower_machine = result(case(scale=7.0), case(degree=(9, 8), scale=0.1))
    assert guard(slower_machine, old) == ([], 4)
    worse = result(case(ours=contender(5.2)), case(degree=(5, 4), ours=contender(100)))
    (line,), compared = guard(worse, old)
    assert compared == 2
    assert "(3, 2) shared" in line
    assert "ours takes 0.65 of eager PyTorch's time, committed is 0.50" in line


def test_exponents_are_those_of_the_larger_half():
    cases = [
        case(d_sae=d, sweep="d_sae", scale=3.0 if d < 1000 else (d / 1000) ** 1.5) for d in (2**k for k in range(8, 14))
    ]
    found = {(sweep, name, what): slope for sweep, name, what, slope in exponents(result(*cases))}
    assert found["d_sae", "eager, Horner", "median_s"] == pytest.approx(1.5)
    assert found["d_sae", "ours, streamed", "peak_bytes"] == pytest.approx(0, abs=1e-9)
    assert ("d_sae", "bare products", "peak_bytes", 0) not in found


def test_targets_take_the_faster_eager_and_say_what_is_missed():
    lines = tables.page({"a": result(case())}, {}).splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("|") and "18432" in line}
    assert "| 2.00 | met |" in rows["step, d_in 576, d_sae 18432, (3, 2) shared: times faster than eager"]
    assert "| not measured |" in rows["step, d_in 576, d_sae 18432, (9, 8) per feature: times faster than eager"]
    streamed = next(line for line in lines if "streamed: times faster" in line)
    assert "| 1.60 | **missed** |" in streamed
    assert "| 1.33 | **missed** |" in next(line for line in lines if "bare products' time" in line)
    assert any("out of memory" in line for line in lines)


def test_a_benchmark_of_one_turn_gives_no_verdict():
    once = case()
    for one in once["contenders"].values():
        one["turns"] = 1
    page = tables.page({"a": result(once)}, {})
    assert "| 2.00 | no verdict: turns are 1 |" in page
    assert "4 s (turns: 1)" in page
    assert "(turns: 1)" in tables.readme_table({"a": result(once)})
    assert guard(result(case(ours=contender(7.0))), result(once)) == ([], 0)


def test_render_writes_page_plots_and_readme(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(README)
    sweep = [case(d_sae=d, sweep="d_sae", scale=d / 512) for d in (512, 1024, 2048)]
    sweep += [case(n_tokens=n, sweep="n_tokens", scale=n / 512) for n in (512, 1024, 2048)]
    write_result(tmp_path / "benchmarks" / "results" / "speed-cpu.json", result(case(), *sweep))
    run_bench(Bench(render=True), tmp_path)
    page, readme = ((tmp_path / name).read_text() for name in ("docs/benchmarks.md", "docs/index.md"))
    for name in ("benchmarks-cpu-time.svg", "benchmarks-cpu-memory.svg"):
        assert name in page
        assert "ours, streamed" in (tmp_path / "docs" / name).read_text()
    assert "| ours | 1.00, 1.00 |" in page
    assert "old" not in readme
    assert readme.startswith("# x\n")
    assert readme.endswith("-->\nrest\n")
    assert "| CPU: 2048 tokens, d_in 576, d_sae 18432, (3, 2) shared, fp32 | 8 s" in readme
    assert "4 s, 400 MB" in readme
    assert "| CPU: d_in 576, d_sae 18432, (9, 8) per feature, fp32 | not measured |" in readme
    assert readme.count("| GPU: not measured yet |") == 1
    again = [path.read_bytes() for path in render(load_results(tmp_path / "benchmarks" / "results"), tmp_path)]
    assert again == [path.read_bytes() for path in render(load_results(tmp_path / "benchmarks" / "results"), tmp_path)]


def test_keep_and_compare_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench"]) == 2
    assert "make bench" in capsys.readouterr().err
    write_result(tmp_path / "new.json", result(case()))
    assert main(["bench", "--new", "new.json", "--keep", "--note", "shared cores"]) == 0
    (kept,) = (tmp_path / "benchmarks" / "results").glob("speed-*.json")
    assert kept.name == "speed-cpu-test-cpu.json"
    assert read_result(kept)["note"] == "shared cores"
    write_result(tmp_path / "new.json", result(case(ours=contender(7.0))))
    assert main(["bench", "--new", "new.json"]) == 0
    assert "warning: 2048 x 576 x 18432" in capsys.readouterr().out
    # Another machine's result beside it does not stand in for this one's; ratios that are as good are said to be.
    write_result(kept.with_name("speed-cpu-a-faster-one.json"), result(case(ours=contender(0.1)), name="A faster one"))
    write_result(tmp_path / "new.json", result(case(scale=3.0)))
    assert main(["bench", "--new", "new.json"]) == 0
    assert "none of 2 ratios is worse" in capsys.readouterr().out
    write_result(tmp_path / "new.json", result(case(n_tokens=7)))
    assert main(["bench", "--new", "new.json"]) == 0
    assert "nothing to compare" in capsys.readouterr().out
    assert main(["bench", "--render"]) == 2  # no docs folder here
    with pytest.raises(ConfigError, match="--new"):
        run_bench(Bench(keep=True))


def test_committed_pages_are_those_of_the_committed_results():
    results = load_results(ROOT / "benchmarks" / "results")
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    plots = {
        name: sorted(one.name for one in (ROOT / "docs").glob(f"benchmarks-{name}-*.svg"))[::-1] for name in results
    }
    assert page == tables.page(results, plots)
    assert tables.readme_table(results) in (ROOT / "docs" / "index.md").read_text()


@pytest.mark.slow
def test_the_suite_runs_at_tiny_sizes(tmp_path):
    """Every kind of work, the kernels in Triton's interpreter; no contender may be wrong."""
    out = tmp_path / "speed.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_speed.py", "-q", "--bench-sizes", "tiny"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--bench-out", str(out), "-p", "no:cacheprovider"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    found = read_result(out)
    assert {one["work"] for one in found["cases"]} == set(tables.WORK)
    for one in found["cases"]:
        assert {entry["status"] for entry in one["contenders"].values()} == {"ok"}
        assert all(entry["median_s"] > 0 for entry in one["contenders"].values())
    assert {sweep for sweep, *_ in ((c["sweep"],) for c in found["cases"])} >= {"n_tokens", "d_sae", "degree", "groups"}
    assert "How it grows" in tables.page({"tiny": found}, {})


@pytest.fixture
def measuring(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("measuring")


def fakes(measuring, fails_from):
    """Three contenders with results; the second runs out of memory from its `fails_from`th run on."""
    runs = dict.fromkeys(("eager, Horner", "large", "ours"), 0)

    def run(name):
        runs[name] += 1
        if name == "large" and runs[name] >= fails_from:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    found = {"z": torch.ones(3)}
    return [measuring.Contender(name, lambda name=name: run(name), lambda: found) for name in runs], found, runs


def test_a_contender_out_of_memory_is_reported_and_the_others_go_on(measuring):
    device = torch.device("cpu")
    made, wanted, _ = fakes(measuring, 1)
    fit, entries = measuring.warm_up(made, wanted, "fp32", device)
    assert entries["large"] == {"status": "out of memory"}
    assert [one.name for one in fit] == ["eager, Horner", "ours"]
    # Without eager PyTorch's own error the limit alone holds; a result that is off gets no time for it.
    off = {"z": torch.ones(3) * 1.005}
    alone = [measuring.Contender("ours", lambda: None, lambda: off)]
    assert measuring.warm_up(alone, wanted, "fp32", device)[1]["ours"]["status"].startswith("wrong: z is off")
    assert measuring.out_of_memory(RuntimeError("Inductor: CUDA out of memory"))
    made, wanted, runs = fakes(measuring, 4)  # two runs to be proved, then one turn
    fit, entries = measuring.warm_up(made, wanted, "fp32", device)
    assert {one["status"] for one in entries.values()} == {"ok"}
    seen = []
    failed = measuring.take_turns(fit, device, "wall", 0.0, lambda times: seen.append(set(times)))
    assert failed == {"large": "out of memory"}
    assert seen == [{one.name for one in made}, *[{"eager, Horner", "ours"}] * 2]
    assert runs["large"] == 4


def test_a_benchmark_case_ends_when_its_time_is_used_up(measuring):
    device = torch.device("cpu")
    made, wanted, runs = fakes(measuring, 99)
    fit, entries = measuring.warm_up(made, wanted, "fp32", device, seconds=-1.0)
    assert not fit
    assert all("time was used up" in one["status"] for one in entries.values())
    made[1].most = 1
    measuring.take_turns(made, device, "wall", 60.0, lambda times: None, most=5)
    assert runs == {"eager, Horner": 5, "large": 1, "ours": 5}
    measuring.take_turns(made, device, "wall", 60.0, lambda times: None, limit=-1.0)
    assert runs["ours"] == 5


def test_memory_is_what_a_run_takes_beside_the_gradients_it_leaves(measuring):
    parameter = torch.nn.Parameter(torch.ones(1000, 250))

    def run():
        parameter.grad = None
        (parameter * torch.ones(1)).square().sum().backward()  # one product kept, one gradient

    def drop():
        parameter.grad = None
        return 4 * parameter.numel()

    one = measuring.Contender("eager, Horner", run, forget=drop)
    run()
    peak = measuring.peak_bytes(one, torch.device("cpu"))
    assert 1e6 <= peak <= 4e6
    assert peak == measuring.peak_bytes(one, torch.device("cpu"))
    # More of the same kept until the end shows, to the byte.
    kept = []
    more = measuring.Contender("more", lambda: (kept.append(torch.ones(500_000)), run()), forget=drop)
    assert measuring.peak_bytes(more, torch.device("cpu")) == peak + 2_000_000


def test_the_slower_eager_writing_does_not_take_the_verdict_away():
    once = case()
    once["contenders"]["eager, powers"]["turns"] = 1
    assert "| 2.00 | met |" in tables.page({"a": result(once)}, {})
    once["contenders"]["eager, Horner"]["turns"] = 1
    assert "no verdict: turns are 1" in tables.page({"a": result(once)}, {})


def test_the_first_case_and_those_of_targets_stand_open_and_the_others_are_folded():
    import json
    from pathlib import Path

    from rsae_triton.report.speed import tables

    results = Path(__file__).parents[2] / "benchmarks" / "results"
    one = json.loads((results / "speed-cpu-intel-r-xeon-r-processor.json").read_text())
    cases = [case for case in one["cases"] if case["work"] == "step" and not case["sweep"]]
    page = "\n".join(tables._cases(cases, [cases[1]]))
    before, folded = page.split("<details")
    measured = [tables.title(case) for case in cases if "contenders" in case]
    assert all(f"**{name}**" in before for name in measured[:2])
    assert all(f"**{name}**" in folded.split("</details>")[0] for name in measured[2:])
    missing = [tables.title(case) for case in cases if "contenders" not in case]
    assert missing
    assert all(name in folded.split("</details>")[1] for name in missing)
