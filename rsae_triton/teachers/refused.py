"""Known kinds of files that this package cannot use, with what each is and what to do instead."""

from __future__ import annotations

import re

from rsae_triton.teachers.gemma_scope import NO_CLT
from rsae_triton.teachers.parts import Files

_CLT = re.compile(r"W_(enc|dec)_\d+\.safetensors")


def reason(files: Files) -> str | None:
    """Returns why these files are refused, or None if they are of no kind known here."""
    names = {files.path.name} if files.path.is_file() else {one.name for one in files.folder.iterdir()}
    if any(_CLT.fullmatch(name) for name in names):
        return f"{files.name} is a cross-layer transcoder, whose features write to many layers; {NO_CLT}"
    if {"conf.yaml", "latest_ckpt.safetensors"} <= names:
        return (
            f"{files.name} is a temporal SAE, which predicts a token's code from the tokens before: no gate of one "
            "token stands for it"
        )
    if {"cross_encoder", "crosscoder"} & {part for name in names for part in re.split(r"[._-]", name.lower())}:
        return f"{files.name} is a crosscoder, which reads several places at once; take an SAE of one place"
    return None
