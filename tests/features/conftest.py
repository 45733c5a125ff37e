"""A tiny language model with its text, activations, a teacher and a Rational SAE of it."""

import pytest
import tiny_models
import torch

import rsae_triton as rt

HOOK = "blocks.2.hook_resid_pre"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """(host, store, teacher, rsae), all of one place; SAEs read the model's own activations."""
    folder = tmp_path_factory.mktemp("features")
    model = tiny_models.saved(tiny_models.llama(), folder / "model")
    (folder / "text").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RSAE_CACHE", str(folder / "cache"))
        host = rt.load_host(str(model), hook_name=HOOK, library="transformers", dtype="float32")
        documents = rt.load_corpus(str(tiny_models.text(folder / "text")))
        store = rt.extract(host, documents, n_tokens=1500, context=64, split="eval", progress=False)
    metadata = {"model_name": str(model), "hook_name": HOOK}
    teacher = rt.JumpReluSAE(
        store.d_in, 96, threshold=0.5, metadata=metadata, generator=torch.Generator().manual_seed(0)
    )
    rt.train(teacher, store, steps=30, batch_size=256, lr=3e-3, progress=False)
    teacher.to_units_(1.0)
    rsae = rt.upgrade(teacher, store)
    rt.train(rsae, store, steps=5, batch_size=256, progress=False)
    return host, store, teacher, rsae
