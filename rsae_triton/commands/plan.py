"""`rsae plan`: predicts memory and time of a training step, to size a run before renting machines.

Products, traffic and instructions are computed by `cost`; the optimiser's traffic and the communication between
processes are added here. The hardware ceilings are estimates (`cost.CEILINGS`, `LINKS`), so every time is a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from rsae_triton.common.checks import check_integer, check_number
from rsae_triton.common.errors import ConfigError
from rsae_triton.ops.cost import CEILINGS, Step, cost, finding_bytes
from rsae_triton.remez.problem import parse_degree
from rsae_triton.sae.rounds import MOST_ROUNDS
from rsae_triton.training.memory import SHARE, cut


@dataclass(frozen=True)
class Links:
    """Bytes/s that one GPU sends in an all-reduce, inside a node and between nodes, and the least seconds that one
    takes.

    The numbers are 0.75 of NVLink's data sheet in one direction, and 0.8 of one InfiniBand port per GPU.
    """

    memory: float
    inside: float
    between: float
    latency: float = 30e-6


LINKS = {
    "A100": Links(79e9, 0.75 * 300e9, 0.8 * 25e9),
    "H100": Links(79e9, 0.75 * 450e9, 0.8 * 50e9),
    "H200": Links(139e9, 0.75 * 450e9, 0.8 * 50e9),
}
STRATEGIES = ("sparse", "saved", "chunked", "streamed", "eager")
ENTRIES = {"rational": 2.1, "jumprelu": 1.3, "relu": 1.0, "topk": 1.0, "batchtopk": 1.0}
"""Entries of the support for every active code: in trained Rational SAEs (docs/steps.md); of a JumpReLU's rectangle it
is a guess."""
_MOST, _MOST_GPUS = 2**40, 2**16


@dataclass(frozen=True)
class Plan:
    """Predict memory and step time of a training run, by strategy and by layout over GPUs.

    Examples:
        rsae plan --d-in 4096 --d-sae 1048576 --tokens 8192 --gpus 8
        rsae plan --d-in 768 --d-sae 24576 --device A100 --degree 9,8 --per-feature
        rsae plan --d-in 768 --d-sae 24576 --family topk
        rsae plan --d-in 768 --d-sae 24576 --rounds 2
    """

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Features."""
    tokens: int = 8192
    """Tokens per optimiser step, over all GPUs."""
    gpus: int = 1
    """Processes, one GPU each."""
    gpus_per_node: int = 8
    """GPUs that NVLink connects."""
    device: Literal["A100", "H100", "H200"] = "H100"
    """GPU whose memory and speed are assumed."""
    degree: str = "3,2"
    """Degree of the rational, as p,q."""
    per_feature: bool = False
    """Every feature has its own coefficients; otherwise all share them."""
    form: Literal["gated", "direct"] = "gated"
    """Form of the gate."""
    precision: Literal["bf16", "float32"] = "bf16"
    """Precision of the matrix products; weights and optimiser are float32 either way."""
    l0: float = 64.0
    """Active features per token, for sparse steps (gated form, and every teacher)."""
    family: Literal["rational", "relu", "jumprelu", "topk", "batchtopk"] = "rational"
    """What is trained: a Rational SAE, or a teacher or control of this family."""
    rounds: int = 1
    """Rounds of a Rational SAE's encoder; more than one have no other way than `rounds`."""
    rows: int = 12
    """Rows of the table: the fastest that fit."""


@dataclass(frozen=True)
class Estimate:
    """One way to run: bytes per GPU and predicted seconds of one step.

    Attributes:
        tokens_over, features_over: processes along each axis. strategy: see `cost`. pieces: how the step is cut.
        weights, optimiser, copies, activations: bytes on each GPU; the optimiser's are gradients and two moments,
            copies are of the weights in the products' dtype. memory: the bytes that each GPU has.
        compute, update, communication: seconds. sent: bytes that each GPU sends in a step. flops: of each GPU's
            products.
    """

    tokens_over: int
    features_over: int
    strategy: str
    pieces: str
    weights: float
    optimiser: float
    copies: float
    activations: float
    memory: float
    compute: float
    update: float
    communication: float
    sent: float
    flops: float

    @property
    def bytes(self) -> float:
        return self.weights + self.optimiser + self.copies + self.activations

    @property
    def fits(self) -> bool:
        return self.bytes <= self.memory

    @property
    def seconds(self) -> float:
        return self.compute + self.update + self.communication


