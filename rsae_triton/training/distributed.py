"""Training on many devices: a mesh of processes started by torchrun, with two axes.

    data       each process has its own tokens; gradients are averaged
    features   each process holds d_sae / R features (encoder, gate, decoder, optimiser). Processes exchange the partial
    sums of x_hat, [n_tokens, d_in] per step, and the gradients of what they share (b_dec, a gate with shared
    coefficients).

The numbers equal those of one process with the whole batch and the whole SAE, up to the order of sums.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from rsae_triton.common.errors import ConfigError, FormatError, RsaeError, StorageError
from rsae_triton.ops.across import Across
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.sae.sharded import read_parts, shapes_of, write_parts
from rsae_triton.sae.units import UNITS
from rsae_triton.teachers import BatchTopKSAE
from rsae_triton.training.checkpoints import Checkpoints
from rsae_triton.training.memory import MemoryPlan
from rsae_triton.training.processes import Alone, Summed
from rsae_triton.training.recipes import Losses, Recipe, losses
from rsae_triton.training.settings import TrainSettings

if TYPE_CHECKING:
    pass


class Sharding(NamedTuple):
    """How a part of an SAE was cut: the configuration of the whole, and for each tensor's name the axis of the cut, or
    None."""

    config: dict[str, Any]
    axes: dict[str, int | None]

    def axis(self, name: str, dims: int) -> int | None:
        """The axis along which a tensor of a checkpoint (`Run.tensors`) is cut."""
        kind, _, rest = name.partition(".")
        if kind == "sae":
            return self.axes[rest]
        if kind == "optimizer":
            return self.axes[rest.rpartition(".")[0]] if dims else None
        return 0  # idle and norms


def launched() -> bool:
    """Whether torchrun (or a similar launcher) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def mesh_of(features: int = 1, device: str = "cpu") -> Iterator[Mesh | None]:
    """Yields the mesh of the processes that torchrun started (NCCL on CUDA, else gloo); None without torchrun."""
    if not launched():
        yield None
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if cuda else "gloo")
    mesh = None
    try:
        mesh = Mesh(features, "cuda" if cuda else "cpu")
        yield mesh
    finally:
        if mesh is not None:
            mesh.leave()
        dist.destroy_process_group()


