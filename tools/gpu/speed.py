"""Times of whole training steps: bare products, this package's ways, torch.compile and peers that are there."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.bare import ROOT
from gpu.made import GATES, SHAPES, TINY, WEIGHT, Case, freeze, make, with_rounds
from rsae_triton import FusedRationalSAE, kernels
from rsae_triton.ops.cost import CEILINGS, Ceilings, cost, optimizer_seconds
from rsae_triton.ops.screening import FLOAT8, Screen, float8_works, multiply
from rsae_triton.ops.workspace import StepMemory
from rsae_triton.training.optimizer import remove_radial_gradient

FIVE, ONE, TWO = "bare products", "one product", "two rounds"
SCREENED = "sparse, screened in float8"
WAYS = ("sparse, row optimiser", "sparse", SCREENED, TWO, "split", "fused", "eager")
PEERS = {
    "SAELens JumpReLU": ("sae_lens", "saelens"),
    "SAELens TopK": ("sae_lens", "saelens"),
    "sparsify TopK": ("sparsify", "sparsify"),
}
"""Name -> the library, and what builds it in benchmarks/peers.py."""
Row = dict[str, Any]
_held: dict[str, Any] = {}
"""The last case's SAE and input: contenders of one case share them."""


def items(device: torch.device, tiny: bool, on: Ceilings) -> Iterator[tuple[str, Callable[[], Row]]]:
    for shape in TINY if tiny else SHAPES:
        for degree, groups in GATES[: 1 if tiny else 2]:
            case = Case(*shape, degree, groups)
            for name in (FIVE, ONE, *WAYS):
                if name == TWO and degree != GATES[0][0]:
                    continue
                if name != "eager" or shape == SHAPES[0] or tiny:  # eager keeps dozens of [n_tokens, d_sae] tensors
                    yield f"{case}: {name}", partial(measured, case, name, device, on)
    case = Case(*(TINY if tiny else SHAPES)[0])
    if device.type == "cuda":
        yield f"{case}: torch.compile", partial(measured, case, "torch.compile", device, on)
    for name in PEERS:
        yield f"{case}: {name}", partial(peer, case, name, device)


