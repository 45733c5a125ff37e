"""Writes the model card, README.md, beside saved weights: what the SAE is, its scores, and how to load it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsae_triton.common.files import write_text
from rsae_triton.common.terminal import printable
from rsae_triton.sae.licences import licence_of, notices

CARD_FILE = "README.md"
_MARK = "<!-- written by rsae_triton.save_pretrained; replaced when the SAE is saved again -->"
_ROWS = {
    "teacher": "teacher",
    "init": "Rational SAE after stage 1",
    "rsae": "Rational SAE",
    "control": "control: teacher, same steps",
}
# Architectures of Rational SAEs and the names of their classes (their modules import this one).
_RATIONAL = {
    "rational": "FusedRationalSAE",
    "rational_topk": "TopKRationalSAE",
    "rational_transcoder": "RationalTranscoder",
    "rational_skip_transcoder": "RationalTranscoder",
}
_COLUMNS = (
    ("mse", "mse", "{:.2f}"),
    ("l0", "l0", "{:.2f}"),
    ("fvu", "FVU", "{:.4f}"),
    ("alive_fraction", "alive", "{:.1%}"),
    ("delta_ce", "Δ CE (nats)", "{:.3f}"),
    ("loss_recovered", "loss recovered", "{:.1%}"),
)


def write_card(folder: Path, text: str) -> None:
    """Writes the card, unless the folder holds a README.md that is not such a card."""
    path = folder / CARD_FILE
    if path.exists() and (not path.is_file() or _MARK not in path.read_text(encoding="utf-8", errors="replace")):
        return
    write_text(path, text)


def model_card(config: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> str:
    """Returns the text of the card.

    Args:
        config: the content of cfg.json. metrics: the content of a run's metrics.json (scores by code, "matched_l0",
            "meta").
    """
    metadata = config.get("metadata") or {}
    loads = _RATIONAL.get(config["architecture"])
    rational = loads is not None
    front: dict[str, Any] = {
        # The hub counts and filters by these tags. SAELens can read the files (a Rational SAE's once our module is
        # imported).
        "library_name": "saelens",
        "tags": ["sparse-autoencoder", "mechanistic-interpretability", "saelens", "rsae-triton"]
        + ["rational-sae"] * rational,
    }
    if (licence := licence_of(metadata)) and re.fullmatch(r"[\w.-]{1,64}", licence):
        front["license"] = licence
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(metadata.get("model_name"))):
        front["base_model"] = metadata["model_name"]
    transcoder = "transcoder" in config["architecture"]
    what = "transcoder" if transcoder else "sparse autoencoder"
    kind = f"Rational {what}" if rational else f"{what.capitalize()} ({config['architecture']})"
    hooks = [_cell(metadata.get(name) or "").replace("`", "") for name in ("hook_name", "hook_name_out")]
    place = f" at `{hooks[0]}`" if hooks[0] else ""
    if transcoder and all(hooks):
        place = f" from `{hooks[0]}` to `{hooks[1]}`"
    model = f" of {_cell(metadata['model_name'])}" if metadata.get("model_name") else ""
    facts = [("d_in, d_sae", f"{config['d_in']}, {config['d_sae']}"), ("dtype", config["dtype"])]
    if transcoder:
        facts[0] = ("d_in, d_sae, d_out", f"{config['d_in']}, {config['d_sae']}, {config['d_out']}")
    if rational:
        p, q = config["degree"]
        facts += [("gate", f"{config['form']}, degree ({p}, {q}), {config['groups']} coefficient set(s)")]
        if "k" in config:
            facts += [("thresholds", f"by token, {config['k']} features each (by a sort)")]
    facts += [("normalisation of activations", config["normalize_activations"])]
    if (metadata.get("stage1") or {}).get("summary"):
        facts += [("stage 1", metadata["stage1"]["summary"])]
    if config.get("rounds", 1) != 1:
        said = (metadata.get("rounds") or {}).get("summary")
        facts += [("rounds of the encoder", said if isinstance(said, str) else str(config["rounds"]))]
    if metadata.get("host_note"):
        facts += [("the model's weights", metadata["host_note"])]
    if metadata.get("loaded_from"):
        facts += [("made from", json.dumps(metadata["loaded_from"]))]
    loader = f"from rsae_triton import {loads or 'load_teacher'}"
    call = f'{loads}.from_pretrained("FOLDER OR HUB ID")' if loads else 'load_teacher("FOLDER OR HUB ID")'
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in front.items()),
        "---",
        _MARK,
        "",
        f"# {kind}{model}{place}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in facts),
        "",
        *_scores(metrics),
        *_licence(metadata),
        "## Loading",
        "",
        "```python",
        loader,
        "",
        f"sae = {call}",
        "feature_acts = sae.encode(x)  # x: [..., d_in], raw activations of the model",
        "y_hat = sae(x)  # the MLP's output, reconstructed" if transcoder else "x_hat = sae(x)",
        "```",
        "",
    ]
    if config["architecture"] == "rational":
        lines += [
            "In SAELens: `import rsae_triton.integrations.saelens`, then `sae_lens.SAE.load_from_disk(folder)`.",
            "Codes carry exact zeros: they are thresholded, and every number above is of the thresholded code.",
            "",
        ]
    return "\n".join(lines)


def _licence(metadata: Mapping[str, Any]) -> list[str]:
    owed = notices(metadata)
    return ["## Licence and attribution", "", *(f"- {_cell(one)}" for one in owed), ""] if owed else []


def _scores(metrics: Mapping[str, Any] | None) -> list[str]:
    if not metrics:
        return ["No scores were given when this SAE was saved.", ""]
    meta = metrics.get("meta") or {}
    lines = ["## Scores on held-out text", ""]
    for title, scores in (("As shipped", metrics), ("At equal l0", metrics.get("matched_l0") or {})):
        rows = [(name, scores[key]) for key, name in _ROWS.items() if isinstance(scores.get(key), Mapping)]
        if not rows:
            continue
        lines += [
            f"| {title} | " + " | ".join(label for _, label, _ in _COLUMNS) + " |",
            "|---" * (len(_COLUMNS) + 1) + "|",
            *(
                f"| {name} | " + " | ".join(_number(row.get(key), form) for key, _, form in _COLUMNS) + " |"
                for name, row in rows
            ),
            "",
        ]
    known = [f"{name} {_cell(meta[name])}" for name in ("model", "hook", "train_tokens", "test_tokens", "seed", "torch")
             if name in meta]  # fmt: skip
    interval = (metrics.get("rsae") or {}).get("delta_ce_low")
    lines += [
        (", ".join(known) + ". " if known else "")
        + "mse is ||x - x_hat||^2 of activations scaled to a mean norm of sqrt(d_in). "
        + (
            f"The Rational SAE's Δ CE as shipped has the 95 % interval {interval:.3f} to "
            f"{metrics['rsae']['delta_ce_high']:.3f}. "
            if isinstance(interval, float) and math.isfinite(interval)
            else ""
        )
        + ("A quick run: its numbers mean little." if meta.get("quick") else ""),
        "",
    ]
    return lines


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) and math.isfinite(value) else "not measured"


def _cell(value: Any) -> str:
    """Escapes a value: text from others must not become markup, a link or a heading."""
    text = " ".join(printable(str(value)).split())
    return re.sub(r"([\\`*\[\]|#!])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
