"""The shell completes what `rsae --tyro-write-completion` wrote for it (docs/index.md)."""

import shutil
import subprocess

import pytest

from rsae_triton.commands.cli import main

bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def written(shell, folder):
    path = folder / "rsae"
    with pytest.raises(SystemExit) as end:
        main(["--tyro-write-completion", shell, str(path)])
    assert not end.value.code
    return path


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    return written("bash", tmp_path_factory.mktemp("completion"))


@bash
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rsae ev", {"eval"}),
        ("rsae re", {"reproduce"}),
        ("rsae gates ", {"fit", "show", "rebuild"}),
        ("rsae demo --rec", {"--recipe"}),
        ("rsae plan --device ", {"A100", "H100", "H200"}),
        ("rsae train --precision b", {"bf16"}),
    ],
)
def test_bash_completes(script, line, expected):
    *words, last = line.split(" ")
    words = " ".join(f"'{word}'" for word in [*words, last])
    code = (
        f"source {script}; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _tyro_rsae; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    offered = {one for one in done.stdout.split() if one not in ("-h", "--help")}
    assert offered == expected, done


def test_zsh_gets_a_script_for_rsae(tmp_path):
    text = written("zsh", tmp_path).read_text()
    assert text.startswith("#compdef rsae")
    assert "--features-over" in text
