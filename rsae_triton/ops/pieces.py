"""The dense way of `rational_autoencode`: a loop over pieces of tokens and features that encodes, decodes,
differentiates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rsae_triton.ops import backends
from rsae_triton.ops.backends import Codes
from rsae_triton.ops.encode import centred
from rsae_triton.ops.gradients import GrowingGradients, add_product
from rsae_triton.ops.reference import GateTensors
from rsae_triton.ops.step import Step
from rsae_triton.ops.tiles import wide
from rsae_triton.ops.workspace import current


def run(step: Step, chunk_tokens: int, chunk_features: int, backend: str) -> tuple[Tensor, ...]:
    """Computes a dense step: total, mse, l1, l0, counts, x_hat and the gradients of total (empty where not wanted).

    Chunks of 0 mean all at once.
    """
    x, W_enc, b_enc, W_dec, b_dec, gate, spec, l1_weight, l0_weight = step[:9]
    subtract, target, scale, dtype, wanted, across = step[9:]
    n, d_sae, exact = len(x), W_enc.shape[1], wide(dtype)
    token_parts, feature_parts = _parts(n, chunk_tokens), _parts(d_sae, chunk_features)
    differentiate, whole = any(wanted), len(feature_parts) == 1
    kind, route = backends.choose(backend, x.device, dtype, x.shape[1], gate, spec, training=differentiate)
    forward, backward = route.forward == "fused", route.backward == "fused"
    # Gradients of the mean, scaled: in float16 the unscaled ones would vanish, and those of the sum overflow.
    unit = 1 / max(n, 1) if dtype != torch.float16 else 2.0 ** -math.ceil(math.log2(max(n, 1)) / 2)
    W_enc_p, W_dec_p = (W_enc.to(dtype), W_dec.to(dtype)) if whole else (W_enc, W_dec)
    norms = torch.linalg.vector_norm(W_dec, dim=1, dtype=exact)
    memory = current()
    found = GrowingGradients(x, W_enc, W_dec, b_dec, gate, wanted, len(token_parts) == 1, whole, memory)
    counts, l1, squares = (x.new_zeros(shape, dtype=exact) for shape in (d_sae, d_sae, ()))
    x_hat = torch.empty_like(x, memory_format=torch.contiguous_format)
    space = memory.space if kind == "cpu" else None
    # A direct gate depends on h - threshold only, so the bias can be absorbed, which saves the CPU a pass over h. Not
    # in low precision, where h must be rounded with the bias in it.
    folded = kind == "cpu" and spec.form == "direct" and dtype == exact

    def encode(features: slice, x_c: Tensor, save_h: bool) -> tuple[Codes, Tensor, Tensor, GateTensors]:
        W_e, W_d, own = W_enc_p[:, features].to(dtype), W_dec_p[features].to(dtype), _rows(gate, features)
        b_e = b_enc[features].to(dtype)
        if folded:
            own = own._replace(threshold=own.threshold - b_e)
        bias = None if folded else b_e
        codes = backends.encode(kind, x_c, W_e, bias, own, spec, save_h=save_h, fused=forward, space=space)
        return codes, W_e, W_d, own

    for tokens in token_parts:
        part = x[tokens]
        x_c = centred(part, b_dec if subtract else None, dtype)
        out = part.new_empty(part.shape, dtype=dtype if whole else exact)
        for features in feature_parts:
            piece = encode(features, x_c, differentiate and whole)
            codes, _, W_d, _ = piece
            add_product(out, codes.z.t(), W_d, fresh=features.start == 0)
            counts[features] += codes.counts
            l1[features] += codes.l1
        out = out.to(exact)
        if step.adds_b_dec:
            out.add_(b_dec)
        if across is not None:
            out = across.sum(out)
        x_hat[tokens] = out
        residual = out.sub_(part if target is None else target[tokens])
        if scale is not None:
            residual.mul_(scale[tokens])
        squares += residual.square().sum()
        if not differentiate:
            continue
        residual.mul_(2 * unit if scale is None else scale[tokens] * (2 * unit))
        g = residual.to(dtype)
        for features in feature_parts:
            codes, W_e, W_d, own = piece if whole else encode(features, x_c, True)
            assert codes.h is not None
            found.decoder(tokens, features, codes.z, g)
            dcounts = norms[features].new_full((len(codes.z),), l0_weight * unit) if l0_weight else None
            dl1 = norms[features] * (l1_weight * unit) if l1_weight else None
            grads = backends.decode_backward(
                kind, g, W_d, codes.h, dcounts, dl1, own, spec,
                coefficients=any(wanted[5:8]), fused=backward, out=codes.z,
            )  # fmt: skip
            found.encoder(tokens, features, x_c, W_e, grads)
        found.residual(tokens, residual, of_x=target is None, of_b_dec=step.adds_b_dec)

    mean = 1 / max(n, 1)
    mse, l1_mean, l0 = squares * mean, torch.dot(l1, norms) * mean, counts.sum() * mean
    total = mse + l1_weight * l1_mean + l0_weight * l0
    if l1_weight:
        found.norms(W_dec, torch.where(norms > 0, l1 / norms, 0) * (l1_weight * unit))
    if subtract:
        found.centre(W_enc)
    return total, mse, l1_mean, l0, counts, x_hat, *found.finish(mean / unit)


def _parts(length: int, step: int) -> list[slice]:
    step = step or max(length, 1)
    return [slice(start, min(start + step, length)) for start in range(0, max(length, 1), step)]


def _rows(gate: GateTensors, features: slice) -> GateTensors:
    """The gate of some of the features; shared coefficients stay shared."""
    parts = [one[features] if k >= 5 or len(one) > 1 else one for k, one in enumerate(gate)]
    return GateTensors(*parts)
