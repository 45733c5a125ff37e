"""The optimiser's loops over rows against PyTorch's own Adam: every number of a step, and whole runs."""

import pytest
import torch

from rsae_triton.ops import native, row_loops
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.training import optimizer as optimizers
from rsae_triton.training.loop import train
from rsae_triton.training.optimizer import make_optimizer, remove_radial_gradient, set_learning_rate, take_step
from rsae_triton.training.recipes import RECIPES
from rsae_triton.training.settings import TrainSettings

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def small(monkeypatch, engine):
    monkeypatch.setattr(optimizers, "_LEAST", 1)
    monkeypatch.setenv("RSAE_CPU_ENGINE", engine)
    return FusedRationalSAE(24, 700, form="gated", backward="rational", generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize("clip", [1e-3, 1e3])
@pytest.mark.parametrize("kept", [True, False])
def test_row_steps_equal_torchs_optimizer(kind, clip, kept, threads, monkeypatch):
    found = []
    for engine in ("tiled", ""):
        sae = small(monkeypatch, engine)
        settings = TrainSettings(steps=10, optimizer=kind, weight_decay=0.1)
        optimizer = make_optimizer(sae, RECIPES["hard"], settings)
        norms = sae.W_dec.detach().norm(dim=1, keepdim=True) * 1.5 if kept else None
        generator = torch.Generator().manual_seed(1)
        for step in range(4):
            for one in sae.parameters():
                one.grad = torch.empty_like(one).copy_(torch.randn(one.shape, generator=generator))
            before = sae.W_dec.grad.clone()
            remove_radial_gradient(sae.W_dec)
            along = (sae.W_dec.grad * sae.W_dec.detach()).sum(1).abs()
            assert float(along.max()) < 1e-5 * float((before * sae.W_dec.detach()).sum(1).abs().max())
            norm = torch.nn.utils.get_total_norm([one.grad for one in sae.parameters()])
            set_learning_rate(optimizer, 1 + step)
            take_step(sae, optimizer, norm, clip, norms)
        found.append([*sae.parameters(), *(one for p in sae.parameters() for one in optimizer.state[p].values())])
    for theirs, ours in zip(*found, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


def test_a_run_is_that_of_torchs_adam_and_goes_on_from_its_state(activations, monkeypatch, tmp_path):
    def run(engines):
        sae = FusedRationalSAE(16, 300, form="gated", backward="rational", generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(optimizers, "_LEAST", 1)
        options = {"steps": 40, "batch_size": 128, "recipe": "hard", "progress": False, "checkpoint_every": 20}
        out = tmp_path / "-".join(one or "compiled" for one in engines)
        for engine in engines:
            monkeypatch.setenv("RSAE_CPU_ENGINE", engine)
            if engine is not engines[0]:
                last = out / "checkpoints" / "step-00000040"
                for file in sorted(last.rglob("*"), reverse=True):
                    file.unlink() if file.is_file() else file.rmdir()
                last.rmdir()
                sae = FusedRationalSAE(
                    16, 300, form="gated", backward="rational", generator=torch.Generator().manual_seed(0)
                )
            log = train(sae, activations, out=out, resume=engine is not engines[0], **options)
        return log, sae

    (first, one), (second, other), (third, _) = run(["tiled"]), run([""]), run(["", "tiled"])
    assert second.mse == pytest.approx(first.mse, rel=1e-3)
    assert third.mse == pytest.approx(first.mse, rel=1e-3)
    torch.testing.assert_close(other.W_dec.norm(dim=1), one.W_dec.norm(dim=1), rtol=1e-5, atol=0)


def test_rows_of_zeros_and_odd_widths():
    for d in (1, 7, 64, 130):
        weight, gradient = torch.randn(5, d), torch.randn(5, d)
        weight[2] = 0
        squares = row_loops.remove_radial_(own := gradient.clone(), weight)
        along = (gradient * weight).sum(1, keepdim=True) / weight.square().sum(1, keepdim=True).clamp_min(1e-12)
        expected = gradient - along * weight
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(squares, expected.square().sum(1), rtol=1e-4, atol=1e-5)
        first, second = torch.zeros(5, d), torch.zeros(5, d)
        row_loops.adam_(
            weight, torch.zeros(5, d), first, second, torch.ones(5), step=1, lr=0.1, betas=(0.9, 0.999), eps=1e-8
        )
        assert bool(weight.isfinite().all())
        assert float(weight[2].norm()) == 0
        assert weight[0].norm() == pytest.approx(1.0, rel=1e-5)
