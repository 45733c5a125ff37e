"""What the kernel tests share: gates to try, the oracle (reference.py in float64), and how errors are compared."""

from itertools import product

import torch

from rsae_triton.ops.reference import GateSpec, GateTensors, rational_gate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEGREES = [(0, 0), (3, 2), (5, 4), (9, 8), (12, 12)]
FLAVOURS = [
    {"form": form, "domain": domain, "hard": hard, "backward": backward, "amplitude": amplitude}
    for form, domain, hard, backward, amplitude in product(
        ("direct", "gated"), ("clamp", "free"), (True, False), ("soft", "rational"), ("rational", "identity")
    )
    if amplitude == "rational" or (form == "gated" and hard)
]
# The best (3, 2) approximation of ReLU on [-1, 1].
RELU_A, RELU_B = [0.0218445, 0.5, 1.595744, 1.191488], [0.0, 2.382977]


def name_of(value) -> str:
    if isinstance(value, dict):
        return "-".join(("hard" if value["hard"] else "dense") if k == "hard" else v for k, v in value.items())
    return str(value).removeprefix("torch.")


def flags(spec: GateSpec, backward: bool = False) -> dict:
    """A GateSpec as the keyword arguments of the wrappers."""
    found = {
        "p": spec.p,
        "q": spec.q,
        "gated": spec.form == "gated",
        "clamp": spec.domain == "clamp",
        "identity": spec.amplitude == "identity",
        "hard": spec.hard,
    }
    return {**found, "backward_rational": spec.backward == "rational"} if backward else found


def random_gate(p: int, q: int, n_features: int, sets: int, seed: int = 0) -> GateTensors:
    """Coefficients of order one, B of both signs, every scale and offset away from its neutral value; float32."""
    g = torch.Generator().manual_seed(1000 * p + 10 * q + sets + seed)

    def uniform(low, high, *shape):
        return torch.rand(*shape, generator=g) * (high - low) + low

    return GateTensors(
        a=uniform(-1, 1, sets, p + 1),
        b=uniform(-1, 1, sets, q),
        centre=uniform(-0.2, 0.2, sets),
        input_scale=uniform(0.7, 1.6, sets),
        output_scale=uniform(0.5, 1.5, sets),
        threshold=uniform(-0.3, 0.5, n_features),
        activity_threshold=uniform(0.05, 0.3, n_features),
    )


def relu_gate(n_features: int) -> GateTensors:
    return GateTensors(
        a=torch.tensor([RELU_A]),
        b=torch.tensor([RELU_B]),
        centre=torch.zeros(1),
        input_scale=torch.full((1,), 2.0),
        output_scale=torch.full((1,), 2.0),
        threshold=torch.zeros(n_features),
        activity_threshold=torch.full((n_features,), 0.06),
    )


def to(gate: GateTensors, device: str) -> GateTensors:
    return GateTensors(*(t.to(device) for t in gate))


def doubtful(h: torch.Tensor, gate: GateTensors, spec: GateSpec, margin: float) -> torch.Tensor:
    """Where h [n, F] is so near to a decision (open, active, inside, sign of z) that rounding could turn it."""
    gate = GateTensors(*(t.double() for t in gate))
    h = h.double()
    t = (h - gate.threshold) / gate.input_scale
    near = (t.abs() < margin) | ((t.abs() - 1).abs() < margin)
    z = rational_gate(h, gate, GateSpec(spec.p, spec.q, spec.form, spec.domain, hard=False))[0]
    near |= z.abs() < margin
    if spec.form == "direct":
        near |= (z.abs() - gate.activity_threshold).abs() < margin
    return near