class Mesh(Alone):
    """The processes of the default group, as a (data, features) DeviceMesh.

    Args:
        features: processes that share the features of one SAE; divides their number, and d_sae.
        device_type: "cuda" or "cpu".

    Raises:
        ConfigError: `features` does not divide the number of processes.
    """

    def __init__(self, features: int = 1, device_type: str = "cpu") -> None:
        size = dist.get_world_size()
        if features < 1 or size % features:
            raise ConfigError(f"{size} processes cannot be cut into groups of {features}; choose a divisor")
        shape = (size // features, features)
        self.mesh = init_device_mesh(device_type, shape, mesh_dim_names=("data", "features"))
        self.rank = dist.get_rank()
        self.data = (self.mesh.get_local_rank("data"), shape[0])
        self.features = (self.mesh.get_local_rank("features"), shape[1])
        cuda = device_type == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self._across = Across(self.over_features_, self.features[0] == 0) if features > 1 else None

    def leave(self) -> None:
        """Lets go of the process groups; the mesh cannot be used any more.

        A group's threads end only when nothing refers to it. If one is at work while Python shuts down, it aborts the
        process ("terminate called without an active exception").
        """
        del self.mesh
        self._across = None

    # -- the parts of an SAE

    def shard(self, sae: SparseAutoencoder) -> SparseAutoencoder:
        """Returns this process's part of `sae`, which must be the same on every process; `sae` itself if there is one
        part.

        Raises:
            ConfigError: d_sae, or the groups of its gate, cannot be cut into equal parts.
        """
        axes, (place, parts) = feature_axes(sae), self.features
        sharding = Sharding(sae.config(), axes)
        if parts > 1:
            for name, tensor in sae.state_dict().items():
                axis = axes[name]
                if axis is not None and tensor.shape[axis] % parts:
                    raise ConfigError(
                        f"{name} has {tensor.shape[axis]} features or groups, which {parts} processes cannot share "
                        "equally; choose a divisor"
                    )
            gate = sae.gate if isinstance(sae, FusedRationalSAE) else None
            if gate is not None and gate.group_of is not None and gate.groups >= sae.d_sae // parts:
                raise ConfigError(
                    f"groups={gate.groups} are assigned to features, of which each of {parts} processes would hold "
                    f"{sae.d_sae // parts}; assign fewer groups than that"
                )
            sae = _cut(sae, axes, place, parts)
        sae.sharding = sharding  # type: ignore[assignment]
        return sae

    def check(self, sae: SparseAutoencoder, recipe: Recipe, settings: TrainSettings) -> None:
        if not hasattr(sae, "sharding"):
            raise ConfigError("training on a mesh takes this process's part of the SAE: mesh.shard(sae)")
        if settings.batch_size % self.data[1]:
            raise ConfigError(
                f"batch_size={settings.batch_size} is not a multiple of the {self.data[1]} data processes"
            )
        if self.data[1] > 1 and isinstance(sae, BatchTopKSAE):
            raise ConfigError("a BatchTopK SAE ranks the whole batch; train it on one process, or use TopK")
        if self.features[1] > 1 and (sae.compares_features or recipe.aux_k):
            raise ConfigError(
                f"a {sae.architecture} SAE with recipe {recipe.name!r} compares all features of a token, which lie on "
                "several processes; split the tokens instead (--features-over 1)"
            )

    def whole_config(self, sae: SparseAutoencoder) -> dict[str, Any]:
        config = _sharding(sae).config
        return config if sae.units is None else {**config, "metadata": {**config["metadata"], UNITS: sae.units}}

    def same(self, steps: list[int]) -> list[int]:
        found = [steps]
        dist.broadcast_object_list(found, src=0, device=self.device)
        return found[0]

    def worst(self, problem: RsaeError | None) -> RsaeError | None:
        mine = None if problem is None else (isinstance(problem, ConfigError), f"{problem} (process {self.rank})")
        met: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(met, mine)
        found = sorted((one for one in met if one is not None), key=lambda one: not one[0])
        if not found:
            return None
        return ConfigError(found[0][1]) if found[0][0] else FormatError(found[0][1])

    def any(self, flag: bool) -> bool:
        raised = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(raised)
        return bool(raised)

    def agree(self, plan: MemoryPlan) -> MemoryPlan:
        """Returns rank 0's plan: processes that cut a step differently would wait for each other for ever."""
        plans = [plan]
        dist.broadcast_object_list(plans, src=0, device=self.device)
        return plans[0]

    # -- one step

    def losses(
        self,
        sae: SparseAutoencoder,
        x: Tensor,
        recipe: Recipe,
        weight: float,
        dead: Tensor | None,
        plan: MemoryPlan,
    ) -> Losses:
        return losses(sae, x, recipe, weight, dead, plan, across=self._across)

    def finish(self, sae: SparseAutoencoder, terms: Losses, flags: list[bool]) -> Summed:
        axes, data, features = _sharding(sae).axes, self.data[1], self.features[1]
        own: list[Tensor] = []
        shared: list[Tensor] = []
        for name, parameter in sae.named_parameters():
            if parameter.grad is not None:
                (own if features > 1 and axes[name] is not None else shared).append(parameter.grad)
        counts = terms.counts.clone()
        # In the same order on every process. All are started before the first is waited for.
        works = [self._sum(one, "data") for one in (*own, counts)] + [self._sum(one) for one in shared]
        for work in works:
            _wait(work)
        for one in (*own, *shared) if data > 1 else ():
            one.div_(data)
        zero = terms.mse.new_zeros((), dtype=torch.float64)
        known = [] if terms.squares is None else [one.grad for one in (sae.W_enc, sae.W_dec) if one.grad is not None]
        squares = [
            sum((_square(one) for one in some if not any(one is other for other in known)), zero)
            for some in (own, shared)
        ]
        if terms.squares is not None:
            squares[0 if features > 1 else 1] += terms.squares
        share = zero if terms.share is None else zero + terms.share / (data * features)
        numbers = [terms.mse.double() / features, terms.l0.double(), terms.total.detach().double(), squares[0], share]
        numbers += [zero, zero] if terms.missed is None else list(terms.missed.double().unbind())
        summed = torch.stack([*numbers, *torch.tensor(flags, dtype=torch.float64, device=zero.device)])
        dist.all_reduce(summed)
        norm = (summed[3] / data + squares[1]).sqrt()
        mse, l0, total, _, support, missed, checked, *raised = summed.tolist()
        grad_norm = float(norm)
        finite = all(map(math.isfinite, (mse, l0, total, grad_norm)))
        flags = [bool(one) for one in raised]
        whole = None if terms.share is None else support
        numbers_of_all = (norm.float(), grad_norm, counts, flags, finite, whole, (missed, checked))
        return Summed(mse / data, l0 / data, *numbers_of_all)

    def mean(self, value: Tensor) -> Tensor:
        value = value.clone()
        _wait(self._sum(value, "data"))
        return value / self.data[1]

    def over_features(self, value: Tensor) -> Tensor:
        return self.over_features_(value.clone())

    def over_features_(self, value: Tensor) -> Tensor:
        """`over_features`, in place."""
        _wait(self._sum(value, "features"))
        return value

    def barrier(self) -> None:
        dist.barrier()

    def _sum(self, value: Tensor, axis: str | None = None) -> Any:
        """Starts to sum `value` in place along an axis, or over all processes; returns None if there is only one."""
        group = dist.group.WORLD if axis is None else self.mesh.get_group(axis)
        # the gradient of W_enc, which is stored feature by feature
        value = value if value.is_contiguous() else value.t()
        return dist.all_reduce(value, group=group, async_op=True) if dist.get_world_size(group) > 1 else None

    # -- checkpoints

    def save(
        self,
        checkpoints: Checkpoints,
        step: int,
        sae: SparseAutoencoder,
        tensors: dict[str, Tensor],
        info: dict[str, Any],
    ) -> Path:
        sharding = _sharding(sae)
        parts = {name: self._whole(one, sharding.axis(name, one.dim())) for name, one in tensors.items()}
        self._all(lambda: checkpoints.begin(step) if self.rank == 0 else None, checkpoints, step)
        self._all(lambda: write_parts(checkpoints.temporary(step), parts), checkpoints, step)
        self._all(lambda: checkpoints.finish(step, info) if self.rank == 0 else None, checkpoints, step)
        return checkpoints.path(step)

    def load(self, path: Path, sae: SparseAutoencoder, like: dict[str, Tensor]) -> dict[str, Tensor]:
        sharding, found = _sharding(sae), {}
        for name, shape in shapes_of(path).items():
            axis, local = sharding.axis(name, len(shape)), list(shape)
            if axis is not None:
                local[axis] //= self.features[1]
            # Adam's state does not exist before the first step
            dtype = like[name].dtype if name in like else torch.float32
            found[name] = self._whole(torch.empty(local, dtype=dtype, device=self.device), axis)
        read_parts(path, found)
        return {name: one.to_local() if isinstance(one, DTensor) else one for name, one in found.items()}

    def _whole(self, part: Tensor, axis: int | None) -> Tensor:
        """Returns a part as a distributed tensor of the whole, stored row by row as in files."""
        if axis is None or self.features[1] == 1:
            return part.contiguous()
        return DTensor.from_local(part.contiguous(), self.mesh, [Replicate(), Shard(axis)], run_check=False)

    def _all(self, action: Callable[[], Any], checkpoints: Checkpoints, step: int) -> None:
        """Runs `action` on every process. If it fails on one, all raise, so that none waits for ever."""
        problem: Exception | None = None
        try:
            action()
        except Exception as error:  # torch wraps the errors of other processes in its own
            problem = error
        failed = torch.tensor(float(problem is not None), device=self.device)
        dist.all_reduce(failed)
        if failed:
            cause = problem or OSError("another process could not write its part")
            raise cause if isinstance(cause, StorageError) else checkpoints.refused(step, cause) from cause


def feature_axes(sae: SparseAutoencoder) -> dict[str, int | None]:
    """The axis of every tensor of an SAE that counts features (or groups of them), by name; None if it has none."""

    # If features are assigned to groups individually, every process holds all groups.
    gate = sae.gate if isinstance(sae, FusedRationalSAE) else None
    groups = None if gate is None or gate.group_of is None else gate.groups

    def axis(name: str, tensor: Tensor) -> int | None:
        if name == "W_enc" or (name.startswith("refinement.") and tensor.dim() == 2):
            return 1
        shared = name in ("b_dec", "refinement.weights") or tensor.dim() == 0 or len(tensor) in (1, groups)
        return None if shared else 0

    return {name: axis(name, tensor) for name, tensor in sae.state_dict().items()}


def _cut(sae: SparseAutoencoder, axes: dict[str, int | None], place: int, parts: int) -> SparseAutoencoder:
    """Returns part number `place` of `parts` equal parts, in memory of its own."""
    taken: dict[int, Any] = {}
    for name, tensor in (*sae.named_parameters(), *sae.named_buffers()):
        axis = axes[name]
        if axis is not None:
            part = tensor.detach().chunk(parts, axis)[place].clone()
            taken[id(tensor)] = nn.Parameter(part) if isinstance(tensor, nn.Parameter) else part
    own = copy.deepcopy(sae, taken)
    own.d_sae //= parts
    if isinstance(own, FusedRationalSAE):
        own.gate.d_sae = own.d_sae
        if own.gate.group_of is None:
            own.gate.groups = max(1, own.gate.groups // parts)
    return own


def _sharding(sae: SparseAutoencoder) -> Sharding:
    return sae.sharding  # type: ignore[return-value]


def _square(one: Tensor) -> Tensor:
    return torch.linalg.vector_norm(one, dtype=torch.float64).square()


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()
