"""Every kernel against float64, whole steps and trajectories: what must hold before a time means anything."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.made import GATES, WEIGHT, Case, freeze, make, with_rounds
from rsae_triton import FusedRationalSAE, kernels, train
from rsae_triton.ops.runtime import matmul_precision
from rsae_triton.ops.screening import ALIGNED, FLOAT8, Screen, float8_works
from rsae_triton.ops.workspace import StepMemory

LIMITS = {"fp32": 1e-3, "bf16": 3e-2}
"""Relative error (of the norm) beside twice eager PyTorch's own in the same dtype."""
Row = dict[str, Any]


def items(device: torch.device, tiny: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    sizes = ((12, 8, 33),) if tiny else ((512, 256, 2048), (511, 200, 1000))
    degrees = GATES[:1] if tiny else (*GATES, ((12, 12), 1))
    for n, d_in, d_sae in sizes:
        for degree, groups in degrees:
            case = Case(n, d_in, d_sae, degree, groups)
            for dtype in LIMITS:
                for way, form, frozen in (
                    ("triton:split", "gated", True), ("triton:split", "direct", False),
                    ("triton:fused", "gated", True), ("triton:fused", "direct", False), ("sparse", "gated", True),
                    ("screened", "gated", True),
                ):  # fmt: skip
                    if form == "direct" and (tiny or degree == (12, 12)):
                        continue
                    name = f"{way} {form} {case} {dtype}"
                    yield name, partial(step, case, device, way, form, frozen, dtype)
        case = Case(n, d_in, d_sae)
        for dtype in ("fp32",) if tiny else LIMITS:
            yield f"two rounds {case} {dtype}", partial(refined, case, device, dtype)
        yield f"rows {case}", partial(rows, case, device)
        yield f"adam {case}", partial(adam, case, device)
    case = Case(16, 8, 33) if tiny else Case(2048, 256, 32768)  # wide, so that the entries have room
    yield "train", partial(trajectories, case, device, 2 if tiny else 50)
    if device.type == "cuda":
        yield "graph", partial(graph, Case(512, 256, 4096), device)


def differentiated(sae: FusedRationalSAE, x: Tensor, dtype: str, **options: Any) -> dict[str, Tensor]:
    """The loss and every gradient."""
    sae.zero_grad(set_to_none=True)
    name = "l0_weight" if sae.gate.form == "gated" else "l1_weight"
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        total = sae.autoencode(x, **{name: WEIGHT}, **options).total
    total.backward()
    found = {name: one.grad.detach().clone() for name, one in sae.named_parameters() if one.grad is not None}
    return {"loss": total.detach(), **found}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    made = {}
    for name, wanted in truth.items():
        wanted = wanted.detach()
        if bool(wanted.any()):
            one = found[name].detach().double()
            made[name] = float((one - wanted).norm() / wanted.norm()) if bool(one.isfinite().all()) else float("inf")
    return made


def judged(found: dict[str, float], eager: dict[str, float], dtype: str) -> Row:
    wrong = [
        f"{name} is off by {error:.2g} of its norm, {2 * eager.get(name, 0.0) + LIMITS[dtype]:.2g} are allowed"
        for name, error in found.items()
        if not error <= 2 * eager.get(name, 0.0) + LIMITS[dtype]
    ]
    return {"status": f"wrong: {'; '.join(wrong)}" if wrong else "ok", "error": max(found.values())}


def step(case: Case, device: torch.device, way: str, form: str, frozen: bool, dtype: str) -> Row:
    """Loss and gradients of one step, against the written-out formulas in float64."""
    sae, x = make(case, device, form=form)
    if frozen:
        freeze(sae)
    exact = copy.deepcopy(sae).double()
    exact.backend = "eager"
    with matmul_precision("highest"):
        truth = differentiated(exact, x.double(), "fp32")
        sae.backend = "eager"
        eager = errors(differentiated(sae, x, dtype), truth)
        sparse = way in ("sparse", "screened")
        sae.backend = "triton:split" if sparse else way
        room = {"memory": "sparse", "most_entries": x.shape[0] * case.d_sae} if sparse else {}
        memory = StepMemory()
        aligned = len(x) % ALIGNED == 0 and case.d_in % ALIGNED == 0
        narrow = FLOAT8 if aligned and float8_works(device) else torch.bfloat16
        memory.screen = Screen(narrow) if way == "screened" else None
        with memory:
            row = judged(errors(differentiated(sae, x, dtype, **room), truth), eager, dtype)
        if memory.screen is not None:
            row["screen"] = str(memory.screen.dtype)
            row["missed"], row["checked"] = memory.screen.found.tolist()
        return row


def refined(case: Case, device: torch.device, dtype: str) -> Row:
    """Loss, code and gradients through two rounds, against the written-out formulas in float64."""
    sae, x = make(case, device)
    sae = with_rounds(sae, x)
    found = {}
    with matmul_precision("highest"):
        for name, backend in (("truth", "eager"), ("eager", "eager"), ("kernels", "triton:split")):
            one, given = (copy.deepcopy(sae).double(), x.double()) if name == "truth" else (sae, x)
            one.backend = backend
            found[name] = differentiated(one, given, "fp32" if name == "truth" else dtype)
            with torch.no_grad():
                found[name]["code"] = one.encode(given)
    truth = found.pop("truth")
    eager, kernels = (errors(one, truth) for one in (found["eager"], found["kernels"]))
    return judged(kernels, eager, dtype)


def rows(case: Case, device: torch.device) -> Row:
    """Codes as rows (inference), from thresholds and from the k largest, and back."""
    sae, x = make(case, device)
    sae.backend = "triton"
    with matmul_precision("highest"):
        code = sae.encode_sparse(x, capacity=case.d_sae)
        z = sae.encode(x)
        dense = torch.zeros_like(z).scatter_add_(1, code.indices, code.values)
        found = {"code": dense, "x_hat": sae.decode_sparse(code)}
        return judged(errors(found, {"code": z.double(), "x_hat": sae.decode(z).double()}), {}, "fp32")


def adam(case: Case, device: torch.device) -> Row:
    """Two steps of the row-fused optimiser against torch's in float64."""
    sae, _ = make(case, device)
    weight = sae.W_dec.detach()[: min(case.d_sae, 64)].contiguous()
    generator = torch.Generator(device=device).manual_seed(1)
    exact = torch.nn.Parameter(weight.double())
    optimizer = torch.optim.Adam([exact], lr=0.01)
    mean, square, ours = torch.zeros_like(weight), torch.zeros_like(weight), weight.clone()
    for number in (1, 2):
        grad = torch.empty_like(weight).normal_(generator=generator)
        exact.grad = grad.double()
        optimizer.step()
        clip = torch.ones((), device=device)
        numbers = kernels.adam_numbers(number, 0.01, clip, betas=(0.9, 0.999), eps=1e-8)
        kernels.adam_rows(ours, grad, mean, square, numbers, radial=False)
    return judged(errors({"weights": ours}, {"weights": exact.detach()}), {}, "fp32")


def trajectories(case: Case, device: torch.device, steps: int) -> Row:
    """`train()` of the default recipe: eager, dense kernels and sparse kernels must lose alike."""
    lost, share = {}, 0.0
    for name, backend, memory in (("eager", "eager", "saved"), ("dense", "triton:split", "saved"),
                                  ("sparse", "triton:split", "sparse")):  # fmt: skip
        sae, x = make(case, device)
        sae.backend = backend
        with matmul_precision("highest"):
            log = train(
                sae, x, steps=steps, batch_size=case.n_tokens // 2, memory=memory, log_every=1, progress=False,
                recipe="hard",
            )  # fmt: skip
        lost[name] = log.mse
    with torch.no_grad(), matmul_precision("highest"):  # the last one's, which trained sparsely
        share = int(sae.autoencode(x, memory="sparse").entries) / (len(x) * sae.d_sae)
    apart = {
        name: max(abs(one / other - 1) for one, other in zip(lost[name], lost["eager"], strict=True))
        for name in ("dense", "sparse")
    }
    worst = max(apart.values())
    return {"status": "ok" if worst < 1e-3 else f"wrong: losses differ by {worst:.2g}", "error": worst, **apart,
            "last_mse": lost["sparse"][-1], "support": share}  # fmt: skip


def graph(case: Case, device: torch.device) -> Row:
    """Loss and gradients of a sparse step captured in a CUDA graph and replayed on other activations."""
    sae, x = make(case, device)
    freeze(sae).backend = "triton:split"
    room = {"memory": "sparse", "most_entries": x.shape[0] * case.d_sae}
    static = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            differentiated(sae, static, "fp32", **room)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        held = differentiated(sae, static, "fp32", **room)
    other = x.flip(0) * 1.1
    static.copy_(other)
    captured.replay()
    found = {name: one.clone() for name, one in held.items()}
    truth = {name: one.double() for name, one in differentiated(sae, other, "fp32", **room).items()}
    return judged(errors(found, truth), {}, "fp32")


def smallest(device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    """For compute-sanitizer, which slows everything down hundredfold: each kernel once."""
    case = Case(40, 40, 100)
    for way in ("sparse", "triton:split", "triton:fused"):
        yield f"{way} {case}", partial(step, case, device, way, "gated", True, "fp32")
    yield f"two rounds {case}", partial(refined, case, device, "fp32")
    yield f"rows {case}", partial(rows, case, device)
    yield f"adam {case}", partial(adam, case, device)
