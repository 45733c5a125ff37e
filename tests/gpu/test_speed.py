"""How long things take, beside what they replace: the bare product, eager PyTorch, torch.compile. With peak memory.

The table goes to out/gpu-speed.json with the device and the versions; docs/kernels.md and routes.json take their
measured numbers from there. What is asserted is only what has to hold on any GPU.
"""

import json
import platform
from pathlib import Path

import pytest
import torch
import triton
from gate_cases import flags, random_gate, to
from triton.testing import do_bench

from rsae_triton import kernels
from rsae_triton.ops import reference
from rsae_triton.ops.autoencode import rational_autoencode
from rsae_triton.ops.cost import CEILINGS, Step, cost
from rsae_triton.ops.reference import GateSpec, GateTensors

N_TOKENS, D_IN, D_SAE = 4096, 768, 24576
CASES = [((3, 2), 1), ((3, 2), D_SAE), ((9, 8), 1), ((9, 8), D_SAE)]
RESULTS = Path("out/gpu-speed.json")


@pytest.fixture(scope="module")
def record():
    rows = []
    yield lambda **row: rows.append(row)
    RESULTS.parent.mkdir(exist_ok=True)
    where = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    shape = {"n_tokens": N_TOKENS, "d_in": D_IN, "d_sae": D_SAE, "dtype": "bfloat16"}
    RESULTS.write_text(json.dumps({**where, "python": platform.python_version(), **shape, "rows": rows}, indent=1))


def measured(function):
    """p20, p50, p80 in ms, and the most memory beside what was there before, in bytes."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    p20, p50, p80 = do_bench(function, warmup=50, rep=300, quantiles=[0.2, 0.5, 0.8])
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "peak_bytes": peak}


def inputs(degree, sets):
    g = torch.Generator(device="cuda").manual_seed(0)
    weights = [
        torch.randn(*shape, generator=g, device="cuda").div(D_IN**0.5).bfloat16()
        for shape in ((D_IN, D_SAE), (D_SAE,), (D_SAE, D_IN), (D_IN,))
    ]
    x = torch.randn(N_TOKENS, D_IN, generator=g, device="cuda").bfloat16()
    return x, weights, to(random_gate(*degree, D_SAE, sets), "cuda")


@pytest.mark.parametrize(("degree", "sets"), CASES)
def test_kernels(degree, sets, record):
    x, (W_enc, b_enc, W_dec, _), gate = inputs(degree, sets)
    spec = GateSpec(*degree)
    h = (x @ W_enc).T.contiguous()
    dz = torch.randn_like(h)
    forward, backward = flags(spec), flags(spec, True)
    contenders = {
        "bare product": lambda: torch.mm(W_enc.t(), x.t()),
        "rational_forward": lambda: kernels.rational_forward(h, gate, **forward),
        "encode_forward": lambda: kernels.encode_forward(x, W_enc, b_enc, gate, **forward),
        "encode_forward, h kept": lambda: kernels.encode_forward(x, W_enc, b_enc, gate, save_h=x.dtype, **forward),
        "rational_backward": lambda: kernels.rational_backward(h, dz, None, None, gate, **backward),
        "encode_backward": lambda: kernels.encode_backward(x, W_dec, h, None, None, gate, **backward),
    }
    for name, function in contenders.items():
        record(what="kernel", name=name, degree=degree, sets=sets, **measured(function))


@pytest.mark.parametrize(("degree", "sets"), CASES)
def test_steps(degree, sets, record):
    """One forward and backward pass of the loss, without the optimiser."""
    x, weights, gate = inputs(degree, sets)
    parameters = [one.requires_grad_() for one in (*weights, *gate[:6])]
    own, spec = GateTensors(*parameters[4:], gate[6]), GateSpec(*degree)

    def eager():
        W_enc, b_enc, W_dec, b_dec = parameters[:4]
        codes = reference.encode(x, W_enc, b_enc, b_dec, own, spec)
        residual = (codes.z.to(W_dec.dtype) @ W_dec + b_dec - x).float()
        return residual.square().sum(1).mean() + 0.1 * codes.l1.sum() / len(x)

    def ours(backend):
        return rational_autoencode(x, *parameters[:4], own, spec, l1_weight=0.1, backend=backend).total

    compiled = torch.compile(eager)
    contenders = {
        "eager": eager,
        "compiled": compiled,
        "split": lambda: ours("triton:split"),
        "fused": lambda: ours("triton:fused"),
    }
    step = Step(N_TOKENS, D_IN, D_SAE, *degree, sets == 1)
    on = next((one for name, one in CEILINGS.items() if name in torch.cuda.get_device_name()), None)
    found = {}
    for name, loss in contenders.items():
        found[name] = measured(lambda loss=loss: torch.autograd.grad(loss(), parameters, allow_unused=True))
        predicted = None if on is None else 1e3 * cost(step, name).seconds(on)
        record(what="step", name=name, degree=degree, sets=sets, predicted_ms=predicted, **found[name])
    for name in ("split", "fused"):
        assert found[name]["p50_ms"] < found["eager"]["p50_ms"]
        assert found[name]["peak_bytes"] < found["eager"]["peak_bytes"] / 2
