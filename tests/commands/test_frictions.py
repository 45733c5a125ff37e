"""Small things that cost a newcomer minutes: names of other tools, results that are not lost, what to install."""

import json
from dataclasses import asdict

import pytest
import torch

from rsae_triton import JumpReluSAE, ReluSAE
from rsae_triton.commands.cli import main
from rsae_triton.common.errors import ConfigError
from rsae_triton.common.install import advice
from rsae_triton.experiments.demo_options import Demo, check
from rsae_triton.ops import cpu


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("dmo", "did you mean demo"),
        ("qwertyuiop", "there are demo"),
        ("eval x --layer 5", "use --hook blocks.LAYER"),
        ("demo --n-tokens=5", "use --tokens"),
        ("demo --dict_size 5", "use --d-sae"),
    ],
)
def test_option_and_command_names_of_other_tools_get_a_suggestion(line, said, capsys):
    assert main(line.split()) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


def test_help_lists_version_and_debug(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--version" in shown
    assert "--debug" in shown


def test_a_demo_of_other_settings_is_not_overwritten(tmp_path):
    demo = Demo(out=tmp_path, teacher="topk")
    (tmp_path / "metrics.json").write_text(
        json.dumps({"meta": {"configuration": {name: str(one) for name, one in asdict(demo).items()}}})
    )
    check(demo)
    with pytest.raises(ConfigError, match=r"other settings \(--teacher topk\); give another --out"):
        check(Demo(out=tmp_path))
    check(Demo(out=tmp_path, overwrite=True))


def test_advice_names_packages_that_every_index_has():
    assert advice("probe").startswith("pip install 'scikit-learn")
    assert "'gguf" in advice("host")
    assert "rsae-triton[" not in advice("host")


def test_narrower_activations_are_read_and_wider_ones_refused():
    sae = ReluSAE(8, 16)
    x = torch.randn(4, 8)
    assert torch.equal(sae.encode(x.bfloat16()), sae.encode(x.bfloat16().float()))
    with pytest.raises(ConfigError, match="convert one of them"):
        sae.encode(x.double())
    with pytest.raises(ConfigError, match="convert one of them"):
        sae.bfloat16().encode(x)


def test_repr_shows_sizes_model_hook_and_units():
    sae = JumpReluSAE(8, 16, metadata={"model_name": "gpt2", "hook_name": "blocks.5.hook_resid_pre"})
    assert "d_in=8, d_sae=16, model=gpt2, hook=blocks.5.hook_resid_pre" in repr(sae)
    sae.units = 0.25
    assert "units=0.25" in repr(sae)


def test_encoding_without_training_never_starts_the_compiler(monkeypatch):
    monkeypatch.delenv("RSAE_CPU_ENGINE", raising=False)
    with cpu.looking(True):
        assert cpu.engine_for(2048 * 2304) == "tiled"
