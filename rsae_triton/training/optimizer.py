"""The optimiser of an SAE: which parameter gets which rate, and what its gradients must not do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.training.recipes import Recipe
from rsae_triton.training.settings import TrainSettings

_DECAYED = ("W_enc", "W_dec")
_BLOCK = 1 << 22


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
    # Block by block: a product of the whole would be one more tensor of the decoder's size.
    size = max(1, _BLOCK // W_dec.shape[1])
    for grad, rows in zip(W_dec.grad.split(size), W_dec.detach().split(size), strict=True):
        along = (grad * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True).clamp_min(1e-12)
        grad.addcmul_(along, rows, value=-1)


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
