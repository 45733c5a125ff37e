"""The parts of the cost model: the rates of devices, the sizes of a step, and the work of one kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


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


# 1 byte: fp8; 2 bytes: bf16; 4 bytes: tf32. Products at 0.68 and bandwidth at 0.9 of the data sheet; instructions at
# 0.85 of multiprocessors * lanes * boost clock; L2 at 0.9 of 5120 bytes per clock.
CEILINGS = {
    ceilings.name: ceilings
    for ceilings in (
        Ceilings("A100", {2: 212e12, 4: 106e12}, 1.8e12, 0.85 * 108 * 64 * 1.41e9, l2=6.5e12, generation=8),
        Ceilings("H100", {1: 1345e12, 2: 672e12, 4: 336e12}, 3.0e12, 0.85 * 132 * 128 * 1.755e9, l2=8.1e12),
        Ceilings("H200", {1: 1345e12, 2: 672e12, 4: 336e12}, 4.3e12, 0.85 * 132 * 128 * 1.755e9, l2=8.1e12),
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
    rounds: number of rounds of the encoder (for the strategy "rounds"). screen: bytes per element of a narrower product
    that only finds candidates (for the strategy "sparse", see `screening`); 0 for none. family: "rational", or a
    teacher's; with "topk" and "batchtopk" the support is what is active.
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
    family: str = "rational"
    screen: int = 0

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
    once: float = 0.0
    """Bytes of these matrices, which are read into the L2 cache once, beside `bytes`."""
    narrow: int = 0
    """Bytes per element of its products, if not those of the step's."""
    tile: tuple[bool, bool] | None = None
    """For a Triton product: whether it is the backward one, and whether there are many coefficients."""

    def seconds(self, on: Ceilings, itemsize: int) -> float:
        size = self.narrow or itemsize
        rate = on.products[size if size in on.products else 2]
        if self.tile:
            features, tokens = TILES[on.generation][(2 if itemsize == 2 else 4, *self.tile)]
            # A step along the inner dimension reads features + tokens elements for features * tokens * 2 FLOPs.
            intensity = 2 * features * tokens / (itemsize * (features + tokens))
            rate = min(rate * on.triton_products, on.l2 * intensity)
        gate, product = self.instructions / on.instructions, self.flops / rate
        # Inside a product, instructions that are not hidden add to the time.
        work = max(product, gate) + (1 - on.hidden) * min(product, gate) if self.flops else gate
        return max(work, (self.bytes + self.once) / on.bandwidth, self.l2_bytes / on.l2) + self.launches * on.launch


def forward_instructions(p: int, q: int) -> float:
    """fp32 instructions per element for the gate, counted in the machine code of sm_90."""
    return _between(p + q, (5, 18), (9, 28), (17, 37))


def backward_instructions(p: int, q: int) -> float:
    """The same for its backward pass, with the gradients of all coefficients."""
    return _between(p + q, (5, 53), (9, 68), (17, 97))


def product(name: str, step: Step, count: float = 1, **more: Any) -> Kernel:
    """`count` of the step's matrix products, each of which reads or writes a code, a weight matrix and an [n, d_in]
    tensor."""
    traffic = count * step.itemsize * (step.codes + step.weights + step.n_tokens * step.d_in)
    extra = more.pop("bytes", 0.0)
    return Kernel(name, 2.0 * step.codes * step.d_in * count, traffic + extra, launches=max(1, round(count)), **more)


def _between(x: float, *points: tuple[float, float]) -> float:
    """Interpolates linearly between the points, and extrapolates beyond the last two on either side."""
    k = next((k for k in range(1, len(points) - 1) if x <= points[k][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[k - 1], points[k]
    return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))