def ceilings(device: torch.device, tiny: bool) -> Ceilings:
    """What the device reaches: the largest of some products and copies."""
    n, elements = (256, 2**16) if tiny else (8192, 2**28)

    def best(run: Callable[[], Any]) -> float:
        run()
        return min(once(run, device) for _ in range(5))

    a = torch.randn(elements, device=device)
    b = torch.empty_like(a)
    bandwidth = 2 * a.numel() * a.element_size() / best(lambda: b.copy_(a))
    products = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, w = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        products[dtype.itemsize] = 2.0 * n**3 / best(lambda x=x, w=w: torch.mm(x, w))
    if float8_works(device):
        low = [kernels.narrow_rows(torch.randn(n, n, device=device), FLOAT8) for _ in range(2)]
        products[1] = 2.0 * n**3 / best(lambda: multiply(*low))
    known = CEILINGS["H200"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return Ceilings(name, products, bandwidth, known.instructions, known.launch, l2=known.l2, measured=True)


def once(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def timed(run: Callable[[], Any], device: torch.device, seconds: float = 1.0, most: int = 30) -> Row:
    """Median, 20th and 80th percentile of up to `most` turns, after two that warm up; and the memory of one."""
    cuda = device.type == "cuda"
    for _ in range(2 if cuda else 0):
        run()
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    turns = [once(run, device)]
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else None
    while sum(turns) < seconds and len(turns) < (most if cuda else 1):
        turns.append(once(run, device))
    low, _, _, high = statistics.quantiles(turns, n=5) if len(turns) > 1 else [turns[0]] * 4
    return {"median_s": statistics.median(turns), "p20_s": low, "p80_s": high, "turns": len(turns), "peak_bytes": peak}


def measured(case: Case, name: str, device: torch.device, on: Ceilings) -> Row:
    """One contender's row: the whole step, and loss with backward alone."""
    sae, x = _case(case, device)
    row: Row = {"case": case.fields(), "contender": name, "status": "ok", "floor_s": _floor(case, on)}
    if name in (FIVE, ONE):
        return row | timed(partial(_products, sae, x, 5 if name == FIVE else 1), device)
    if name == TWO:
        sae = with_rounds(sae, x)
    way = {"split": "triton:split", "fused": "triton:fused"}.get(name, "triton:split")
    sae.backend = "eager" if name in ("eager", "torch.compile") else way
    sparse = name.startswith("sparse")
    screen = Screen(FLOAT8) if name == SCREENED else None
    if screen is not None and not float8_works(device):
        return row | {"status": "not run: no float8 products"}
    loss: Callable[[], Tensor] = partial(_loss, sae, x, sparse, screen)
    if name in ("sparse", TWO):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            row["encode_s"] = timed(partial(sae.encode_sparse, x), device, 0.5)["median_s"]
    if name == "torch.compile":
        loss = torch.compile(loss)
    rows = name in ("sparse, row optimiser", TWO)
    finish = _row_optimizer(sae) if rows else _optimizer(sae)

    def differentiate() -> None:
        sae.zero_grad(set_to_none=True)
        loss().backward()

    def whole() -> None:
        differentiate()
        finish()

    row |= timed(whole, device)
    row["loss_backward_s"] = timed(differentiate, device, 0.5)["median_s"]
    strategy = {"eager": "eager", "torch.compile": "compiled", "split": "split", "fused": "fused", TWO: "rounds"}
    step = replace(case.step(2 if name == TWO else 1), screen=0 if screen is None else 1)
    predicted = cost(step, strategy.get(name, "sparse"))
    # Beside the model's step: the float32 weights' copies in bfloat16; in a sparse step also the norms of W_dec's rows.
    beside = step.weights * (16 if sparse else 12) / on.bandwidth
    row["predicted_loss_backward_s"] = predicted.seconds(on) + beside
    row["predicted_s"] = row["predicted_loss_backward_s"] + optimizer_seconds(case.step(), on, rows=rows)
    row["predicted_bytes"] = predicted.peak_bytes
    if sparse:
        room = {"memory": "sparse", "l0_weight": WEIGHT}
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            row["support"] = int(sae.autoencode(x, **room).entries) / (len(x) * case.d_sae)
    return row


def peer(case: Case, name: str, device: torch.device) -> Row:
    """Another library's step in bfloat16, where it is installed. It computes another function at the same shape."""
    row: Row = {"case": case.fields(), "contender": name, "status": "ok"}
    library, builder = PEERS[name]
    if importlib.util.find_spec(library) is None:
        return row | {"status": "not run: not installed"}
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import peers
    from cases import Case as BenchCase

    sae, x = make(case, device)
    with torch.no_grad():
        sae.b_enc.sub_(sae.gate.threshold)  # where theirs have their thresholds
    whole = BenchCase("step", case.n_tokens, case.d_in, case.d_sae, dtype="bf16")
    made = getattr(peers, builder)(whole, sae.bfloat16(), x.bfloat16())
    contender = next(one for one in made if one.name == name)
    contender.run()
    contender.found()
    return row | timed(contender.run, device)


def _case(case: Case, device: torch.device) -> tuple[FusedRationalSAE, Tensor]:
    if _held.get("key") != str(case):
        _held.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        sae, x = make(case, device)
        _held.update(key=str(case), made=(freeze(sae), x))
    sae, x = _held["made"]
    return sae, x


def _products(sae: FusedRationalSAE, x: Tensor, count: int) -> None:
    if "low" not in _held:
        z = torch.randn(sae.d_sae, len(x), device=x.device).bfloat16()
        _held["low"] = (x.bfloat16(), sae.W_enc.detach().t().bfloat16(), sae.W_dec.detach().bfloat16(), z)
    low, W_enc, W_dec, z = _held["low"]
    torch.mm(W_enc, low.t())
    if count == 5:
        torch.mm(z.t(), W_dec)
        torch.mm(W_dec, low.t())
        torch.mm(z, low)
        torch.mm(z, low)


def _loss(sae: FusedRationalSAE, x: Tensor, sparse: bool, screen: Screen | None = None) -> Tensor:
    memory = StepMemory()
    memory.screen = screen
    with memory, torch.autocast(x.device.type, torch.bfloat16):
        if sparse:
            return sae.autoencode(x, l0_weight=WEIGHT, memory="sparse").total
        if sae.backend != "eager":
            return sae.autoencode(x, l0_weight=WEIGHT).total
        z, counts, _ = sae.encode_with_sums(x)
        residual = x - sae.decode(z, x)
        return residual.square().sum(-1).mean() + WEIGHT * counts.sum() / len(x)


def _optimizer(sae: FusedRationalSAE) -> Callable[[], None]:
    """Makes the optimiser's step of `train()`: the radial part, clipping, Adam, the rows' norms; a learning rate of 0
    keeps the weights."""
    if "optimizer" not in _held:
        trained = [one for one in sae.parameters() if one.requires_grad]
        _held["optimizer"] = torch.optim.Adam(trained, lr=0.0, fused=True)
        _held["norms"] = sae.W_dec.detach().norm(dim=1, keepdim=True)

    def finish() -> None:
        remove_radial_gradient(sae.W_dec)
        torch.nn.utils.clip_grad_norm_([one for one in sae.parameters() if one.grad is not None], 1.0)
        _held["optimizer"].step()
        sae.scale_decoder_rows_(_held["norms"])

    return finish


def _row_optimizer(sae: FusedRationalSAE) -> Callable[[], None]:
    """The same with the matrices' part in one pass over each, and their copies in bfloat16 made on the way."""
    matrices = [(sae.W_enc.detach().t(), False), (sae.W_dec.detach(), True)]
    states = [(*(torch.zeros_like(one) for _ in range(2)), one.bfloat16()) for one, _ in matrices]
    others = [one for one in sae.parameters() if one.requires_grad and one is not sae.W_enc and one is not sae.W_dec]
    small, norms = torch.optim.Adam(others, lr=0.0, fused=True), matrices[1][0].norm(dim=1)

    def finish() -> None:
        grads = [sae.W_enc.grad.t(), sae.W_dec.grad]
        squares = [
            kernels.row_norms(grad, weight if radial else None).sum()
            for grad, (weight, radial) in zip(grads, matrices, strict=True)
        ]
        squares += [one.grad.square().sum() for one in others]
        clip = (1 / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp(max=1.0)
        numbers = kernels.adam_numbers(1, 0.0, clip, betas=(0.9, 0.999), eps=1e-8)
        for grad, (weight, radial), (mean, square, copy) in zip(grads, matrices, states, strict=True):
            kernels.adam_rows(
                weight, grad, mean, square, numbers, radial=radial, norms=norms if radial else None, copy=copy
            )
        torch._foreach_mul_([one.grad for one in others], clip)
        small.step()

    return finish


def _floor(case: Case, on: Ceilings) -> float:
    """One product, and every weight, gradient and moment once."""
    flops = 2.0 * case.n_tokens * case.d_in * case.d_sae / on.products[2]
    return max(flops, 28 * 2 * case.d_in * case.d_sae / on.bandwidth)
