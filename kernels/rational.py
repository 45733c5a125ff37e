"""The rational gate as device functions, shared by all gate kernels. The formulas are in docs/kernels.md.

A gate's coefficients are passed as one flat tuple of registers `c`, in the order of `launch.pack_gate`:

    a_0 .. a_p,  b_1 .. b_q,  centre,  1 / C_in,  C_out

each a scalar (SHARED) or shaped like the feature index (one value per feature), so that the same code broadcasts both
against a tile of tokens. P and Q here are the *degrees*; `numerator` and `denominator` are the polynomials. The
denominator is never squared: at (9, 8) its square overflows where the quotient is fine.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_coefficients(pointer, f, f_mask, n_features, COUNT: tl.constexpr, SHARED: tl.constexpr):
    """Loads `c`: COUNT values of coefficients [COUNT, G], G = 1 (SHARED) or n_features; f: feature indices (int64)."""
    c = ()
    for k in tl.static_range(COUNT):
        if SHARED:
            c = c + (tl.load(pointer + k),)  # noqa: RUF005 (Triton's front end has no starred tuples)
        else:
            c = c + (tl.load(pointer + k * n_features + f, mask=f_mask, other=0.0),)  # noqa: RUF005
    return c


@triton.jit
def horner(s, c, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Returns sum_k c[FIRST + k] s^k, k < COUNT."""
    value = c[FIRST + COUNT - 1]
    for k in tl.static_range(1, COUNT):
        value = value * s + c[FIRST + COUNT - 1 - k]
    return value


@triton.jit
def horner_slope(s, c, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Returns the polynomial and its derivative, from one pass of Horner's rule for both."""
    value = c[FIRST + COUNT - 1]
    slope = 0.0
    for k in tl.static_range(1, COUNT):
        slope = value if k == 1 else slope * s + value
        value = value * s + c[FIRST + COUNT - 1 - k]
    return value, slope


@triton.jit
def argument(h, theta, c, P: tl.constexpr, Q: tl.constexpr, CLAMP: tl.constexpr):
    """Returns t = (h - theta) / C_in and s = clip(t, -1, 1) - centre. NaN stays NaN, as in torch.clamp."""
    t = (h - theta) * c[P + Q + 2]
    s = t
    if CLAMP:
        s = tl.maximum(s, -1.0, propagate_nan=tl.PropagateNan.ALL)
        s = tl.minimum(s, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return t, s - c[P + Q + 1]


@triton.jit
def tail(t):
    """Returns max(t - 1, 0), NaN for NaN: the continuation of a clamped direct gate beyond the right end."""
    return tl.maximum(t - 1.0, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def times_sign(value, x):
    """Returns value sign(x), with torch's sign: 0 for 0 and for NaN. Uses selections, because LLVM makes sign(x) in
    integers."""
    return tl.where(x > 0.0, value, tl.where(x < 0.0, -value, 0.0))


@triton.jit
def gate_forward(
    h, theta, activity, c,
    P: tl.constexpr, Q: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, IDENTITY: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Returns z and active (0.0 or 1.0), both shaped like h (float32)."""
    t, s = argument(h, theta, c, P, Q, CLAMP)
    y = horner(s, c, 0, P + 1)
    if Q > 0:
        y = y / (1.0 + tl.abs(horner(s, c, P + 1, Q) * s))
    # Zeroing is a multiplication, not a selection, because NaN * 0 is NaN in torch.
    if GATED:
        active = tl.where(h > theta, 1.0, 0.0)
        z = h
        if not IDENTITY:
            z = z * y
        if HARD:
            z = z * active
    else:
        if CLAMP:
            y = y + tail(t)
        z = y * c[P + Q + 3] + tl.zeros_like(h)  # a (0, 0) gate is a constant, so this gives it h's shape
        active = tl.where(tl.abs(z) > activity, 1.0, 0.0)
        if HARD:
            z = z * active
    return z, active


@triton.jit
def gate_backward(
    h, g, dcount, dl1, theta, activity, c,
    P: tl.constexpr, Q: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, IDENTITY: tl.constexpr, HARD: tl.constexpr,
    RATIONAL_BACKWARD: tl.constexpr, HAS_DL1: tl.constexpr,
):  # fmt: skip
    """Returns the derivatives of `gate_forward` with respect to everything it reads, element by element.

    g = dL/dz, dcount = dL/dactive and dl1 = dL/d|z|, float32. With r = numerator / denominator and g_r = dL/dr:

        dh, dt   dL/dh and dL/dt                       u    g_r / denominator, so that dL/da_i = u s^i
        v        dL/db_j = v s^j                       e    g_r r', so that dL/dcentre = -e
        t, s     the gate's argument                   gain dL/dC_out (0 in the gated form)
        z        what `gate_forward` computed
    """
    t, s = argument(h, theta, c, P, Q, CLAMP)
    y, slope = horner_slope(s, c, 0, P + 1)
    inverse = 1.0
    signed_y = 0.0  # y sign(B)
    if Q > 0:
        w, w_slope = horner_slope(s, c, P + 1, Q)
        b = w * s
        b_slope = w_slope * s + w
        inverse = 1.0 / (1.0 + tl.abs(b))
        y = y * inverse
        signed_y = times_sign(y, b)
        slope = slope - signed_y * b_slope
    gain = 0.0
    if GATED:
        active = tl.where(h > theta, 1.0, 0.0)
        z = h if IDENTITY else h * y
        if HARD:
            z = z * active
        if HAS_DL1:
            g = g + times_sign(dl1, z)
        g_amplitude = g
        if HARD:
            g_amplitude = g * active
        g_r = dcount
        if RATIONAL_BACKWARD:
            g_r = g_r + g * h
        elif not IDENTITY:
            g_r = g_r + g_amplitude * h
    else:
        gain = y
        if CLAMP:
            gain = gain + tail(t)
        z = gain * c[P + Q + 3] + tl.zeros_like(h)
        active = tl.where(tl.abs(z) > activity, 1.0, 0.0)
        if HARD:
            z = z * active
        if HAS_DL1:
            g = g + times_sign(dl1, z)
        g_r = g
        if HARD and not RATIONAL_BACKWARD:
            g_r = g_r * active
        gain = g_r * gain
        g_r = g_r * c[P + Q + 3]
    u = g_r * inverse
    e = u * slope
    dt = e
    if CLAMP:
        dt = tl.where(tl.abs(t) <= 1.0, e, 0.0)  # both ends count as inside, as in torch.clamp
        if not GATED:
            dt = dt + tl.where(t > 1.0, g_r, 0.0)
    dh = dt * c[P + Q + 2]
    if GATED:
        dh = dh + g_amplitude if IDENTITY else dh + g_amplitude * y
    return dh, dt, u, -u * signed_y, e, t, s, gain, z
