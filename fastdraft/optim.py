"""AdamW over flat buffers, with Muon for matrices if asked, and the gradient kept as an un-normalised sum until the step.

Every trainable weight is a view into one flat buffer in the compute dtype; master weights, both moments and the
gradient sum are flat fp32 buffers of the same length. One step, with G the gradient sum over the global batch and N its
number of live step-0 rows:

    g = G / N;  g *= min(1, clip / |g|);  m, v as Adam's;  w -= lr * (m^ / (sqrt(v^) + eps) + weight_decay * w)

so the result does not depend on how the global batch was cut. Norm weights (1-D) take no weight decay. The arithmetic is
`kernels/adamw.py`. With `optimizer: muon` a matrix W [r, c] takes another step from the same g:

    m += (1 - mu) (g - m);  u = (1 - mu) g + mu m;  W -= lr * (0.2 sqrt(max(r, c)) NS(u) + weight_decay * W)

NS(u) is nearly U V^T of u = U S V^T, by five Newton-Schulz iterations in the compute dtype, whose products are the GPU's
fastest. The factor gives the step the size that AdamW's usually has; a rate of four times AdamW's was the best
(docs/quality.md). A matrix's moment v is kept and stays 0: then all optimizers have one layout of checkpoints, slices and
buffers.

torch.optim.Muon is the same arithmetic (a test compares them). It is not used because it iterates in bf16 whatever the
masters are, so that no float64 test could hold processes to one another; steps on tensors that it is given whole, where
here a process may have a slice; and has no step that changes nothing, which N = 0 must be without asking the device.

Sources: AdamW (arXiv 1711.05101); Muon (Keller Jordan, 2024), its factor: Moonlight (arXiv 2502.16982); WSD (arXiv
2404.06395), the form of its decay: arXiv 2405.18392.

# P trainable weights
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdraft.config import OptimConfig
from fastdraft.kernels.adamw import adamw_, adamw_scratch
from fastdraft.kernels.jit import compile_together
from fastdraft.model.graph import GraphPool, Replay

NS_STEPS, NS_COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # Keller Jordan's: singular values come to 0.7 .. 1.2
GRAPH_FLOPS = 2e12  # of all matrices of a step; from there on a GPU takes longer than the host does for its launches


class FlatAdamW:
    """Owns the flat buffers of `parameters`; the parameters become views into `self.weights`."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        config: OptimConfig,
        total_steps: int,
        dtype: torch.dtype,
        norms: list[tuple[int, int]] | None = None,  # ranges without weight decay; None: the parameters of one dimension
        muon: Muon | None = None,  # of a slice of the weights; None: as the config says, of the parameters
    ):
        if not parameters:
            raise ValueError("the draft has no trainable parameter")
        self.config, self.total_steps, self.step_count = config, total_steps, 0
        self.names = list(parameters)
        first = next(iter(parameters.values()))
        count = sum(p.numel() for p in parameters.values())
        if muon is None and config.optimizer == "muon":
            muon = Muon(matrices({name: p.shape for name, p in parameters.items()}, config), (0, count), config, dtype)
        self.muon = muon
        buffer = dict(device=first.device, dtype=torch.promote_types(dtype, torch.float32))
        self.master = torch.cat([p.detach().reshape(-1) for p in parameters.values()]).to(**buffer)
        self.m, self.v, self.grad = (torch.zeros(count, **buffer) for _ in range(3))
        self.weights = self.master.to(dtype) if dtype != self.master.dtype else self.master
        self.updates = torch.zeros((), dtype=torch.float64, device=first.device)  # steps that had a live row
        self.scratch = adamw_scratch(first.device)
        self.compiled = not self.grad.is_cuda
        self.grads: dict[str, Tensor] = {}  # views of the gradient sum, by parameter name
        found, start = [], 0
        for name, p in parameters.items():
            end = start + p.numel()
            p.data = self.weights[start:end].view(p.shape)
            self.grads[name] = self.grad[start:end].view(p.shape)
            if p.ndim == 1:
                found.append((start, end))
            start = end
        norms = found if norms is None else norms
        self.not_decayed = _ranges(norms, first.device)
        self.by_adamw: list[tuple[slice, Tensor]] = []  # what Muon leaves to AdamW, and the ranges without decay in it
        for start, end in [] if muon is None else muon.rest(count):
            inside = [(max(lo, start) - start, min(hi, end) - start) for lo, hi in norms if lo < end and start < hi]
            self.by_adamw.append((slice(start, end), _ranges(inside, first.device)))

    def lr(self, step: int) -> float:
        """Of AdamW, by optimizer step, counted from 0: linear warm-up, then by `schedule` to min_lr_ratio."""
        c = self.config
        warmup = max(1, round(c.warmup_ratio * self.total_steps))
        if step < warmup:
            return c.lr * (step + 1) / warmup
        if c.schedule == "wsd":
            decay = max(1, round(c.decay_share * self.total_steps))
            progress = min(1.0, max(0, step - (self.total_steps - decay) + 1) / (decay + 1))
            share = 1 - math.sqrt(progress)
        else:
            progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
            share = 0.5 * (1 + math.cos(math.pi * progress))
        return c.lr * (c.min_lr_ratio + (1 - c.min_lr_ratio) * share)

    def step(self, num_live: Tensor) -> Tensor:  # scalar tensor: norm of G / N before clipping
        """One step from the summed gradient over `num_live` (device scalar), then zeroes the sum.

        A batch without a live row (num_live 0) leaves weights and moments as they are; the schedule still counts it.
        """
        lr = self.lr(self.step_count)
        self.step_count += 1
        if self.muon is not None:
            return self._step_with_muon(num_live, lr)
        return self._adamw(slice(None), self.not_decayed, num_live, self.updates, lr, self.config.clip)

    def _adamw(
        self,
        part: slice,  # of the flat buffers
        not_decayed: Tensor,  # [S, 2], within it
        num_live: Tensor,  # scalar
        updates: Tensor,  # scalar, counted up
        lr: float,
        clip: float,
    ) -> Tensor:  # scalar: the part's norm
        c = self.config
        step = partial(
            adamw_,
            self.grad[part],
            self.master[part],
            self.m[part],
            self.v[part],
            None if self.weights is self.master else self.weights[part],
            not_decayed,
            num_live,
            updates,
            self.scratch,
            lr=lr,
            betas=c.betas,
            eps=c.eps,
            weight_decay=c.weight_decay,
            clip=clip,
        )
        if not self.compiled:
            compile_together(step, self.grad.device)
            self.compiled = True
        return step()

    @torch.no_grad()
    def _step_with_muon(self, num_live: Tensor, lr: float) -> Tensor:
        """The whole gradient is clipped by its one norm. AdamW then goes over what Muon leaves, part by part: to scale its
        gradient by c is to divide it by N / c."""
        rows = num_live.clamp_min(1)
        norm = torch.linalg.vector_norm(self.grad, dtype=torch.float64) / rows
        scale = (self.config.clip / norm.clamp_min(1e-30)).clamp_max(1.0)
        go = (num_live > 0).to(self.master.dtype)
        weights = None if self.weights is self.master else self.weights
        self.muon.step_(self.grad, self.master, self.m, weights, (scale / rows).to(self.master.dtype), go, lr)
        for part, not_decayed in self.by_adamw:
            self._adamw(part, not_decayed, num_live / scale, self.updates.clone(), lr, math.inf)
        self.updates += go
        return norm.to(self.grad.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """The live buffers, and the step count in a tensor of its own."""
        step_count = torch.tensor(self.step_count)
        return {"master": self.master, "m": self.m, "v": self.v, "updates": self.updates, "step_count": step_count}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in ("master", "m", "v", "updates"):
            mine = getattr(self, name)
            if state[name].shape != mine.shape:
                raise ValueError(f"checkpoint has {state[name].numel()} trainable weights, this draft {mine.numel()}")
            mine.copy_(state[name])
        self.step_count = int(state["step_count"])
        if self.weights is not self.master:
            self.weights.copy_(self.master)


def _ranges(pairs: list[tuple[int, int]], device: torch.device) -> Tensor:  # [S, 2] int64
    return torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2)


