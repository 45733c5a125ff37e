"""SAELens: importing this module registers the architecture "rational", for loading, splicing, evals and training.

    import rsae_triton.integrations.saelens
    sae = sae_lens.SAE.load_from_disk("out/my_rsae")

Everything in SAELens that takes an SAE then also takes a rational one: `HookedSAETransformer`, `SAETransformerBridge`
(also with `use_error_term`), `run_evals`, the training runner.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from rsae_triton.common.errors import ConfigError, FormatError, SourceError
from rsae_triton.ops.encode import rational_encode
from rsae_triton.ops.reference import rational_gate
from rsae_triton.sae import rounds
from rsae_triton.sae.gate import RationalGate
from rsae_triton.sae.rational import FusedRationalSAE, initial_gate
from rsae_triton.sae.transcoder import Transcoder

__all__ = ["RationalSAE", "RationalTrainingSAE", "from_saelens", "to_saelens", "transcoder_to_saelens"]

ARCHITECTURE = FusedRationalSAE.architecture
TESTED = "6.54"


def check_version() -> None:
    """Raises SourceError without a usable SAELens; warns about a version that has not been tested."""
    try:
        found = version("sae-lens")
    except PackageNotFoundError as error:
        raise SourceError(
            f"rsae_triton.integrations.saelens needs SAELens; install it with: pip install 'sae-lens=={TESTED}.*'"
        ) from error
    if found.split(".")[0] != TESTED.split(".")[0]:
        raise SourceError(
            f"sae-lens {found} has another interface than version {TESTED.split('.')[0]}, which this was written for; "
            f"install it with: pip install 'sae-lens=={TESTED}.*'"
        )
    if found.split(".")[:2] != TESTED.split("."):
        warnings.warn(
            f"rsae_triton was tested with sae-lens {TESTED}; this is {found}. If something fails, install "
            f"'sae-lens=={TESTED}.*'",
            stacklevel=3,
        )


check_version()
from sae_lens import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig  # noqa: E402
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class, register_sae_training_class  # noqa: E402
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput  # noqa: E402
from sae_lens.saes.topk_sae import TopK  # noqa: E402


@dataclass(kw_only=True)
class _GateConfig:
    """The fields of `RationalGate.config()`, and how many rounds the encoder has."""

    degree: list[int] = field(default_factory=lambda: [3, 2])
    groups: int = 1
    groups_assigned: bool = False
    form: str = "gated"
    domain: str = "clamp"
    amplitude: str = "rational"
    backward: str = "rational"
    input_scale_groups: int = 1
    output_scale_groups: int = 1
    activity_threshold_groups: int = 1
    rounds: int = 1
    rounds_weighed: bool = False


@dataclass
class RationalSAEConfig(SAEConfig, _GateConfig):
    """Configuration of a `RationalSAE`; the same as the cfg.json of our `save_pretrained`."""

    def to_dict(self) -> dict[str, Any]:
        """The same fields as ours: those of rounds only where they are needed."""
        made = super().to_dict()
        usual = [name for name, one in (("rounds", 1), ("rounds_weighed", False)) if made[name] == one]
        return {name: value for name, value in made.items() if name not in usual}

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


class _Rational:
    """What the SAEs for inference and for training have in common: weights, gate, encoding, folding."""

    b_enc: nn.Parameter
    gate: RationalGate
    refinement: rounds.Refinement | None

    def _initialize_rational(self: Any) -> None:
        """Makes b_enc and the gate. On the meta device the numbers will be loaded, so none are computed."""
        cfg = self.cfg
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, dtype=self.dtype, device=self.device))
        weights = torch.ones(cfg.d_in) if cfg.rounds_weighed else None
        more = (
            rounds.Refinement(cfg.d_sae, cfg.rounds, weights=weights, device=self.device) if cfg.rounds != 1 else None
        )
        self.refinement = more
        fields = {name: getattr(cfg, name) for name in _GateConfig.__dataclass_fields__}
        if self.device.type == "meta":
            self.gate = RationalGate.from_config({**fields, "d_sae": cfg.d_sae})
            return
        options = {name: fields[name] for name in ("groups", "domain", "amplitude", "backward")}
        options["input_scale"] = torch.full((cfg.input_scale_groups,), getattr(cfg, "init_input_scale", 1.0))
        options["output_scale"] = torch.ones(cfg.output_scale_groups)
        options["activity_threshold"] = torch.zeros(cfg.activity_threshold_groups)
        if cfg.groups_assigned:
            options["group_of"] = torch.zeros(cfg.d_sae, dtype=torch.int64)  # to be loaded
        if cfg.form == "gated":
            options["threshold"] = getattr(cfg, "init_threshold", 0.0)
        degree = (int(cfg.degree[0]), int(cfg.degree[1]))
        self.gate = initial_gate(cfg.d_sae, degree, cfg.form, options).to(self.device)

    def _pre_and_post(self: Any, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Returns hidden_pre, if a hook needs it, and the code."""
        sae_in = self.process_sae_in(x)
        hook = self.hook_sae_acts_pre
        if hook._forward_hooks or hook._backward_hooks:
            hidden_pre = hook(sae_in @ self.W_enc + self.b_enc)
            z = self.gate(hidden_pre) if self.refinement is None else self._further_rounds(sae_in, hidden_pre)
            return hidden_pre, self.hook_sae_acts_post(z)
        if self.refinement is not None:
            return None, self.hook_sae_acts_post(self._further_rounds(sae_in, None))
        # No hook is between product and gate, so the fused encoder is used.
        z = rational_encode(sae_in, self.W_enc, self.b_enc, None, self.gate.tensors(), self.gate.spec())[0]
        return None, self.hook_sae_acts_post(z)

    def _further_rounds(self: Any, sae_in: Tensor, hidden_pre: Tensor | None) -> Tensor:
        """Returns the code of all rounds; if a hook needs hidden_pre, the later rounds continue from it."""
        centred = self.cfg.apply_b_dec_to_input
        b_dec = torch.zeros_like(self.b_dec) if centred else self.b_dec
        weights = rounds.Weights(self.W_enc, self.b_enc, self.W_dec, b_dec, self.gate, self.refinement)
        return rounds.encode(weights, sae_in, hidden=hidden_pre).z

    @torch.no_grad()
    def fold_W_dec_norm(self: Any) -> None:  # noqa: N802
        """Scales decoder rows to unit norm and codes by the norms. Reconstructions do not change."""
        norms = self.fold_and_get_W_dec_norm()
        self.gate.scale_features_(norms.float())
        if self.refinement is not None:
            self.refinement.scale_features_(norms.float())
        self.cfg.input_scale_groups = len(self.gate.log_input_scale)
        self.cfg.output_scale_groups = len(self.gate.output_scale)
        self.cfg.activity_threshold_groups = len(self.gate.activity_threshold)

    def fold_activation_norm_scaling_factor(self: Any, scaling_factor: float) -> None:
        """Does what SAELens does, and converts the rounds to the decoder's new units."""
        super().fold_activation_norm_scaling_factor(scaling_factor)  # type: ignore[misc]
        if self.refinement is not None:
            self.refinement.scale_activations_(scaling_factor)

    def fold_activation_whitening(self: Any, *matrices: Any, **options: Any) -> None:
        """Does what SAELens does. Raises ConfigError for several rounds, whose error is measured in the whitened
        units."""
        if self.refinement is not None:
            raise ConfigError("whitening cannot be folded into an encoder with rounds; take them away: with_rounds(1)")
        super().fold_activation_whitening(*matrices, **options)  # type: ignore[misc]

    def process_state_dict_for_loading(self: Any, state_dict: dict[str, Any]) -> None:
        """Restores precision after SAELens has read everything, also the gate, in the dtype of the weights."""
        low = sorted(
            name
            for name, one in state_dict.items()
            if name.startswith(("gate.", "refinement.")) and one.element_size() < 4
        )
        if low:
            warnings.warn(
                f"SAELens read the gate's parameters as {state_dict[low[0]].dtype}, which rounds thresholds and "
                "coefficients; use load_from_disk(..., dtype='float32') and then .to(...), which leaves them alone",
                stacklevel=4,
            )
            for name in low:
                state_dict[name] = state_dict[name].float()
        if "gate.group_of" in low and self.cfg.groups > 256:
            raise FormatError("groups of features cannot be read in low precision; use load_from_disk(dtype='float32')")
        if "gate.group_of" in state_dict:
            state_dict["gate.group_of"] = state_dict["gate.group_of"].long()