def draw_h(n_tokens: int, gate: GateTensors, spec: GateSpec, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """h [n, F] in dtype, both sides of every decision and none at it (the edge tests are for that)."""
    g = torch.Generator().manual_seed(seed)
    n_features = gate.threshold.shape[0]
    h = torch.zeros(n_tokens, n_features, dtype=dtype)
    near = torch.ones_like(h, dtype=torch.bool)
    for _ in range(20):
        h = torch.where(near, torch.randn(n_tokens, n_features, generator=g).to(dtype), h)
        near = doubtful(h, gate, spec, 1e-5)
        if not near.any():
            return h
    raise AssertionError("no h away from the gate's decisions")


def oracle(h, dz, dcounts, dl1, gate: GateTensors, spec: GateSpec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """z, counts, l1, dh and every gradient by autograd of reference.py in dtype.

    h, dz [n, F]; dcounts, dl1 [F] or None. Without dz nothing is differentiated.
    """
    h = h.detach().cpu().to(dtype).requires_grad_()
    gate = GateTensors(*(t.detach().cpu().to(dtype).requires_grad_() for t in gate))
    z, active = rational_gate(h, gate, spec)
    counts, l1 = active.sum(0), z.abs().sum(0)
    found = {"z": z.detach(), "counts": counts.detach(), "l1": l1.detach()}
    if dz is None:
        return found
    loss = (z * dz.cpu().to(dtype)).sum()
    if dcounts is not None:
        loss = loss + (counts * dcounts.cpu().to(dtype)).sum()
    if dl1 is not None:
        loss = loss + (l1 * dl1.cpu().to(dtype)).sum()
    inputs = {"h": h, **gate._asdict()}
    del inputs["activity_threshold"]
    if not loss.requires_grad:
        loss = loss + 0 * h.sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    for (name, tensor), gradient in zip(inputs.items(), gradients, strict=True):
        found["d" + name] = torch.zeros_like(tensor) if gradient is None else gradient
    found["db_enc"] = found["dh"].sum(0)
    return found


def magnitudes(h, dz, dcounts, dl1, gate: GateTensors, spec: GateSpec) -> dict[str, torch.Tensor]:
    """For each gradient that is a sum, the sum of its terms' absolute values: what its rounding error scales with.

    Each element of h becomes a feature of its own, with a copy of its feature's gate.
    """
    n_tokens, n_features = h.shape
    alone = GateTensors(*(t.expand(n_features, *t.shape[1:]).repeat(n_tokens, *[1] * (t.dim() - 1)) for t in gate))
    dcounts, dl1 = (None if one is None else one.repeat(n_tokens) for one in (dcounts, dl1))
    terms = oracle(h.reshape(1, -1), dz.reshape(1, -1), dcounts, dl1, alone, spec, torch.float64)
    found = {}
    for name, tensor in [*gate._asdict().items(), ("b_enc", gate.threshold)]:
        if name != "activity_threshold":
            size = terms["d" + name].abs().unflatten(0, (n_tokens, n_features)).sum(0)
            found["d" + name] = size if tensor.shape[0] == n_features else size.sum(0, keepdim=True)
    return found


def error(found: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """Largest absolute error over the largest true value, or, element by element, over `scale`."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    if truth.numel() == 0:
        return 0.0
    difference = (found.detach().cpu().double() - truth.double()).abs()
    assert not difference.isnan().any(), "NaN"
    return (difference / (truth.abs().max() if scale is None else scale).clamp(min=1e-30)).max().item()


def assert_gradients(grads, truth, torchs, scale, tolerance) -> None:
    """Every gradient of a gate (a `kernels.GateGrads`): `assert_as_good_as_torch` on the scale of its terms."""
    for name, found in grads._asdict().items():
        assert found.dtype == torch.float32
        assert_as_good_as_torch("d" + name, found, truth["d" + name], torchs["d" + name], tolerance, scale["d" + name])


WORST: dict[str, float] = {}
"""Largest excess over torch's own error seen for each name in this run."""


def assert_as_good_as_torch(name, found, truth, torchs, tolerance, scale=None) -> None:
    """found's error against the float64 truth is at most that of torch in the same dtype, plus tolerance."""
    ours, theirs = error(found, truth, scale), error(torchs, truth, scale)
    WORST[name] = max(WORST.get(name, 0.0), ours - theirs)
    assert ours <= theirs + tolerance, f"{name}: error {ours:.3g}, torch's own {theirs:.3g} + {tolerance:.3g}"


def assert_frozen(frozen, whole) -> None:
    """A gate's gradients without those of the coefficients: zeros in their shapes, every other one bit for bit."""
    for name, one, other in zip(whole._fields, frozen, whole, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(one, torch.zeros_like(other) if name in ("a", "b", "centre") else other), name
