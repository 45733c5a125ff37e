"""Which backend is taken: what is refused, and where `auto` falls back to eager PyTorch."""

from types import SimpleNamespace

import pytest
import torch

from rsae_triton.common.errors import ConfigError, SourceError
from rsae_triton.ops import backends
from rsae_triton.ops import encode as ops


@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [("gpu", torch.float32, "choose one of"), ("triton", torch.float64, "float32, bfloat16 or float16")],
)
def test_backends_that_cannot_work_are_refused(backend, dtype, message):
    with pytest.raises(ConfigError, match=message):
        ops.resolve_backend(backend, torch.device("cpu"), dtype)


def test_triton_on_cpu_tensors_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="CUDA device"):
        ops.resolve_backend("triton", torch.device("cpu"), torch.float32)


def test_auto_falls_back_to_eager_where_triton_cannot_be_had(monkeypatch):
    """torch 2.6 comes with triton 3.2, which the kernels do not compile with: slower, said once, but it works."""

    def missing():
        raise SourceError("backend='triton' cannot be used (too old)")

    monkeypatch.setattr(backends, "kernels", missing)
    monkeypatch.setattr(backends, "capability", lambda device: (9, 0))
    backends._kernels_start.cache_clear()
    with pytest.warns(UserWarning, match="falls back to eager"):
        assert ops.resolve_backend("auto", torch.device("cuda"), torch.float32) == "eager"
    backends._kernels_start.cache_clear()


def test_auto_falls_back_to_eager_where_triton_cannot_start(monkeypatch):
    """A container with a GPU and no C compiler: Triton, which builds its launcher, would fail at the first kernel."""
    from triton.runtime import driver

    class Active:
        def get_current_target(self):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(backends, "kernels", lambda: SimpleNamespace(INTERPRETED=False))
    monkeypatch.setattr(type(driver), "active", property(lambda self: Active()), raising=False)
    monkeypatch.setattr(backends, "capability", lambda device: (9, 0))
    for cached in (backends.start_driver, backends._kernels_start):
        cached.cache_clear()
    device = torch.device("cuda")
    with pytest.warns(UserWarning, match=r"find C compiler.*apt install gcc python3-dev.*falls back to eager"):
        assert ops.resolve_backend("auto", device, torch.float32) == "eager"
    with pytest.raises(SourceError, match="Failed to find C compiler"):
        ops.resolve_backend("triton:split", device, torch.float32)
    backends._kernels_start.cache_clear()


def test_an_amd_gpu_runs_eager_pytorch_and_says_so(monkeypatch):
    """MI300 says 9.4, which is no Hopper."""
    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr(backends, "capability", lambda device: (9, 4))
    monkeypatch.setattr(backends, "_kernels_start", lambda: True)
    backends._say_once.cache_clear()
    with pytest.warns(UserWarning, match=r"AMD GPU \(ROCm 6\.2\)"):
        assert backends.resolve_backend("auto", torch.device("cuda"), torch.float32) == "eager"
    with pytest.raises(ConfigError, match=r"AMD GPU.*use backend='auto'"):
        backends.resolve_backend("triton:split", torch.device("cuda"), torch.float32)


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), "eager"), ((8, 0), "triton"), ((12, 0), "triton")])
def test_a_gpu_without_bfloat16_in_hardware_runs_eager_pytorch(capability, taken, monkeypatch):
    monkeypatch.setattr(backends, "_kernels_start", lambda: True)
    monkeypatch.setattr(backends, "start_driver", lambda: None)
    monkeypatch.setattr(backends, "capability", lambda device: capability)
    device = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert ops.resolve_backend("auto", device, dtype) == taken
        if taken == "triton":
            assert ops.resolve_backend("triton:fused", device, dtype) == "triton:fused"
        else:
            with pytest.raises(ConfigError, match=r"needs compute capability 8\.0.*cuda has 7\.5; use backend='auto'"):
                ops.resolve_backend("triton:fused", device, dtype)
