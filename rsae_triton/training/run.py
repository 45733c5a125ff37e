"""A training run: its state, one optimiser step, and saving and restoring all of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.errors import NumericsError
from rsae_triton.ops.screening import Screen
from rsae_triton.ops.workspace import StepMemory
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.training.checkpoints import Checkpoints
from rsae_triton.training.language import LanguageLoss
from rsae_triton.training.memory import MemoryPlan, screen_of
from rsae_triton.training.on_entries import probed_share, support_share
from rsae_triton.training.optimizer import (
    in_one_pass,
    make_optimizer,
    optimizer_tensors,
    remove_radial_gradient,
    set_learning_rate,
    take_step,
)
from rsae_triton.training.processes import Alone, Summed
from rsae_triton.training.recipes import Losses, Recipe, SparsityController
from rsae_triton.training.route import Route
from rsae_triton.training.settings import TrainSettings


class Run:
    """The complete state of a training run between two steps.

    Attributes:
        step: number of steps done. sae, optimizer, controller: the parts of the run. idle: [d_sae], tokens since each
            feature was last active. norms: [d_sae, 1], the norms at which the decoder's rows are held, or None.
            language: the KL term.
        together: the processes of the run. identity: of the activations. dtype: the SAE's dtype outside of training.
            memory: buffers that steps on the CPU reuse. screen: of the product of sparse steps on a GPU.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        settings: TrainSettings,
        recipe: Recipe,
        plan: MemoryPlan,
        together: Alone,
        identity: str,
        dtype: torch.dtype,
        language: LanguageLoss | None = None,
    ) -> None:
        self.sae, self.settings, self.recipe, self.plan, self.together = sae, settings, recipe, plan, together
        self.identity, self.dtype, self.step, self.language = identity, dtype, 0, language
        self.memory, self.route = StepMemory(), Route(plan)
        products = torch.bfloat16 if settings.precision == "bf16" else sae.W_dec.dtype
        # A float8 product takes multiples of 16 tokens, so pieces of unequal sizes are not screened.
        tokens, rest = divmod(settings.batch_size // together.data[1], settings.accumulate)
        self.screen = Screen(None) if rest else screen_of(sae, plan, tokens, products)
        self.memory.whole = settings.accumulate == 1
        self.optimizer = make_optimizer(sae, recipe, settings)
        self.controller: SparsityController | None = None
        self.idle = torch.zeros(sae.d_sae, device=sae.W_dec.device)
        self.norms: Tensor | None = None
        if settings.decoder_norm != "free" and sae.W_dec.requires_grad:  # a decoder that is kept stays bit-equal
            norms = sae.W_dec.detach().norm(dim=1, keepdim=True)
            self.norms = norms if settings.decoder_norm == "keep" else torch.ones_like(norms)
            if settings.decoder_norm == "unit":
                sae.scale_decoder_rows_(self.norms)

    # -- one step

    def advance(
        self, batch: Tensor, stop: bool, due: bool, checkpoints: Checkpoints | None
    ) -> tuple[dict[str, Any], bool, bool]:
        """Makes one optimiser step on this process's rows. Returns its numbers, and whether any process wants to stop
        or to save.

        Raises:
            NumericsError: something is not finite; nothing was changed.
        """
        sae, settings = self.sae, self.settings
        x = batch.detach().to(device=sae.W_dec.device, dtype=sae.W_dec.dtype)
        if self.controller is None:
            norm = self.together.mean(sae.sides(x)[1].float().norm(dim=1).mean())
            if not bool(norm.isfinite()):
                raise NumericsError(self._explain(x, None, checkpoints))
            self.controller = SparsityController(self.recipe, float(norm))
        may_die = self.step * settings.batch_size > settings.dead_after  # nothing is silent for longer than that
        dead = self.idle > settings.dead_after if self.recipe.aux_k and may_die else None
        ramp = settings.sparsity_ramp(self.step)
        plan = self.route.plan(self.step, lambda: self._support_share(x))
        given = (x, ramp * self.controller.weight, dead)
        terms, summed, kl = self._gradients(*given, plan, [stop, due])
        if summed.share == math.inf:  # on some process the entries did not fit
            plan = self.route.dense
            terms, summed, kl = self._gradients(*given, plan, [stop, due])
            summed.share = 1.0
        if not summed.finite:
            raise NumericsError(self._explain(x, terms, checkpoints))
        factor = settings.learning_rate(self.step)
        set_learning_rate(self.optimizer, factor)
        before = self._kept() if self._looked_at(summed.flags, checkpoints) else None
        take_step(
            sae,
            self.optimizer,
            summed.norm,
            settings.clip,
            self.norms,
            self._copy if terms.squares is not None else None,
        )
        if self.norms is not None:
            self.memory.know_norms(sae.W_dec, self.norms)
        sae.constrain_()
        if before is not None:
            self._check_step(before, checkpoints)
        self.idle = torch.where(summed.counts > 0, 0.0, self.idle + settings.batch_size)
        if summed.share is not None:
            self.route.saw(summed.share, self.step)
        self.controller.update(summed.l0, ramp)
        self.screen.saw(*summed.missed, self.step)
        row = {
            "step": self.step,
            "tokens": (self.step + 1) * settings.batch_size,
            "mse": summed.mse,
            "l0": summed.l0,
            "weight": ramp * self.controller.weight,
            "lr": settings.lr * factor,
            "sparse": int(plan.mode == "sparse"),
            "support": max(self.route.share, 0.0),  # share of [n_tokens, d_sae] when it was last measured
            **kl,
            **self.screen.row(),
            "grad_norm": summed.grad_norm,  # reading the tensor would wait for the optimiser's step
        }
        self.step += 1
        stop, due = summed.flags
        return row, stop, due

    def _gradients(
        self, x: Tensor, weight: float, dead: Tensor | None, plan: MemoryPlan, flags: list[bool]
    ) -> tuple[Losses, Summed, dict[str, float]]:
        """Computes the loss of x and its gradients on this process, the numbers over all processes, and the language
        loss."""
        screened = plan.mode == "sparse" and self.screen.starts(self.route.share)
        self.memory.screen = self.screen if screened else None
        terms = self._differentiate(x, weight, dead, plan)
        terms.missed = self.screen.found if screened else None
        kl: dict[str, float] = {}
        if self.language is not None and self.language.starts(self.step):
            mse = float(terms.mse)
            if math.isfinite(mse):  # otherwise the step is repeated, or is the last one
                kl["kl"] = self.language.backward(self.sae, self.step, mse)
        if plan.mode != "sparse" and self.route.looks_later(self.step):
            terms.share = probed_share(self.sae, x)
        made = self.memory.made
        alone = self.language is None and self.together.data[1] == 1  # nothing is added to these gradients
        if made is not None and alone and in_one_pass(self.sae):
            # The optimiser's own pass removes the radial gradient.
            terms.squares = made.encoder + (made.decoder if self.norms is None else made.without_radial)
        elif self.norms is not None:
            remove_radial_gradient(self.sae.W_dec)
        return terms, self.together.finish(self.sae, terms, flags), kl

    def _copy(self, matrix: Tensor) -> Tensor | None:
        """Returns memory for the copy of a matrix that the next step's products read; None if they read the matrix."""
        made = self.memory.made
        return None if made is None or made.dtype == matrix.dtype else self.memory.copy_for(matrix, made.dtype)

    def _looked_at(self, flags: list[bool], checkpoints: Checkpoints | None) -> bool:
        """Whether to check the parameters after this step: if they are saved or returned, or the rate is very high.

        Otherwise the next step's loss shows a failure, and finite gradients move finite parameters by at most about ten
        times the rate.
        """
        every = self.settings.checkpoint_every
        done = self.step + 1
        saved = checkpoints is not None and (any(flags) or (every is not None and done % every == 0))
        fast = max(group["lr"] for group in self.optimizer.param_groups) > 1
        return saved or fast or done == self.settings.steps

    def _kept(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters with copies of them in the CPU's memory."""
        return [(one, one.detach().to("cpu", copy=True)) for one in _trained(self.sae)]

    def _check_step(self, before: list[tuple[Tensor, Tensor]], checkpoints: Checkpoints | None) -> None:
        """If the optimiser's step made something infinite, restores the parameters and raises NumericsError."""
        named = {**dict(self.sae.named_parameters()), **optimizer_tensors(self.sae, self.optimizer)}
        bad = next((name for name, one in named.items() if not bool(one.isfinite().all())), None)
        if not self.together.any(bad is not None):
            return
        with torch.no_grad():
            for parameter, kept in before:
                parameter.copy_(kept)
        raise NumericsError(
            self._stopped(f"the optimiser's step made {bad or 'another process'} infinite", checkpoints)
        )

    def _differentiate(self, x: Tensor, weight: float, dead: Tensor | None, plan: MemoryPlan) -> Losses:
        """Computes the gradients of the loss on x, in as many pieces as the settings say, and returns its terms."""
        # In mode "saved" autograd allocates the gradients itself.
        self.memory.zero_grad(self.sae.parameters(), keep=plan.mode != "saved")
        found = []
        for piece in x.chunk(self.settings.accumulate):
            part = len(piece) / len(x)
            with self.memory:
                with torch.autocast(x.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
                    terms = self.together.losses(self.sae, piece, self.recipe, weight, dead, plan)
                (terms.total if part == 1 else terms.total * part).backward()
            if part == 1:
                return terms
            found.append((part, terms))
        total, mse, l0 = (sum(part * getattr(one, name).detach() for part, one in found) for name in _SCALARS)
        shares = [part * one.share for part, one in found if one.share is not None]
        counts = torch.stack([one.counts for _, one in found]).sum(0)
        return Losses(total, mse, l0, counts, sum(shares) if len(shares) == len(found) else None)

    @torch.no_grad()
    def _support_share(self, x: Tensor) -> float:
        """Estimates the share of the support, from some tokens of every process."""
        share = torch.tensor(support_share(self.sae, x), dtype=torch.float64, device=x.device)
        return float(self.together.over_features(self.together.mean(share))) / self.together.features[1]

    def features(self) -> dict[str, Any]:
        """The number of dead features and the fraction of alive ones, of the whole SAE."""
        dead = int(self.together.over_features((self.idle > self.settings.dead_after).sum()))
        return {"dead": dead, "alive": 1 - dead / (self.sae.d_sae * self.together.features[1])}

    def _explain(self, x: Tensor, terms: Losses | None, checkpoints: Checkpoints | None) -> str:
        """Names the first tensor that is not finite, in the order of the computation."""
        parameters = list(self.sae.named_parameters())
        gradients = [(f"the gradient of {name}", one.grad) for name, one in parameters if one.grad is not None]
        loss = [] if terms is None else [("the loss", terms.total)]
        named = [("the batch", x), *parameters, *loss, *gradients]
        name, bad = next(((name, one) for name, one in named if not bool(one.isfinite().all())), ("", None))
        what = "a sum over the processes"
        if bad is not None:
            count = int((~bad.isfinite()).sum())
            what = f"{name} holds {count} NaN or infinite of {bad.numel()} values"
            what += f", the first at {(~bad.isfinite()).nonzero()[0].tolist()}" if bad.dim() else ""
            what += " (NaN or infinite activations)" if bad is x else ""
        return self._stopped(what, checkpoints)

    def _stopped(self, what: str, checkpoints: Checkpoints | None) -> str:
        last = checkpoints.steps() if checkpoints is not None else []
        good = f"the last good checkpoint is {checkpoints.path(last[-1])}" if checkpoints and last else "no checkpoint"
        return (
            f"training stopped at step {self.step}: {what}; the SAE holds the parameters from before this step, "
            f"{good}. Lower lr, or clean the activations"
        )

    # -- the whole run

    def config(self) -> dict[str, Any]:
        """The configuration of the whole SAE, with the dtype that it has outside of training."""
        return {**self.together.whole_config(self.sae), "dtype": str(self.dtype).removeprefix("torch.")}

    def tensors(self) -> dict[str, Tensor]:
        found = {f"sae.{name}": one for name, one in self.sae.state_dict().items()}
        found |= optimizer_tensors(self.sae, self.optimizer)
        found["idle"] = self.idle
        if self.norms is not None:
            found["norms"] = self.norms
        return found

    def save(self, checkpoints: Checkpoints, seconds: float) -> Path:
        """Writes a checkpoint; see `Checkpoints.save` for what it raises."""
        info = {
            "config": self.config(),
            "settings": self.settings.fixed(self.recipe),
            "activations": self.identity,
            "controller": None if self.controller is None else self.controller.state(),
            "route": self.route.state(),
            "screen": self.screen.state(),
            "seconds": seconds,
            **({} if self.language is None else {"language": self.language.state()}),
        }
        return self.together.save(checkpoints, self.step, self.sae, self.tensors(), info)


_SCALARS = ("total", "mse", "l0")


def _trained(sae: SparseAutoencoder) -> list[Tensor]:
    return [one for one in sae.parameters() if one.grad is not None]
