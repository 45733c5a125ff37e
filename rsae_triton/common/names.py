"""Names of models: converts TransformerLens' short names and other spellings to ids of the Hugging Face hub."""

from __future__ import annotations

import re
from importlib.util import find_spec

EMBEDDED = "smollm2"
EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_NOTE = "a 4-bit GGUF of SmolLM2-135M-Instruct, dequantised: close to the hub's weights, not equal to them"

# Short name -> hub id: an exact name, or a pattern and its replacement.
_EXACT = {
    "gpt2-small": "gpt2",
    "distillgpt2": "distilgpt2",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "gpt-oss-20b": "openai/gpt-oss-20b",
}
_PATTERNS = (
    (r"(pythia-[\d.]+[mb](?:-deduped)?(?:-v0)?)", r"EleutherAI/\1"),
    (r"(gemma-[\w.-]+)", r"google/\1"),
    (r"qwen(\d(?:\.\d)?)-([\d.]+)b((?:-a\d+b)?)((?:-base|-instruct)?)", None),
    (r"llama-(3(?:\.\d)?-\d+b(?:-instruct)?)", None),
)
_CACHED = re.compile(r"models--([^/\\]+?)(?:--([^/\\]+))?[/\\]snapshots[/\\][^/\\]+")


def hub_model(name: str) -> str:
    """Returns the hub's id of a model with another known name; otherwise `name` itself.

    "gpt2-small" and "pythia-70m-deduped" are TransformerLens' names; "gemma-v3-270m-pt" is used in Gemma Scope 2's
    files. A path into the hub's cache becomes the id that was fetched.
    """
    if cached := _CACHED.search(name):
        return "/".join(part for part in cached.groups() if part)
    owner, _, short = name.rpartition("/")
    if re.match(r"gemma-(v3-|3-270m-pt)", short) and owner in ("", "google"):
        short = short.replace("gemma-v3-", "gemma-3-")
        # on the hub, the 270m model has no -pt
        return f"google/{short.replace('-pt', '') if '270m' in short else short}"
    if owner:
        return name
    if name in _EXACT:
        return _EXACT[name]
    for pattern, written in _PATTERNS:
        if (found := re.fullmatch(pattern, name, re.IGNORECASE)) and written is not None:
            return found.expand(written)
        if found and name.lower().startswith("qwen"):
            version, size, active, kind = found.groups()
            return f"Qwen/Qwen{version}-{size}B{active.upper()}{kind.title()}"
        if found:
            return f"meta-llama/Llama-{found[1].replace('b', 'B').replace('instruct', 'Instruct')}"
    return _by_transformer_lens(name)


def model_metadata(name: str) -> dict[str, str]:
    """What an SAE records about the model it was trained on: the hub id that other libraries ask for, and for the
    embedded model what it really is."""
    if name == EMBEDDED:
        return {"model_name": EMBEDDED_ID, "host": EMBEDDED, "host_note": EMBEDDED_NOTE}
    return {"model_name": hub_model(name)}


def _by_transformer_lens(name: str) -> str:
    """Looks a name up in TransformerLens' own table, if that is installed."""
    if find_spec("transformer_lens") is None:
        return name
    try:
        from transformer_lens.supported_models import MODEL_ALIASES
    except Exception:  # of another version, or failing to import: this is only a look-up
        return name
    return next((str(hub) for hub, aliases in MODEL_ALIASES.items() if name in aliases), name)
