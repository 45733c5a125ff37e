"""The speed targets, and whether a result reaches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rsae_triton.report.speed.results import FLOOR, eager, ours, timed

SHARED, FEATURE = ((3, 2), 1), ((9, 8), 0)
STREAMED = "ours, streamed"


class Target(NamedTuple):
    """One target: `measured` returns the number (None: the case is missing or a contender has no time)."""

    kind: str
    text: str
    case: dict[str, Any]
    measured: Callable[[dict[str, Any]], float | None]
    bound: float
    at_least: bool

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def _speedup(over: str) -> Callable[[dict[str, Any]], float | None]:
    """Returns a function that computes how many times faster the fastest of ours is."""

    def measured(case: dict[str, Any]) -> float | None:
        plain = eager(case) if over == "eager" else None
        base = plain[1] if plain else timed(case).get(over, {}).get("median_s")
        mine = [one["median_s"] for one in ours(case).values()]
        return base / min(mine) if base and mine else None

    return measured


def _over(name: str) -> Callable[[dict[str, Any]], float | None]:
    """Returns a function that computes the fastest of ours in units of another contender's time."""

    def measured(case: dict[str, Any]) -> float | None:
        found = _speedup(name)(case)
        return None if found is None else 1 / found

    return measured


def _memory(mine: str | None, over: str) -> Callable[[dict[str, Any]], float | None]:
    """Returns a function that computes our transient memory (the leanest, or the one named) relative to another
    contender's."""

    def measured(case: dict[str, Any]) -> float | None:
        names = ("eager, Horner", "eager, powers") if over == "eager" else (over,)
        base = [timed(case)[name]["peak_bytes"] for name in names if name in timed(case)]
        own = [one["peak_bytes"] for name, one in ours(case).items() if mine in (None, name)]
        return min(own) / min(base) if base and own and min(base) else None

    return measured


def _streamed_speedup(case: dict[str, Any]) -> float | None:
    base, one = eager(case), timed(case).get(STREAMED)
    return base[1] / one["median_s"] if base and one else None


def _case(n: int | None, d_in: int, d_sae: int, gate: Any, dtype: str, work: str = "step") -> dict[str, Any]:
    """The sizes that a case must have; n: None for any."""
    tokens = {} if n is None else {"n_tokens": n}
    return {"work": work, **tokens, "d_in": d_in, "d_sae": d_sae, "degree": list(gate[0]), "groups": gate[1],
            "form": "direct", "dtype": dtype, "sweep": ""}  # fmt: skip


def targets() -> Iterator[Target]:
    """Yields all targets."""
    compiled, jumprelu = "torch.compile", "SAELens JumpReLU"
    for gate, name, bound in ((SHARED, "(3, 2) shared", 2.0), (FEATURE, "(9, 8) per feature", 3.5)):
        case = _case(None, 576, 18432, gate, "fp32")
        text = f"step, d_in 576, d_sae 18432, {name}"
        yield Target("cpu", f"{text}: times faster than eager", case, _speedup("eager"), bound, True)
        yield Target("cpu", "the same, streamed: times faster than eager", case, _streamed_speedup, bound, True)
        memory = _memory(STREAMED, "eager")
        yield Target("cpu", "the same, streamed: of eager's transient memory", case, memory, 0.1, False)
        yield Target("cpu", "the same: of the bare products' time", case, _over(FLOOR), 1.15, False)
    sizes = ((4096, 768, 24576, 10.0), (4096, 2304, 65536, 5.0), (8192, 4096, 131072, 4.0))
    for n, d_in, d_sae, bound in sizes:
        for gate, name, least in ((SHARED, "(3, 2) shared", 1.1), (FEATURE, "(9, 8) per feature", 1.4)):
            case = _case(n, d_in, d_sae, gate, "bf16")
            text = f"step {n} x {d_in} x {d_sae}, {name}"
            yield Target("cuda", f"{text}: times faster than eager", case, _speedup("eager"), bound, True)
            yield Target("cuda", f"the same: times faster than {compiled}", case, _speedup(compiled), least, True)
            memory = _memory(None, compiled)
            yield Target("cuda", f"the same: of {compiled}'s transient memory", case, memory, 1 / 3, False)
            yield Target("cuda", "the same: of the bare products' time", case, _over(FLOOR), 1.15, False)
            if gate is SHARED:
                yield Target("cuda", f"the same: of {jumprelu}'s step", case, _over(jumprelu), 1.1, False)
    n, d_in, d_sae, _ = sizes[1]
    case = _case(n, d_in, d_sae, FEATURE, "bf16", "encode")
    yield Target("cuda", f"encode {n} x {d_in} x {d_sae}: of the bare product's time", case, _over(FLOOR), 1.25, False)


def find(result: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the result's case with these sizes, or None."""
    return next((case for case in result["cases"] if all(case[name] == one for name, one in wanted.items())), None)
