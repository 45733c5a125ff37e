"""`write_report`: everything about a run on one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rsae_triton.activations import ActivationStore, PairedStore
from rsae_triton.common.errors import ConfigError, ShapeError
from rsae_triton.common.files import make_folder, write_atomically
from rsae_triton.report import plots, scores
from rsae_triton.report.codes import Codes, codes_of, mse_against_l0, subset
from rsae_triton.report.labels import answer, labels_figure, survival
from rsae_triton.report.snippets import CONTEXT, N_ROWS, Tokenizer, feature_snippets
from rsae_triton.report.style import ROLES, roles_in
from rsae_triton.report.svg import inline_svg
from rsae_triton.sae.base import SparseAutoencoder

TEMPLATE = "page.html"


@dataclass(frozen=True)
class Plot:
    """A figure as inline SVG, with its heading and a caption that says how to read it."""

    svg: str
    title: str
    caption: str


def write_report(
    path: str | Path,
    *,
    title: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, Any],
    logs: Mapping[str, Any],
    saes: Mapping[str, SparseAutoencoder],
    x: Tensor,
    store: ActivationStore | PairedStore | None = None,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    features_page: str | None = None,
) -> Path:
    """Writes the report of a run and returns its path. An existing file is replaced completely or not at all.

    Args:
        path: of the .html file; its folder is created.
        facts: name -> value, shown as they are (command, model, hook, text, seconds, ...).
        metrics: metrics.json as made by `evaluation.compare`; missing and NaN scores are shown as a dash.
        logs: a `TrainLog` or its `as_dict()` by role; None or absent where nothing was trained.
        saes: "teacher", "init" (after stage 1), "rsae", "control"; init and rsae are `FusedRationalSAE`. The entries of
            `style.MORE` are optional: teacher and RSAE with an untrained round, and the second control.
        x: held-out activations [n_tokens, d_in] in the units of the SAEs (for transcoders: input and target beside each
            other); plots use at most 20 000 rows.
        store, tokenizer: for snippets, the store whose first len(x) rows x is, and the tokenizer of its text; without
            either there are no snippets.
        features_page: file name of the page of all features in the same folder, for a link.
        seed: for the choice of rows in plots and snippets if x has more than they use.

    Raises:
        ConfigError: an SAE is missing or of the wrong kind. ShapeError: x does not fit the SAEs or the store.
        StorageError: the file cannot be written.
    """
    _check(saes, x, store)
    rows = subset(len(x), seed)
    x = x[rows.to(x.device)]
    codes = {role: codes_of(saes[role], x) for role in roles_in(saes)}
    features = None
    if store is not None and tokenizer is not None:
        features = feature_snippets(saes, codes, rows.numpy(), store, tokenizer)
    headline, notes = scores.headline(metrics)
    survived = survival(saes["teacher"], {role: sae for role, sae in saes.items() if role != "teacher"}, codes)
    text = "A feature counts as unchanged if both similarities exceed 0.9 (dotted)."
    page = _template().render(
        title=title,
        facts=facts,
        headline=headline,
        notes=notes,
        columns=scores.COLUMNS,
        tables=_tables(metrics),
        plots=_plots(metrics, _curves(logs), saes, codes, x),
        features=features,
        features_page=features_page,
        labels_answer=answer(survived),
        labels_plot=Plot(inline_svg(labels_figure(survived), "labels", "Do my labels survive?", text), "", text),
        n_tokens=len(x),
        context=CONTEXT,
        n_rows=N_ROWS,
        d_in=saes["rsae"].d_in,
        hook=_place(saes["rsae"]) or facts.get("hook"),
    )
    return _replace(Path(path), page)


def _place(sae: SparseAutoencoder) -> str | None:
    inside, outside = (sae.metadata.get(name) for name in ("hook_name", "hook_name_out"))
    return f"{inside} to {outside}" if inside and outside else inside


def _check(saes: Mapping[str, SparseAutoencoder], x: Tensor, store: ActivationStore | PairedStore | None) -> None:
    from rsae_triton.sae.rational import FusedRationalSAE

    missing = [role for role in ROLES if role not in saes]
    if missing:
        raise ConfigError(f"saes lacks {', '.join(missing)}; a report compares {', '.join(ROLES)}")
    for role in ("init", "rsae"):
        if not isinstance(saes[role], FusedRationalSAE):
            raise ConfigError(f"saes[{role!r}] is a {saes[role].architecture} SAE; give a FusedRationalSAE")
    if len({saes[role].d_sae for role in ROLES}) > 1:
        sizes = ", ".join(f"{role} {saes[role].d_sae}" for role in ROLES)
        raise ShapeError(f"the SAEs differ in d_sae ({sizes}); a report compares SAEs of one size")
    if store is not None and len(x) > len(store):
        raise ShapeError(f"x has {len(x)} rows, the store {len(store)}; give the store that x was read from")


def _curves(logs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The non-empty logs as dictionaries, in the order of ROLES."""
    found = {role: logs[role] for role in ROLES if logs.get(role) is not None}
    dicts = {role: dict(log) if isinstance(log, Mapping) else log.as_dict() for role, log in found.items()}
    return {role: log for role, log in dicts.items() if log.get("step")}


