"""Every `rsae ...` line in a docstring, the README or docs/ is one that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest

from rsae_triton.commands import cli, gates

ROOT = Path(__file__).parents[2]
# What the commands call once their arguments are parsed.
DOORS = [name for name in vars(cli) if name.startswith("run_")] + ["run", "export"]


def lines_of(text: str) -> list[str]:
    """Commands, with the lines that a backslash continues."""
    joined = re.sub(r"\\+\n\s*", " ", text)
    return [one.strip() for one in joined.splitlines() if re.match(r"\s*rsae [a-z]", one)]


def collect() -> list[tuple[str, str]]:
    found = [
        (kind.__name__, line)
        for kind in vars(cli).values()
        if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__")
        for line in lines_of(kind.__doc__ or "")
    ]
    found += [("gates fit", line) for line in lines_of(gates.fit.__doc__)]
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```(?:bash|console|sh)\n(.*?)```", page.read_text(), flags=re.DOTALL):
            found += [(page.name, line) for line in lines_of(block)]
    return found


def test_there_are_examples_for_every_command():
    documented = {line.split()[1] for _, line in collect()}
    assert {"demo", "upgrade", "train", "teach", "sweep", "reproduce", "eval", "probe", "match", "doctor"} <= documented


@pytest.mark.parametrize(("where", "line"), collect(), ids=lambda value: value[:60])
def test_the_command_line_takes_it(where, line, monkeypatch):
    called = []
    for name in DOORS:
        monkeypatch.setattr(cli, name, lambda *arguments: called.append(arguments) or [])
    for name in ("fit", "show", "rebuild"):
        monkeypatch.setattr(gates, name, _with_signature(getattr(gates, name), called))
    arguments = shlex.split(line.partition(" #")[0])[1:]
    assert cli.main(arguments) == 0, f"{where}: {line}"
    assert called, f"{where}: {line} ran nothing"


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--help"])
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [*cli.COMMANDS, "gates"])
def test_the_help_of_a_command_says_what_it_does_and_ends_with_its_examples(name, capsys):
    documented = gates.fit.__doc__ if name == "gates" else cli.COMMANDS[name][1].__doc__
    shown = help_of(capsys, *([name, "fit"] if name == "gates" else [name]))
    summary = documented.split("\n\n")[0].replace("`", "")
    assert " ".join(summary.split())[:60] in " ".join(shown.replace("`", "").split())
    examples = lines_of(documented)
    assert lines_of(shown) == examples
    assert examples or name == "bench"  # which reads what `make bench` measured


def test_the_help_has_an_example_of_every_command(capsys):
    shown = help_of(capsys)
    assert {line.split()[1] for line in lines_of(shown)} == {*cli.COMMANDS, "gates"} - {"bench"}


def _with_signature(function, called):
    import functools

    @functools.wraps(function)
    def record(*arguments, **named):
        called.append((arguments, named))

    return record
