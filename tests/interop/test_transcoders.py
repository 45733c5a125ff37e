"""Transcoders of SAELens: its four classes read here, ours written for it, and codes of both compared."""

import pytest
import torch

pytest.importorskip("sae_lens")
from sae_lens import SAE

from rsae_triton import upgrade
from rsae_triton.common.errors import ConfigError
from rsae_triton.integrations.saelens import transcoder_to_saelens
from rsae_triton.sae.transcoder import JumpReluTranscoder, ReluTranscoder, TopKTranscoder
from rsae_triton.teachers import load_teacher

D, F, D_OUT = 8, 40, 6
X = torch.randn(200, D, generator=torch.Generator().manual_seed(0))
ARCHITECTURES = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def agree(ours, theirs):
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(X), theirs.encode(X), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_transcoders_are_read_from_disk_and_from_memory(tmp_path, architecture):
    torch.manual_seed(0)
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "d_out": D_OUT, "dtype": "float32", "device": "cpu",
              "apply_b_dec_to_input": False}  # fmt: skip
    theirs = SAE.from_dict(config)
    with torch.no_grad():
        for name, one in theirs.named_parameters():
            one.copy_(torch.rand_like(one) * 0.5 if name == "threshold" else torch.randn_like(one) * 0.4)
    theirs.cfg.metadata.hook_name, theirs.cfg.metadata.hook_name_out = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
    theirs.save_model(tmp_path)
    for ours in (load_teacher(tmp_path), load_teacher(theirs)):
        agree(ours, theirs)
        assert ours.metadata["hook_name_out"] == "blocks.1.hook_mlp_out"
        assert ours.config()["architecture"] == architecture
    rsae = upgrade(theirs, X, targets=theirs(X).detach())
    assert rsae.metadata["stage1"]["relative_error"] < 0.0085


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", [ReluTranscoder, JumpReluTranscoder])
def test_ours_are_read_by_saelens(tmp_path, kind, skip):
    ours = kind(D, F, d_out=D_OUT, skip=skip, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for one in (ours.b_enc, ours.b_dec, *([ours.W_skip] if skip else [])):
            one.normal_(0, 0.3)
    agree(ours, transcoder_to_saelens(ours))
    agree(ours, SAE.load_from_disk(ours.save_pretrained(tmp_path)))
    ours.units, ours.units_out = 1.0, 1.0
    ours.to_units_(2.0, 3.0)
    with torch.no_grad():
        torch.testing.assert_close(transcoder_to_saelens(ours)(X), ours(2.0 * X) / 3.0, rtol=1e-4, atol=1e-5)


def test_a_rational_transcoder_goes_to_saelens_as_a_jumprelu():
    teacher = JumpReluTranscoder(D, F, threshold=0.3, generator=torch.Generator().manual_seed(0))
    rsae = upgrade(teacher, X, targets=teacher(X).detach())
    with pytest.raises(ConfigError, match="to_jumprelu"):
        transcoder_to_saelens(rsae)
    jumprelu, loss = rsae.to_jumprelu(X, targets=teacher(X).detach())
    agree(jumprelu, transcoder_to_saelens(jumprelu))
    assert loss.code_error < 0.01
    with pytest.raises(ConfigError, match="no architecture"):
        transcoder_to_saelens(TopKTranscoder(D, F, k=4))
