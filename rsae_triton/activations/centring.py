"""Centres a residual stream to mean zero, as TransformerLens' `center_writing_weights` does.

GPT-2 reads its residual stream only through layer norms, which subtract the mean. So every weight that writes into the
stream can lose its mean over d_model without a change in the logits. SAEs trained on TransformerLens' default GPT-2
(such as Joseph Bloom's) expect that stream, whose numbers differ from the plain model's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.errors import ConfigError


def center_writing_weights_(model: Any) -> None:
    """Centres everything that a GPT-2 writes into its residual stream. The logits do not change.

    Args:
        model: a `GPT2LMHeadModel` of transformers, changed in place. Its unembedding gets its own weights: tied to the
            embedding, it would be centred as well.

    Raises:
        ConfigError: another kind of model. RMS norms do not subtract the mean, so centring would change the model.
    """
    if model.config.model_type != "gpt2":
        raise ConfigError(
            f"center_writing_weights is for GPT-2, whose layer norms take the mean away; "
            f"this is {model.config.model_type}"
        )
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
        stream = model.transformer
        written: list[Tensor] = [stream.wte.weight, stream.wpe.weight]
        for block in stream.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                written += [projection.weight, projection.bias]
        for weight in written:  # their last dimension is d_model (Conv1D is [in, out])
            weight.sub_(weight.float().mean(-1, keepdim=True).to(weight.dtype))
