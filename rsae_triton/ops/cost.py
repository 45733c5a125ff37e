"""Predicts the cost of a training step of an SAE: FLOPs, bytes, fp32 instructions, memory and time.

A step is loss = mse + sparsity, forward and backward, without the optimiser, for an x that needs no gradient. A
strategy is a list of kernels. A kernel takes the longest of three times: for its matrix products at the device's rate,
for its traffic at the bandwidth, and for its fp32 instructions at the issue rate. tests/ops/test_cost.py counts small
steps operator by operator and compares. Times are predictions until a benchmark says otherwise (docs/kernels.md).

    eager      plain PyTorch; autograd also multiplies out the gradient of x - b_dec
    compiled   the same under torch.compile: pointwise chains fused, sums of coefficient gradients in groups
    split      library products and one pointwise kernel each way, no gradient of x - b_dec
    fused      the gate inside both products (`encode_forward`, `encode_backward`)
    chunked    split, over pieces of tokens; streamed: over pieces of features, which encodes twice
    sparse     one product, then the kernels of the support's entries (`support_triton`; teachers: `teacher_triton`)
    rounds     an encoder of several rounds (`rounds`, with the kernels of `round_search`)

Teachers and controls (`Step.family`) have two strategies: eager, which is how they are trained densely, and sparse.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rsae_triton.common.errors import ConfigError
from rsae_triton.ops.cost_kernels import (
    CEILINGS,
    TILES,
    Ceilings,
    Kernel,
    Step,
    backward_instructions,
    forward_instructions,
    product,
)

__all__ = ["CEILINGS", "FAMILIES", "STRATEGIES", "TILES", "Ceilings", "Cost", "Step", "cost", "finding_bytes",
           "optimizer_seconds",
           "peak_bytes", "product_seconds"]  # fmt: skip

STRATEGIES = ("eager", "compiled", "split", "fused", "chunked", "streamed", "sparse", "rounds")
FAMILIES = ("rational", "relu", "jumprelu", "topk", "batchtopk")
SECTOR = 32
"""Bytes that move when a number that lies alone is read or written."""
RANKING = 5
"""How often the library's top-k and sort are assumed to pass over their input (by digits; not measured)."""


@dataclass(frozen=True)
class Cost:
    """The kernels of a step, and the most bytes alive at once besides x, weights, their gradients and the gate."""

    strategy: str
    step: Step
    kernels: tuple[Kernel, ...]
    peak_bytes: float

    def total(self, what: str) -> float:
        """The sum of "flops", "bytes", "instructions" or "launches" over the kernels."""
        total: float = sum(getattr(kernel, what) for kernel in self.kernels)
        return total

    def seconds(self, on: Ceilings) -> float:
        """The time in seconds; a prediction unless the ceilings were measured (`Ceilings.measured`)."""
        return sum(kernel.seconds(on, self.step.itemsize) for kernel in self.kernels)


