"""Which dimensions of the activations make a language model's loss worse when a round is added.

    python benchmarks/dimensions.py --host gemma3-270m --teacher relu

In some dimensions the error of an encoder with a round is larger than the teacher's. Their values in the
reconstruction are exchanged between the two, and all of these reconstructions are spliced into the model. The
dimensions are chosen on validation text, the losses are those of test text. Beside it stands how much the model
listens to each dimension (`rsae_triton.dimension_weights`).
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from rsae_triton.activations import load_corpus, load_host
from rsae_triton.common.files import write_text
from rsae_triton.evaluation.downstream import splice_of, splice_sequences
from rsae_triton.evaluation.listening import dimension_weights
from rsae_triton.evaluation.paired import mean_interval
from rsae_triton.evaluation.reconstruction import reconstruct
from rsae_triton.experiments.reproduce import Reproduce, sweeps_of
from rsae_triton.experiments.teach import make_teacher, splits_for
from rsae_triton.sae.base import SparseAutoencoder


@dataclass(frozen=True)
class Options:
    host: str = "gemma3-270m"
    """A section of hosts.toml; the teacher and the place are those of its first sweep, seed 0."""
    teacher: str = "relu"
    sequences: int = 16
    out: Path | None = None
    """benchmarks/results/dimensions-HOST-TEACHER.json when not given."""


class Exchanged:
    """The reconstruction of `one`, with the values of `other` in the dimensions of `where` [d_in], bool."""

    def __init__(self, one: SparseAutoencoder, other: SparseAutoencoder, where: Tensor) -> None:
        self.one, self.other, self.where = one, other, where

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        return self.one.W_dec

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, feature_acts: Tensor, x: Tensor | None = None) -> Tensor:
        x = feature_acts
        return torch.where(self.where, reconstruct(self.other, x), reconstruct(self.one, x))


@torch.no_grad()
def measured(options: Options) -> dict[str, Any]:
    sweep = sweeps_of(Reproduce(host=options.host))[0][0]
    cell = next(one for one in sweep.cells() if one.teacher == options.teacher)
    plan = cell.plan()
    assert plan is not None
    host = load_host(sweep.model, hook_name=cell.hook)
    splits = splits_for(host, load_corpus(list(sweep.text)), sweep.tokens)
    teacher, _ = make_teacher(plan, splits, splits.train.tensor(), label=cell.label)
    x = splits.validation.tensor()
    weights = dimension_weights(host, splits.validation)
    plain, weighed = (teacher.with_rounds(2, x, weights=one) for one in (None, weights))
    variance = x.double().var(0)
    share = {
        name: (x - reconstruct(sae, x)).double().square().mean(0) / variance
        for name, sae in (("teacher", teacher), ("plain", plain), ("weighed", weighed))
    }
    worse = share["plain"] > share["teacher"]
    codecs: dict[str, Any] = {
        "teacher": teacher,
        "a round": plain,
        "a round, the teacher's values where that is better": Exchanged(plain, teacher, worse),
        "the teacher, the round's values where that is worse": Exchanged(teacher, plain, worse),
        "a weighed round": weighed,
    }
    held = splits.test.sequences
    spliced = splice_sequences(
        host, codecs, held.tokens[: options.sequences], splice_of(splits.train), splits.train.mean,
        counted=held.counted[: options.sequences],
    )  # fmt: skip
    own, clean, largest = spliced["sae:teacher"].ce, spliced["clean"].ce, int(variance.argmax())
    return {
        "command": f"python benchmarks/dimensions.py --host {options.host} --teacher {options.teacher}",
        "machine": f"{platform.machine()}, {host.device}",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "d_in": len(variance),
        "sequences": options.sequences,
        "largest": {
            "variance": float(variance[largest] / variance.sum()),
            "weight": float(weights[largest] / weights.median()),
            "deviation": float((variance[largest] / variance.median()).sqrt()),
        },
        "correlation": float(torch.corrcoef(torch.stack([weights.double().log(), variance.log() / 2]))[0, 1]),
        "worse": int(worse.sum()),
        "above_variance": {name: int((one > 1).sum()) for name, one in share.items()},
        "share": {name: float(one.mean()) for name, one in share.items()},
        "delta_ce": {name: [*mean_interval(spliced[f"sae:{name}"].ce - clean)] for name in codecs},
        "to_teacher": {name: [*mean_interval(spliced[f"sae:{name}"].ce - own)] for name in codecs if name != "teacher"},
    }


def main(options: Options) -> None:
    out = options.out or Path(f"benchmarks/results/dimensions-{options.host}-{options.teacher}.json")
    found = measured(options)
    write_text(out, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
