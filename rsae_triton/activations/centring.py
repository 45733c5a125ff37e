"""A residual stream of mean zero, as TransformerLens' `center_writing_weights` makes it.

GPT-2 reads its residual stream through layer norms alone, which take the mean away: every weight that writes into
the stream can lose its mean over d_model and the logits stay. SAEs trained on TransformerLens' default GPT-2 (Joseph
Bloom's among them) expect that stream, whose numbers differ from the plain model's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rsae_triton.common.errors import ConfigError


def center_writing_weights_(model: Any) -> None:
    """Centres what every module of a GPT-2 writes into the residual stream; the logits stay the same.

    Args:
        model: a `GPT2LMHeadModel` of transformers, changed in place. Its unembedding gets weights of its own: tied to
            the embedding it would be centred as well.

    Raises:
        ConfigError: another kind of model. RMS norms do not take the mean away, so that centring would change it.
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
        for weight in written:  # the last dimension is d_model in all of them (Conv1D is [in, out])
            weight.sub_(weight.float().mean(-1, keepdim=True).to(weight.dtype))