def cost(step: Step, strategy: str, *, chunk_tokens: int = 0, chunk_features: int = 0) -> Cost:
    """Returns the cost of a step under a strategy; chunks of 0 mean all at once.

    Raises:
        ConfigError: an unknown strategy or family, or a strategy that the family does not have.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy is {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    if step.family not in FAMILIES:
        raise ConfigError(f"family is {step.family!r}; choose one of {', '.join(FAMILIES)}")
    if step.family != "rational" and strategy not in ("eager", "sparse"):
        raise ConfigError(
            f"a {step.family} SAE is trained eagerly or sparsely; strategy {strategy!r} is for rational ones"
        )
    tokens, features = chunk_tokens or step.n_tokens, chunk_features or step.d_sae
    if strategy in ("sparse", "rounds"):
        made = _sparse(step) if strategy == "sparse" else _rounds(step)
    elif strategy in ("eager", "compiled"):
        made = _eager(step) if strategy == "eager" else _compiled(step)
    else:
        made = _ours(step, strategy, tokens, features)
    return Cost(strategy, step, tuple(made), peak_bytes(step, strategy, tokens, features))


def peak_bytes(step: Step, strategy: str, chunk_tokens: int, chunk_features: int) -> float:
    """The most bytes of tensors alive at once, besides x, the weights, their gradients and tensors of size d_sae."""
    e, rows = step.itemsize, step.n_tokens * step.d_in
    if strategy == "eager" and step.family != "rational":
        return step.codes * _EAGER_TEACHERS[step.family][1] * e / 4 + 4 * rows * e
    if strategy == "eager":
        # Counted: what autograd saves for the gate in float32, and the gate's largest temporaries.
        own = (40 if step.form == "direct" else 36) + 4 * step.p + (8 + 4 * step.q if step.q else 0)
        return step.codes * (own + (2 if e < 4 else 0)) + 4 * rows * e
    if strategy in ("compiled", "split", "fused"):
        # h, then z together with dz, or dz together with dh.
        return 3 * step.codes * e + 4 * rows * e
    if strategy == "sparse":
        # h, bits along tokens and along features, and some 36 bytes for each entry that the lists have room for.
        # A screen has the narrow copies and candidates beside; its own h becomes the step's, unless that is float32.
        screen = 0.0
        if step.screen:
            screen = step.screen * (step.weights + rows) + step.codes * (0.37 + (2 if e > 2 else 0))
        return step.codes * (e + 0.25 + 36 * 1.25 * max(step.support, 0.01)) + 4 * rows * max(e, 4) + screen
    if strategy == "rounds":
        # Autograd keeps some 24 numbers per entry and half a dozen [n_tokens, d_in] tensors for every round.
        return step.codes * step.support * (64 + 96 * step.rounds) + rows * 4 * (4 + 6 * step.rounds)
    piece = min(chunk_tokens, step.n_tokens) * min(chunk_features, step.d_sae)
    part = min(chunk_tokens, step.n_tokens) * step.d_in
    # h, and z, whose memory is then used for dz and dh; x_c, x_hat and the residual, in float32 and in the products'
    # dtype.
    return 2 * piece * e + rows * e + part * (8 + 2 * e)


def finding_bytes(step: Step) -> float:
    """Bytes of h and its bits, which a GPU holds while it looks for the candidates of an encoder with rounds; the
    strategy "rounds" does not count them, since a CPU has no more than a block of h."""
    return step.codes * (step.itemsize + 0.25)


def product_seconds(step: Step, on: Ceilings, *, backward: bool, fused: bool) -> float:
    """Time of an encoder product and its gate, or of dz and the gate's backward pass, fused or split."""
    kernels = list(_ours(step, "fused" if fused else "split", step.n_tokens, step.d_sae))
    if fused:
        return kernels[1 if backward else 0].seconds(on, step.itemsize)
    return product("", step).seconds(on, step.itemsize) + kernels[2 if backward else 1].seconds(on, step.itemsize)


_EAGER_TEACHERS = {"relu": (82, 16), "jumprelu": (112, 20), "topk": (63, 12), "batchtopk": (53, 13)}
"""Bytes per code of plain PyTorch in float32, counted: what the pointwise operators move, and what is alive at most."""


def _eager(step: Step) -> Iterable[Kernel]:
    if step.family != "rational":
        moved = _EAGER_TEACHERS[step.family][0] + (4 * RANKING if step.family.endswith("topk") else 0)
        yield product("products", step, 5)
        yield Kernel("pointwise", bytes=step.codes * moved * step.itemsize / 4, launches=40)
        return
    yield product("products", step, 6)
    # Counted for float32 arithmetic on h: every operator reads and writes [n_tokens, d_sae] tensors.
    per_code = (293 if step.form == "direct" else 232) + 60 * step.p + (88 + 60 * step.q if step.q else 0)
    narrow = 18 if step.itemsize < 4 else 0
    yield Kernel("pointwise", bytes=step.codes * (per_code + narrow), launches=30 + 8 * (step.p + step.q))


