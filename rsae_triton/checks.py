"""What the public doors ask of numbers and tensors, in one wording: what is wrong, then what to give."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, NumericsError, ResourceError, ShapeError, first_line


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises ConfigError unless `value` is an integer (no bool) from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} is {value!r}; give an integer {wanted}")


def check_seed(seed: Any) -> None:
    """Raises ConfigError unless `seed` is an integer of 64 bits."""
    check_integer("seed", seed, -(2**63), 2**63 - 1)


def check_number(
    name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> None:
    """Raises ConfigError unless `value` is a finite number, >= `least`, > `above`, <= `most`."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or value <= above or value > most:
        low = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        high = f" and at most {most:g}" if most < math.inf else ""
        raise ConfigError(f"{name} is {value!r}; give a finite number{low}{high}")


def check_tensor(name: str, value: Any, device: torch.device | None = None) -> None:
    """Raises ShapeError unless `value` is a dense tensor, ConfigError unless it is of floats and on the device."""
    if not isinstance(value, Tensor):
        raise ShapeError(f"{name} is a {type(value).__name__}; give a torch.Tensor")
    if value.layout is not torch.strided:
        raise ShapeError(f"{name} is {value.layout}; give a dense tensor, for example {name}.to_dense()")
    if not value.is_floating_point():
        raise ConfigError(f"{name} is {value.dtype}; give floating-point numbers, for example {name}.float()")
    if device is not None and value.device != device:
        raise ConfigError(f"{name} is on {value.device}, the rest on {device}; move them to one device with .to(...)")


def check_finite(name: str, tensor: Tensor, advice: str) -> None:
    """Raises NumericsError with how many values are NaN or infinite and where the first stands."""
    if bool(torch.isfinite(tensor).all()):
        return
    bad = ~torch.isfinite(tensor)
    first = tuple(bad.nonzero()[0].tolist()) if tensor.dim() else ()
    value = float(tensor[first])
    raise NumericsError(
        f"{name} holds {int(bad.sum())} NaN or infinite values, the first ({value:g}) at {list(first)}; {advice}"
    )


def check_room(what: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ShapeError for a tensor of more elements than 64 bits can count, ResourceError for one that no address
    space holds; memory that is merely short is found when it is taken."""
    elements = math.prod(sizes)
    if elements >= 2**62:
        raise ShapeError(f"{what} would have {elements:.3g} elements; sizes are wrong")
    if elements * dtype.itemsize >= 2**47:
        raise ResourceError(f"{what} would take {elements * dtype.itemsize / 2**40:.3g} TiB; sizes are wrong")


def parse_device(device: Any) -> torch.device | None:
    """A device that can be used, from its name.

    Raises:
        ConfigError: no such device, or one that this torch or this machine does not have.
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