# --- Muon ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """A weight that Muon steps, or this process's part of it, and where that lies among all weights laid end to end."""

    name: str
    start: int
    shape: tuple[int, int]
    whole: tuple[int, int]  # the weight's shape, of which processes that share weights have parts

    @property
    def end(self) -> int:
        return self.start + self.shape[0] * self.shape[1]


def matrices(
    shapes: dict[str, Sequence[int]],
    config: OptimConfig,
    whole: dict[str, Sequence[int]] | None = None,  # of the weights that `shapes` are parts of; None: they are whole
) -> list[Matrix]:
    """The weights that `optim.muon_weights` names. Where a user names none, `run/draft.py` `named_optim` has named those of
    the method, which alone knows what is a matrix of a linear map and what a table with a row for each token.

    ValueError for a name that no weight has, for a weight that is no matrix, and where no matrix is left.
    """
    patterns, found, start = config.muon_weights, [], 0
    assert patterns is not None
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in shapes):
            raise ValueError(
                f"optim.muon_weights names {pattern!r}, and no trained weight has that name; there are {', '.join(shapes)}"
            )
    for name, shape in shapes.items():
        chosen = any(fnmatchcase(name, pattern) for pattern in patterns)
        if chosen and len(shape) != 2:
            raise ValueError(
                f"optim.muon_weights names {name}, which is {list(shape)}: Muon orthogonalises matrices, and this is none; "
                "leave it to AdamW"
            )
        if chosen:
            found.append(Matrix(name, start, tuple(shape), tuple((whole or shapes)[name])))
        start += math.prod(shape)
    if not found:
        raise ValueError("optim.optimizer is muon, and no weight is left to it; set optim.optimizer=adamw")
    return found