def _compiled(step: Step) -> Iterable[Kernel]:
    e = step.itemsize
    yield product("products", step, 6)
    yield Kernel("gate", 0, 2 * step.codes * e, step.codes * forward_instructions(step.p, step.q))
    yield Kernel("gate backward", 0, 3 * step.codes * e, step.codes * backward_instructions(step.p, step.q))
    # This is an assumption, still to be measured: coefficient sums are separate kernels that read h and dz again, all
    # scalars in one kernel and sums per feature four at a time.
    groups = 1 if step.shared else -(-(step.p + step.q + 5) // 4)
    again = step.codes * forward_instructions(step.p, step.q)
    yield Kernel("coefficient sums", 0, 2 * step.codes * e * groups, again * groups, launches=groups)


def _ours(step: Step, strategy: str, chunk_tokens: int, chunk_features: int) -> Iterable[Kernel]:
    e, codes = step.itemsize, step.codes
    pieces = -(-step.n_tokens // chunk_tokens) * -(-step.d_sae // chunk_features)
    forward, backward = forward_instructions(step.p, step.q), backward_instructions(step.p, step.q)
    encodings = 2 if chunk_features < step.d_sae else 1
    if strategy == "fused":
        many = step.p + step.q >= 8  # the same condition as in kernels/configs.py
        tiles = (False, many and not step.shared), (True, many)
        yield product("encode + gate", step, tile=tiles[0], instructions=codes * forward, bytes=codes * e)
        yield product("dz + gate backward", step, tile=tiles[1], instructions=codes * backward, bytes=codes * e)
        yield product("products", step, 3)
    else:
        yield product("products", step, 4 + encodings)
        yield Kernel("gate", 0, 2 * codes * e * encodings, codes * forward * encodings, pieces * encodings)
        yield Kernel("gate backward", 0, 3 * codes * e, codes * backward, pieces)
    yield Kernel("db_dec", 0, step.weights * e, step.weights)
    token_pieces = -(-step.n_tokens // chunk_tokens)
    if token_pieces > 1:
        # Every piece but the first reads and writes the float32 sums of both weights' gradients; in a narrow dtype it
        # also reads and writes its own contribution.
        each = 2 * 4 + (2 * e if e < 4 else 0)
        yield Kernel("sums of pieces", 0, (token_pieces - 1) * 2 * each * step.weights, launches=0)


SMALL = {"rational": 3, "relu": 2, "jumprelu": 1, "topk": 5, "batchtopk": 20}
"""Launches of PyTorch's operations on a few numbers or a number per feature in a sparse step, counted."""
COLUMNS, PROGRAMS = 512, 4096
"""Columns of a row in one program of `support_decode` and of `feature_sums`; programs that `support_mark` aims for."""


def _sparse(step: Step) -> Iterable[Kernel]:
    e, codes, weights, rows, family = step.itemsize, step.codes, step.weights, step.n_tokens * step.d_in, step.family
    ranked, active, d_sae = family.endswith("topk"), codes * step.active, step.d_sae
    entries, blocks = active if ranked else codes * step.support, -(-step.d_in // COLUMNS)
    yield Kernel("centred", 0, rows * (4 + e))
    if step.screen:
        yield from _screened(step)
    else:
        yield product("product", step)
    if ranked:
        yield Kernel("rank", 0, codes * e * RANKING + (entries * 12 if family == "topk" else 0))
    if family == "topk":
        yield Kernel("sort", 0, entries * (109 + 2 * SECTOR + 16 * RANKING), launches=11)
    else:
        yield from _found(step, entries, among=entries * PASSED[step.screen] if step.screen else 0.0)
        forward = forward_instructions(step.p, step.q) if family == "rational" else 4
        yield Kernel("gate", 0, entries * (20 + SECTOR), entries * forward)
        # Each of about 1024 programs adds up the counts of those before it.
        yield Kernel(
            "rows", 0, codes / 4 + active * (SECTOR + 4 + e) + 2 * min(1024, step.n_tokens / 32) ** 2, launches=2
        )
    gathered, decoder, runs = active * step.d_in, weights * e, min(step.n_tokens, 2048 / blocks)
    # It also compares x_hat with x, and writes the gradient in the products' dtype and its sums.
    yield Kernel(
        "decode", 0, active * (4 + e) * blocks + rows * (8 + e) + 8 * runs * step.d_in, gathered + 4 * rows,
        l2_bytes=gathered * e, once=decoder,
    )  # fmt: skip
    # Entries are sorted by feature, so its row of W_dec is read once and then found in the multiprocessor's own cache.
    gathered = entries * step.d_in
    yield Kernel("dots", 0, entries * 12, 2 * gathered, l2_bytes=gathered * e + decoder, once=decoder + rows * e)
    backward = backward_instructions(step.p, step.q) if family == "rational" else 10
    yield Kernel("gate backward", 0, entries * (28 if family == "relu" else 24), entries * backward)
    # A teacher's h has a gradient where the code is active. An l1 penalty (ReLU's) reads the decoder.
    gathered += (active - entries if family != "rational" else 0) * step.d_in + active * step.d_in
    penalty = 4 * weights if family == "relu" else 0
    yield Kernel(
        "sums", 0, 8 * weights + penalty + entries * 20 * blocks + (32 + 8 * blocks) * d_sae, 2 * gathered, launches=2,
        l2_bytes=gathered * e, once=2 * rows * e,
    )  # fmt: skip
    through = 2 * min(1024, d_sae / 64) * step.d_in * 4
    yield Kernel(
        "totals", 0, weights * e + (20 + 8 * blocks + 4 * _splits(step)) * d_sae + through + 4 * runs * step.d_in,
        2 * weights, launches=2,
    )  # fmt: skip
    yield Kernel("small operations", 0, 12 * d_sae, launches=SMALL[family])


def _splits(step: Step) -> int:
    """Number of runs of tokens that `support_mark` counts separately."""
    return min(-(-step.n_tokens // 128), -(-PROGRAMS // -(-step.d_sae // 32)))


PASSED = {1: 1.5, 2: 1.05}
"""Candidates of a screened product over entries of the support, by its bytes per element: measured on emulated products
(docs/kernels.md)."""


def _screened(step: Step) -> Iterable[Kernel]:
    """A product in a narrow dtype, and h of its candidates in the step's."""
    e, s, weights, rows = step.itemsize, step.screen, step.weights, step.n_tokens * step.d_in
    candidates = step.codes * step.support * PASSED[s]
    yield Kernel("narrow", 0, (weights + rows) * (e + s), weights + rows, launches=2)
    yield Kernel("product", 2.0 * weights * step.n_tokens, 2 * step.codes + s * (weights + rows), narrow=s)
    yield from _found(replace(step, itemsize=2), candidates)
    gathered = candidates * step.d_in
    once = (weights + rows) * e
    yield Kernel("h again", 0, candidates * (8 + SECTOR), 2 * gathered, l2_bytes=gathered * e + weights * e, once=once)
    yield Kernel("screening, small", 0, 8 * step.d_sae, launches=SCREENING)


SCREENING = 7
"""Launches on a few numbers or one a feature in a step with a screened product, beside those without one."""


def _found(step: Step, entries: float, among: float = 0.0) -> Iterable[Kernel]:
    splits, blocks = _splits(step), step.d_sae / 32
    read = among * SECTOR + step.codes / 8 if among else step.codes * step.itemsize
    yield Kernel("mark", 0, read + step.codes / 4 + 16 * splits * step.d_sae, step.codes * 8)
    # Each program adds up the counts of those before it.
    before = 2 * blocks * blocks * splits
    yield Kernel("entries", 0, step.codes / 8 + entries * (SECTOR + 12) + (12 + 4 * splits) * step.d_sae + before)


def _rounds(step: Step) -> Iterable[Kernel]:
    """An encoder of several rounds. A search goes through the rows of the float32 decoder three times: those of what is
    open, and, for a correction, those of the whole support once. Its backward pass adds the whole support in the last
    of its passes, and in the first where a correction followed."""
    e, count, weights, rows = step.itemsize, step.rounds, step.weights, step.n_tokens * step.d_in
    entries, active = step.codes * step.support, step.codes * step.active
    yield product("product", step, bytes=weights * (4 + e) if e < 4 else 0.0)
    yield from _found(step, entries)
    read = (3 * count * active + (count - 1) * (entries - active)) * step.d_in
    yield Kernel("search", 0, count * (16 * rows + 71 * entries), 2 * read, count, 4 * read, once=4 * count * weights)
    read = ((count - 1) * (2 * entries + active) + entries + active) * step.d_in
    sent = 4 * rows * (5 * count - 1) + 77 * entries * count
    yield Kernel("search backward", 0, sent, 2 * read, count, 4 * read, once=4 * count * weights)
    # W_dec's gradient has three terms of a search, one of a correction, and one of codes that are set to zero at the
    # end; two of them are added up in a pass over the entries.
    passes = (4 * count) // 2 + 1
    read = (3 * count * active + count * entries) * step.d_in
    yield Kernel(
        "sums", 0, 8 * weights * passes + 24 * entries * passes, 2 * read, 2 * (passes + 1), 4 * read,
        once=4 * rows * (4 * count + 1),
    )  # fmt: skip
    yield Kernel("residual", 0, rows * (110 + (4 + e if e < 4 else 0)), launches=14)
    yield Kernel("db_dec and norms", 0, 8 * weights, 2 * weights, launches=2)
    launches = 43 + 57 * count - (19 + 2 * count + 2 * (passes + 1))
    moved = entries * (64 + 434 * count) + 372 * step.d_sae
    yield Kernel("operations on entries", 0, moved, launches=launches)


def optimizer_seconds(step: Step, on: Ceilings, *, rows: bool) -> float:
    """Time of Adam on float32 weights, with removing the radial part, clipping, and restoring the rows' norms.

    Bytes per parameter: 72 with torch's operations; by rows 28, or 30 with a copy in bfloat16, because the norm comes
    with the gradients.
    """
    return 2 * step.weights * ((30 if step.itemsize < 4 else 28) if rows else 72) / on.bandwidth
