"""Checkpoints of a training run: one folder each, written completely or not at all; the last few are kept.

    checkpoints/step-00001000/
        training.json          step, settings, log, controller: everything that is not a tensor
        state/*.safetensors    weights (`sae.*`), optimiser, RNG, statistics of each feature

A folder is written under a temporary name, forced to disk and renamed, so that a run that is killed keeps its earlier
checkpoints. The processes of a run write one file each; any number of processes can read them (`sharded.py`).
"""

from __future__ import annotations

import json
import os
import re
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
    """The checkpoints of the run whose results are in `out`."""

    def __init__(self, out: Path, keep: int = 2) -> None:
        self.folder, self.keep = out / FOLDER, keep

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        try:
            names = [path.name for path in self.folder.glob("step-*") if path.is_dir()]
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be read ({error.strerror or error})") from error
        return sorted(int(name[5:]) for name in names if re.fullmatch("step-[0-9]{1,18}", name))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def newest_first(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yields checkpoints with their training.json, newest first; a damaged one is skipped with a warning."""
        for step in reversed(self.steps()):
            try:
                yield self.path(step), read_info(self.path(step))
            except FormatError as error:
                warnings.warn(f"{error}; going back to the checkpoint before", stacklevel=2)

    def clean(self) -> None:
        """Removes what killed runs left behind; the caller must hold the lock of the run's folder."""
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)

    def begin(self, step: int) -> Path:
        """Returns an empty folder for the checkpoint of `step`, after removing what killed runs left there."""
        try:
            self.clean()
            temporary = self.temporary(step)
            (temporary / STATE).mkdir(parents=True)
        except OSError as error:
            raise self.refused(step, error) from error
        return temporary

    def finish(self, step: int, info: dict[str, Any]) -> Path:
        """Writes training.json, renames the checkpoint to its final name and removes the oldest."""
        temporary, final = self.temporary(step), self.path(step)
        try:
            files = {path.name: path.stat().st_size for path in sorted((temporary / STATE).iterdir())}
            (temporary / INFO).write_text(json.dumps({"schema": SCHEMA, "step": step, "files": files, **info}))
            if final.exists():  # left from a later step than the run went back to
                os.rename(final, self.folder / f".step-{step:08d}-old")
            publish(temporary, final)
        except OSError as error:
            raise self.refused(step, error) from error
        with suppress(OSError):  # the checkpoint is written; what remains is removed with the next one
            self._forget(step)
        return final

    def _forget(self, newest: int) -> None:
        """Removes all but the last `keep` readable checkpoints. Damaged ones that are not older than those stay."""
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
            if step < kept:  # renamed first, so that under its own name a checkpoint is always complete
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
        """Writes a checkpoint of a single process.

        Raises:
            StorageError: the disk is full or refuses; the earlier checkpoints are intact.
        """
        temporary = self.begin(step)
        whole = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
        try:
            save_file(whole, temporary / STATE / "state.safetensors")
        except (OSError, SafetensorError) as error:
            raise self.refused(step, error) from error
        return self.finish(step, info)

    def refused(self, step: int, error: Exception) -> StorageError:
        """Returns the error for a checkpoint that could not be written, and removes its remains."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)
        free = shutil.disk_usage(self.folder if self.folder.is_dir() else self.folder.parent.parent).free
        last = self.steps()
        good = f"the last good one is {self.path(last[-1])}, --resume goes on from it" if last else "there is none yet"
        return StorageError(
            f"the checkpoint of step {step} cannot be written to {self.folder} ({error}; {free / 1e9:.2f} GB free): "
            f"{good}. Make room, or keep fewer checkpoints"
        )

    def temporary(self, step: int) -> Path:
        """The folder in which the checkpoint of `step` is written."""
        return self.folder / f".step-{step:08d}"