class MuonCost(NamedTuple):
    """Of an optimizer step, for the process that has most of each."""

    num_bytes: int  # beside the flat buffers, at most
    sent: int  # bytes that go to those who share the weights
    flops: int


def muon_cost(
    weights: list[Matrix],
    itemsize: int,  # of a number of the compute dtype
    count: int,  # weights of a process, before replicas divide them
    replicas: int = 1,
    tensor: int = 1,  # processes that share the weights, of which `weights` are one's parts
) -> MuonCost:
    """What Muon takes; nothing without matrices.

    Several replicas gather the directions of all weights. Then a matrix [r, c] has its direction, the iterate before and
    behind a product and, in turn, two squares of the short side or its step in fp32. Processes that share the weights first
    send each other the parts of all matrices that they step, and keep whole those that they orthogonalise.
    """
    if not weights:
        return MuonCost(0, 0, 0)
    size = -(-count // replicas)
    slices = (replicas + 1) * size * itemsize if replicas > 1 else 0
    costs = []
    for first in range(0, size * replicas, size):
        stepped = [w for w in weights if w.start < first + size and first < w.end]
        parts = itemsize * sum(w.end - w.start for w in stepped)
        for mine in shared_out(stepped, tensor):
            one = max((_bytes_of_one(w.whole, itemsize) for w in mine), default=0)
            peak = one
            if tensor > 1:
                wholes = tensor * itemsize * sum(w.end - w.start for w in mine)
                step = 4 * max((w.end - w.start for w in stepped), default=0)
                peak = max(wholes + max(parts, one), parts + step)
            costs.append((peak, 2 * parts * (tensor - 1) // tensor, muon_flops(mine)))
    most = [max(of_each) for of_each in zip(*costs, strict=True)]
    return MuonCost(slices + most[0], most[1], most[2])


def _bytes_of_one(shape: tuple[int, int], itemsize: int) -> int:
    r, c = shape
    return 3 * itemsize * r * c + max(2 * itemsize * min(r, c) ** 2, 4 * r * c)


def muon_flops(weights: Iterable[Matrix]) -> int:
    """Of orthogonalising the whole matrices: NS_STEPS times three products."""
    sides = (sorted(w.whole) for w in weights)
    return sum(NS_STEPS * 2 * short**2 * (2 * long + short) for short, long in sides)


def shared_out(weights: list[Matrix], n: int) -> list[list[Matrix]]:
    """Which of `weights` each of n processes orthogonalises: the costliest first, to whoever has least to do."""
    theirs: list[list[Matrix]] = [[] for _ in range(n)]
    for matrix in sorted(weights, key=lambda w: -muon_flops([w])):  # a stable sort: all processes find the same
        min(theirs, key=muon_flops).append(matrix)
    return theirs


def one_by_one(weights: list[Matrix], directions: Iterable[Tensor]) -> Iterator[Tensor]:  # of each, as many elements
    """The directions of whole matrices orthogonalised, each when it is asked for."""
    for matrix, direction in zip(weights, directions, strict=True):
        yield orthogonalized(direction.view(matrix.shape)).reshape(-1)


class Muon:
    """Steps matrices of a flat buffer, of which this process has the elements from mine[0] up to mine[1].

    A step orthogonalises whole matrices. Where replicas have the rest of a buffer, `gather` gives every process the
    directions of all, and each goes on with the matrices that its own elements are of. Where the buffer holds parts of
    matrices, `orthogonalize` is asked for the same parts of the whole ones' results.
    """

    def __init__(
        self,
        weights: list[Matrix],
        mine: tuple[int, int],
        config: OptimConfig,
        dtype: torch.dtype,  # that directions are orthogonalised in
        gather: Callable[[Tensor], Tensor] | None = None,  # everyone's [n] end to end; None: this process has all elements
        orthogonalize: Callable[[list[Matrix], Iterable[Tensor]], Iterator[Tensor]] = one_by_one,  # of all that are stepped
    ):
        self.config, self.dtype, self.gather, self.orthogonalize = config, dtype, gather, orthogonalize
        self.rate, self.momentum = config.muon_rate / config.lr, config.momentum  # the rate as a multiple of AdamW's
        self.parts: list[tuple[Matrix, slice, slice]] = []  # a matrix, what is mine of it, where that lies in my buffers
        for matrix in weights:
            lo, hi = max(matrix.start, mine[0]), min(matrix.end, mine[1])
            if lo < hi:
                within, here = slice(lo - matrix.start, hi - matrix.start), slice(lo - mine[0], hi - mine[0])
                self.parts.append((matrix, within, here))
        alone = gather is None and orthogonalize is one_by_one  # what processes say to each other is not recorded
        self.is_small = alone and muon_flops(matrix for matrix, _, _ in self.parts) <= GRAPH_FLOPS
        self.recorded: _Recorded | None = None

    def rest(self, count: int) -> list[tuple[int, int]]:
        """The ranges of a buffer of `count` elements that are no matrix's."""
        edges = [0, *(x for _, _, here in self.parts for x in (here.start, here.stop)), count]
        return [(lo, hi) for lo, hi in zip(edges[::2], edges[1::2], strict=True) if lo < hi]

    def step_(
        self,
        grad: Tensor,  # [n] the sum G, zeroed where it is a matrix's
        master: Tensor,  # [n] updated
        m: Tensor,  # [n] updated
        weights: Tensor | None,  # [n] written, master rounded; None where master serves
        factor: Tensor,  # scalar: what makes G the clipped g
        go: Tensor,  # scalar: 1, or 0 for a step that changes nothing
        lr: float,  # AdamW's
    ) -> None:
        rate = torch.full((), lr * self.rate, dtype=torch.float64, device=grad.device)
        buffers = (grad, master, m, weights)
        if not (grad.is_cuda and self.is_small):
            self._launch(*buffers, factor, go, rate)
            return
        if self.recorded is None or not self.recorded.is_of(buffers):
            self.recorded = _Recorded(buffers, (factor, go, rate))
        self.recorded.run(self._launch, (factor, go, rate))

    def _launch(
        self,
        grad: Tensor,
        master: Tensor,
        m: Tensor,
        weights: Tensor | None,
        factor: Tensor,  # as those of `step_`
        go: Tensor,
        rate: Tensor,  # scalar, float64: Muon's
    ) -> None:
        c = self.config
        if self.gather is None:
            directions = (self._direction(grad[here], m[here], factor, go) for _, _, here in self.parts)
        else:
            mine = torch.zeros(len(grad), dtype=self.dtype, device=grad.device)
            for _, _, here in self.parts:
                mine[here] = self._direction(grad[here], m[here], factor, go)
            everyone = self.gather(mine)
            directions = (everyone[matrix.start : matrix.end] for matrix, _, _ in self.parts)
        found = self.orthogonalize([matrix for matrix, _, _ in self.parts], directions)
        for (matrix, within, here), direction in zip(self.parts, found, strict=True):
            step = direction[within].to(master.dtype)
            if c.weight_decay:
                master[here].mul_(1 - go * (rate * c.weight_decay).to(go.dtype))
            master[here].sub_(step.mul_(go * (rate * (0.2 * math.sqrt(max(matrix.whole)))).to(go.dtype)))
            if weights is not None:
                weights[here] = master[here]
            grad[here].zero_()

    def _direction(self, grad: Tensor, m: Tensor, factor: Tensor, go: Tensor) -> Tensor:
        g = grad * factor
        m.lerp_(g, go * (1 - self.momentum))
        return g.lerp_(m, self.momentum).to(self.dtype)


class _Recorded:
    """A step of small matrices on a GPU: some thirty launches for each, which one CUDA graph replays. The first step runs
    without it, the second is recorded. The buffers stay where they are, and three scalars are copied into place."""

    def __init__(self, buffers: Sequence[Tensor | None], scalars: Sequence[Tensor]):
        self.buffers, self.scalars = tuple(buffers), tuple(x.clone() for x in scalars)
        self.replay = Replay(GraphPool(), self.scalars[0].device)

    def is_of(self, buffers: Sequence[Tensor | None]) -> bool:
        return all(mine is theirs for mine, theirs in zip(self.buffers, buffers, strict=True))

    def run(
        self,
        launch: Callable[..., None],  # of the buffers and the scalars
        scalars: Sequence[Tensor],
    ) -> None:
        for place, x in zip(self.scalars, scalars, strict=True):
            place.copy_(x)
        self.replay.run(partial(launch, *self.buffers, *self.scalars))


def orthogonalized(
    x: Tensor,  # [r, c]
) -> Tensor:  # [r, c]
    """Nearly U V^T for x = U S V^T: its singular values are brought to about 1 by Newton-Schulz iterations of products."""
    a, b, c = NS_COEFFICIENTS
    wide = x if x.shape[0] <= x.shape[1] else x.T
    size = torch.linalg.vector_norm(wide, dtype=torch.promote_types(x.dtype, torch.float32))
    wide = wide * (1 / size.clamp_min(1e-7)).to(x.dtype)
    for _ in range(NS_STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[0] <= x.shape[1] else wide.T
