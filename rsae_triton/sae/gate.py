"""`RationalGate`: the trainable scalar function h -> z of a Rational SAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from rsae_triton.common.checks import as_tensor, check_finite, check_integer, check_room, check_tensor, parse_device
from rsae_triton.common.errors import ConfigError, NumericsError, ShapeError
from rsae_triton.ops.reference import GateSpec, GateTensors, rational_gate

if TYPE_CHECKING:
    from rsae_triton.remez import GateFit


def smooth_step() -> tuple[list[float], list[float]]:
    """Returns a, b of g(u) = 1/2 + u / (1 + u^2), of type (2, 2).

    On [-1, 1] it rises from 0 to 1 and is flat at both ends, so that clipping its argument leaves no kink. It replaces
    a Heaviside step where the gate's slope trains a threshold.
    """
    return [0.5, 1.0, 0.5], [0.0, 1.0]


class Precise(nn.Module):
    """A module whose parameters stay float32: .to(bfloat16) only moves it, because thresholds in bf16 silently stop
    learning."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.is_floating_point() and moved.element_size() < 4
            return tensor.to(moved.device) if narrowed else moved

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # With load_state_dict(assign=True) torch takes the given tensors themselves, in their dtype. `state_dict` is a
        # copy that torch made for this call.
        for name, _ in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.is_floating_point() and given.element_size() < 4:
                state_dict[prefix + name] = given.detach().float()
        super()._load_from_state_dict(state_dict, prefix, *rest)


