"""to_jumprelu: the nearest JumpReLU SAE, and an honest count of what it loses."""

import pytest
import torch
from rational_cases import D_IN, D_SAE, FORMS, rsae

from rsae_triton import FusedRationalSAE, RationalGate, upgrade
from rsae_triton.common.errors import NumericsError, ShapeError
from rsae_triton.sae.gate import smooth_step
from rsae_triton.teachers import JumpReluSAE, load_teacher


@pytest.fixture
def x():
    return torch.randn(4000, D_IN, generator=torch.Generator().manual_seed(3)) + 0.2


@torch.no_grad()
@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
@pytest.mark.parametrize("form", FORMS)
def test_the_reported_export_loss_equals_a_direct_measurement(form, normalize_activations, x, tmp_path):
    sae = rsae(form, normalize_activations=normalize_activations)
    dense, loss = sae.to_jumprelu(x)
    assert isinstance(dense, JumpReluSAE)
    held = x[1::2]
    z, dense_z = sae.encode(held), dense.encode(held)
    assert loss.n_tokens == len(held)
    assert loss.code_error == pytest.approx(float((dense_z - z).norm() / z.norm()), rel=1e-4)
    assert loss.l0_jumprelu == pytest.approx(float((dense_z != 0).float().sum(1).mean()), rel=1e-5)
    assert loss.mse_jumprelu == pytest.approx(float((held - dense(held)).square().sum(1).mean()), rel=1e-4)
    assert loss.mse == pytest.approx(float((held - sae(held)).square().sum(1).mean()), rel=1e-4)
    # What an encoder found out in three rounds no function of its first pre-activations says.
    assert loss.code_error < (0.7 if "rounds" in form else 0.2)
    assert dense.metadata["exported_from"]["code_error"] == loss.code_error
    dense.save_pretrained(tmp_path)
    again = load_teacher(tmp_path)
    assert torch.equal(again.encode(held), dense_z)
    assert "%" in loss.summary


@torch.no_grad()
def test_to_jumprelu_is_nearer_than_copying_the_thresholds(x):
    """The obvious export keeps weights and thresholds; it forgets what the gate does just above them."""
    gate = RationalGate(D_SAE, (2, 2), *smooth_step(), form="gated", input_scale=1.0, threshold=0.3)
    sae = FusedRationalSAE(D_IN, D_SAE, gate=gate)
    _, loss = sae.to_jumprelu(x)
    naive = JumpReluSAE(D_IN, D_SAE)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(naive, name).copy_(getattr(sae, name))
    naive.threshold.copy_(sae.gate.threshold)
    held = x[1::2]
    z = sae.encode(held)
    assert loss.code_error < 0.8 * float((naive.encode(held) - z).norm() / z.norm())


@torch.no_grad()
def test_a_jumprelu_in_disguise_loses_nothing(x):
    """amplitude="identity" makes the code h where h > theta."""
    sae = FusedRationalSAE(D_IN, D_SAE, form="gated", amplitude="identity", backward="rational")
    sae.gate.threshold.fill_(0.7)
    dense, loss = sae.to_jumprelu(x)
    assert loss.code_error < 1e-6
    assert torch.allclose(dense.threshold, sae.gate.threshold)
    assert torch.allclose(dense.W_enc, sae.W_enc, atol=1e-3)
    assert loss.mse_jumprelu == pytest.approx(loss.mse, rel=1e-2)


@torch.no_grad()
def test_an_upgraded_teacher_comes_back_as_itself(x):
    teacher = JumpReluSAE(D_IN, D_SAE, generator=torch.Generator().manual_seed(0))
    teacher.threshold.fill_(0.5)
    _, loss = upgrade(teacher, x, rounds=1).to_jumprelu(x)
    assert loss.code_error < 0.02
    held = x[1::2]
    assert loss.mse_jumprelu == pytest.approx(float((held - teacher(held)).square().sum(1).mean()), rel=0.02)


@torch.no_grad()
def test_silent_features_stay_silent(x):
    sae = rsae("gated")
    sae.gate.threshold[:7] = 1e4
    dense, _ = sae.to_jumprelu(x)
    assert not dense.encode(x)[:, :7].any()


def test_bad_activations(x):
    with pytest.raises(ShapeError, match="d_in=16"):
        rsae().to_jumprelu(x[:, :3])
    with pytest.raises(ShapeError):
        rsae().to_jumprelu(x[:1])
    x[5, 5] = torch.nan
    with pytest.raises(NumericsError, match="NaN"):
        rsae().to_jumprelu(x)