class _WholeCode(TopK):
    """Tells SAEDashboard to encode all features and then to choose some, as it does for TopK.

    It would otherwise slice the encoder to the features that it wants: it cannot slice a gate, and with rounds the code
    of a feature depends on the others. Nothing calls it; `RationalSAE.encode` has the gate.
    """


class RationalSAE(_Rational, SAE):
    """A Rational SAE as SAELens' `SAE`; its codes carry exact zeros."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self._initialize_rational()

    def get_activation_fn(self) -> Any:
        """Returns a marker that other tools read; see `_WholeCode`."""
        return _WholeCode(self.cfg.d_sae)

    def encode(self, x: Tensor) -> Tensor:
        """Encodes activations [..., d_in] as a sparse code [..., d_sae]."""
        return self._pre_and_post(x)[1]

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Decodes codes [..., d_sae] to reconstructions [..., d_in]."""
        sae_out = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(sae_out), self.d_head)


@dataclass
class RationalTrainingSAEConfig(TrainingSAEConfig, _GateConfig):
    """Configuration for training a Rational SAE with SAELens.

    Args:
        l0_coefficient: weight of the mean number of active features (gated form; the gradient goes through the step).
        l1_coefficient: weight of the mean of sum |z| * ||W_dec row||.
        init_threshold, init_input_scale: theta and C_in of a new gate, in units of hidden_pre.
    """

    l0_coefficient: float = 1.0
    l0_warm_up_steps: int = 0
    l1_coefficient: float = 0.0
    l1_warm_up_steps: int = 0
    init_threshold: float = 0.01
    init_input_scale: float = 0.05

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


