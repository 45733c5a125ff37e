"""The whole GPU path without a GPU (pretend_cuda.py): nothing is left on the CPU, nothing waits where it must not."""

import copy
import math

import pytest
import torch
from pretend_cuda import pretend

import rsae_triton as rt
from rsae_triton import FusedRationalSAE
from rsae_triton.commands import routes as measure_routes
from rsae_triton.evaluation.reconstruction import at_l0, measure
from rsae_triton.ops import screening
from rsae_triton.ops.workspace import StepMemory
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE

GPU = "cuda:1"
TEACHERS = {"relu": (ReluSAE, {}), "jumprelu": (JumpReluSAE, {"threshold": 0.3}), "topk": (TopKSAE, {"k": 6}),
            "batchtopk": (BatchTopKSAE, {"k": 6})}  # fmt: skip
QUIET = {"steps": 2, "batch_size": 32, "progress": False}


@pytest.fixture
def cuda():
    with pretend() as mode:
        yield mode


def teacher(name):
    kind, options = TEACHERS[name]
    return kind(16, 24, generator=torch.Generator().manual_seed(0), **options)


def rational(**options):
    return FusedRationalSAE(16, 24, generator=torch.Generator().manual_seed(0), form="gated", **options)


def on_gpu(sae):
    return all(one.is_cuda for one in (*sae.parameters(), *sae.buffers()))


@pytest.mark.parametrize("backend", ["triton:split", "triton:fused"])
@pytest.mark.parametrize("chunks", [None, {"chunk_tokens": 16}, {"chunk_features": 16}])
def test_a_step_computes_what_the_cpu_does_and_never_waits(chunks, backend, activations):
    def step(sae, x):
        sae.backend = backend if x.is_cuda else "eager"
        if chunks is None:
            z, counts, l1 = sae.encode_with_sums(x)
            loss = (x - sae.decode(z)).square().sum() / len(x) + 0.1 * l1.sum() / len(x) + 0.1 * counts.sum() / len(x)
        else:
            loss = sae.autoencode(x, l1_weight=0.1, l0_weight=0.1, **chunks).total
        loss.backward()
        return loss

    x, here = activations[:32], rational()
    expected = step(here, x)
    with pretend() as cuda:
        there = rational().to(GPU)
        loss = step(there, x.to(GPU))
        assert cuda.waits == []
        assert ("encode_backward_kernel" in cuda.launches) == (backend == "triton:fused" and chunks is not None)
        torch.testing.assert_close(loss.cpu(), expected)
        for (name, one), other in zip(there.named_parameters(), here.parameters(), strict=True):
            if other.grad is not None and other.grad.numel():
                torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_sparse_step_computes_what_the_cpu_does_and_never_waits(activations):
    def step(sae, x, memory):
        for name in ("alpha", "beta", "centre", "log_input_scale"):
            getattr(sae.gate, name).requires_grad_(False)
        found = sae.autoencode(x, l1_weight=0.1, l0_weight=0.1, memory=memory, most_entries=32 * 24)
        found.total.backward()
        return found

    x, here = activations[:32], rational()
    expected = step(here, x, "dense")
    with pretend() as cuda:
        there = rational().to(GPU)
        found = step(there, x.to(GPU), "sparse")
        assert cuda.waits == []
        assert {"support_mark_kernel", "feature_sums_kernel"} <= set(cuda.launches)
        assert 0 < int(found.entries) < 32 * 24
        torch.testing.assert_close(found.total.cpu(), expected.total)
        for (name, one), other in zip(there.named_parameters(), here.parameters(), strict=True):
            if other.grad is not None:
                torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [{}, {"form": "direct"}, {"coefficients": 4}, {"thresholds": "token"}], ids=str)
@pytest.mark.parametrize("name", TEACHERS)
def test_an_upgrade_stays_on_the_gpu(name, options, activations, cuda):
    if "thresholds" in options and name != "topk":
        pytest.skip("for TopK teachers")
    rsae = rt.upgrade(teacher(name).to(GPU), activations[:128].to(GPU), tolerance=9.0, **options)
    assert on_gpu(rsae)
    assert rsae.encode(activations[:16].to(GPU)).is_cuda


