"""The gate commands as a user types them."""

import json

import numpy as np
import pytest
import tyro

from rsae_triton.commands import gates as commands
from rsae_triton.common.errors import ConfigError, FormatError
from rsae_triton.remez import GateFit, table

COMMANDS = {"fit": commands.fit, "show": commands.show, "rebuild": commands.rebuild}


def run(*arguments: str) -> None:
    tyro.extras.subcommand_cli_from_dict(COMMANDS, args=list(arguments))


def test_fit_prints_the_certificate_and_writes_figure_and_fit(tmp_path, capsys):
    figure, out = tmp_path / "gate.svg", tmp_path / "deep" / "gate.json"
    gate = ("jumprelu", "--degree", "5,4", "--theta", "0.1", "--margin", "0.02")
    run("fit", *gate, "--plot", str(figure), "--out", str(out))
    text = capsys.readouterr().out
    assert "error        0.0089294" in text
    assert "alternates on 11 points" in text
    assert "<svg" in figure.read_text()
    fit = GateFit.from_dict(json.loads(out.read_text()))
    assert all(f"{value:+.17g}" in text for value in (*fit.a, *fit.b))


def test_fit_takes_samples_and_tol(tmp_path, capsys):
    np.save(tmp_path / "t.npy", np.random.default_rng(0).normal(0, 0.1, 1000))
    run("fit", "relu", "--method", "least_squares", "--samples", str(tmp_path / "t.npy"), "--tol", "1e-4")
    assert "relu, degree (3, 2), least_squares" in capsys.readouterr().out


def test_wrong_input_is_one_of_our_errors(tmp_path):
    (tmp_path / "t.npy").write_text("not numpy")
    with pytest.raises(FormatError, match="samples"):
        run("fit", "relu", "--samples", str(tmp_path / "t.npy"))
    with pytest.raises(ConfigError, match="margin"):
        run("fit", "step")
    with pytest.raises(ConfigError, match="suffixes"):
        run("fit", "relu", "--degree", "3,2", "--plot", str(tmp_path / "gate.nonsense"))


def test_show_prints_every_shipped_gate(capsys):
    run("show")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(table.ENTRIES)
    assert any("relu" in line and "9,8" in line and "0.000368282" in line for line in lines)


def test_rebuild_writes_a_table_that_reads_back(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(table, "ENTRIES", table.ENTRIES[:2])
    run("rebuild", "--out", str(tmp_path / "new" / "table.json"))
    assert "2 gates" in capsys.readouterr().out
    assert [fit.degree for fit in table.read_table(tmp_path / "new" / "table.json")] == [(3, 2), (5, 4)]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.json"]
