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
    sparse     one product, then the kernels of the support's entries (`support_triton`)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rsae_triton.common.errors import ConfigError

STRATEGIES = ("eager", "compiled", "split", "fused", "chunked", "streamed", "sparse", "rounds")


@dataclass(frozen=True)
class Ceilings:
    """The rates per second that a device reaches in practice, which are below its data sheet.

    Attributes:
        products: FLOP/s of the library's matrix products, by bytes per element. bandwidth: bytes/s.
        instructions: fp32 instructions/s over all lanes. launch: seconds that a kernel costs besides its work.
        triton_products: the fraction of `products` that a Triton product with a large tile reaches. l2: bytes/s from
            the L2 cache, which limits a product with a small tile. generation: selects the tiles (the major compute
            capability).
        hidden: the fraction of a gate inside a product that is hidden behind another program's product.
        measured: False if these are estimates from data sheets.
    """

    name: str
    products: dict[int, float]
    bandwidth: float
    instructions: float
    launch: float = 3e-6
    triton_products: float = 0.8
    hidden: float = 0.5
    measured: bool = False
    l2: float = math.inf
    generation: int = 9


# 2 bytes: bf16; 4 bytes: tf32. Products at 0.68 and bandwidth at 0.9 of the data sheet; instructions at 0.85 of
# multiprocessors * lanes * boost clock; L2 at 0.9 of 5120 bytes per clock.
CEILINGS = {
    ceilings.name: ceilings
    for ceilings in (
        Ceilings("A100", {2: 212e12, 4: 106e12}, 1.8e12, 0.85 * 108 * 64 * 1.41e9, l2=6.5e12, generation=8),
        Ceilings("H100", {2: 672e12, 4: 336e12}, 3.0e12, 0.85 * 132 * 128 * 1.755e9, l2=8.1e12),
        Ceilings("H200", {2: 672e12, 4: 336e12}, 4.3e12, 0.85 * 132 * 128 * 1.755e9, l2=8.1e12),
    )
}