def _tables(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    matched = metrics.get("matched_l0") or {}
    l0 = scores.text(scores.number(matched.get("teacher") or {}, "l0"), ".1f")
    return [
        {
            "title": f"At equal l0 ({l0})",
            "note": "Each code's threshold is raised until it has the teacher's l0: the fair comparison. A code that "
            "is sparser to begin with stays as it is.",
            "rows": scores.rows(matched),
        },
        {
            "title": "As shipped",
            "note": "The codes as they are saved. Where l0 differs, more features buy a lower error.",
            "rows": scores.rows(metrics),
        },
    ]


def _plots(
    metrics: Mapping[str, Any],
    logs: Mapping[str, Mapping[str, Any]],
    saes: Mapping[str, SparseAutoencoder],
    codes: Mapping[str, Codes],
    x: Tensor,
) -> list[Plot]:
    picture = plots.picture_of(saes, codes, x)
    target = plots.matched_l0(metrics, codes)
    curves = {role: mse_against_l0(codes[role], saes[role].sides(x)[1]) for role in roles_in(codes)}
    frequencies = {role: codes[role].firing_frequency() for role in ("teacher", "rsae", "control")}
    gate = (
        "Lines are medians over features, the band holds 80 % of them (thresholds differ per feature). Grey: how many "
        "real pre-activations h of the teacher lie there, on a log scale; thin line: those of the RSAE. Dotted blue: "
        "the rational itself, without the zeros."
    )
    figures = [
        ("gate-zoom", plots.gate_figure(picture, zoom=True), "The learned gate, where it opens", gate),
        ("gate", plots.gate_figure(picture), "The learned gate over all pre-activations", gate),
        (
            "trade-off",
            plots.trade_off_figure(curves, target),
            "Error against sparsity",
            f"Each code with its threshold raised, from its own l0 (dot) down to a quarter; lower is better. On "
            f"{len(x):,} held-out tokens.",
        ),
        (
            "frequency",
            plots.frequency_figure(frequencies, len(x)),
            "How often features fire",
            f"Features by the fraction of {len(x):,} held-out tokens on which they are active; "
            "areas are proportional to numbers of features.",
        ),
    ]
    tuned = {role: log for role, log in logs.items() if role != "teacher"}
    if tuned:
        caption = "Training batches, faint; a running mean over a twentieth of the run, strong. RSAE and control see "
        caption += "the same batches."
        figures.append(("training", plots.training_figure(tuned, target), "Fine-tuning", caption))
    if "teacher" in logs:
        figure = plots.training_figure({"teacher": logs["teacher"]})
        figures.append(
            ("teacher-training", figure, "Training of the teacher", "Training batches, faint; a running mean, strong.")
        )
    return [Plot(inline_svg(figure, name, title, text), title, text) for name, figure, title, text in figures]


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rsae_triton.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE)


def _replace(path: Path, page: str) -> Path:
    make_folder(path.parent)
    # Some tokenizers return lone surrogates, which no UTF-8 file can hold.
    write_atomically(path, lambda temporary: temporary.write_bytes(page.encode("utf-8", errors="replace")))
    return path
