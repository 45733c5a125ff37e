"""Checks of the arguments of public functions. All messages say what is wrong, and then what to give."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.errors import ConfigError, NumericsError, ResourceError, ShapeError, first_line


def shown(value: Any) -> str:
    """`value` as shown in a message: on one line, and short."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python does not print integers of more than 4300 digits
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def closest(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean lr?" if one of `known` is similar to `name`, else "": the end of a message."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ConfigError if one of the `given` names is not `known`; the message suggests similar ones."""
    known = list(known)
    for name in given:
        if name not in known:
            near = closest(name, known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"{what} has no {name!r}{near}")


def check_flag(name: str, value: Any) -> None:
    """Raises ConfigError unless `value` is True or False, since a text such as "no" would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {shown(value)}; give True or False")


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises ConfigError unless `value` is an integer (not a bool) from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} is {shown(value)}; give an integer {wanted}")


def check_seed(seed: Any) -> None:
    """Raises ConfigError unless `seed` is an integer of 64 bits."""
    check_integer("seed", seed, -(2**63), 2**63 - 1)


def check_number(
    name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> None:
    """Raises ConfigError unless `value` is a finite number, >= `least`, > `above`, <= `most`."""
    try:
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        number = False
    if not number or value < least or value <= above or value > most:
        low = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        high = f" and at most {most:g}" if most < math.inf else ""
        raise ConfigError(f"{name} is {shown(value)}; give a finite number{low}{high}")


def check_tensor(name: str, value: Any, device: torch.device | None = None) -> None:
    """Raises ShapeError unless `value` is a dense tensor, ConfigError unless it is floating-point and on the device."""
    if not isinstance(value, Tensor):
        raise ShapeError(f"{name} is a {type(value).__name__}; give a torch.Tensor")
    if value.is_nested:
        raise ShapeError(f"{name} is a nested tensor; give a dense one, for example torch.cat({name}.unbind())")
    if value.layout is not torch.strided:
        raise ShapeError(f"{name} is {value.layout}; give a dense tensor, for example {name}.to_dense()")
    if not value.is_floating_point():
        raise ConfigError(f"{name} is {value.dtype}; give floating-point numbers, for example {name}.float()")
    if device is not None and value.device != device:
        raise ConfigError(f"{name} is on {value.device}, the rest on {device}; move them to one device with .to(...)")


def check_data(name: str, value: Any) -> None:
    """`check_tensor` for a tensor whose values will be read; on the meta device there are none."""
    check_tensor(name, value)
    if value.is_meta:
        raise ConfigError(f"{name} is on meta and holds no data; give a tensor on cpu or cuda")


def as_tensor(name: str, value: Any, dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
    """Converts a number, numbers, an array or a tensor to a dense tensor. Raises ConfigError for anything else."""
    if isinstance(value, Tensor) and (value.layout is not torch.strided or value.is_meta):
        raise ConfigError(f"{name} is {'on meta' if value.is_meta else value.layout}; give a dense tensor with data")
    if "complex" in str(getattr(value, "dtype", "")):  # its imaginary part would be lost
        raise ConfigError(f"{name} is {value.dtype}; give real numbers")
    try:
        return torch.as_tensor(value, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"{name} is {shown(value)}; give a number, or numbers ({first_line(error, 80)})") from error


def check_finite(name: str, tensor: Tensor, advice: str) -> None:
    """Raises NumericsError that says how many values are NaN or infinite, and where the first one is."""
    if bool(torch.isfinite(tensor).all()):
        return
    bad = ~torch.isfinite(tensor)
    first = tuple(bad.nonzero()[0].tolist()) if tensor.dim() else ()
    value = float(tensor[first])
    raise NumericsError(
        f"{name} holds {int(bad.sum())} NaN or infinite values, the first ({value:g}) at {list(first)}; {advice}"
    )


def check_room(what: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ShapeError for a tensor with more elements than 64 bits can count, ResourceError for one that no address
    space holds. (Whether memory suffices is only found on allocation.)"""
    elements = math.prod(sizes)
    if elements >= 2**62:
        raise ShapeError(f"{what} would have {elements:.3g} elements; sizes are wrong")
    if elements * dtype.itemsize >= 2**47:
        raise ResourceError(f"{what} would take {elements * dtype.itemsize / 2**40:.3g} TiB; sizes are wrong")


def parse_device(device: Any) -> torch.device | None:
    """Returns a usable device by name.

    Raises:
        ConfigError: there is no such device, or this torch or this machine does not have it.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = first_line(error, 120)
        raise ConfigError(
            f"device {device!r} cannot be used ({reason}); choose cpu, or cuda where there is one"
        ) from error
    return found