# [features, tokens] of the fused kernels' tiles, by generation, bytes per element, whether backward, and whether there
# are many coefficients. These are the tiles of kernels/configs.py, which cannot be imported without Triton; a test
# compares them.
TILES = {
    8: {
        (2, False, False): (128, 128), (2, False, True): (128, 64), (4, False, False): (128, 64),
        (4, False, True): (128, 64), (2, True, False): (64, 32), (2, True, True): (64, 16),
        (4, True, False): (64, 32), (4, True, True): (64, 16),
    },
    9: {
        (2, False, False): (128, 128), (2, False, True): (128, 128), (4, False, False): (128, 64),
        (4, False, True): (128, 64), (2, True, False): (64, 64), (2, True, True): (64, 32),
        (4, True, False): (64, 32), (4, True, True): (64, 32),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A step: sizes, the gate, and the bytes per element of x, W, h and z (the gate itself is float32).

    active, support: fractions of [n_tokens, d_sae] that are active, and in the support (the entries of a sparse step).
    rounds: number of rounds of the encoder (for the strategy "rounds").
    """

    n_tokens: int
    d_in: int
    d_sae: int
    p: int = 3
    q: int = 2
    shared: bool = True
    form: str = "direct"
    itemsize: int = 2
    active: float = 0.002
    support: float = 0.0042
    rounds: int = 1

    @property
    def codes(self) -> int:
        """Number of elements of a [n_tokens, d_sae] tensor."""
        return self.n_tokens * self.d_sae

    @property
    def weights(self) -> int:
        """Number of elements of a weight matrix."""
        return self.d_in * self.d_sae


@dataclass(frozen=True)
class Kernel:
    """The work of a launch (or of several equal `launches`): FLOPs of matrix products, bytes of traffic, fp32
    instructions."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    instructions: float = 0.0
    launches: int = 1
    l2_bytes: float = 0.0
    """Traffic served by the L2 cache: rows of matrices that are gathered repeatedly."""
    tile: tuple[bool, bool] | None = None
    """For a Triton product: whether it is the backward one, and whether there are many coefficients."""

    def seconds(self, on: Ceilings, itemsize: int) -> float:
        rate = on.products.get(itemsize, on.products[min(on.products)])
        if self.tile:
            features, tokens = TILES[on.generation][(2 if itemsize == 2 else 4, *self.tile)]
            # A step along the inner dimension reads features + tokens elements for features * tokens * 2 FLOPs.
            intensity = 2 * features * tokens / (itemsize * (features + tokens))
            rate = min(rate * on.triton_products, on.l2 * intensity)
        gate, product = self.instructions / on.instructions, self.flops / rate
        # Inside a product, instructions that are not hidden add to the time.
        work = max(product, gate) + (1 - on.hidden) * min(product, gate) if self.flops else gate
        return max(work, self.bytes / on.bandwidth, self.l2_bytes / on.l2) + self.launches * on.launch


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


def forward_instructions(p: int, q: int) -> float:
    """fp32 instructions per element for the gate, counted in the machine code of sm_90."""
    return _between(p + q, (5, 18), (9, 28), (17, 37))


def backward_instructions(p: int, q: int) -> float:
    """The same for its backward pass, with the gradients of all coefficients."""
    return _between(p + q, (5, 53), (9, 68), (17, 97))


def cost(step: Step, strategy: str, *, chunk_tokens: int = 0, chunk_features: int = 0) -> Cost:
    """Returns the cost of a step under a strategy; chunks of 0 mean all at once.

    Raises:
        ConfigError: an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy is {strategy!r}; choose one of {', '.join(STRATEGIES)}")
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
    if strategy == "eager":
        # Counted: what autograd saves for the gate in float32, and the gate's largest temporaries.
        own = (40 if step.form == "direct" else 36) + 4 * step.p + (8 + 4 * step.q if step.q else 0)
        return step.codes * (own + (2 if e < 4 else 0)) + 4 * rows * e
    if strategy in ("compiled", "split", "fused"):
        # h, then z together with dz, or dz together with dh.
        return 3 * step.codes * e + 4 * rows * e
    if strategy == "sparse":
        # h, bits along tokens and along features, and some 36 bytes for each entry that the lists have room for.
        return step.codes * (e + 0.25 + 36 * 1.25 * max(step.support, 0.01)) + 4 * rows * max(e, 4)
    if strategy == "rounds":
        # Autograd keeps some 24 numbers per entry and half a dozen [n_tokens, d_in] tensors for every round.
        return step.codes * step.support * (64 + 96 * step.rounds) + rows * 4 * (4 + 6 * step.rounds)
    piece = min(chunk_tokens, step.n_tokens) * min(chunk_features, step.d_sae)
    part = min(chunk_tokens, step.n_tokens) * step.d_in
    # h, and z, whose memory is then used for dz and dh; x_c, x_hat and the residual, in float32 and in the products'
    # dtype.
    return 2 * piece * e + rows * e + part * (8 + 2 * e)


def product_seconds(step: Step, on: Ceilings, *, backward: bool, fused: bool) -> float:
    """Time of an encoder product and its gate, or of dz and the gate's backward pass, fused or split."""
    kernels = list(_ours(step, "fused" if fused else "split", step.n_tokens, step.d_sae))
    if fused:
        return kernels[1 if backward else 0].seconds(on, step.itemsize)
    return _product("", step).seconds(on, step.itemsize) + kernels[2 if backward else 1].seconds(on, step.itemsize)


def _product(name: str, step: Step, count: float = 1, **more: Any) -> Kernel:
    """`count` of the step's matrix products, each of which reads or writes a code, a weight matrix and an [n, d_in]
    tensor."""
    traffic = count * step.itemsize * (step.codes + step.weights + step.n_tokens * step.d_in)
    extra = more.pop("bytes", 0.0)
    return Kernel(name, 2.0 * step.codes * step.d_in * count, traffic + extra, launches=max(1, round(count)), **more)


def _eager(step: Step) -> Iterable[Kernel]:
    yield _product("products", step, 6)
    # Counted for float32 arithmetic on h: every operator reads and writes [n_tokens, d_sae] tensors.
    per_code = (293 if step.form == "direct" else 232) + 60 * step.p + (88 + 60 * step.q if step.q else 0)
    narrow = 18 if step.itemsize < 4 else 0
    yield Kernel("pointwise", bytes=step.codes * (per_code + narrow), launches=30 + 8 * (step.p + step.q))


def _compiled(step: Step) -> Iterable[Kernel]:
    e = step.itemsize
    yield _product("products", step, 6)
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
        yield _product("encode + gate", step, tile=tiles[0], instructions=codes * forward, bytes=codes * e)
        yield _product("dz + gate backward", step, tile=tiles[1], instructions=codes * backward, bytes=codes * e)
        yield _product("products", step, 3)
    else:
        yield _product("products", step, 4 + encodings)
        yield Kernel("gate", 0, 2 * codes * e * encodings, codes * forward * encodings, pieces * encodings)
        yield Kernel("gate backward", 0, 3 * codes * e, codes * backward, pieces)
    yield Kernel("db_dec", 0, step.weights * e, step.weights)
    token_pieces = -(-step.n_tokens // chunk_tokens)
    if token_pieces > 1:
        # Every piece but the first reads and writes the float32 sums of both weights' gradients; in a narrow dtype it
        # also reads and writes its own contribution.
        each = 2 * 4 + (2 * e if e < 4 else 0)
        yield Kernel("sums of pieces", 0, (token_pieces - 1) * 2 * each * step.weights, launches=0)


def _sparse(step: Step) -> Iterable[Kernel]:
    e, codes, rows = step.itemsize, step.codes, step.n_tokens * step.d_in
    entries, active = codes * step.support, codes * step.active
    yield _product("product", step)
    # Reading or writing a single number that lies alone moves a sector of 32 bytes.
    yield Kernel("mark", 0, codes * (e + 0.25), codes * 8, launches=2)
    yield Kernel("entries", 0, codes / 8 + entries * (32 + 12), launches=3)
    yield Kernel("gate", 0, entries * (12 + 4 + 32), entries * forward_instructions(step.p, step.q))
    yield Kernel("rows", 0, codes / 4 + active * (32 + 4 + e), launches=4)
    yield Kernel("decode", 0, step.weights * e + rows * 4, active * step.d_in, l2_bytes=active * step.d_in * e)
    yield Kernel("residual", 0, rows * (8 + 4 + 4 + 8 + 4 + e), launches=6)
    # Entries are sorted by feature, so its row of W_dec is read once and then found in the multiprocessor's own cache.
    gathered = entries * step.d_in
    yield Kernel("dots", 0, (step.weights + rows) * e, 2 * gathered, l2_bytes=gathered * e + step.weights * e)
    yield Kernel("gate backward", 0, entries * 24, entries * backward_instructions(step.p, step.q))
    gathered = (entries + active) * step.d_in
    yield Kernel("sums", 0, 2 * step.weights * 4 + 2 * rows * e, 2 * gathered, launches=7, l2_bytes=gathered * e)
    yield Kernel("db_dec", 0, step.weights * 4, step.weights, launches=3)


def _rounds(step: Step) -> Iterable[Kernel]:
    """The sparse step, and for every round the decoding and the dot products with the decoder, forward and backward.

    A search decodes the active codes twice and takes their dot products once; a further round takes those of the whole
    support. The backward pass of each costs two of the same kind, one of which makes rows of the decoder's gradient.
    """
    yield from _sparse(step)
    e, rows, support, active = step.itemsize, step.n_tokens * step.d_in, step.support, step.active
    passes = step.rounds * 3 * active + (step.rounds - 1) * support
    gathered = 3 * step.codes * passes * step.d_in
    launches = 12 * (4 * step.rounds - 1)
    traffic = launches * rows * 4 + 3 * (step.weights * e) * (4 * step.rounds - 1)
    yield Kernel("rounds", 0, traffic, 2 * gathered, launches=launches, l2_bytes=gathered * e)


def optimizer_seconds(step: Step, on: Ceilings, *, rows: bool) -> float:
    """Time of Adam on float32 weights, with removing the radial part, clipping, and restoring the rows' norms.

    Bytes per parameter: 72 with torch's operations; by rows 28, or 30 with a copy in bfloat16, because the norm comes
    with the gradients.
    """
    return 2 * step.weights * ((30 if step.itemsize < 4 else 28) if rows else 72) / on.bandwidth


def _between(x: float, *points: tuple[float, float]) -> float:
    """Interpolates linearly between the points, and extrapolates beyond the last two on either side."""
    k = next((k for k in range(1, len(points) - 1) if x <= points[k][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[k - 1], points[k]
    return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))
