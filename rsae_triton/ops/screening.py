"""Screens the sparse step's one dense product on a GPU: makes it in a narrower dtype, and h again where it may matter.

The narrow product only finds candidates: the places where h may be in the support, given the product's error. Their h
is then made again in the products' own dtype, by dot products at these places, and decides. Rounding each number of
two rows changes their product by a random sum whose standard deviation is `DEVIATION` |x| |w| / sqrt(d_in) (if large
numbers of x and w do not meet more often than others), and the margin is `sigmas` of these. That is no bound, so that
it is checked: `Screen` counts, on some tokens of every tenth step, what a whole product finds and the screen has not.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.errors import first_line
from rsae_triton.ops import backends, routing
from rsae_triton.ops.cost import CEILINGS, Ceilings, Step, cost

FLOAT8 = torch.float8_e4m3fn
DEVIATION = {FLOAT8: 2.0**-4, torch.bfloat16: 2.0**-9}
"""The largest relative error of rounding; `ERROR` of it is the standard deviation for two factors."""
ERROR = math.sqrt(2 / 3 * 0.75 / (2 * math.log(2)))
"""Two independent errors that are uniform up to the largest one, of numbers whose logarithm is uniform."""
SIGMAS, MOST_SIGMAS = 3.0, 12.0
"""The margin in standard deviations of the error: at first, and the widest one."""
LIMIT = 1e-4
"""The share of active entries that may be missed; above it the margin is doubled, and at last the screen turned off."""
EVERY, TOKENS = 10, 64
"""A check looks at this many tokens (a multiple of 32), in one of so many steps."""
WORTH = 0.95
"""The predicted time of a step, as a share of that without a screen, from which a screen is worth having."""
ALIGNED = 16
"""What d_in and the number of tokens must be multiples of in a float8 product."""

_log = logging.getLogger(__name__)


class Screen:
    """The screen of a run, and what its checks have found.

    Attributes:
        dtype: of the narrow product, or None if there is no screen. off: whether it missed too much even with the
            widest margin. most: the share of [n_tokens, d_sae] in the support up to which it is predicted to pay.
            sigmas: the margin, in standard deviations of the error.
        missed, checked: active entries that the checks since the last change of the margin have found missing, and
            entries that they have looked at. found: [2], the same of the last step as a tensor on the GPU, if it
            was checked; None otherwise.
    """

    def __init__(self, dtype: torch.dtype | None, most: float = 1.0) -> None:
        self.dtype, self.most, self.sigmas, self.off = dtype, most, SIGMAS, False
        self.missed, self.checked, self._steps = 0.0, 0.0, 0
        self.found: Tensor | None = None

    def starts(self, share: float) -> bool:
        """Whether the next step is screened, if `share` of [n_tokens, d_sae] was in the last step's support."""
        self.found = None
        return self.dtype is not None and not self.off and share <= self.most

    def product(self, rows: Tensor, x_c: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns h [d_sae, n_tokens] in bfloat16, from W_enc^T [d_sae, d_in] and x_c [n_tokens, d_in], and its margin:
        the features' part [d_sae] and the tokens' [n_tokens]."""
        assert self.dtype is not None
        narrow = backends.kernels().narrow_rows
        w, x = narrow(rows, self.dtype), narrow(x_c, self.dtype)
        share = self.sigmas * ERROR * DEVIATION[self.dtype] / math.sqrt(max(rows.shape[1], 1))
        return multiply(w, x), (w.norms * share, x.norms)

    def check(self, candidates: Tensor, rows: Tensor, x_c: Tensor, threshold: Tensor, b_enc: Tensor) -> None:
        """Compares candidates [d_sae, n_tokens / 32] (a bit for each token) with a whole product, for some tokens and
        in one of `EVERY` steps. threshold [d_sae]: above which h + b_enc is active."""
        due, turn = self._steps % EVERY == 0, self._steps // EVERY
        self._steps += 1
        if not due or not len(x_c):
            return
        first = turn % -(-len(x_c) // TOKENS) * TOKENS
        x = x_c[first : first + TOKENS]
        active = torch.mm(rows, x.t()).float() + b_enc[:, None] > threshold[:, None]
        words = candidates[:, first // 32 : (first + TOKENS) // 32, None]
        found = (words >> torch.arange(32, device=x.device)).flatten(1)[:, : len(x)] & 1
        self.found = torch.stack([(active & (found == 0)).sum(), active.sum()])

    def saw(self, missed: float, checked: float, step: int) -> None:
        """Takes the numbers of a check (`found`), and decides on the margin of the steps after it."""
        self.missed, self.checked = self.missed + missed, self.checked + checked
        if self.missed < 2 or self.missed <= LIMIT * self.checked:  # a single one may be chance
            return
        said = f"{self.missed:.0f} of {self.checked:.0f} active entries were missed by the screen of the product"
        if self.sigmas < MOST_SIGMAS:
            self.sigmas *= 2
            _log.warning("step %d: %s; its margin is doubled", step, said)
        else:
            self.off = True
            _log.warning("step %d: %s; products are whole from here on", step, said)
        self.missed = self.checked = 0.0

    def row(self) -> dict[str, float]:
        """What the log says of it: the share of active entries that the checks have found missing."""
        return {} if self.dtype is None or self.off else {"missed": self.missed / max(self.checked, 1.0)}

    def state(self) -> dict[str, Any]:
        """The state for `restore`."""
        return {
            "off": self.off, "sigmas": self.sigmas, "missed": self.missed, "checked": self.checked,
            "steps": self._steps,
        }  # fmt: skip

    def restore(self, state: Any) -> None:
        """Continues from `state`; from anything else (an old checkpoint) as at the start."""
        if not isinstance(state, dict) or state.keys() != self.state().keys():
            return
        if not all(isinstance(one, bool | int | float) for one in state.values()):
            return
        self.off, self._steps = bool(state["off"]), int(state["steps"])
        self.sigmas, self.missed, self.checked = (float(state[name]) for name in ("sigmas", "missed", "checked"))


def multiply(w: Any, x: Any) -> Tensor:
    """Multiplies rows w [d_sae, d_in] and x [n_tokens, d_in], as `narrow_rows` makes them: [d_sae, n_tokens] in
    bfloat16. In float8 a CPU computes what a GPU does, up to the order of its sums."""
    if w.rows.dtype != FLOAT8:
        return torch.mm(w.rows, x.rows.t())
    if w.rows.device.type != "cuda":
        h = w.rows.float() @ x.rows.float().t()
        return h.mul_(w.scales[:, None]).mul_(x.scales).to(torch.bfloat16)
    # The GPU's fast sums keep some 14 bits. Their error is up to a hundredth of h, and less than the margin.
    scales = {"scale_a": w.scales[:, None], "scale_b": x.scales[None, :]}
    return torch._scaled_mm(w.rows, x.rows.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


@functools.cache
def float8_works(device: torch.device) -> bool:
    """Whether a GPU multiplies float8 rows with a scale each: Hopper, with a torch that does. Tries a small product."""
    if device.type != "cuda":
        return backends.interpreting()
    if backends.unsupported(device) is not None or backends.capability(device)[0] != 9:
        return False
    try:
        a, b = (torch.linspace(-1, 1, 64 * 64, device=device).view(64, 64) * k for k in (1, 2))
        narrow = backends.kernels().narrow_rows
        error = multiply(narrow(a, FLOAT8), narrow(b, FLOAT8)).float() - a @ b.t()
        return float(error.abs().max()) <= 0.1 * float(a.norm(dim=1).max() * b.norm(dim=1).max())
    except Exception as error:  # a missing operator, an argument that another version knows
        _log.info("float8 products are not used on %s: %s", device, first_line(error))
        return False


def screen_for(step: Step, dtype: torch.dtype, device: torch.device) -> Screen:
    """Returns the screen that is predicted to make a sparse step of this size fastest, if any.

    dtype: of the products.
    """
    name = routing.device_name(device)
    on = next((CEILINGS[one] for one in sorted(CEILINGS, reverse=True) if one.lower() in name.lower()), None)
    if on is None or step.d_in > backends.kernels().MOST_COLUMNS:
        return Screen(None)
    best = Screen(None), 0.0
    for narrow in (FLOAT8, torch.bfloat16):
        size = narrow.itemsize
        if size >= dtype.itemsize or on.products.get(size, 0) <= on.products[dtype.itemsize]:
            continue
        if narrow == FLOAT8 and (step.d_in % ALIGNED or step.n_tokens % ALIGNED):
            continue
        most, saved = _worth(replace(step, itemsize=dtype.itemsize), size, on)
        if saved > best[1] and (narrow != FLOAT8 or float8_works(device)):
            best = Screen(narrow, most), saved
    return best[0]


def _worth(step: Step, size: int, on: Ceilings) -> tuple[float, float]:
    """The largest share of the support at which a screen of this size is worth having, and the seconds that it saves
    without any."""
    most, first = 0.0, 0.0
    for share in (k / 4000 for k in range(50)):  # up to the room that a step's lists have
        at = replace(step, support=share, active=share / 2.1)
        whole, screened = (cost(one, "sparse").seconds(on) for one in (at, replace(at, screen=size)))
        if screened > WORTH * whole:
            break
        most, first = share, first or whole - screened
    return most, first
