"""The optimiser of an SAE: which parameter gets which rate, and what its gradients must not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rsae_triton.ops import row_loops
from rsae_triton.ops.backends import kernels, triton_runs_on
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.training.recipes import Recipe
from rsae_triton.training.settings import TrainSettings

_DECAYED = ("W_enc", "W_dec")
_BLOCK = 1 << 22
# Below it, how a matrix is read makes no difference that could be measured.
_LEAST = 1 << 16


def make_optimizer(sae: SparseAutoencoder, recipe: Recipe, settings: TrainSettings) -> torch.optim.Optimizer:
    """Adam or AdamW, fused where torch offers it; groups by the recipe's `lr_scale`, each with its own `base_lr`."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in sae.named_parameters():
        scale = next((factor for ending, factor in recipe.lr_scale.items() if name.endswith(ending)), 1.0)
        decayed = settings.optimizer == "adamw" and name in _DECAYED
        groups.setdefault((scale, settings.weight_decay if decayed else 0.0), []).append(parameter)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(
        [
            {"params": parameters, "lr": settings.lr * scale, "base_lr": settings.lr * scale, "weight_decay": decay}
            for (scale, decay), parameters in groups.items()
        ],
        betas=(0.9, 0.999),
        fused=sae.W_dec.device.type in ("cuda", "cpu"),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def remove_radial_gradient(W_dec: nn.Parameter) -> None:
    """Drops the part of the decoder's gradient along its rows: their norm is fixed, Adam must not chase it."""
    if W_dec.grad is None:
        return
    if _by_triton(W_dec):
        kernels().remove_radial(W_dec.grad, W_dec.detach())
        return
    if row_loops.usable(W_dec.grad, W_dec.detach()):
        row_loops.remove_radial_(W_dec.grad, W_dec.detach())
        return
    # Block by block: a product of the whole would be one more tensor of the decoder's size.
    size = max(1, _BLOCK // W_dec.shape[1])
    for grad, rows in zip(W_dec.grad.split(size), W_dec.detach().split(size), strict=True):
        along = (grad * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True).clamp_min(1e-12)
        grad.addcmul_(along, rows, value=-1)


def in_one_pass(sae: SparseAutoencoder) -> bool:
    """Whether `take_step` takes each matrix that has a gradient in one pass of a GPU's kernels, so that it can remove
    the decoder's radial gradient and write copies in it."""
    return all(_by_triton(one) for one in (sae.W_enc, sae.W_dec) if one.grad is not None)


@torch.no_grad()
def take_step(
    sae: SparseAutoencoder, optimizer: torch.optim.Optimizer, norm: Tensor, clip: float, norms: Tensor | None,
    copies: Callable[[Tensor], Tensor | None] | None = None,
) -> None:  # fmt: skip
    """Clips the gradients, whose norm is `norm`, steps, and gives the decoder's rows the lengths `norms`, if any.

    Where the matrices can be read row by row in compiled loops or kernels, all of it is one pass over each; the small
    parameters are the optimiser's own. Nobody waits for a GPU.

    copies: given (on a GPU, `in_one_pass`), the same pass also removes the radial part of the decoder's gradient, if
    there are `norms`, and writes the matrix into the memory that this returns for it, if any.
    """
    in_rows = [
        (parameter, group) for group in optimizer.param_groups for parameter in group["params"]
        if parameter.grad is not None and _rows(parameter) is not None
    ]  # fmt: skip
    if in_rows:
        scale: Any = torch.clamp(clip / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grads_with_norm_
        if not sae.W_dec.is_cuda:
            scale = float(scale)
        for parameter, group in in_rows:
            own = norms if parameter is sae.W_dec else None
            if copies is None:
                _row_step(optimizer, parameter, group, scale, own)
            else:
                _row_step(optimizer, parameter, group, scale, own, radial=own is not None, copy=copies(parameter))
    held = [(parameter, parameter.grad) for parameter, _ in in_rows]
    for parameter, _ in held:
        parameter.grad = None
    torch.nn.utils.clip_grads_with_norm_([one for one in sae.parameters() if one.grad is not None], clip, norm)
    optimizer.step()
    for parameter, grad in held:
        parameter.grad = grad
    if norms is not None and all(parameter is not sae.W_dec for parameter, _ in in_rows):
        sae.scale_decoder_rows_(norms)


def _rows(parameter: Tensor) -> Tensor | None:
    """A large matrix with its rows one after the other: itself, or its transpose; None where loops cannot read it."""
    grad = parameter.grad
    if parameter.dim() != 2 or grad is None or grad.stride() != parameter.stride():
        return None
    rows = parameter.detach() if parameter.is_contiguous() else parameter.detach().t()
    if _by_triton(parameter):
        return rows
    return rows if parameter.numel() >= _LEAST and row_loops.usable(rows) else None


def _by_triton(parameter: Tensor) -> bool:
    """Whether the kernels of `adam_rows` take this matrix: on a GPU that they run on, in float32, row by row."""
    grad = parameter.grad
    if not parameter.is_cuda or grad is None or grad.dtype != torch.float32 or parameter.dtype != torch.float32:
        return False
    if grad.stride() != parameter.stride() or not (parameter.is_contiguous() or parameter.t().is_contiguous()):
        return False
    rows = parameter if parameter.is_contiguous() else parameter.t()
    return triton_runs_on(parameter.device) and rows.shape[1] <= kernels().MOST_COLUMNS


def _row_step(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, group: dict[str, Any], scale: Any, norms: Tensor | None,
    *, radial: bool = False, copy: Tensor | None = None,
) -> None:  # fmt: skip
    state = optimizer.state[parameter]
    if not state:  # as Adam itself begins
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if parameter.is_cuda else "cpu")
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    state["step"] += 1
    assert parameter.grad is not None
    matrices = (parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"])
    weight, grad, first, second = (one if parameter.is_contiguous() else one.t() for one in matrices)
    if parameter.is_cuda:
        device, decay = kernels(), group["weight_decay"] if isinstance(optimizer, torch.optim.AdamW) else 0.0
        numbers = device.adam_numbers(
            state["step"], group["lr"], scale, betas=group["betas"], eps=group["eps"], weight_decay=decay
        )
        lengths = None if norms is None else norms.flatten()
        device.adam_rows(weight, grad, first, second, numbers, radial=radial, norms=lengths, copy=copy)
        return
    row_loops.adam_(
        weight, grad, first, second, norms, step=int(state["step"]), lr=group["lr"], betas=group["betas"],
        eps=group["eps"], scale=scale, decay=group["lr"] * group["weight_decay"],  # AdamW's; Adam has none here
    )  # fmt: skip


def optimizer_tensors(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's state by name: `optimizer.W_enc.exp_avg` and so on, of every parameter that has had a gradient."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in sae.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave."""
    for name, parameter in sae.named_parameters():
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if state:
            # Copies: the file's memory may lie so that other instructions run over it, and round otherwise.
            optimizer.state[parameter] = {key: _laid_out(value, parameter) for key, value in state.items()}


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy on the parameter's device, in the parameter's layout if it has its shape: Adam takes all as they lie."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
