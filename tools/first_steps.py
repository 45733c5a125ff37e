"""Does what README.md and the tutorial say, word for word, as a newcomer would: python tools/first_steps.py FOLDER

Makes a fresh clone of the last commit in FOLDER, a fresh virtual environment and a fresh cache. Then it runs,
in this order: the shell commands of README's sections Install and Try it, in one shell; README's Python blocks, in one
process; the tutorial's cells, in another. Nothing is left out, changed or added; only the clone's address, which is
not published yet, is fetched from this checkout. It stops at the first step that fails, and prints the feature that the
tutorial looks at and the completions that it steers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADDRESS = "https://github.com/OWNER/rsae-triton"


def section(page: str, title: str) -> str:
    """The text below `## title`, up to the next heading of its level."""
    return re.split(r"^## ", page.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def shell_of(readme: str) -> str:
    """The commands of README up to the first Python."""
    found = [*blocks(section(readme, "Install"), "bash"), *blocks(section(readme, "Try it"), "bash")]
    if len(found) < 2:
        raise SystemExit("README.md has no commands under Install or Try it")
    return "".join(found)


def cells_of(notebook: str) -> str:
    cells = [one for one in json.loads(notebook)["cells"] if one["cell_type"] == "code"]
    return "\n\n".join("".join(one["source"]) for one in cells)


def main(folder: Path) -> None:
    folder = folder.resolve()
    if folder.exists():
        raise SystemExit(f"{folder} is there already; give a new folder")
    folder.mkdir(parents=True)
    venv.create(folder / "env", with_pip=True)
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
        "PATH": f"{folder / 'env' / 'bin'}:{os.environ['PATH']}",
        "RSAE_CACHE": str(folder / "cache"),
        "MPLBACKEND": "agg",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
    }
    readme = (ROOT / "README.md").read_text()
    clone, taken = folder / ADDRESS.rsplit("/", 1)[1], {}

    def step(name: str, command: list[str], place: Path) -> str:
        print(f"--- {name}", flush=True)
        start = time.perf_counter()
        done = subprocess.run(command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True)
        taken[name] = time.perf_counter() - start
        print(done.stdout, flush=True)
        if done.returncode:
            raise SystemExit(f"{name}: failed with {done.returncode}")
        return done.stdout

    step("README, shell", ["bash", "-e", "-c", shell_of(readme)], folder)
    # What a newcomer reads is the clone's.
    step("README, Python", ["python", "-c", "".join(blocks((clone / "README.md").read_text(), "python"))], clone)
    # A notebook shows the value of a cell's last line; a script does not, and needs no notebook server.
    cells = cells_of((clone / "docs" / "notebooks" / "tutorial.ipynb").read_text())
    shown = step("tutorial", ["python", "-c", cells], clone)
    if not re.search(r"^Feature \d+ of ", shown, re.MULTILINE) or "clean" not in shown:
        raise SystemExit("the tutorial showed no feature, or steered nothing")
    print("; ".join(f"{name} {seconds:.0f} s" for name, seconds in taken.items()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