class RationalGate(Precise):
    """A rational gate for `d_sae` features; feature f uses coefficient set ``f * groups // d_sae``, or ``group_of[f]``.

    The trained parameters are alpha = a / s_a and beta = b / s_b, where s_a and s_b are the *unit-influence scales*
    (how much one unit of a coefficient moves the gate at most), so that every parameter is O(1) although the
    coefficients themselves reach 1e7. All parameters are float32 whatever dtype the module is moved to.

    Args:
        d_sae: number of features.
        degree: (p, q), 0 to 12 each.
        a, b: coefficients [p+1] and [q] (the same for all groups at first), or [groups, p+1] and [groups, q].
        groups: number of coefficient sets; divides d_sae unless group_of is given. 1 is "shared", d_sae "per feature".
        group_of: which set each feature uses, [d_sae] integers below groups; None gives neighbouring features one set.
        form, domain, amplitude, backward: see `GateSpec`.
        centre: c, a number or [groups].
        input_scale, output_scale: C_in > 0 and C_out; a number, [groups] or [d_sae].
        threshold: theta; a number or [d_sae].
        activity_threshold: codes with |z| at or below it are exact zeros (direct form); a number or [d_sae].
        numerator_scale, denominator_scale: unit-influence scales [p+1] and [q]; ones when not given.

    Raises:
        ConfigError, ShapeError, NumericsError: a setting, a size or a value cannot be used.
    """

    numerator_scale: Tensor
    denominator_scale: Tensor
    output_scale: Tensor
    activity_threshold: Tensor
    group_of: Tensor | None

    def __init__(
        self,
        d_sae: int,
        degree: Sequence[int],
        a: Any,
        b: Any,
        *,
        groups: int = 1,
        group_of: Any = None,
        form: str = "direct",
        domain: str = "clamp",
        amplitude: str = "rational",
        backward: str = "soft",
        centre: Any = 0.0,
        input_scale: Any = 1.0,
        output_scale: Any = 1.0,
        threshold: Any = 0.0,
        activity_threshold: Any = 0.0,
        numerator_scale: Any = None,
        denominator_scale: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(degree, Sequence) or isinstance(degree, str) or len(degree) != 2:
            raise ConfigError(f"degree is {degree!r}; give two integers (p, q)")
        check_integer("d_sae", d_sae, 1)
        check_integer("groups", groups, 1)
        device = parse_device(device)
        if d_sae % groups and group_of is None:
            raise ConfigError(f"groups={groups} does not divide d_sae={d_sae}; choose a divisor (1 = shared)")
        self.d_sae, self.groups = d_sae, groups
        self.degree = (degree[0], degree[1])
        self.form, self.domain, self.amplitude, self.backward = form, domain, amplitude, backward
        self.spec()  # refuses bad settings before any tensor is allocated
        p, q = self.degree
        check_room(f"a gate of d_sae={d_sae}, groups={groups}", (max(d_sae, groups * (p + q + 1)),), torch.float32)
        assigned = None if group_of is None else as_tensor("group_of", group_of, None, device).detach().clone()
        self.register_buffer("group_of", assigned)
        self.check_groups()

        def tensor(name: str, value: Any, *shapes: tuple[int, ...]) -> Tensor:
            made = as_tensor(name, value, torch.float32, device).detach().clone()
            if made.dim() == len(shapes[0]) - 1:
                made = made.unsqueeze(0)
            if made.shape[1:] == shapes[0][1:] and made.shape[0] == 1 and (1, *shapes[0][1:]) not in shapes:
                made = made.expand(shapes[0]).clone()
            if tuple(made.shape) not in shapes:
                raise ShapeError(f"{name} has shape {tuple(made.shape)}; expected {' or '.join(map(str, shapes))}")
            check_finite(name, made, "gate parameters must be finite")
            return made

        scale_a = tensor(
            "numerator_scale",
            [1.0] * (p + 1) if numerator_scale is None else numerator_scale,
            (groups, p + 1),
        )
        scale_b = tensor(
            "denominator_scale", [1.0] * q if denominator_scale is None else denominator_scale, (groups, q)
        )
        for name, scale in (("numerator_scale", scale_a), ("denominator_scale", scale_b)):
            if bool((scale <= 0).any()):
                raise NumericsError(f"{name} must be positive; got a smallest value of {float(scale.min()):g}")
        self.register_buffer("numerator_scale", scale_a)
        self.register_buffer("denominator_scale", scale_b)
        self.alpha = nn.Parameter(tensor("a", a, (groups, p + 1)) / scale_a)
        self.beta = nn.Parameter(tensor("b", b, (groups, q)) / scale_b)
        self.centre = nn.Parameter(tensor("centre", centre, (groups,)))
        scale_in = tensor("input_scale", input_scale, (groups,), (1,), (d_sae,))
        if bool((scale_in <= 0).any()):
            raise NumericsError(f"input_scale must be positive; got a smallest value of {float(scale_in.min()):g}")
        # C_in is trained through its logarithm, so it stays positive and a step is a relative change.
        self.log_input_scale = nn.Parameter(scale_in.log())
        scale_out = tensor("output_scale", output_scale, (groups,), (1,), (d_sae,))
        if form == "gated":  # unused: as a parameter it would have no gradient, which DDP refuses
            self.register_buffer("output_scale", scale_out)
        else:
            self.output_scale = nn.Parameter(scale_out)
        self.threshold = nn.Parameter(tensor("threshold", threshold, (d_sae,)))
        self.register_buffer("activity_threshold", tensor("activity_threshold", activity_threshold, (1,), (d_sae,)))
        self._check_thresholds()

    @classmethod
    def from_fit(
        cls,
        fit: GateFit,
        d_sae: int,
        *,
        thresholds: Tensor | None = None,
        form: str = "direct",
        **options: Any,
    ) -> RationalGate:
        """Makes a gate from a certified fit.

        Args:
            fit: a result of `fit_gate`. For form="direct" a fit of the gate itself; for form="gated" a fit of the ramp,
                or of the step at 0.
            thresholds: per-feature thresholds [d_sae] in units of h. In the direct form one shared (a, b) serves them
                all, because a JumpReLU is homogeneous, J_theta(l h) = l J_{theta/l}(h): feature f gets C_in = C_out =
                thresholds[f] / fit.theta. In the gated form they become theta_f.
            options: see `RationalGate`.

        Raises:
            ConfigError: thresholds with a direct fit whose own theta is 0, or that are not positive.
        """
        if not all(hasattr(fit, name) for name in ("a", "b", "degree", "theta")):
            raise ConfigError(f"fit is a {type(fit).__name__}; give what fit_gate returned")
        if thresholds is not None and form == "direct":
            if fit.theta <= 0:
                raise ConfigError(
                    "per-feature thresholds need a fit with theta > 0 (C_f = theta_f / theta); fit "
                    "fit_gate('jumprelu', degree, theta=0.1, margin=0.02), or use form='gated'"
                )
            scale = as_tensor("thresholds", thresholds, torch.float32, None) / fit.theta
            if bool((scale <= 0).any()):
                raise ConfigError("per-feature thresholds of a direct gate must be positive; use form='gated'")
            options = {"input_scale": scale, "output_scale": scale, **options}
        elif thresholds is not None:
            options = {"threshold": thresholds, **options}
        return cls(
            d_sae,
            fit.degree,
            fit.a,
            fit.b,
            form=form,
            centre=fit.centre,
            numerator_scale=fit.numerator_scale,
            denominator_scale=fit.denominator_scale,
            **options,
        )

    def numerator(self) -> Tensor:
        """a, [groups, p+1]."""
        return self.alpha * self.numerator_scale

    def denominator(self) -> Tensor:
        """b, [groups, q]."""
        return self.beta * self.denominator_scale

    @property
    def input_scale(self) -> Tensor:
        """C_in > 0, [groups] or [1] or [d_sae]."""
        return self.log_input_scale.exp()

    def spec(self, hard: bool = True) -> GateSpec:
        """The settings of the gate; hard=False is for the dense rational code (always with amplitude "rational")."""
        amplitude = self.amplitude if hard else "rational"
        return GateSpec(*self.degree, self.form, self.domain, amplitude, hard, self.backward if hard else "soft")

    def check_groups(self) -> None:
        """Raises ShapeError or ConfigError if `group_of` does not give every feature one of the groups."""
        if self.group_of is None:
            return
        if self.group_of.shape != (self.d_sae,) or self.group_of.dtype != torch.int64:
            raise ShapeError(
                f"group_of is {self.group_of.dtype} of shape {tuple(self.group_of.shape)}; give int64 [{self.d_sae}]"
            )
        if bool((self.group_of < 0).any()) or bool((self.group_of >= self.groups).any()):
            raise ConfigError(f"group_of names a group outside 0 to {self.groups - 1}; there are groups={self.groups}")

    def check_values(self) -> None:
        """Raises NumericsError for impossible values: scales that are not positive or overflow, or thresholds below
        zero."""
        for name, values in (("numerator", self.numerator()), ("denominator", self.denominator())):
            check_finite(name, values, "its coefficients overflow")
        for name, scale in (
            ("numerator_scale", self.numerator_scale), ("denominator_scale", self.denominator_scale),
            ("input_scale", self.input_scale),
        ):  # fmt: skip
            if not bool(((scale > 0) & scale.isfinite()).all()):
                raise NumericsError(f"{name} must be positive and finite; got {scale.flatten()[:3].tolist()}")

        self._check_thresholds()

    def _check_thresholds(self) -> None:
        # A gated code opens for h > theta >= 0 only. With a negative activity threshold no code would be zero.
        gated = [("threshold", self.threshold)] if self.form == "gated" else []
        for name, values in (("activity_threshold", self.activity_threshold), *gated):
            if bool((values < 0).any()):
                raise NumericsError(
                    f"{name} must not be negative; got a smallest value of {float(values.detach().min()):g}"
                )

    def _per_feature(self, values: Tensor) -> Tensor:
        """Returns a row for each feature, from rows for groups (or one row for all, or a row per feature)."""
        if self.group_of is not None and len(values) == self.groups > 1:
            return values[self.group_of]
        return values.repeat_interleave(self.d_sae // len(values), dim=0)

    def tensors(self) -> GateTensors:
        """The numbers per feature: [1, ...] if one set serves all features, [d_sae, ...] otherwise."""
        a, b = self.numerator(), self.denominator()
        centre: Tensor = self.centre
        scale_in, scale_out = self.input_scale, self.output_scale.view(-1)
        if any(len(one) > 1 for one in (a, scale_in, scale_out)):
            a, b, centre, scale_in, scale_out = (self._per_feature(one) for one in (a, b, centre, scale_in, scale_out))
        activity = self.activity_threshold.expand(self.d_sae)
        return GateTensors(a, b, centre, scale_in, scale_out, self.threshold, activity)

    def forward(self, hidden_pre: Tensor, *, hard: bool = True) -> Tensor:
        """Computes codes from pre-activations [..., d_sae], in the same shape, in plain PyTorch (float32 inside)."""
        check_tensor("hidden_pre", hidden_pre, self.threshold.device)
        if hidden_pre.shape[-1:] != (self.d_sae,):
            raise ShapeError(f"hidden_pre ends in {tuple(hidden_pre.shape[-1:])}; this gate has d_sae={self.d_sae}")
        rows = hidden_pre.reshape(-1, self.d_sae)
        wide = rows.float() if rows.element_size() < 4 else rows
        return rational_gate(wide, self.tensors(), self.spec(hard))[0].to(rows.dtype).reshape(hidden_pre.shape)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Projects thresholds onto theta >= 0 after an optimiser step, since a gated code opens only for h > theta >=
        0."""
        if self.form == "gated":
            self.threshold.clamp_(min=0)

    @torch.no_grad()
    def scale_features_(self, scale: Tensor) -> None:
        """Changes the units of feature f to be scale[f] > 0 times smaller: g_f(h) becomes s_f * g_f(h / s_f).

        Thresholds, C_in and the activity threshold are multiplied by scale; in the direct form also C_out (a gated code
        h * r scales with h). All of them become per-feature. They are new parameters, so an existing optimiser must be
        rebuilt.
        """
        check_tensor("scale", scale)
        scale = scale.to(self.threshold)
        if scale.shape != (self.d_sae,) or not bool(((scale > 0) & scale.isfinite()).all()):
            raise ShapeError(
                f"scale has shape {tuple(scale.shape)}; give a positive, finite number for each of {self.d_sae}"
            )

        def replaced(old: Tensor, values: Tensor) -> nn.Parameter:
            return nn.Parameter(values, requires_grad=old.requires_grad)

        self.threshold.mul_(scale)
        self.log_input_scale = replaced(self.log_input_scale, self._per_feature(self.log_input_scale) + scale.log())
        if self.form == "direct":
            self.output_scale = replaced(self.output_scale, self._per_feature(self.output_scale) * scale)
        self.activity_threshold = self._per_feature(self.activity_threshold) * scale

    def plot(self, features: Sequence[int] | None = None) -> Any:
        """Plots activation against pre-activation; the dotted line is the rational without its zeros. Returns a
        matplotlib figure.

        features: which to draw; by default five, from the lowest threshold to the highest.
        """
        from rsae_triton.sae.plot import plot_gate

        return plot_gate(self, features)

    def config(self) -> dict[str, Any]:
        """The arguments for an empty gate of this kind and size."""
        return {
            "degree": list(self.degree),
            "groups": self.groups,
            "groups_assigned": self.group_of is not None,
            "form": self.form,
            "domain": self.domain,
            "amplitude": self.amplitude,
            "backward": self.backward,
            "input_scale_groups": len(self.log_input_scale),
            "output_scale_groups": len(self.output_scale),
            "activity_threshold_groups": len(self.activity_threshold),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RationalGate:
        """Makes a gate from `config` (with d_sae) whose numbers are still to be loaded."""
        p, q = config["degree"]
        sizes = {}
        for name in ("input_scale", "output_scale", "activity_threshold"):
            sizes[name] = config.get(f"{name}_groups", 1)
            # Checked before anything of that size is allocated: a configuration can contain anything.
            if sizes[name] not in (1, config["groups"], config["d_sae"]):
                raise ConfigError(f"{name}_groups is {sizes[name]!r}; it must be 1, groups or d_sae")
        return cls(
            config["d_sae"],
            (p, q),
            [0.0] * (p + 1),
            [0.0] * q,
            groups=config["groups"],
            group_of=torch.zeros(config["d_sae"], dtype=torch.int64) if config.get("groups_assigned") else None,
            form=config["form"],
            domain=config["domain"],
            amplitude=config["amplitude"],
            backward=config["backward"],
            activity_threshold=torch.zeros(sizes["activity_threshold"]),
            input_scale=torch.ones(sizes["input_scale"]),
            output_scale=torch.ones(sizes["output_scale"]),
        )

    def extra_repr(self) -> str:
        groups = {1: "shared", self.d_sae: "per feature"}.get(self.groups, f"{self.groups} groups")
        return f"d_sae={self.d_sae}, degree={self.degree}, {groups}, {self.form}, domain={self.domain}, " + (
            f"amplitude={self.amplitude}, backward={self.backward}"
        )
