"""`rsae features`: writes a page that shows the features of an SAE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from rsae_triton.activations import ActivationStore, load_host
from rsae_triton.commands.evaluate import bar, check_writable
from rsae_triton.common.errors import ConfigError, FormatError
from rsae_triton.common.files import read_json
from rsae_triton.evaluation.held_out import HostOptions, load_sae, open_host
from rsae_triton.features import write_features


@dataclass(frozen=True, kw_only=True)
class Features(HostOptions):
    """Write one HTML page with every feature of a saved SAE: contexts, histogram and gate, logit lens, its teacher's.

    Examples:
        rsae features out/demo/rsae --teacher out/demo/teacher
        rsae features out/rsae --activations STORE --out features.html
    """

    sae: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SAE")]]
    """Folder of the SAE."""
    activations: Path | None = None
    """Folder of an activation store (`rsae extract`); held-out text of the demo when not given."""
    teacher: Path | None = None
    """The SAE it was made from, to show the partner of each feature."""
    labels: Path | None = None
    """A JSON file with names of features: {"303": "numbers"}."""
    most: int = 4096
    """Features on the page; a random choice if the SAE has more."""
    tokens: int = 10_000
    """About how many tokens to read."""
    out: Path | None = None
    """The page; features.html in the SAE's folder when not given."""


def run_features(config: Features) -> Path:
    """Writes the page and returns its path.

    Raises:
        RsaeError: something that the user can fix.
    """
    if config.most < 1 or config.tokens < 2:
        raise ConfigError(f"--most {config.most} --tokens {config.tokens}: give at least 1 and 2")
    out = config.out or config.sae / "features.html"
    check_writable(out)
    labels = None if config.labels is None else _labels(read_json(config.labels), config.labels)
    sae = load_sae(config.sae)
    teacher = None if config.teacher is None else load_sae(config.teacher)
    host: Any = None
    source: Any = None
    if config.activations is not None:
        source = ActivationStore(config.activations)
        if config.model is not None:
            host = load_host(config.model, device=config.device, dtype=config.dtype)
    else:
        source = open_host(config, {str(config.sae): sae})
        sae.metadata["hook_name"] = source.default_hook
    with bar("features", min(sae.d_sae, config.most)) as advance:
        return write_features(
            out, sae, source, teacher=teacher, host=host, labels=labels, most=config.most, n_tokens=config.tokens,
            progress=advance,
        )  # fmt: skip


def _labels(found: Any, path: Path) -> dict[int, str]:
    try:
        return {int(index): str(label) for index, label in found.items()}
    except (AttributeError, ValueError) as error:
        raise FormatError(f'{path} holds no labels; write {{"303": "numbers", ...}}') from error