@pytest.mark.parametrize("name", ["relu", "topk", "batchtopk", "saved", "chunked", "streamed", "auto", "sparse"])
def test_a_training_step_waits_once(name, activations, cuda):
    """For the numbers that say whether it is finite; TopK's also for whether a feature is dead, once one may be."""
    sae = (teacher(name) if name in TEACHERS else rational()).to(GPU)
    options = {**QUIET, "memory": "auto" if name in TEACHERS else name, "log_every": 100}
    waits = []
    for steps in (2, 3):
        cuda.waits.clear()
        trained = copy.deepcopy(sae)
        rt.train(trained, activations[:64].to(GPU), **{**options, "steps": steps})
        waits.append(len(cuda.waits))
    assert waits[1] - waits[0] == 1
    assert on_gpu(trained)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_screened_training_step_waits_once_too(precision, activations, cuda, monkeypatch):
    """Also where its check is due."""
    monkeypatch.setattr("rsae_triton.training.run.screen_of", lambda *_: screening.Screen(screening.FLOAT8))
    monkeypatch.setattr("rsae_triton.training.memory.capacity_for", lambda places: places)
    monkeypatch.setattr(screening, "EVERY", 1)
    on_cpu = lambda w, x: (w.rows.float() * w.scales[:, None]) @ (x.rows.float() * x.scales[:, None]).t()  # noqa: E731
    monkeypatch.setattr(screening, "multiply", lambda w, x: on_cpu(w, x).bfloat16())
    waits = []
    for steps in (2, 3):
        cuda.waits.clear(), cuda.launches.clear()
        sae = rational().to(GPU)
        rt.train(sae, activations[:64].to(GPU), **{**QUIET, "steps": steps}, memory="sparse", precision=precision)
        waits.append(len(cuda.waits))
        assert cuda.launches.count("narrow_rows_kernel") == 2 * steps
    assert waits[1] - waits[0] == 1
    assert on_gpu(sae)


@pytest.mark.parametrize("options", [{}, {"dead_after": 32}, {"recipe": "jumprelu-tanh"}], ids=str)
@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_train_sparsely_as_they_do_densely(name, options, activations):
    """By the kernels, waiting once a step, and once more where a feature may be dead."""
    if ("recipe" in options and name != "jumprelu") or ("dead_after" in options and not name.endswith("topk")):
        pytest.skip("not for this family")

    def trained(device, memory, steps):
        sae = teacher(name).to(device)
        log = rt.train(sae, activations[:64].to(device), **{**QUIET, "steps": steps}, memory=memory, lr=0.01,
                       log_every=100, **options)  # fmt: skip
        return sae, log

    here, log = trained("cpu", "saved", 4)
    waits = []
    with pretend() as cuda:
        for steps in (3, 4):
            cuda.waits.clear(), cuda.launches.clear()
            there, found = trained(GPU, "sparse", steps)
            waits.append(len(cuda.waits))
        assert waits[1] - waits[0] == 1 + ("dead_after" in options)
        assert cuda.launches.count("feature_sums_kernel") >= 4
        assert found.mse == pytest.approx(log.mse, rel=1e-4)
        for (key, one), other in zip(there.state_dict().items(), here.state_dict().values(), strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-5, msg=key)


def test_a_topk_teacher_is_sparse_by_itself_where_it_is_wide(activations, cuda):
    for k, calls in ((6, 0), (1, 3)):
        sae = TopKSAE(16, 120, k=k, generator=torch.Generator().manual_seed(0)).to(GPU)
        cuda.launches.clear()
        rt.train(sae, activations[:64].to(GPU), **{**QUIET, "steps": 4})
        assert cuda.launches.count("feature_sums_kernel") == calls  # the first step is dense


