"""The language model: returns its activations, and its losses when activations are replaced."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from rsae_triton.activations import layers as stream
from rsae_triton.activations import places
from rsae_triton.activations.bridge import Bridge, Enough, run_bridge
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.common.names import EMBEDDED, EMBEDDED_ID, hub_model

Replace = Callable[[torch.Tensor], torch.Tensor]

# Layer 16 of SmolLM2's 30: behind the middle, where features depend least on the token alone.
_DEFAULT_DEPTH = 0.53
_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_SERVED = ("hook_resid_pre", "hook_resid_post", "mlp.hook_in", "mlp.hook_out", "hook_mlp_out")


class SpliceLoss(NamedTuple):
    """Losses of every predicted token, float32 [B, T - 1]: `nll` in nats, and `kl`, KL(clean || replaced), if asked
    for."""

    nll: torch.Tensor
    kl: torch.Tensor | None


class HostModel:
    """A causal language model whose activations are read and replaced at named places.

    Places have TransformerLens' names; other libraries' names work too (`places`). Residual streams and the inputs and
    outputs of MLPs are always read from the Hugging Face module (bit-equal to TransformerLens, and 8 % faster). All
    other places need TransformerLens, whose bridge shares every weight with the module.

    Attributes:
        model: the Hugging Face module. tokenizer: its tokenizer. name: the name it was loaded by.
        bridge: TransformerLens' `TransformerBridge` over the same weights, for `run_with_cache` and the like; made when
            it is first asked for; None if TransformerLens is not installed or cannot run the model.
        lens: makes the bridge (`activations.bridge`).
        default_hook: the place that is read if none is given.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, bridge: Any = None, default_hook: str | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.lens = bridge if isinstance(bridge, Bridge) else Bridge(bridge)
        self.name = name
        self.centred = False  # whether `center_writing_weights` was asked for
        config = model.config.get_text_config()
        self.d_model: int = config.hidden_size
        self.n_layers: int = len(stream.decoder_layers(model))
        self.vocab_size: int = config.vocab_size
        self.max_context: int = getattr(config, "max_position_embeddings", None) or 2**31
        self._resumable: dict[int, bool] = {}
        middle = f"blocks.{min(round(_DEFAULT_DEPTH * self.n_layers), self.n_layers - 1)}.hook_resid_pre"
        self.default_hook: str = middle  # resolve_hook suggests this one while it checks the requested hook
        self.default_hook = self.resolve_hook(default_hook)

    @property
    def hub_id(self) -> str:
        """The model's id on the hub, as far as it is known; used in files for other libraries."""
        return EMBEDDED_ID if self.name == EMBEDDED else hub_model(self.name)

    @property
    def bridge(self) -> Any:
        """TransformerLens' bridge, made at the first call; None if there is none."""
        return self.lens.get()

    @property
    def library(self) -> str:
        """The library that runs the model: "transformers" until something needs TransformerLens."""
        return "transformers" if self.lens.made is None else "transformer_lens"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def bos_token_id(self) -> int:
        """The token that begins a context: the tokenizer's BOS, else its EOS. Raises ConfigError if it has neither."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ConfigError(f"the tokenizer of {self.name!r} has neither a BOS nor an EOS token; use another model")

    def fingerprint(self) -> str:
        """A digest of the weights (64 values of each parameter), dtype and vocabulary; the same for the same model."""
        digest = hashlib.sha256(f"{self.dtype}|{len(self.tokenizer)}|{self.bos_token_id}".encode())
        for name, weight in self.model.named_parameters():
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
            digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.tobytes())
        return digest.hexdigest()

    # --- places -----------------------------------------------------------------------------------------------

    def hook_names(self) -> list[str]:
        """All names of places, in TransformerLens' form."""
        served = self._served()
        return served if self.bridge is None else list(dict.fromkeys([*served, *self.bridge.hook_dict]))

    def _served(self) -> list[str]:
        """The names that the Hugging Face module serves."""
        served = [f"blocks.{layer}.{place}" for layer in range(self.n_layers) for place in _SERVED]
        return [name for name in served if stream.tap(self.model, name) is not None]

    def resolve_hook(self, hook_name: str | None = None) -> str:
        """Returns TransformerLens' name for a place, given any of its names (`places.canonical`); the default for None.

        Raises:
            ConfigError: there is no such place; the message suggests similar names.
        """
        if hook_name is None:
            return self.default_hook
        hook_name = places.canonical(hook_name)
        if hook_name == f"blocks.{self.n_layers}.hook_resid_pre":  # another name for the output of the last layer
            hook_name = f"blocks.{self.n_layers - 1}.hook_resid_post"
        if hook_name in self._served() or hook_name in (names := self.hook_names()):
            return hook_name
        hint = places.suggestion(hook_name, names, self.default_hook)
        if hook_name.isdecimal():
            hint = f"did you mean blocks.{hook_name}.hook_resid_post (what layer {hook_name} gives out)?"
        if layer := re.match(r"blocks\.(\d+)\.", hook_name):
            if int(layer[1]) >= self.n_layers:
                raise ConfigError(
                    f"no hook {hook_name!r}: {self.name!r} has {self.n_layers} layers, 0 to {self.n_layers - 1}; "
                    f"the last place is blocks.{self.n_layers - 1}.hook_resid_post"
                )
            if self.bridge is None:
                hint = f"did you mean {' or '.join(f'blocks.{layer[1]}.{place}' for place in _SERVED[:2])}?"
        absent = " (without transformer_lens only residual streams and MLPs are served)" if not self.bridge else ""
        raise ConfigError(f"no hook {hook_name!r} in {self.name!r}{absent}; {hint}")

    def hook_width(self, hook_name: str | None = None) -> int:
        """The width d_in of the activations at a place, as `residual` returns them."""
        if self._depth(self.resolve_hook(hook_name)) is not None:  # a residual stream: known without a pass
            return self.d_model
        tokens = torch.tensor([[self.bos_token_id] * 2], device=self.device)
        return self.residual(tokens, hook_name).shape[-1]

    # --- reading and replacing --------------------------------------------------------------------------------

    @torch.no_grad()
    def residual(self, tokens: torch.Tensor, hook_name: str | None = None) -> torch.Tensor:
        """Returns the activations [B, T, d] at `hook_name` for `tokens` [B, T], in host units and the host's dtype.

        The forward pass ends there. Activations with several trailing axes (heads) are flattened into d.
        """
        name = self.resolve_hook(hook_name)
        tokens = self._check_tokens(tokens)
        depth = self._depth(name)
        if depth is not None:
            return stream.read(self.model, tokens, depth)
        if (tap := stream.tap(self.model, name)) is not None:
            return stream.read_many(self.model, tokens, {name: tap})[name]
        found: list[torch.Tensor] = []

        def take(value: torch.Tensor) -> None:
            found.append(value)
            raise Enough

        with contextlib.suppress(Enough):
            self._run_bridge(tokens, {name: take})
        return found[0]

    def residuals(self, tokens: torch.Tensor, hook_names: Sequence[str | None]) -> list[torch.Tensor]:
        """Returns `residual` at several places, from one forward pass that ends at the last of them."""
        if len(hook_names) == 1:
            return [self.residual(tokens, hook_names[0])]
        names = [self.resolve_hook(name) for name in hook_names]
        tokens = self._check_tokens(tokens)
        taps = {name: stream.tap(self.model, name) for name in names}
        with torch.no_grad():
            if all(tap is not None for tap in taps.values()):
                read = stream.read_many(
                    self.model, tokens, {name: tap for name, tap in taps.items() if tap is not None}
                )
                return [read[name] for name in names]
            found: dict[str, torch.Tensor] = {}

            def keep(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
                def take(value: torch.Tensor) -> torch.Tensor:
                    found[name] = value.clone()  # some modules write into what they return
                    if len(found) == len(set(names)):
                        raise Enough
                    return value

                return take

            with contextlib.suppress(Enough):
                self._run_bridge(tokens, {name: keep(name) for name in names})
        return [found[name] for name in names]

    @torch.no_grad()
    def complete(self, prompt: str, n_tokens: int = 40) -> str:
        """Returns `prompt` with n_tokens more, each of them the most likely next token."""
        inputs = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        if inputs.shape[1] == 0 or int(inputs[0, 0]) != self.bos_token_id:
            inputs = torch.cat([torch.tensor([[self.bos_token_id]]), inputs.long()], dim=1)
        inputs = self._check_tokens(inputs)
        found = self.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=n_tokens, do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        return str(self.tokenizer.decode(found[0, 1:]))

    def next_token_loss(
        self, tokens: torch.Tensor, hook_name: str | None = None, replace: Replace | None = None
    ) -> torch.Tensor:
        """Returns the negative log likelihood [B, T - 1], float32 nats, of `tokens`[:, 1:], each given the tokens
        before it.

        `replace` maps the UNSCALED residual [B, T, d], in host units, BOS positions included, to its replacement (None:
        the clean model). A replacement should return BOS positions unchanged: their norm is about a hundred times that
        of the others, and no SAE was trained on them.
        """
        return self.splice(tokens, hook_name, {"": replace})[""].nll

    @torch.no_grad()
    def splice(
        self,
        tokens: torch.Tensor,
        hook_name: str | None,
        replacements: Mapping[str, Replace | None],
        *,
        kl: bool = False,
        read_at: str | None = None,
    ) -> dict[str, SpliceLoss]:
        """Returns `next_token_loss` for several replacements; the layers before the hook run only once.

        Args:
            replacements: by name; the result has a SpliceLoss for each, in the same order.
            kl: also compute KL(clean || replaced) per token.
            read_at: another place, which runs before this one; `replace` is then called with (activations here,
                activations there).
        """
        name = self.resolve_hook(hook_name)
        if read_at is not None:
            return self._splice_pair(self._check_tokens(tokens), self.resolve_hook(read_at), name, replacements, kl)
        tokens = self._check_tokens(tokens)
        if tokens.shape[1] < 2:
            raise ShapeError(f"tokens of shape {tuple(tokens.shape)} predict nothing; give at least 2 per row")
        depth = self._depth(name)
        resid = None
        if depth is not None and self._can_resume(tokens, depth):
            resid = stream.read(self.model, tokens, depth)
        clean = self._logits(tokens, name, None, resid) if kl else None
        losses = {}
        for key, replace in replacements.items():
            logits = clean if clean is not None and replace is None else self._logits(tokens, name, replace, resid)
            losses[key] = _token_losses(logits, tokens, clean)
        return losses

    def _splice_pair(
        self, tokens: torch.Tensor, read_at: str, name: str, replacements: Mapping[str, Any], kl: bool
    ) -> dict[str, SpliceLoss]:
        """`splice` for activations that are read at one place and replaced at another; one forward pass for each."""
        clean = self.model(input_ids=tokens, use_cache=False).logits if kl else None
        losses = {}
        for key, replace in replacements.items():
            if replace is None:
                logits = self.model(input_ids=tokens, use_cache=False).logits if clean is None else clean
            else:
                logits = self._through_pair(tokens, read_at, name, replace)
            losses[key] = _token_losses(logits, tokens, clean)
        return losses

    def _through_pair(self, tokens: torch.Tensor, read_at: str, name: str, replace: Callable[..., Any]) -> torch.Tensor:
        read: list[torch.Tensor] = []

        def take(value: torch.Tensor) -> torch.Tensor:
            read.append(value.clone())
            return value

        def put(value: torch.Tensor) -> torch.Tensor:
            if not read:
                raise ConfigError(f"{name} is computed before {read_at} in {self.name!r}; swap the two")
            new = replace(value.clone(), read[-1])
            if new.shape != value.shape:
                raise ShapeError(
                    f"replace returned {tuple(new.shape)} for activations of {tuple(value.shape)}; keep it"
                )
            return new.to(value.device, value.dtype)

        reading, writing = stream.tap(self.model, read_at), stream.tap(self.model, name)
        if reading is None or writing is None:
            return self._run_bridge(tokens, {read_at: take, name: put})
        with reading(take), writing(put):
            return self.model(input_ids=tokens, use_cache=False).logits

    def kl(self, tokens: torch.Tensor, hook_name: str | None, replace: Replace) -> torch.Tensor:
        """Returns KL(clean || replaced) of every prediction [B, T - 1] in nats, differentiable through the result of
        `replace`.

        Arguments are as in `splice`. The layers before the hook run without gradients, those behind it with.
        """
        name = self.resolve_hook(hook_name)
        tokens = self._check_tokens(tokens)
        if tokens.shape[1] < 2:
            raise ShapeError(f"tokens of shape {tuple(tokens.shape)} predict nothing; give at least 2 per row")
        depth = self._depth(name)
        with torch.no_grad():
            resume = depth is not None and self._can_resume(tokens, depth)
            resid = stream.read(self.model, tokens, depth) if resume and depth is not None else None
            clean = self._logits(tokens, name, None, resid)
        kl = _token_losses(self._logits(tokens, name, replace, resid), tokens, clean).kl
        assert kl is not None
        return kl

    def loss_gradient(self, tokens: torch.Tensor, hook_name: str | None, counted: torch.Tensor) -> torch.Tensor:
        """Returns the gradient [B, T, d] of `next_token_loss`, summed where `counted` [B, T - 1] is true, by the
        activations."""
        name, kept = self.resolve_hook(hook_name), []

        def leaf(value: torch.Tensor) -> torch.Tensor:
            kept.append(value.detach().requires_grad_(True))
            return kept[-1]

        tokens = self._check_tokens(tokens)
        with torch.enable_grad():
            loss = _token_losses(self._logits(tokens, name, leaf, None), tokens, None).nll
            return torch.autograd.grad((loss * counted.to(loss)).sum(), kept[-1])[0]

    def _logits(
        self, tokens: torch.Tensor, name: str, replace: Replace | None, resid: torch.Tensor | None
    ) -> torch.Tensor:
        def checked(value: torch.Tensor) -> torch.Tensor:
            if replace is None:
                return value
            new = replace(value.clone())  # because `replace` may write into its argument
            if new.shape != value.shape:
                raise ShapeError(f"replace returned {tuple(new.shape)} for a residual of {tuple(value.shape)}; keep it")
            return new.to(value.device, value.dtype)

        depth = self._depth(name)
        if depth is None:
            if (tap := stream.tap(self.model, name)) is None:
                return self._run_bridge(tokens, {name: checked})
            with tap(checked):
                return self.model(input_ids=tokens, use_cache=False).logits
        if resid is None:
            return stream.replaced(self.model, tokens, depth, checked)
        return stream.resumed(self.model, tokens, depth, checked(resid))

    def _can_resume(self, tokens: torch.Tensor, depth: int) -> bool:
        """Whether later layers depend on earlier ones through the residual stream only; tried once, on one sequence."""
        if depth not in self._resumable:
            one = tokens[:1]
            whole = self.model(input_ids=one, use_cache=False).logits.float()
            try:
                part = stream.resumed(self.model, one, depth, stream.read(self.model, one, depth)).float()
                self._resumable[depth] = torch.allclose(part, whole, rtol=1e-2, atol=1e-2)
            except (TypeError, AttributeError, KeyError, IndexError, RuntimeError):
                self._resumable[depth] = False
        return self._resumable[depth]

    def _run_bridge(self, tokens: torch.Tensor, functions: Mapping[str, Callable[[torch.Tensor], Any]]) -> torch.Tensor:
        return run_bridge(self.bridge, tokens, functions, self.name, self.default_hook)

    def _depth(self, name: str) -> int | None:
        match = _RESIDUAL.fullmatch(name)
        return int(match[1]) + (match[2] == "post") if match else None

    def _check_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ShapeError(f"tokens have shape {tuple(tokens.shape)}, {tokens.dtype}; give integers [batch, token]")
        if tokens.shape[1] > self.max_context:
            raise ConfigError(
                f"{tokens.shape[1]} tokens are a longer context than {self.name!r} takes; use {self.max_context}"
            )
        return tokens.to(self.device, torch.long)


def _token_losses(logits: torch.Tensor, tokens: torch.Tensor, clean: torch.Tensor | None) -> SpliceLoss:
    """Computes the losses row by row: float32 log-probabilities of a whole batch would take gigabytes."""
    nlls, kls = [], []
    for row, targets in enumerate(tokens[:, 1:]):
        log_p = functional.log_softmax(logits[row, :-1].float(), dim=-1)
        nlls.append(-log_p.gather(1, targets[:, None]).squeeze(1))
        if clean is not None:
            log_clean = functional.log_softmax(clean[row, :-1].float(), dim=-1)
            kls.append((log_clean.exp() * (log_clean - log_p)).sum(-1))
    return SpliceLoss(torch.stack(nlls), torch.stack(kls) if kls else None)
