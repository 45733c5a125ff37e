"""Tiny random SAEs, a store of invented text and its tokenizer, so that a page is made offline in a second."""

from __future__ import annotations

import torch

from rsae_triton.activations import Sequences
from rsae_triton.sae.gate import RationalGate, smooth_step
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.teachers import JumpReluSAE, ReluSAE, TopKSAE
from rsae_triton.training.loop import TrainLog

D_IN, D_SAE, N_SEQUENCES, LENGTH = 16, 32, 12, 20
TEACHERS = {"relu": ReluSAE, "jumprelu": JumpReluSAE, "topk": TopKSAE}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make_saes(kind="relu", form="gated"):
    options = {"k": 6} if kind == "topk" else {}
    teacher = TEACHERS[kind](D_IN, D_SAE, generator=generator(1), **options)
    control = TEACHERS[kind](D_IN, D_SAE, generator=generator(2), **options)
    saes = {"teacher": teacher}
    for role, threshold in (("init", 0.5), ("rsae", torch.linspace(0.3, 1.2, D_SAE))):
        a, b = smooth_step()
        gate = RationalGate(D_SAE, (2, 2), a, b, form="gated", threshold=threshold, backward="rational")
        options = {"gate": gate} if form == "gated" else {"form": "direct"}
        saes[role] = FusedRationalSAE(D_IN, D_SAE, backend="eager", generator=generator(1), **options)
    return {**saes, "control": control}


def make_log(seed):
    steps = list(range(0, 100, 10))
    noise = torch.rand(10, generator=generator(seed)).tolist()
    return TrainLog("hard", 100, 8, 0, steps, noise, noise, noise, [0] * 10)


class FakeStore:
    """What the report reads of an `ActivationStore`."""

    def __init__(self):
        rows = N_SEQUENCES * (LENGTH - 1)
        self.contexts = torch.arange(rows) // (LENGTH - 1)
        self.positions = torch.arange(rows) % (LENGTH - 1) + 1
        tokens = torch.arange(N_SEQUENCES * LENGTH).reshape(N_SEQUENCES, LENGTH)
        # Every context holds the end of one document and the beginning of the next.
        documents = torch.arange(N_SEQUENCES)[:, None].repeat(1, LENGTH)
        documents[:, LENGTH // 2 :] += 1
        self.sequences = Sequences(tokens, documents, torch.ones(N_SEQUENCES, LENGTH - 1, dtype=torch.bool))
        self.document_info = [{"source": "<b>source</b>", "title": f"work {i}"} for i in range(N_SEQUENCES + 1)]

    def __len__(self):
        return len(self.contexts)


class FakeTokenizer:
    """Token i reads as `text` followed by i, e.g. " word7"."""

    def __init__(self, text=" word"):
        self.text = text

    def decode(self, token_ids):
        return "".join(f"{self.text}{i}" for i in token_ids)
