"""`rsae match`: which features of an SAE have kept their meaning in its teacher, and which have changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rsae_triton.commands.evaluate import bar, check_writable, provenance, write_json
from rsae_triton.common.errors import ConfigError
from rsae_triton.common.terminal import plain
from rsae_triton.evaluation.held_out import TextOptions, check_text, load_saes, open_held_out, open_host
from rsae_triton.evaluation.matching import match_features, passes


@dataclass(frozen=True, kw_only=True)
class Match(TextOptions):
    """Match the features of an SAE with its teacher's: by decoder direction, and by when they are active.

    Examples:
        rsae match out/demo/teacher out/demo/rsae
        rsae match out/demo/teacher out/demo/control --tokens 50000 --changed 100 --out match.json
    """

    teacher: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="TEACHER")]]
    """Folder of the SAE whose features are the reference."""
    sae: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SAE")]]
    """Folder of the SAE whose features are matched with the teacher's."""
    changed: int = 20
    """How many of the most changed features to list."""
    out: Path | None = None
    """Write everything here as JSON, with every feature's partner."""


def run_match(options: Match) -> dict[str, Any]:
    """Matches the two SAEs, prints the tables and returns what is written to `--out`.

    Raises:
        RsaeError: something that the user can fix.
    """
    if options.changed < 0:
        raise ConfigError(f"--changed is {options.changed}; give 0 or a positive number")
    if options.tokens < 2:
        raise ConfigError(f"--tokens is {options.tokens}; a correlation takes at least 2, better 10000")
    check_text(options)
    check_writable(options.out)
    saes = load_saes([options.teacher, options.sae])
    host = open_host(options, saes)
    data = open_held_out(options, saes, host)
    teacher, sae = saes.values()
    with bar("matching", passes(teacher, sae) * len(data.x)) as advance:
        found = match_features(teacher, sae, data.x, progress=advance)
    columns = ("partner", "cosine", "correlation", "best_correlated", "best_correlation", "frequency",
               "partner_frequency", "overlap")  # fmt: skip
    rows = {name: _numbers(getattr(found, name)) for name in columns}
    result: dict[str, Any] = {
        "summary": found.summary(),
        "most_changed": [
            {"feature": f, **{name: rows[name][f] for name in columns}} for f in found.most_changed(options.changed)
        ],
        "features": rows,
        "meta": {
            **provenance(host),
            "teacher": str(options.teacher),
            "sae": str(options.sae),
            "text": ", ".join(options.text),
            "corpus_sha256": data.store.manifest["corpus_sha256"],
            "n_tokens": data.store.n_tokens,
            "seed": data.store.manifest["seed"],
        },
    }
    write_json(options.out, result)
    show(result)
    return result


def _numbers(values: Tensor) -> list[float | int | None]:
    """Converts values for JSON, which does not have NaN."""
    return [None if value != value else value for value in values.tolist()]


def show(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the tables of a result of `run_match`."""
    console = console or Console()
    summary, meta = result["summary"], result["meta"]
    n = summary["n_features"]
    title = plain(f"{meta['sae']} against {meta['teacher']}: {meta['n_tokens']} tokens")
    table = Table(title=title, title_justify="left")
    table.add_column("features")
    table.add_column("", justify="right")
    measured = n - summary["never_active"]
    for label, count, of in (
        ("kept their meaning (cosine and correlation > 0.9)", summary["kept_meaning"], measured),
        ("cosine of decoder rows > 0.9", summary["cosine_above_0.9"], n),
        ("correlation of activations > 0.9", summary["correlation_above_0.9"], measured),
        ("partner has the same index", summary["same_index"], n),
        ("partner is mutual", summary["mutual"], n),
        ("partner is also the best correlated", summary["partner_is_best_correlated"], n),
        ("no correlation: never active in one of the two", summary["never_active"], n),
    ):
        table.add_row(label, f"{count} of {of} ({count / max(of, 1):.2%})")
    console.print(table)
    table = Table(title="Over all features")
    names = ("p5", "p25", "p50", "p75", "p95")
    for label in ("", *names):
        table.add_column(label, justify="right")
    for key in ("cosine", "correlation", "best_correlation", "overlap"):
        table.add_row(key.replace("_", " "), *(f"{summary[key].get(name, float('nan')):.3f}" for name in names))
    console.print(table)
    if result["most_changed"]:
        table = Table(title="Most changed", title_justify="left")
        for label in ("feature", "partner", "cosine", "corr.", "best corr.", "active", "partner's"):
            table.add_column(label, justify="right", no_wrap=True)
        for row in result["most_changed"]:
            table.add_row(
                str(row["feature"]),
                str(row["partner"]),
                f"{row['cosine']:.3f}",
                f"{row['correlation']:.3f}",
                f"{row['best_correlated']} ({row['best_correlation']:.3f})",
                f"{row['frequency']:.2%}",
                f"{row['partner_frequency']:.2%}",
            )
        console.print(table)
