"""A CUDA device that is none: tensors that say they are on a GPU, hold their numbers on the CPU, and are as strict.

What a GPU refuses raises here too: operands on several devices, a generator of the CPU, a kernel launched while another
GPU is the current one or on memory of the CPU. Kernels run in Triton's interpreter. Whatever would make the CPU wait
for the GPU is noted in `waits`.
"""

import contextlib
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

# Their answer, or its size, is in the numbers.
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount"}
# An index may lie on the CPU, and copies are there to change the device.
MIXED = {"_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_", "_pin_memory"}
INDEX = 1
"""Number of the pretended device: not 0, so that code which takes the current device for the tensors' own is found."""


class CudaTensor(torch.Tensor):
    """`held` on the CPU, with the looks of a tensor on cuda:1.

    Below Python it is on the meta device: autograd of a torch built without CUDA has no way to deal with another.
    """

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="meta", requires_grad=False,
        )  # fmt: skip

    def __init__(self, held):
        self.held = held

    device = property(lambda self: torch.device("cuda", INDEX))
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"cuda:{INDEX} {self.held!r}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of pretend()")


class Generator(torch.Generator):
    """Numbers of the CPU's generator, with the looks of one on `device`."""

    on_cuda: ClassVar[dict[int, "Generator"]] = {}
    """By address: what C++ hands on is another Python object. Kept, so that no address is used again."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.place = torch.device(device)
        if self.place.type == "cuda":
            self.on_cuda[self._cdata] = self

    device = property(lambda self: self.place)


class Pretend(TorchDispatchMode):
    """Computes on what tensors hold.

    Attributes:
        waits: names of the operators that made the CPU wait. launches: names of the kernels, in order.
        current: index of the current device.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.launches, self.current = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "rsae":  # the package's own operators: their bodies, not their names
            from torch._library.custom_ops import OPDEFS

            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
        ours = [one for one in given if isinstance(one, CudaTensor)]
        cpu = [one for one in given if not isinstance(one, CudaTensor) and one.dim()]
        if ours and cpu and name not in MIXED:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, some are on the CPU")
        if cpu and name in ("index", "index_put_") and not isinstance(args[0], CudaTensor) and ours:
            raise RuntimeError(f"{name}: indices on cuda, self on the CPU")
        target = kwargs.get("device")
        on_cuda = bool(ours) if target is None else torch.device(target).type == "cuda"
        generator = kwargs.get("generator")
        if generator is not None and (generator._cdata in Generator.on_cuda) != on_cuda:
            raise RuntimeError(f"{name}: the generator is on another device")
        masks = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
        leaves = (name == "copy_" and not isinstance(args[0], CudaTensor)) or (name == "_to_copy" and not on_cuda)
        if ours and (name in WAITING or masks or leaves):
            self.waits.append(name)
        if target is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        wrappers = {id(one.held): one for one in ours}
        found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if not on_cuda:
            return found
        return tree_map_only(
            torch.Tensor, lambda one: wrappers[id(one)] if id(one) in wrappers else CudaTensor(one), found
        )

    def launch(self, run, executor, *args, **kwargs):
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        assert all(isinstance(one, CudaTensor) for one in tensors), "a kernel was given memory of the CPU"
        assert self.current == INDEX, f"a kernel was launched on cuda:{self.current}, its tensors are on cuda:{INDEX}"
        self.launches.append(executor.fn.__name__)
        with _disable_current_modes():
            run(executor, *map(_held, args), **{name: _held(one) for name, one in kwargs.items()})

    def exchange(self, index):
        before = self.current
        self.current = before if index < 0 else index
        return before


def _held(one):
    return one.held if isinstance(one, CudaTensor) else one


@contextlib.contextmanager
def pretend(capability=(9, 0)):
    """Pretends that there are two CUDA devices, of which cuda:0 is the current one; "cuda" makes tensors on cuda:1."""
    from triton.runtime.interpreter import GridExecutor

    from rsae_triton.ops import backends

    mode, run = Pretend(), GridExecutor.__call__
    cuda = {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None,
        "device_count": lambda: 2, "current_device": lambda: mode.current, "synchronize": lambda *_: None,
        "_exchange_device": mode.exchange, "_maybe_exchange_device": mode.exchange,
        "get_device_capability": lambda *_: capability, "get_device_name": lambda *_: "a pretended H100",
        "is_bf16_supported": lambda *_: True, "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda *_: (8 << 30, 8 << 30), "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0, "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "get_device_properties": lambda _: SimpleNamespace(name="pretended", major=9, minor=0, total_memory=8 << 30),
    }  # fmt: skip
    # They look at what a tensor is below Python.
    made, taken = torch.tensor, torch.as_tensor
    ours = {
        "Generator": Generator,
        "tensor": lambda data, dtype=None, device=None, **k: made(data, dtype=dtype, **k).to(device or "cpu"),
        "as_tensor": lambda data, dtype=None, device=None: (
            data if isinstance(data, torch.Tensor) else taken(data, dtype=dtype)
        ).to(device=device or getattr(data, "device", "cpu"), dtype=dtype),
    }
    with contextlib.ExitStack() as stack:
        for name, stub in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        for name, stub in ours.items():
            stack.enter_context(mock.patch.object(torch, name, stub))
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", lambda *a, **k: mode.launch(run, *a, **k)))
        stack.callback(backends.capability.cache_clear)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.enter_context(mode)
        yield mode