def estimates(plan: Plan) -> list[Estimate]:
    """Returns every strategy on every layout; first those that fit, the fastest first.

    Raises:
        ConfigError: impossible sizes.
    """
    for name in ("d_in", "d_sae", "tokens", "gpus", "gpus_per_node", "rows"):
        most = _MOST_GPUS if name.startswith("gpus") else _MOST
        check_integer(f"--{name.replace('_', '-')}", getattr(plan, name), 1, most)
    check_number("--l0", plan.l0, above=0)
    check_integer("--rounds", plan.rounds, 1, MOST_ROUNDS)
    if plan.rounds > 1 and (plan.family != "rational" or plan.form != "gated"):
        raise ConfigError("--rounds is for Rational SAEs of the gated form")
    p, q = parse_degree(plan.degree)
    active = min(plan.l0 / plan.d_sae, 1.0)
    layouts = [(plan.gpus // share, share) for share in range(1, plan.gpus + 1) if plan.gpus % share == 0]
    layouts = [(data, share) for data, share in layouts if plan.tokens % data == 0 and plan.d_sae % share == 0]
    if not layouts:
        raise ConfigError(f"{plan.gpus} GPUs share neither {plan.tokens} tokens nor {plan.d_sae} features equally")
    itemsize = 2 if plan.precision == "bf16" else 4
    found = [
        _estimate(plan, Step(plan.tokens // data, plan.d_in, plan.d_sae // share, p, q, not plan.per_feature, plan.form,
                             itemsize, active, min(ENTRIES[plan.family] * active, 1.0), plan.rounds, plan.family),
                  data, share, strategy)
        for data, share in layouts
        for strategy in _strategies(plan, data, share)
    ]  # fmt: skip
    if not found:
        raise ConfigError(f"a {plan.family} SAE is not split over {plan.gpus} GPUs; plan it for one")
    return sorted(found, key=lambda one: (not one.fits, one.seconds))


def _strategies(plan: Plan, data: int, share: int) -> tuple[str, ...]:
    """How this SAE can be trained where `data` processes split the tokens and `share` the features."""
    if plan.rounds > 1:
        return ("rounds",) if share == 1 else ()  # with features elsewhere, its searches do without the kernels
    if plan.family != "rational":
        whole = plan.family.endswith("topk")  # which compares all features of a token; BatchTopK those of all tokens
        alone = (whole and share > 1) or (plan.family == "batchtopk" and data > 1)
        return () if alone else ("sparse", "eager")
    return STRATEGIES if plan.form == "gated" else STRATEGIES[1:]


def _estimate(plan: Plan, step: Step, data: int, share: int, strategy: str) -> Estimate:
    on, links = CEILINGS[plan.device], LINKS[plan.device]
    gate = (step.p + step.q + 6) * (1 if step.shared else step.d_sae) if plan.family == "rational" else 0
    further = 5 * step.rounds - 3 if step.rounds > 1 else 0  # of every feature
    parameters = 2 * step.weights + gate + (2 + further) * step.d_sae
    held = 4.0 * parameters
    copies = 2.0 * step.weights * step.itemsize if step.itemsize < 4 and strategy != "streamed" else 0.0
    budget = SHARE * (links.memory - 4 * held - copies)
    if strategy in ("eager", "sparse", "rounds"):
        priced, pieces = cost(step, strategy), ""
    else:
        way = cut(step, budget, strategy)
        sizes = {"chunk_tokens": way.chunk_tokens or 0, "chunk_features": way.chunk_features or 0}
        priced = cost(step, "split" if strategy == "saved" else strategy, **sizes)
        pieces = ", ".join(f"{value} {name[6:]}" for name, value in sizes.items() if value)
    # One pass over each row: Adam reads parameter, gradient and both moments and writes three of them, and the copies.
    # Unless a sparse step made the whole gradient: before it the norm is read, and the decoder's radial part removed
    # (two reads, one write); and the copies are made by a pass of their own.
    traffic = held * 7 + copies
    if strategy != "sparse" or data > 1:
        traffic += held + 12.0 * step.weights + 2 * copies
    sent, seconds = _communication(plan, step, data, share, parameters, priced.strategy == "streamed", pieces, links)
    return Estimate(
        tokens_over=data,
        features_over=share,
        strategy=strategy,
        pieces=pieces,
        weights=held,
        optimiser=3 * held,
        copies=copies,
        activations=priced.peak_bytes + (finding_bytes(step) if strategy == "rounds" else 0.0),
        memory=links.memory,
        compute=priced.seconds(on),
        update=traffic / on.bandwidth,
        communication=seconds,
        sent=sent,
        flops=priced.total("flops"),
    )


def _communication(
    plan: Plan, step: Step, data: int, share: int, parameters: float, streamed: bool, pieces: str, links: Links
) -> tuple[float, float]:
    """Returns the bytes that one GPU sends in a step and the seconds that takes, with no overlap with computation.

    A ring all-reduce of b bytes among r GPUs sends 2 (r - 1) / r b from each.
    """

    def ring(count: float, ranks: int, inside: bool) -> tuple[float, float]:
        sent = 2 * (ranks - 1) / ranks * count if ranks > 1 else 0.0
        return sent, sent / (links.inside if inside else links.between) + (links.latency if ranks > 1 else 0.0)

    # Processes that share features have consecutive ranks.
    partial = ring(4.0 * step.n_tokens * step.d_in, share, share <= plan.gpus_per_node)
    gradients = ring(4.0 * parameters, data, plan.gpus <= plan.gpus_per_node)
    numbers = ring(4.0 * (step.d_in + 64), plan.gpus, plan.gpus <= plan.gpus_per_node)
    sent, seconds = (sum(part) for part in zip(partial, gradients, numbers, strict=True))
    return sent, seconds


_WIDE = 155
"""Columns that the whole table takes; in a narrower terminal it is shown without its parts."""


def run_plan(plan: Plan, console: Console | None = None) -> list[Estimate]:
    """Runs `rsae plan`: prints the table and returns all estimates."""
    found = estimates(plan)
    fitting = [one for one in found if one.fits]
    shown = (fitting or found)[: plan.rows]
    eager = [one for one in found if one.strategy == "eager"][:1]
    shown += [one for one in eager if one not in shown]
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=max(console.width, _WIDE))
    narrow = console.width < _WIDE
    best = found[0]
    console.print(
        f"d_in {plan.d_in}, d_sae {plan.d_sae}, {plan.tokens} tokens a step, {plan.precision} products, "
        f"{plan.gpus} x {plan.device}, {plan.family}{f', {plan.rounds} rounds' if plan.rounds > 1 else ''}. "
        "Predicted from estimated ceilings, not measured."
        + f" {_WIDE} columns show what memory and time are made of."
        * narrow,
        highlight=False,
    )
    table = Table()
    sizes = ("all",) if narrow else ("weights", "grad + Adam", "copies", "activations", "all")
    times = ("step",) if narrow else ("compute", "update", "network", "step")
    for name in ("GPUs, tokens\nx features", "\n--memory", *(f"{one}\nGB" for one in sizes), "\nfits",
                 *(f"{one}\nms" for one in times), "\ntokens/s"):  # fmt: skip
        table.add_column(name, justify="left" if "memory" in name else "right", no_wrap=True)
    for one in shown:
        parts = [f"{part / 1e9:.2f}" for part in (one.weights, one.optimiser, one.copies, one.activations, one.bytes)]
        spent = [f"{1e3 * part:.1f}" for part in (one.compute, one.update, one.communication, one.seconds)]
        table.add_row(
            f"{one.tokens_over} x {one.features_over}",
            f"{one.strategy}{f' ({one.pieces})' if one.pieces else ''}",
            *parts[-len(sizes) :],
            "yes" if one.fits else "no",
            *spent[-len(times) :],
            f"{plan.tokens / one.seconds:,.0f}",
        )
    console.print(table)
    if not fitting:
        console.print(f"nothing fits into {best.memory / 1e9:.0f} GB: take more GPUs, or fewer features")
    else:
        nodes = -(-plan.gpus // plan.gpus_per_node)
        many = f"--nnodes {nodes} " if nodes > 1 else ""
        launch = f"torchrun {many}--nproc-per-node {min(plan.gpus, plan.gpus_per_node)} -m rsae_triton train"
        command = launch if plan.gpus > 1 else "rsae train"
        memory = {"eager": "saved", "sparse": "auto", "rounds": "auto"}  # with auto, a run begins with dense steps
        console.print(
            f"best: {command} ... --batch-size {plan.tokens} --features-over {best.features_over} --memory "
            f"{memory.get(best.strategy, best.strategy)} --precision {plan.precision}",
            highlight=False,
            soft_wrap=True,
        )
    return found
