"""Translates the names that libraries have for places in a language model to TransformerLens' names.

    blocks.5.hook_resid_pre    blocks.5.hook_in, model.layers.5.input
    blocks.5.hook_resid_post   blocks.5.hook_out, blocks.6.hook_in, model.layers.5, layers.5 (sparsify), layer 5
    blocks.5.mlp.hook_in       model.layers.5.mlp.input
    blocks.5.mlp.hook_out      model.layers.5.mlp, layers.5.mlp, and blocks.5.hook_mlp_out where nothing follows the MLP

"layer 5" is the output of layer 5, as in the names of Gemma Scope, Llama Scope and Neuronpedia.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_LAYERS = (
    r"(?:model\.language_model\.layers|language_model\.layers|model\.decoder\.layers|model\.layers|transformer\.h|"
)
_LAYERS += r"gpt_neox\.layers|layers|h)"
_SIDES = {"input": "in", "output": "out", None: "out"}
_RESIDUAL = {"in": "pre", "out": "post"}


def canonical(name: str) -> str:
    """Returns TransformerLens' name for a place with another known name; otherwise `name` itself."""
    name = name.strip()
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_(in|out)", name):
        return f"blocks.{found[1]}.hook_resid_{_RESIDUAL[found[2]]}"
    if found := re.fullmatch(rf"{_LAYERS}\.(\d+)(\.mlp)?(?:\.(input|output))?", name):
        side = _SIDES[found[3]]
        return f"blocks.{found[1]}.mlp.hook_{side}" if found[2] else f"blocks.{found[1]}.hook_resid_{_RESIDUAL[side]}"
    if found := re.fullmatch(r"blocks\.(\d+)(\.mlp)?", name):
        return f"blocks.{found[1]}.mlp.hook_out" if found[2] else f"blocks.{found[1]}.hook_resid_post"
    if found := re.fullmatch(r"layer[ _.-]?(\d+)", name, re.IGNORECASE):
        return f"blocks.{int(found[1])}.hook_resid_post"
    return name


def same_place(one: str, other: str) -> bool:
    """Whether two names are of the same place; also hook_resid_post of a layer and hook_resid_pre of the next."""

    def place(name: str) -> str:
        found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", canonical(name))
        return f"blocks.{int(found[1]) + 1}.hook_resid_pre" if found else canonical(name)

    return place(one) == place(other)


def suggestion(name: str, names: Sequence[str], fallback: str) -> str:
    """A hint for an unknown name: names that look like it, else one that is known to exist."""
    near = difflib.get_close_matches(canonical(name), names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"try {fallback}"


def other_names(name: str) -> list[str]:
    """All names of the place called `name`, TransformerLens' own first."""
    own = canonical(name)
    names = [own]
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", own):
        layer, side = int(found[1]), {"pre": "in", "post": "out"}[found[2]]
        names.append(f"blocks.{layer}.hook_{side}")
        if side == "in" and layer:
            names += [f"blocks.{layer - 1}.hook_resid_post", f"blocks.{layer - 1}.hook_out"]
    return names