@pytest.mark.parametrize("room", [8, 10_000])
def test_sparse_training_is_dense_training_also_where_the_entries_have_no_room(room, activations, cuda, monkeypatch):
    monkeypatch.setattr("rsae_triton.training.memory.capacity_for", lambda places: room)
    trained, ways = {}, {}
    for memory in ("saved", "sparse", "auto"):
        trained[memory] = rational().to(GPU)
        cuda.launches.clear()
        log = rt.train(trained[memory], activations[:64].to(GPU), **{**QUIET, "steps": 3}, memory=memory, log_every=1)
        ways[memory] = "feature_sums_kernel" in cuda.launches
        assert all(math.isfinite(one) for one in log.mse)
    # "auto" begins densely, looks beside the first step's numbers, and finds half of all places in the support.
    assert ways == {"saved": False, "sparse": True, "auto": False}
    for name, one in trained["saved"].named_parameters():
        for memory in ("sparse", "auto"):
            other = dict(trained[memory].named_parameters())[name]
            torch.testing.assert_close(other.cpu(), one.cpu(), rtol=1e-3, atol=1e-5, msg=f"{memory} {name}")


def test_a_run_on_a_gpu_becomes_sparse_by_itself(activations, cuda):
    sae = rational()
    sae.gate.threshold.data += 30.0  # nothing is active
    sae = sae.to(GPU)
    rt.train(sae, activations[:64].to(GPU), **{**QUIET, "steps": 3}, memory="auto", target_l0=None)
    assert cuda.launches.count("feature_sums_kernel") == 2


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "adamw", "weight_decay": 0.5}, {"decoder_norm": "free"}], ids=str
)
@pytest.mark.filterwarnings("ignore:decoder norms are free")
def test_the_optimisers_kernels_step_as_the_cpu_does(options, activations):
    def trained(device):
        sae = rational().to(device)
        rt.train(sae, activations[:64].to(device), **QUIET, clip=0.01, lr=0.01, memory="saved", **options)
        return {name: one.detach().cpu() for name, one in sae.named_parameters()}

    here = trained("cpu")
    with pretend() as cuda:
        there = trained(GPU)
    assert cuda.launches.count("adam_rows_kernel") == 4
    assert ("remove_radial_kernel" in cuda.launches) == ("decoder_norm" not in options)
    for name, one in here.items():
        torch.testing.assert_close(there[name], one, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("name", "options"),
    [("rational", {"precision": "bf16"}), ("rational", {"decoder_norm": "free"}),
     ("rational", {"trainable": "encoder"}), ("relu", {}), ("relu", {"decoder_norm": "free"}),
     ("topk", {"precision": "bf16"})], ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:decoder norms are free")
def test_sparse_steps_pass_over_each_matrix_once(name, options, activations, monkeypatch):
    """The norm to clip at comes with the gradients, the radial part goes and bfloat16 copies are written in Adam's."""

    def trained(device, memory):
        sae = (rational() if name == "rational" else teacher(name)).to(device)
        with torch.no_grad():
            sae.W_dec.mul_(torch.linspace(0.5, 2, 24, device=device)[:, None])
        log = rt.train(sae, activations[:64].to(device), **{**QUIET, "steps": 4}, clip=0.01, lr=0.01, memory=memory,
                       **options)  # fmt: skip
        return {key: one.detach().cpu() for key, one in sae.named_parameters()}, log

    here, log = trained("cpu", "saved")
    cast, copies = StepMemory.cast, []
    with pretend() as cuda:

        def seen(memory, matrix, dtype):
            found = cast(memory, matrix, dtype)
            copies.append(any(found.held.data_ptr() == one.held.data_ptr() for _, one in memory._copies.values()))
            if copies[-1]:
                torch.testing.assert_close(found.cpu(), matrix.detach().cpu().to(dtype), rtol=0, atol=0)
            return found

        monkeypatch.setattr(StepMemory, "cast", seen)
        there, found = trained(GPU, "sparse")
    assert "remove_radial_kernel" not in cuda.launches
    assert cuda.launches.count("adam_rows_kernel") == (4 if "trainable" in options else 8)
    assert found.mse == pytest.approx(log.mse, rel=2e-2 if "precision" in options else 1e-4)
    within = {"rtol": 5e-2, "atol": 2e-2} if "precision" in options else {"rtol": 1e-3, "atol": 1e-5}
    for key, one in here.items():
        torch.testing.assert_close(there[key], one, **within, msg=key)
    assert copies == (
        [False] * 2 + [True] * 6 if "precision" in options else [False] * 8
    )  # two matrices, all steps but the first


def test_rows_wait_once_and_decode_without(activations, cuda):
    x, sae = activations[:8].to(GPU), rational().to(GPU)
    cuda.waits.clear()
    code = sae.encode_sparse(x, capacity=24)
    assert len(cuda.waits) == 1
    values = code.values.detach().requires_grad_()
    x_hat = sae.decode_sparse(code._replace(values=values))
    assert len(cuda.waits) == 1
    x_hat.square().sum().backward()
    torch.testing.assert_close(x_hat.cpu(), sae.decode(sae.encode(x)).cpu())
    assert values.grad.is_cuda
    assert {"sparse_encode_kernel", "sparse_dots_kernel", "segment_sum_kernel"} <= set(cuda.launches)


def test_checkpoints_scores_export_and_files_take_tensors_of_the_gpu(activations, cuda, tmp_path):
    x, sae = activations[:64].to(GPU), rational().to(GPU)
    rt.train(sae, x, **QUIET, out=str(tmp_path / "run"), deterministic=True)
    rt.train(rational().to(GPU), x, **QUIET, out=tmp_path / "run", resume=True, deterministic=True)
    assert measure(at_l0(sae, x, 2.0), x).scores.l0 <= 2.0
    assert on_gpu(sae.to_jumprelu(x)[0])
    sae.save_pretrained(tmp_path / "sae")
    assert on_gpu(FusedRationalSAE.from_pretrained(tmp_path / "sae", device=GPU))


def test_routes_are_measured(cuda):
    row = next(measure_routes.measure(torch.device(GPU), lambda call: (call(), 1.0)[1], n_tokens=16, d_sae=32))
    assert row["source"] == "measured"


def test_pretend_cuda_tensors_refuse_to_mix_with_cpu_tensors(cuda):
    x, here = torch.randn(4, 16, device=GPU), torch.randn(4, 16)
    for mixed in (lambda: x + here, lambda: x @ here.T, lambda: here[torch.ones(4, dtype=torch.long, device=GPU)]):
        with pytest.raises(RuntimeError, match="on"):
            mixed()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(4, device=GPU, generator=torch.Generator())
    torch.randn(4, device=GPU, generator=torch.Generator(GPU))
    assert (x + torch.tensor(1.0)).is_cuda  # one number of the CPU's is allowed
    assert cuda.waits == []
    for waiting in (lambda: float(x.sum()), x.cpu, x.nonzero, lambda: x[x > 0], lambda: bool((x > 0).any())):
        waiting()
    assert len(cuda.waits) == 5


def test_a_kernel_on_the_wrong_gpu_or_on_memory_of_the_cpu_is_found(monkeypatch, cuda):
    import contextlib
    from importlib import import_module

    sae, x = rational().to(GPU), torch.randn(4, 16, device=GPU)
    with pytest.raises(AssertionError, match="memory of the CPU"):
        rt.kernels.rational_forward(torch.randn(24, 16), sae.gate.tensors(), p=3, q=2, gated=True, clamp=True,
                                    identity=False, hard=True)  # fmt: skip
    monkeypatch.setattr(
        import_module("rsae_triton.kernels.rational_forward"), "launching_on", lambda _: contextlib.nullcontext()
    )
    sae.backend = "triton:split"
    with pytest.raises(AssertionError, match="launched on cuda:0"):
        sae.encode(x)
