"""Checkpoints in dictionary_learning's layout, loaded by its own `load_dictionary` and by us."""

import importlib.util
import json
import sys
import types

import pytest
import torch

from rsae_triton.common.errors import FormatError
from rsae_triton.teachers import JumpReluSAE, ReluSAE, TopKSAE, load_teacher

if importlib.util.find_spec("dictionary_learning") is None:
    pytest.skip("dictionary-learning is not installed: make test-interop", allow_module_level=True)
if importlib.util.find_spec("nnsight") is None:
    # It imports nnsight for collecting activations, which no dictionary needs; nnsight 0.3 needs an old transformers.
    sys.modules["nnsight"] = types.SimpleNamespace(LanguageModel=object)
from dictionary_learning import dictionary as classes
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary

D_IN, D_SAE, K = 12, 40, 5
KINDS = {
    "AutoEncoder": (lambda: classes.AutoEncoder(D_IN, D_SAE), ReluSAE),
    "AutoEncoderNew": (lambda: classes.AutoEncoderNew(D_IN, D_SAE), ReluSAE),
    "GatedAutoEncoder": (lambda: classes.GatedAutoEncoder(D_IN, D_SAE), JumpReluSAE),
    "JumpReluAutoEncoder": (lambda: classes.JumpReluAutoEncoder(D_IN, D_SAE), JumpReluSAE),
    "AutoEncoderTopK": (lambda: AutoEncoderTopK(D_IN, D_SAE, K), TopKSAE),
    "BatchTopKSAE": (lambda: BatchTopKSAE(D_IN, D_SAE, K), JumpReluSAE),
    "MatryoshkaBatchTopKSAE": (lambda: MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [10, 30]), JumpReluSAE),
}


def write(folder, kind, threshold=0.4):
    """What `training.trainSAE` leaves behind: ae.pt and config.json."""
    dictionary = KINDS[kind][0]()
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            parameter.normal_(0, 0.4)
            if name == "threshold":
                parameter.abs_()
        if kind.endswith("TopKSAE"):
            dictionary.threshold.fill_(threshold)
    torch.save(dictionary.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": kind, "k": K, "layer": 8, "lm_name": "EleutherAI/pythia-70m", "submodule_name": None}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    return load_dictionary(str(folder), device="cpu")[0]


def agree(dictionary, teacher, x):
    with torch.no_grad():
        z = dictionary.encode(x)
        assert (z != 0).any()
        assert torch.allclose(teacher.encode(x), z, atol=1e-5)
        assert torch.allclose(teacher.decode(z), dictionary.decode(z), atol=1e-5)
        assert torch.allclose(teacher(x), dictionary(x), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_class(tmp_path, kind):
    dictionary, x = write(tmp_path, kind), torch.randn(64, D_IN) + 0.5
    teacher = load_teacher(tmp_path)
    assert type(teacher) is KINDS[kind][1]
    agree(dictionary, teacher, x)
    agree(dictionary, load_teacher(tmp_path / "ae.pt"), x)
    assert teacher.metadata["hook_name"] == "blocks.8.hook_resid_post"
    assert teacher.metadata["model_name"] == "EleutherAI/pythia-70m"


def test_a_threshold_that_was_never_set_is_a_relu(tmp_path):
    """-1 until `threshold_start_step`: then every positive pre-activation is active."""
    agree(write(tmp_path, "BatchTopKSAE", threshold=-1.0), load_teacher(tmp_path), torch.randn(64, D_IN))


def test_an_unknown_class_is_named(tmp_path):
    write(tmp_path, "AutoEncoder")
    config = json.loads((tmp_path / "config.json").read_text())
    for name, message in (("CrossCoder", "is a crosscoder"), ("NewAutoEncoder", "NewAutoEncoder")):
        config["trainer"]["dict_class"] = name
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(FormatError, match=message):
            load_teacher(tmp_path)
