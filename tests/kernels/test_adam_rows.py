"""adam_rows: one pass over a weight matrix against what it replaces, operation by operation."""

import pytest
import torch

from rsae_triton.kernels.adam_rows import adam_numbers, adam_rows, remove_radial, row_norms

OPTIONS = {"betas": (0.9, 0.999), "eps": 1e-8}


def start(shape=(7, 5), device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    return weight, grads


def expected(weight, grads, kind, radial, decay=0.0):
    """Three steps of torch's optimiser in float64, with the steps around it."""
    weight = torch.nn.Parameter(weight.clone())
    norms = weight.detach().norm(dim=1, keepdim=True)
    optimizer = kind([weight], lr=0.1, weight_decay=decay, **OPTIONS)
    for step, grad in enumerate(grads, 1):
        grad = grad.clone()
        if radial:
            along = (grad * weight.detach()).sum(1, keepdim=True) / weight.detach().square().sum(1, keepdim=True)
            grad -= along * weight.detach()
        weight.grad = grad * (1 / step)
        optimizer.param_groups[0]["lr"] = 0.1 / step
        optimizer.step()
        if radial:
            weight.data *= norms / weight.data.norm(dim=1, keepdim=True)
    state = optimizer.state[weight]
    return weight.detach(), state["exp_avg"], state["exp_avg_sq"]


def found(weight, grads, device, radial, decay=0.0, copy=None):
    weight = weight.float().to(device)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    norms = weight.norm(dim=1) if radial else None
    for step, grad in enumerate(grads, 1):
        clip = torch.tensor(1 / step, device=device)
        # The count as a number, or as torch keeps it on a GPU.
        count = step if step == 2 else torch.tensor(float(step), device=device)
        numbers = adam_numbers(count, 0.1 / step, clip, **OPTIONS, weight_decay=decay)
        adam_rows(weight, grad.float().to(device), mean, square, numbers, radial=radial, norms=norms, copy=copy)
    return weight.cpu(), mean.cpu(), square.cpu()


@pytest.mark.parametrize(("kind", "decay"), [(torch.optim.Adam, 0.0), (torch.optim.AdamW, 0.3)])
@pytest.mark.parametrize("radial", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (3, 300)], ids=str)
def test_a_row_step_equals_torchs_adam_with_clipping_and_normalisation(shape, radial, kind, decay, device):
    weight, grads = start(shape)
    truth = expected(weight, grads, kind, radial, decay)
    for ours, exact in zip(found(weight, grads, device, radial, decay), truth, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-6)


def test_the_bfloat16_copy_equals_the_updated_weights(device):
    weight, grads = start()
    copy = torch.zeros(7, 5, dtype=torch.bfloat16, device=device)
    ours, *_ = found(weight, grads, device, True, copy=copy)
    assert torch.equal(copy.cpu(), ours.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_without_the_radial_part(dtype, device):
    weight, (grad, *_) = start((6, 70))
    weight, grad = weight.to(dtype), grad.to(dtype)
    along = (grad * weight).double().sum(1, keepdim=True) / weight.double().square().sum(1, keepdim=True)
    for given, exact in ((None, grad.double()), (weight, grad.double() - along * weight.double())):
        squares = row_norms(grad.to(device), None if given is None else given.to(device))
        torch.testing.assert_close(squares.cpu().double(), exact.square().sum(1), rtol=1e-5,
                                   atol=1e-5)  # fmt: skip
        assert squares.dtype == torch.float32
    ours = grad.to(device, copy=True)
    remove_radial(ours, weight.to(device))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5  # the gradient is rounded to its dtype again
    torch.testing.assert_close(ours.cpu().double(), exact, rtol=tolerance, atol=tolerance)


def test_nan_is_kept_and_nothing_waits(device):
    weight, grads = start()
    grads[0][2, 3] = torch.nan
    ours, *_ = found(weight, grads[:1], device, False)
    assert ours.isnan().nonzero().tolist() == [[2, 3]]


def test_tensors_of_other_shapes_or_strides_are_refused(device):
    one = torch.zeros(4, 5, device=device)
    numbers = torch.zeros(7, device=device)
    with pytest.raises(ValueError, match="one shape"):
        adam_rows(one, one[:3], one, one, numbers, radial=True)
    with pytest.raises(ValueError, match="contiguous"):
        adam_rows(one.T, one.T, one.T, one.T, numbers, radial=True)
    with pytest.raises(ValueError, match="adam_numbers"):
        adam_rows(one, one, one, one, numbers[:3], radial=True)
    with pytest.raises(ValueError, match="norms"):
        adam_rows(one, one, one, one, numbers, radial=True, norms=numbers)
    long = torch.zeros(1, 20000, device=device)
    with pytest.raises(ValueError, match="registers"):
        row_norms(long, None)
    empty = torch.zeros(0, 5, device=device)
    adam_rows(empty, empty, empty, empty, numbers, radial=True)
    assert len(row_norms(empty, empty)) == 0
