"""Processes for tests that kill runs or train on several: started quickly, by a server that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed.checkpoint", "rsae_triton", "rsae_triton.training.distributed"]
)


def small_sae(kind: str, d_sae: int = 64):
    from rsae_triton import FusedRationalSAE, TopKRationalSAE
    from rsae_triton.sae.gate import RationalGate, smooth_step
    from rsae_triton.teachers import JumpReluSAE, ReluSAE, TopKSAE

    generator = torch.Generator().manual_seed(0)
    if kind in ("relu", "jumprelu", "topk"):
        options = {"k": 8} if kind == "topk" else {}
        made = {"relu": ReluSAE, "jumprelu": JumpReluSAE, "topk": TopKSAE}[kind]
        return made(16, d_sae, generator=generator, **options)
    if kind == "token":
        gate = RationalGate(d_sae, (2, 2), *smooth_step(), form="gated", threshold=0.0)
        return TopKRationalSAE(16, d_sae, k=8, gate=gate, generator=generator)
    if kind == "rounds":
        options = {"form": "gated", "backward": "rational", "backend": "cpu", "generator": generator}
        sae = FusedRationalSAE(16, d_sae, rounds=3, **options)
        with torch.no_grad():
            for one in (sae.gate.threshold, sae.refinement.threshold):
                one.fill_(0.5)
        return sae
    form, _, groups = kind.partition("-")
    backward = "rational" if form == "gated" else "soft"
    # The tiled engine, whatever the batch: Inductor's compiler would take longer than the test.
    options = {"form": form, "backward": backward, "generator": generator}
    if groups == "assigned":
        # Eight groups that lie anywhere among the features.
        shuffled = torch.randperm(d_sae, generator=generator) % 8
        gate = RationalGate(
            d_sae, (2, 2), *smooth_step(), groups=8, group_of=shuffled, form=form, backward=backward, threshold=0.05
        )
        return FusedRationalSAE(16, d_sae, gate=gate, backend="eager", generator=generator)
    options["groups"] = int(groups or 1)
    return FusedRationalSAE(16, d_sae, backend="eager", **options)


def resumable(out: str, heard, steps: int, kind: str = "gated") -> None:
    """Trains in `out`, going on with what is there; `heard` gets the number of every step done."""
    from synthetic import sparse_activations

    from rsae_triton import train

    torch.set_num_threads(1)
    sae = small_sae(kind)
    optimizer_step = torch.optim.Adam.step

    def step(self, *arguments, **options):
        heard.value += 1
        return optimizer_step(self, *arguments, **options)

    torch.optim.Adam.step = step
    settings = {"recipe": "hard", "target_l0": 6.0, "checkpoint_every": 3, "log_every": 2, "deterministic": True}
    train(sae, sparse_activations(), steps=steps, batch_size=64, out=Path(out), resume=True, progress=False, **settings)
    sae.save_pretrained(Path(out) / "sae")


def together(rank: int, world: int, features: int, folder: str, kind: str, options: dict) -> None:
    """One of `world` processes that train on a mesh; what each ends with lies in folder/rank.pt.

    unreadable: {rank: step}, the checkpoint that one process cannot read, as on a file system of its own. full: {rank:
    step}, the one whose part it finds no room for; what it is told then lies there instead.
    """
    import torch.distributed as dist
    from synthetic import sparse_activations

    from rsae_triton import train
    from rsae_triton.common.errors import StorageError
    from rsae_triton.training.distributed import Mesh

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    here = Path(folder)
    step = options.pop("unreadable", {}).get(rank)
    if step is not None:
        hide_checkpoint(step)
    full = options.pop("full", None)
    if full is not None and rank in full:
        fill_disk(full[rank])
    dist.init_process_group("gloo", init_method=f"file://{here / 'meeting'}", rank=rank, world_size=world)
    try:
        mesh = Mesh(features)
        sae = mesh.shard(small_sae(kind))
        try:
            log = train(sae, sparse_activations(), progress=False, mesh=mesh, **options)
        except StorageError as error:
            if full is None:
                raise
            torch.save({"refused": str(error)}, here / f"{rank}.pt")
            return
        found = {"log": log.as_dict(), "place": (mesh.data, mesh.features), "weights": dict(sae.state_dict())}
        torch.save(found, here / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def step_of(together, sae, x, known: bool):
    """The gradients of one batch, summed over the processes as training does, and their norm. known: the norms of the
    matrices' gradients come with the loss, as from the sparse step's kernels; then nothing may read these again."""
    from rsae_triton.training.recipes import recipe_for

    terms = together.losses(sae, x, recipe_for(sae, "hard"), 0.05, None, None)
    terms.total.backward()
    kept = {}
    if known:
        kept = {name: getattr(sae, name).grad.clone() for name in ("W_enc", "W_dec")}
        terms.squares = sum(one.square().sum() for one in kept.values())
        for name in kept:
            getattr(sae, name).grad.zero_()
    summed = together.finish(sae, terms, [False])
    grads = {name: one.grad for name, one in sae.named_parameters() if one.grad is not None}
    return {**grads, **kept}, summed.grad_norm


def one_step(rank: int, world: int, features: int, folder: str, kind: str, options: dict) -> None:
    """One of `world` processes that make the gradients of a step; those of its features lie in folder/rank.pt."""
    import torch.distributed as dist
    from synthetic import sparse_activations

    from rsae_triton.training.distributed import Mesh

    torch.set_num_threads(1)
    here = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{here / 'meeting'}", rank=rank, world_size=world)
    try:
        mesh = Mesh(features)
        part = sparse_activations()[:512].chunk(mesh.data[1])[mesh.data[0]]
        grads, norm = step_of(mesh, mesh.shard(small_sae(kind)), part, options["known"])
        torch.save({"place": (mesh.data, mesh.features), "weights": grads, "norm": norm}, here / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def fill_disk(step: int) -> None:
    """Half of this process's part of one checkpoint is written, and then there is no room."""
    import errno

    from rsae_triton.training import distributed

    write = distributed.write_parts

    def refuse(folder, tensors):
        write(folder, tensors)
        if folder.name.endswith(str(step)):
            for part in (folder / "state").iterdir():
                os.truncate(part, part.stat().st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device")

    distributed.write_parts = refuse


def hide_checkpoint(step: int) -> None:
    from rsae_triton.common.errors import FormatError
    from rsae_triton.training import resuming

    read = resuming.read_info

    def refuse(path):
        if path.name.endswith(str(step)):
            raise FormatError(f"{path} is missing")
        return read(path)

    resuming.read_info = refuse


def run_together(
    world: int, features: int, folder: Path, kind: str, timeout: float = 120, work=together, **options
) -> list[dict]:
    """Trains on `world` processes (or does other `work`) and returns what each found; fails where one does."""
    (folder / "meeting").unlink(missing_ok=True)
    processes = [
        CONTEXT.Process(target=work, args=(rank, world, features, str(folder), kind, options)) for rank in range(world)
    ]
    for one in processes:
        one.start()
    until = time.monotonic() + timeout
    for one in processes:
        one.join(max(0.1, until - time.monotonic()))
    codes = [one.exitcode for one in processes]
    for one in processes:
        if one.is_alive():
            os.kill(one.pid, 9)
            one.join()
    assert codes == [0] * world, f"exit codes {codes}"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def measured_run(n: int, d_in: int, d_sae: int, memory: str, answer) -> None:
    """Trains for a step and answers by how many bytes this process grew at most (Linux)."""
    os.environ["RSAE_CPU_ENGINE"] = "tiled"  # a compiler takes memory too
    from rsae_triton import FusedRationalSAE, train

    torch.set_num_threads(1)
    x = torch.randn(n, d_in)
    # What the first product and the first optimiser take for themselves.
    train(FusedRationalSAE(d_in, 64, form="gated"), x[:64], steps=1, batch_size=64, progress=False)
    before = resident("VmRSS")
    sae = FusedRationalSAE(d_in, d_sae, form="gated", backend="cpu", initialise=False)
    with torch.no_grad():
        for one in (sae.W_enc, sae.W_dec):
            one.uniform_(-0.1, 0.1)
    Path("/proc/self/clear_refs").write_text("5")
    train(sae, x, steps=1, batch_size=n, memory=memory, recipe="hard", progress=False)
    answer.value = resident("VmHWM") - before


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def peak_of_a_run(n: int, d_in: int, d_sae: int, memory: str) -> int:
    answer = CONTEXT.Value("q", 0, lock=False)
    process = CONTEXT.Process(target=measured_run, args=(n, d_in, d_sae, memory, answer))
    process.start()
    process.join(180)
    assert process.exitcode == 0
    return answer.value
