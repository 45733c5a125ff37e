"""Finds out what a checkpoint's pickle would build, without building it.

A pickle is a program for a small stack machine. Here it runs on descriptions of values instead of values: which
functions it calls, what the keys of its dictionaries are, and how large everything would be if written out. (A list
that holds another ten times, and so on, grows tenfold on every level, and takes for ever to hash or print.)
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rsae_triton.common.errors import FormatError

MAX_ENTRIES = 100_000
_BUILDERS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
    *(f"torch {name}" for name in vars(torch) if name.endswith("Storage")),
    *(f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}
_SCALARS = {
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
}  # fmt: skip
_EMPTY = {"EMPTY_TUPLE": "tuple", "EMPTY_LIST": "list", "EMPTY_DICT": "dict"}
_CLOSING = {"TUPLE": "tuple", "LIST": "list", "DICT": "dict"}
_PAIRS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(eq=False)
class _Value:
    """A value that is not built: its type, and what it holds."""

    kind: str
    parts: list[_Value] = field(default_factory=list)
    weight: int = 0  # its size when written out in full; 0: not counted yet, -1: being counted


_MARK = _Value("mark")
_PLAIN = _Value("plain")


def check_pickle(path: Path, data: bytes) -> None:
    """Raises FormatError unless `data` builds only tensors and plain containers of a bounded size, with text or numbers
    as keys. `path` is for the message."""
    made: list[_Value] = []
    try:
        result = _run(path, data, made)
    except (IndexError, KeyError, ValueError) as error:  # an empty stack, or a missing entry of the memo
        raise FormatError(f"{path} is damaged: its pickle is not valid ({error}); fetch it again") from error
    for one in (*made, result):
        if _weight(path, one) > MAX_ENTRIES:
            raise FormatError(f"{path} would unfold to more than {MAX_ENTRIES:,} entries; it is no checkpoint")


def _run(path: Path, data: bytes, made: list[_Value]) -> _Value:
    stack: list[_Value] = []
    memo: dict[Any, _Value] = {}

    def new(kind: str, parts: list[_Value]) -> None:
        made.append(_Value(kind, parts))
        stack.append(made[-1])

    def to_mark() -> list[_Value]:
        taken = []
        while (one := stack.pop()) is not _MARK:
            taken.append(one)
        return taken[::-1]

    def fill(taken: list[_Value]) -> None:
        if stack[-1].kind not in ("list", "dict", "made"):
            raise ValueError("something other than a container is filled")
        stack[-1].parts += taken

    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "GLOBAL":
            _check_global(path, argument)
            new("global", [])
            stack[-1].kind = f"global {argument}"
        elif name in _SCALARS:
            stack.append(_PLAIN)
        elif name in _EMPTY:
            new(_EMPTY[name], [])
        elif name in _CLOSING:
            new(_CLOSING[name], to_mark())
            if name == "DICT":
                _check_keys(path, stack[-1].parts[::2])
        elif name in _PAIRS:
            count = _PAIRS[name]
            taken = stack[-count:]
            del stack[-count:]
            new("tuple", taken)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("APPEND", "SETITEM"):
            taken = stack[-(1 if name == "APPEND" else 2) :]
            del stack[-len(taken) :]
            fill(taken)
            if name == "SETITEM":
                _check_keys(path, taken[:1])
        elif name in ("APPENDS", "SETITEMS"):
            taken = to_mark()
            fill(taken)
            if name == "SETITEMS":
                _check_keys(path, taken[::2])
        elif name == "REDUCE":
            arguments = stack.pop()
            function = stack.pop()
            if function.kind == "global collections OrderedDict" and arguments.parts:
                raise FormatError(f"{path} fills a dictionary in a way that torch.save does not; it is refused")
            new("made", [arguments])
        elif name == "BINPERSID":
            _check_storage(path, stack[-1])
            stack[-1] = _PLAIN
        elif name == "BUILD":
            fill([stack.pop()])
        elif name == "POP":
            stack.pop()
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise FormatError(f"{path} was not written by torch.save ({name} in its pickle); it is refused")
    raise ValueError("no end")


def _check_global(path: Path, name: Any) -> None:
    if name not in _BUILDERS:
        raise FormatError(
            f"{path} needs {str(name)[:80].replace(' ', '.')} to be read; a pickle of more than tensors can run any "
            "code and is refused. Load it where you trust it and save its state_dict"
        )


def _check_keys(path: Path, keys: list[_Value]) -> None:
    if any(key is not _PLAIN for key in keys):
        raise FormatError(f"{path} has a dictionary with keys that are neither text nor numbers; it is refused")


def _check_storage(path: Path, named: _Value) -> None:
    """Checks the description of a tensor's memory: five values, none of which may be large."""
    plain = named.kind == "tuple" and all(one is _PLAIN or one.kind.startswith("global") for one in named.parts)
    if not plain or len(named.parts) != 5:
        raise FormatError(f"{path} was not written by torch.save (its storages have other names); it is refused")


def _weight(path: Path, value: _Value) -> int:
    """The number of values in `value`, counting shared ones each time they occur."""
    waiting = [value]
    while waiting:
        one = waiting[-1]
        if one.weight > 0:
            waiting.pop()
        elif one.weight == 0 and one.parts:
            one.weight = -1
            for part in one.parts:
                if part.weight == -1:
                    raise FormatError(f"{path} holds a container that holds itself; it is no checkpoint")
                if part.weight == 0:
                    waiting.append(part)
        else:
            one.weight = min(1 + sum(max(part.weight, 1) for part in one.parts), 2 * MAX_ENTRIES)
            waiting.pop()
    return value.weight
