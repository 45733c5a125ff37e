"""Every trainable parameter takes part in every step, as DistributedDataParallel demands."""

import gc

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from rsae_triton import upgrade
from rsae_triton.sae.topk_rational import TopKRationalSAE
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE

G = torch.Generator().manual_seed(0)
X = torch.randn(300, 16, generator=G)


def teacher(kind, **options):
    return kind(16, 64, generator=torch.Generator().manual_seed(1), **options)


KINDS = {
    "relu": lambda: teacher(ReluSAE),
    "jumprelu": lambda: teacher(JumpReluSAE),
    "topk": lambda: teacher(TopKSAE, k=6),
    "batchtopk": lambda: teacher(BatchTopKSAE, k=6),
    "gated, cpu": lambda: upgrade(teacher(JumpReluSAE, threshold=0.8), X),  # of two rounds
    "one round": lambda: upgrade(teacher(JumpReluSAE, threshold=0.8), X, rounds=1),
    "gated, eager": lambda: upgrade(teacher(JumpReluSAE, threshold=0.8), X, backend="eager"),
    "gated, per feature": lambda: upgrade(teacher(ReluSAE), X, coefficients="per_feature", backend="eager"),
    "direct, cpu": lambda: upgrade(teacher(ReluSAE), X, form="direct"),
    "direct, eager": lambda: upgrade(teacher(ReluSAE), X, form="direct", backend="eager"),
    "by token": lambda: upgrade(teacher(TopKSAE, k=6), X, thresholds="token"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(kind):
    sae = KINDS[kind]()
    sae(X).square().sum().backward()
    assert [name for name, one in sae.named_parameters() if one.requires_grad and one.grad is None] == []


@pytest.mark.parametrize("kind", ["gated, eager", "gated, cpu", "by token"])
def test_wrapped_by_ddp_a_second_step_is_taken(kind, tmp_path):
    """Without find_unused_parameters the second step of a module with idle parameters raises."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(KINDS[kind]())
        for _ in range(2):
            wrapped.zero_grad()
            wrapped(X).square().sum().backward()
        # Were its reducer the last to hold the group, its end would wait for a thread that waits for the interpreter.
        del wrapped
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()


def test_saved_gates_of_before_load_as_they_are(tmp_path):
    """What is a buffer now has the name it had as a parameter."""
    sae = KINDS["by token"]()
    assert {"gate.output_scale", "gate.threshold"} <= sae.state_dict().keys()
    assert torch.equal(TopKRationalSAE.from_pretrained(sae.save_pretrained(tmp_path))(X), sae(X))


def test_a_teacher_with_negative_codes_keeps_them_by_token_and_says_so_by_feature(tmp_path):
    topk = teacher(TopKSAE, k=40, relu=False)
    z = topk.encode(X)
    assert (z < 0).sum() > 1000
    rsae = upgrade(topk, X, thresholds="token")
    code = rsae.encode(X)
    assert int((code < 0).sum()) == int((z < 0).sum())
    assert float((code - z).norm() / z.norm()) < 0.01
    assert torch.equal(TopKRationalSAE.from_pretrained(rsae.save_pretrained(tmp_path)).encode(X), code)
    everything = teacher(TopKSAE, k=64, relu=False)
    code = upgrade(everything, X, thresholds="token").encode(X)
    torch.testing.assert_close(code, everything.encode(X), rtol=0.02, atol=0.02)
    with pytest.warns(UserWarning, match="negative.*thresholds='token'"):
        upgrade(topk, X)