class RationalTrainingSAE(_Rational, TrainingSAE):
    """A Rational SAE for SAELens' training runner: mse + l0 + l1 on the shipped code."""

    def initialize_weights(self) -> None:
        if self.cfg.rounds != 1:
            raise ConfigError("SAELens' runner trains one round; train through rounds with rsae_triton.train")
        super().initialize_weights()
        self._initialize_rational()

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the code and hidden_pre, both [..., d_sae]."""
        sae_in = self.process_sae_in(x)
        hidden_pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(self.gate(hidden_pre)), hidden_pre

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self.gate.constrain_()
        return super().training_forward_pass(step_input)

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {
            "l0": TrainCoefficientConfig(self.cfg.l0_coefficient, self.cfg.l0_warm_up_steps),
            "l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps),
        }

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        rows = hidden_pre.reshape(-1, self.cfg.d_sae).float()
        active = rational_gate(rows, self.gate.tensors(), self.gate.spec())[1]
        l1 = (feature_acts.abs() * self.W_dec.norm(dim=1)).sum(-1).mean()
        return {
            "l0_loss": step_input.coefficients["l0"] * active.sum(-1).mean(),
            "l1_loss": step_input.coefficients["l1"] * l1,
        }


def transcoder_to_saelens(sae: Transcoder) -> Any:
    """Converts a ReLU or JumpReLU transcoder to SAELens' class for it, with copied weights, in the model's units.

    Raises:
        ConfigError: a kind that SAELens does not have; convert a Rational one with `to_jumprelu` first.
    """
    config = sae.config()
    if config["architecture"] not in SAE_CLASS_REGISTRY:
        hint = "use to_jumprelu(...) first" if hasattr(sae, "gate") else "it has ReLU and JumpReLU ones"
        raise ConfigError(f"SAELens has no architecture {config['architecture']!r}; {hint}")
    if sae.all_units not in (None, (1.0, 1.0)):
        sae = copy.deepcopy(sae).to_units_(1.0)
    made = SAE.from_dict({**config, "device": "cpu"})
    made.load_state_dict({name: one.detach().clone() for name, one in sae.state_dict().items()})
    return made.to(device=str(sae.W_enc.device), dtype=sae.W_enc.dtype)


def to_saelens(sae: FusedRationalSAE) -> RationalSAE:
    """Converts to a SAELens `SAE` that takes raw activations, with its own copy of the weights.

    Raises:
        ConfigError: a subclass that computes something else, such as `TopKRationalSAE`.
    """
    if sae.architecture != ARCHITECTURE:
        raise ConfigError(f"SAELens knows the architecture {ARCHITECTURE!r}, not {sae.architecture!r}")
    if sae.units not in (None, 1.0):
        sae = copy.deepcopy(sae).to_units_(1.0)
    made = RationalSAE(RationalSAEConfig.from_dict({**sae.config(), "device": "meta"}))
    copies = {name: one.detach().clone(memory_format=torch.contiguous_format) for name, one in sae.state_dict().items()}
    made.load_state_dict(copies, assign=True)
    return made.to(device=str(sae.W_enc.device), dtype=sae.W_enc.dtype)


def from_saelens(sae: Any) -> FusedRationalSAE:
    """Converts a SAELens `RationalSAE` or `RationalTrainingSAE` to ours, with copied weights."""
    config = sae.cfg.to_dict()
    return FusedRationalSAE.from_files(config, sae.state_dict(), "the SAELens SAE").to(sae.W_enc.device)


if ARCHITECTURE not in SAE_CLASS_REGISTRY:
    register_sae_class(ARCHITECTURE, RationalSAE, RationalSAEConfig)
    register_sae_training_class(ARCHITECTURE, RationalTrainingSAE, RationalTrainingSAEConfig)
