"""Checkpoints that EleutherAI's sparsify wrote itself, against its own encode, decode and forward."""

import json
import os

import pytest
import torch

from rsae_triton.common.errors import FormatError
from rsae_triton.sae.transcoder import TopKTranscoder
from rsae_triton.teachers import TopKSAE, load_teacher

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its decoder's kernel needs a GPU
sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is not installed: make test-interop")

D_IN, K = 12, 5


def write(folder, **options):
    config = sparsify.SparseCoderConfig(k=K, **{"expansion_factor": 4, **options})
    sae = sparsify.SparseCoder(D_IN, config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(0, 0.4)
    sae.save_to_disk(folder)
    return sparsify.SparseCoder.load_from_disk(folder)


def dense(encoded, d_sae):
    return torch.zeros(len(encoded.top_acts), d_sae).scatter(1, encoded.top_indices, encoded.top_acts)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_latents": 30},
        {"normalize_decoder": False},  # SAELens subtracts b_dec only then; sparsify always does
        {"transcode": True},
        {"transcode": True, "skip_connection": True},
    ],
)
def test_encode_decode_and_forward(tmp_path, options):
    folder = tmp_path / "layers.7.mlp"
    sae, x = write(folder, **options), torch.randn(64, D_IN) + 0.5
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    teacher = load_teacher(folder)
    assert isinstance(teacher, TopKSAE)
    assert teacher.d_sae == options.get("num_latents", 48)
    with torch.no_grad():
        encoded = sae.encode(x)
        z = dense(encoded, teacher.d_sae)
        assert torch.allclose(teacher.encode(x), z, atol=1e-5)
        if not options.get("skip_connection"):
            assert torch.allclose(teacher.decode(z), sae.decode(encoded.top_acts, encoded.top_indices), atol=1e-5)
        assert torch.allclose(teacher(x), sae(x).sae_out, atol=1e-5)
    assert teacher.metadata["model_name"] == "EleutherAI/pythia-70m"
    transcodes = options.get("transcode", False)
    assert isinstance(teacher, TopKTranscoder) == transcodes
    assert teacher.metadata["hook_name"] == ("blocks.7.mlp.hook_in" if transcodes else "blocks.7.hook_mlp_out")
    assert teacher.metadata.get("hook_name_out") == ("blocks.7.mlp.hook_out" if transcodes else None)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"activation": "groupmax"}, "groupmax"), ({"skip_connection": True}, "skip connection")],
)
def test_sparsify_files_other_than_topk_saes_are_refused(tmp_path, options, message):
    write(tmp_path / "layers.0", **options)
    with pytest.raises(FormatError, match=message):
        load_teacher(tmp_path / "layers.0")


def test_saelens_reads_this_format_wrongly(tmp_path):
    """Why this format needs its own test; when it fails, SAELens has mended its loader: change docs/formats.md."""
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    write(tmp_path / "layers.7", normalize_decoder=True)
    config, state = loaders.sparsify_disk_loader(tmp_path / "layers.7")
    teacher = load_teacher(tmp_path / "layers.7")
    assert state["W_dec"].shape == (D_IN, 48)
    assert tuple(teacher.W_dec.shape) == (48, D_IN)
    assert config["apply_b_dec_to_input"] is False
    assert teacher.apply_b_dec_to_input is True
