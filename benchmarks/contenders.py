"""Who does the work of a case: this package, eager PyTorch in two writings, torch.compile, the bare products, peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kat
import torch
from cases import Case, make_sae
from measuring import Contender, forget
from torch import Tensor

from rsae_triton import FusedRationalSAE
from rsae_triton.ops.backends import gate_backward
from rsae_triton.ops.reference import GateSpec, GateTensors, rational_gate
from rsae_triton.ops.runtime import matmul_precision
from rsae_triton.ops.workspace import StepMemory, Workspace
from rsae_triton.training.memory import MemoryPlan
from rsae_triton.training.recipes import RECIPES, losses

WEIGHTS = {"direct": 0.1, "gated": 0.05}
"""Weight of the sparsity term: l1 in the direct form, l0 in the gated one."""
TOP_K = 32


class Made:
    """A case's SAE, input and optimiser, which all contenders but the peers share.

    Adam's learning rate is 0: it does all of its work, and every turn starts from the same weights.
    """

    def __init__(self, case: Case, device: torch.device, peers: bool) -> None:
        self.case, self.device, self.peers = case, device, peers
        self.sae, self.x = make_sae(case, device, "auto")
        self.recipe = RECIPES["paper" if case.form == "direct" else "hard"]
        self.weight = WEIGHTS[case.form]
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=0.0, fused=True)
        if case.work == "step":
            # Adam's state and gradients are there before any contender's memory is looked at.
            for one in self.sae.parameters():
                one.grad = torch.zeros_like(one)
            self.optimiser.step()

    def contenders(self) -> tuple[list[Contender], dict[str, Tensor]]:
        """All of them, eager Horner first, and what they must find."""
        return getattr(self, f"_{self.case.work}")()

    def backends(self) -> dict[str, tuple[str, str]]:
        """Ours: name -> (backend, strategy of the cost model)."""
        if self.device.type == "cuda":
            return {"ours": ("auto", "split"), "ours, split": ("triton:split", "split"),
                    "ours, fused": ("triton:fused", "fused")}  # fmt: skip
        return {"ours": ("auto", "split")}

    def using(self, backend: str, work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            self.sae.backend = backend
            work()

        return run

    def forget(self) -> int:
        """Drops the gradients; returns their bytes."""
        return forget(self.sae)

    def gradients(self) -> dict[str, Tensor]:
        return {name: one.grad for name, one in self.sae.named_parameters() if one.grad is not None and one.numel()}

    # The whole training step

    def _step(self) -> tuple[list[Contender], dict[str, Tensor]]:
        case, x = self.case, self.x
        n, d_sae = case.n_tokens, case.d_sae
        last: dict[str, Tensor] = {}

        def step(loss: Callable[[], Tensor], memory: StepMemory | None = None) -> Callable[[], None]:
            def run() -> None:
                if memory is None:
                    self.optimiser.zero_grad(set_to_none=True)
                    total = loss()
                else:  # as `train()` has it
                    memory.zero_grad(self.sae.parameters())
                    with memory:
                        total = loss()
                total.backward()
                self.optimiser.step()
                last["loss"] = total.detach()

            return run

        def planned(mode: str, tokens: int | None = None, features: int | None = None) -> Callable[[], Tensor]:
            plan = MemoryPlan(mode, tokens, features, 0.0, None)
            return lambda: losses(self.sae, x, self.recipe, self.weight, plan=plan).total

        def found() -> dict[str, Tensor]:
            return {"loss": last["loss"], **self.gradients()}

        def ours(name: str, backend: str, strategy: str, *cut: Any, **pieces: int) -> Contender:
            memory = StepMemory() if pieces else None

            def forget() -> int:
                if memory is not None:
                    memory.space = Workspace()
                return self.forget()

            work = self.using(backend, step(planned(*cut), memory))
            return Contender(name, work, found, strategy=strategy, pieces=pieces, forget=forget)

        # Half of the tokens: what `train(memory="chunked")` takes where it fits.
        tokens, features = max(n // 2, 16), max(min(1024, d_sae // 4), 16)
        made = [ours("eager, Horner", "eager", "eager", "saved"), Contender("bare products", products(x, d_sae, 5))]
        made += [ours(name, *how, "saved") for name, how in self.backends().items()]
        made += [
            ours("ours, chunked", "auto", "chunked", "chunked", tokens, chunk_tokens=tokens),
            ours("ours, streamed", "auto", "streamed", "streamed", None, features, chunk_features=features),
        ]
        if case.compiled:
            compiled = self.using("eager", step(torch.compile(planned("saved"))))
            made.append(Contender("torch.compile", compiled, found, strategy="compiled", forget=self.forget))
        if self.peers and case.degree == (3, 2) and case.form == "direct" and case.groups == 1 and not case.sweep:
            from peers import steps

            made += steps(case, self.sae, x)
        if case.powers:
            # The slowest by far, and no target rests on it: with many features it gets one turn.
            most = 1 if self.device.type == "cpu" and d_sae > 10_000 else None
            powers = step(lambda: naive_loss(self))
            made.append(Contender("eager, powers", powers, found, strategy="eager", forget=self.forget, most=most))
        return made, self._reference_step()

    def _reference_step(self) -> dict[str, Tensor]:
        """Loss and gradients by the written-out formulas, in float64 where that is quick, in pieces."""
        case = self.case
        dtype = torch.float64 if case.n_tokens * case.d_sae <= 2**21 else torch.float32
        sae, x = self.in_dtype(dtype), self.x.to(dtype)
        cut = {"l1_weight" if case.form == "direct" else "l0_weight": self.weight}
        with matmul_precision("highest"):
            total = sae.autoencode(x, hard=not self.recipe.soft, chunk_tokens=max(2**22 // case.d_sae, 16), **cut).total
        total.backward()
        return {"loss": total.detach(), **{n: p.grad for n, p in sae.named_parameters() if p.grad is not None}}

    def in_dtype(self, dtype: torch.dtype) -> FusedRationalSAE:
        sae, _ = make_sae(self.case, self.device, "eager")
        sae.load_state_dict(self.sae.state_dict())
        return sae.to(dtype)

    # The encoder alone

    def _encode(self) -> tuple[list[Contender], dict[str, Tensor]]:
        case, x, sae = self.case, self.x, self.sae
        last: dict[str, Tensor] = {}

        def keep(encode: Callable[[], Tensor]) -> Callable[[], None]:
            @torch.no_grad()
            def run() -> None:
                last.clear()
                last["z"] = encode()

            return run

        def encode() -> Tensor:
            return sae.encode(x)

        found = lambda: dict(last)  # noqa: E731
        made = [
            Contender("eager, Horner", self.using("eager", keep(encode)), found),
        ]
        if case.powers:
            made.append(Contender("eager, powers", keep(lambda: naive_encode(sae, x, hard=True)[0]), found))
        if case.compiled:
            made.append(Contender("torch.compile", self.using("eager", keep(torch.compile(encode))), found))
        made += [Contender(name, self.using(how[0], keep(encode)), found) for name, how in self.backends().items()]
        made.append(Contender("bare products", products(x, case.d_sae, 1)))
        return made, {"z": self._exact_code(hard=True)}

    @torch.no_grad()
    def _exact_code(self, hard: bool) -> Tensor:
        sae = self.in_dtype(torch.float32)
        rows = self.x.float().split(max(2**24 // self.case.d_sae, 1))
        return torch.cat([sae.encode(part, hard=hard).to(self.x.dtype) for part in rows])

    def _backward(self) -> tuple[list[Contender], dict[str, Tensor]]:
        case, x, sae = self.case, self.x, self.sae
        generator = torch.Generator(device=self.device).manual_seed(1)
        dz = torch.empty(case.n_tokens, case.d_sae, device=self.device).normal_(generator=generator).to(x.dtype)
        hard = not self.recipe.soft
        last: dict[str, Tensor] = {}

        def both(encode: Callable[[], Tensor]) -> Callable[[], None]:
            def run() -> None:
                sae.zero_grad(set_to_none=True)
                z = encode()
                z.backward(dz)
                last["z"] = z.detach()

            return run

        def encode() -> Tensor:
            return sae.encode_with_sums(x, hard=hard).z

        def found() -> dict[str, Tensor]:
            return {"z": last.pop("z"), **self.gradients()}

        made = [
            Contender("eager, Horner", self.using("eager", both(encode)), found),
        ]
        if case.powers:
            made.append(Contender("eager, powers", both(lambda: naive_encode(sae, x, hard)[0]), found))
        if case.compiled:
            made.append(Contender("torch.compile", self.using("eager", both(torch.compile(encode))), found))
        made += [Contender(name, self.using(how[0], both(encode)), found) for name, how in self.backends().items()]
        made.append(Contender("bare products", products(x, case.d_sae, 2)))
        exact = self.in_dtype(torch.float32)
        parts = max(2**22 // case.d_sae, 1)
        for part, slope in zip(x.float().split(parts), dz.float().split(parts), strict=True):
            exact.encode_with_sums(part, hard=hard).z.backward(slope)
        wanted = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None and p.numel()}
        return made, {"z": self._exact_code(hard), **wanted}

    # Inference to rows and back

    def _sparse(self) -> tuple[list[Contender], dict[str, Tensor]]:
        case, x, sae = self.case, self.x, self.sae
        last: dict[str, Tensor] = {}

        def keep(name: str, there_and_back: Callable[[], Tensor]) -> Callable[[], None]:
            @torch.no_grad()
            def run() -> None:
                last.clear()
                last[name] = there_and_back()

            return run

        def contender(name: str, backend: str, work: Callable[[], Tensor], what: str = "x_hat") -> Contender:
            return Contender(name, self.using(backend, keep(what, work)), lambda: dict(last))

        def largest() -> Tensor:
            z = sae.encode(x)
            values, indices = z.topk(TOP_K, dim=1, sorted=False)
            return torch.nn.functional.embedding_bag(
                indices, sae.W_dec, per_sample_weights=values.relu(), mode="sum"
            ).add_(sae.b_dec)

        def code() -> Tensor:
            return sae.decode_sparse(sae.encode_sparse(x))

        def code_largest() -> Tensor:
            return sae.decode_sparse(sae.encode_sparse(x, k=TOP_K))

        made = [
            contender("eager, Horner", "eager", lambda: sae.decode(sae.encode(x))),
            contender("ours, dense", "auto", lambda: sae.decode(sae.encode(x))),
            contender("ours", "auto", code),
            Contender("bare products", products(x, case.d_sae, 1)),
        ]
        z = self._exact_code(hard=True).float()
        exact = {"x_hat": z @ sae.W_dec.float() + sae.b_dec.float()}
        keep_k = z.relu()
        least = keep_k.topk(min(TOP_K, case.d_sae), dim=1).values[:, -1:]
        exact_k = torch.where(keep_k >= least, keep_k, 0) @ sae.W_dec.float() + sae.b_dec.float()
        if case.d_sae >= TOP_K:
            for name, backend, work in (("eager, top-k", "eager", largest), ("ours, top-k", "auto", code_largest)):
                made.append(contender(name, backend, work))
                made[-1].wanted = {"x_hat": exact_k}
        return made, exact

    # The gate's backward pass alone, as KAT's rational layers have it: r(h), no clip, no bias

    def _coefficients(self) -> tuple[list[Contender], dict[str, Tensor]]:
        case = self.case
        generator = torch.Generator(device=self.device).manual_seed(2)
        h = torch.empty(case.d_sae, case.n_tokens, device=self.device).normal_(generator=generator).mul_(0.5)
        g = torch.empty_like(h).normal_(generator=generator)
        h, g = h.to(case.torch_dtype), g.to(case.torch_dtype)
        sets = self.sae.gate.tensors()
        count = case.groups or case.d_sae
        one, zero = h.new_ones(1, dtype=torch.float32), h.new_zeros(1, dtype=torch.float32)
        nothing = h.new_zeros(case.d_sae, dtype=torch.float32)
        a, b = sets.a.detach(), sets.b.detach()
        gate = GateTensors(a, b, zero, one, one, nothing, nothing)
        spec = GateSpec(*case.degree, domain="free", hard=False)
        last: dict[str, Tensor] = {}

        def eager() -> None:
            rows = h.t().float().detach().requires_grad_()
            own_a, own_b = a.clone().requires_grad_(), b.clone().requires_grad_()
            z = rational_gate(rows, gate._replace(a=own_a, b=own_b), spec)[0]
            last["da"], last["db"] = torch.autograd.grad(z, (own_a, own_b, rows), g.t().float())[:2]

        def ours() -> None:
            backend = "triton" if self.device.type == "cuda" or kat.interpreted() else "cpu"
            grads = gate_backward(backend, h, g, None, None, gate, spec).gate
            last["da"], last["db"] = grads.a, grads.b

        def style(per_block: bool) -> Callable[[], None]:
            def run() -> None:
                _, last["da"], last["db"] = kat.backward(h.t(), g.t(), a, b, case.d_sae // count, per_block)

            return run

        found = lambda: dict(last)  # noqa: E731
        made = [Contender("eager, Horner", eager, found), Contender("ours", ours, found)]
        if self.device.type == "cuda" or kat.interpreted():
            made.append(Contender("KAT's way (an atomic an element)", style(False), found))
            made.append(Contender("FlashKAT's way (an atomic a block)", style(True), found))
        exact = [one.double().requires_grad_() for one in (a, b)]
        wide = gate._replace(a=exact[0], b=exact[1])
        for part, slope in zip(h.t().split(256), g.t().split(256), strict=True):
            z = (rational_gate(part.double(), wide, spec)[0] * slope).sum()
            z.backward()
        return made, {"da": exact[0].grad, "db": exact[1].grad}


def naive_rational(s: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """P(s) / (1 + |B(s)|) by powers, the way it is first written; a [G, p+1], b [G, q]."""
    numerator = sum(a[:, i] * s**i for i in range(a.shape[1]))
    denominator = 1 + abs(sum(b[:, j] * s ** (j + 1) for j in range(b.shape[1])))
    return numerator / denominator


def naive_encode(sae: FusedRationalSAE, x: Tensor, hard: bool) -> tuple[Tensor, Tensor]:
    """The encoder of an RSAE by powers: z [n, d_sae] and, in the gated form, a differentiable activity."""
    gate, spec = sae.gate.tensors(), sae.gate.spec(hard)
    h = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).float()
    t = (h - gate.threshold) / gate.input_scale
    r = naive_rational(torch.clamp(t, -1, 1) - gate.centre, gate.a, gate.b)
    if spec.form == "direct":
        z = gate.output_scale * (r + torch.relu(t - 1))
        if hard:
            z = torch.where(z.abs() > gate.activity_threshold, z, 0.0)
        return z.to(x.dtype), z
    opened = (h > gate.threshold).to(h.dtype)
    # A straight-through estimator: the value of the step, the derivative of the rational.
    active = r + (opened - r).detach()
    return (h * active).to(x.dtype), active


def naive_loss(made: Made) -> Tensor:
    """Computes `recipes.losses` with `naive_encode`."""
    sae, x = made.sae, made.x
    z, active = naive_encode(sae, x, hard=not made.recipe.soft)
    residual = x - (z @ sae.W_dec + sae.b_dec)
    mse = residual.square().sum(-1).mean()
    if made.case.form == "direct":
        return mse + made.weight * (z.abs() @ sae.W_dec.norm(dim=1)).mean()
    return mse + made.weight * active.sum() / len(x)


def products(x: Tensor, d_sae: int, count: int) -> Callable[[], None]:
    """The first `count` of the five matrix products of a step, into memory that is there already: the floor.

    The two of an encoder forward and backward are h and dW_enc.
    """
    n, d_in = x.shape
    generator = torch.Generator(device=x.device).manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, device=x.device).normal_(generator=generator).to(x.dtype)

    W_enc, h = draw(d_in, d_sae), draw(d_sae, n)
    dW_enc = torch.empty_like(W_enc)
    W_dec, out = (draw(d_sae, d_in), torch.empty_like(x)) if count == 5 else (None, None)
    dW_dec = None if W_dec is None else torch.empty_like(W_dec)

    def run() -> None:
        torch.mm(W_enc.t(), x.t(), out=h)
        if count > 1:
            torch.mm(x.t(), h.t(), out=dW_enc)
        if count == 5:
            torch.mm(h.t(), W_dec, out=out)
            torch.mm(h, x, out=dW_dec)
            torch.mm(W_dec, x.t(), out=h)

    return run
