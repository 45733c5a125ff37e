"""Checkpoints of a training run: a folder each, whole or not there, the last few kept.

    checkpoints/step-00001000/
        training.json          step, settings, log, controller: everything that is no tensor
        state/*.safetensors    weights (`sae.*`), optimiser, RNG, what is known of each feature

A folder is written under another name, forced to disk and renamed, so that a run killed at any moment leaves the
checkpoints it had. Processes of one run write one file each; any number of processes reads them (`sharded.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rsae_triton.common.checkpoint import INFO, SCHEMA, STATE, read_info
from rsae_triton.common.errors import FormatError, StorageError
from rsae_triton.common.files import publish

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of a run whose results lie in `out`."""

    def __init__(self, out: Path, keep: int = 2) -> None:
        self.folder, self.keep = out / FOLDER, keep

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, ascending."""
        try:
            names = [path.name for path in self.folder.glob("step-*") if path.is_dir()]
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be read ({error.strerror or error})") from error
        return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def newest_first(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Checkpoints with their training.json; one that is damaged is passed over with a warning."""
        for step in reversed(self.steps()):
            try:
                yield self.path(step), read_info(self.path(step))
            except FormatError as error:
                warnings.warn(f"{error}; going back to the checkpoint before", stacklevel=2)

    def clean(self) -> None:
        """Removes what killed runs left; whoever calls it holds the run's folder."""
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` into; leftovers of killed runs are removed."""
        try:
            self.clean()
            temporary = self.temporary(step)
            (temporary / STATE).mkdir(parents=True)
        except OSError as error:
            raise self.refused(step, error) from error
        return temporary

    def finish(self, step: int, info: dict[str, Any]) -> Path:
        """Writes training.json, gives the checkpoint its name and removes the oldest."""
        temporary, final = self.temporary(step), self.path(step)
        try:
            files = {path.name: path.stat().st_size for path in sorted((temporary / STATE).iterdir())}
            (temporary / INFO).write_text(json.dumps({"schema": SCHEMA, "step": step, "files": files, **info}))
            if final.exists():  # of a future that the run went back from
                os.rename(final, self.folder / f".step-{step:08d}-old")
            publish(temporary, final)
        except OSError as error:
            raise self.refused(step, error) from error
        with suppress(OSError):  # the checkpoint is there; what is left over goes with the next one
            self._forget(step)
        return final

    def _forget(self, newest: int) -> None:
        """Removes all but the last `keep` that can be read, beside what is damaged and not older than those."""
        steps = self.steps()
        kept, good = newest, 0
        for step in reversed(steps):
            good += self._is_whole(step)
            if good == self.keep:
                kept = step
                break
        else:
            return
        for step in steps:
            if step < kept:  # under its own name it is whole, or not there
                os.rename(self.path(step), self.folder / f".step-{step:08d}-old")
        for old in self.folder.glob(".step-*-old"):
            shutil.rmtree(old, ignore_errors=True)

    def _is_whole(self, step: int) -> bool:
        try:
            read_info(self.path(step))
        except (FormatError, OSError):
            return False
        return True

    def save(self, step: int, tensors: dict[str, Tensor], info: dict[str, Any]) -> Path:
        """Writes a checkpoint of this process alone.

        Raises:
            StorageError: the disk is full or refuses; the checkpoints before are still there.
        """
        temporary = self.begin(step)
        whole = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
        try:
            save_file(whole, temporary / STATE / "state.safetensors")
        except (OSError, SafetensorError) as error:
            raise self.refused(step, error) from error
        return self.finish(step, info)

    def refused(self, step: int, error: Exception) -> StorageError:
        """The error for a checkpoint that could not be written; removes what there is of it."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)
        free = shutil.disk_usage(self.folder if self.folder.is_dir() else self.folder.parent.parent).free
        last = self.steps()
        good = f"the last good one is {self.path(last[-1])}, --resume goes on from it" if last else "there is none yet"
        return StorageError(
            f"the checkpoint of step {step} cannot be written to {self.folder} ({error}; {free / 1e9:.2f} GB free): "
            f"{good}. Make room, or keep fewer checkpoints"
        )

    def temporary(self, step: int) -> Path:
        """Where the checkpoint of `step` lies while it is written."""
        return self.folder / f".step-{step:08d}"
