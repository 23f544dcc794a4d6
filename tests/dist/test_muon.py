"""Muon where processes share the weights: what one process gives, in float64, in every layout and from any into any other.

The weights are a few small matrices, cut by rows, by columns and not at all; `test_layouts.py` has whole runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from meta_step import LiveBytes
from small_runs import by_ranks
from torch import Tensor, nn

from fastdraft import optim
from fastdraft.checkpoint import list_checkpoints, load_tensors, read_state, save_checkpoint
from fastdraft.config import OptimConfig
from fastdraft.dist import mesh
from fastdraft.dist import tensor as sharing
from fastdraft.dist.shard import SharedAdamW
from fastdraft.dist.tensor import Parts
from fastdraft.optim import FlatAdamW, matrices, muon_cost, muon_flops, orthogonalized, shared_out

SHAPES = {
    "norm": (7,),
    "rows": (8, 5),
    "columns": (3, 12),
    "other norm": (9,),
    "tall": (20, 4),
    "whole": (3, 5),
    "head": (8, 6),
    "wide": (4, 16),
}
CUT = {"rows": 0, "columns": 1, "tall": 0, "head": 0, "wide": 1}
CONFIG = OptimConfig(
    lr=0.05,
    weight_decay=0.3,
    clip=0.7,
    warmup_ratio=0.3,
    min_lr_ratio=0.1,
    optimizer="muon",
    muon_lr=0.08,
    muon_weights=["rows", "columns", "tall", "whole", "wide"],  # the head is AdamW's
)
# data, sequence, tensor, of up to eight processes
LAYOUTS = [layout for layout in itertools.product((1, 2, 4), repeat=3) if math.prod(layout) <= 8]
SHARES = 8  # of a step's gradient
SAVED, LAST = 6, 9  # steps


def cut_part(cut: dict[str, int], name: str, shape: Sequence[int], rank: int, size: int) -> tuple[slice, ...]:
    """Of a weight that `cut` names with the axis along which it is divided."""
    place = [slice(0, n) for n in shape]
    if name in cut:
        width = shape[cut[name]] // size
        place[cut[name]] = slice(rank * width, (rank + 1) * width)
    return tuple(place)


part = partial(cut_part, CUT)


def whole_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def gradients(step: int, share: int) -> dict[str, Tensor]:
    """Small in some steps, so that only others are clipped; none in step 2."""
    generator = torch.Generator().manual_seed(10 * step + share)
    size = 0.0 if step == 2 else 0.01 if step % 3 else 20.0
    return {n: size * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}


def run_alone(steps: int, dtype: torch.dtype = torch.float64) -> tuple[FlatAdamW, dict[str, nn.Parameter], list[float]]:
    own = {name: nn.Parameter(x) for name, x in whole_weights().items()}
    flat, norms = FlatAdamW(own, CONFIG, 10, dtype), []
    for step in range(steps):
        for share in range(SHARES):
            for name, grad in gradients(step, share).items():
                flat.grads[name] += grad
        norms.append(float(flat.step(torch.tensor(0.0 if step == 2 else SHARES, dtype=torch.float64))))
    return flat, own, norms


def of_process(dtype: torch.dtype = torch.float64) -> tuple[SharedAdamW, dict[str, nn.Parameter]]:
    """This process's optimizer and weights in the layout that it is in."""
    axis, parts = mesh.axis("tensor"), None
    places = {name: part(name, shape, axis.rank, axis.size) for name, shape in SHAPES.items()}
    own = {name: nn.Parameter(x[places[name]].clone()) for name, x in whole_weights().items()}
    if axis.size > 1:
        parts = Parts({name: torch.Size(shape) for name, shape in SHAPES.items()}, part, axis)
    return SharedAdamW(own, CONFIG, 10, dtype, mesh.axis("replicas"), parts), own


def take_steps(optimizer: SharedAdamW, steps: range) -> list[float]:
    axis, replicas, norms = mesh.axis("tensor"), mesh.axis("replicas"), []
    for step in steps:
        for share in range(replicas.rank, SHARES, replicas.size):
            for name, grad in gradients(step, share).items():
                optimizer.grads[name] += grad[part(name, grad.shape, axis.rank, axis.size)]
        live = 0.0 if step == 2 else SHARES / replicas.size
        norm = optimizer.start(torch.full((5, 2), live, dtype=torch.float64))
        optimizer.finish()
        norms.append(float(norm))
    return norms


def assert_weights(own: dict[str, nn.Parameter], law: dict[str, nn.Parameter], case: object) -> None:
    axis = mesh.axis("tensor")
    for name, p in own.items():
        expected = law[name].data[part(name, SHAPES[name], axis.rank, axis.size)]
        torch.testing.assert_close(p.data, expected, rtol=1e-12, atol=1e-13, msg=f"{case}, {name}")


def of_world(world: int) -> list[tuple[int, int, int]]:
    return [layout for layout in LAYOUTS if math.prod(layout) == world]


def _save_all(world: int, folder: Path) -> None:
    """Steps in every layout of so many processes, with a checkpoint on the way; no matrix is orthogonalised twice in a
    tensor group."""
    mesh.start_process("cpu")
    (_, law, norms), (_, half, _) = run_alone(LAST), run_alone(SAVED)
    done, original = [], orthogonalized
    sharing.orthogonalized = lambda x: done.append(tuple(x.shape)) or original(x)
    for layout in of_world(world):
        mesh.lay_out(*layout[1:])
        optimizer, own = of_process()
        found = take_steps(optimizer, range(SAVED))
        assert_weights(own, half, layout)
        save_checkpoint(
            folder / str(layout), optimizer.state_dict() | {"rng.cpu": torch.arange(3)}, {"step": SAVED}, keep=1
        )
        found += take_steps(optimizer, range(SAVED, LAST))
        assert_weights(own, law, layout)
        torch.testing.assert_close(found, norms, rtol=1e-12, atol=0)
        torch.save([p.data for p in own.values()], folder / f"{layout} of rank {mesh.rank()}")
        stepped = {matrix.name for matrix, _, _ in optimizer.own.muon.parts}
        if layout[2] > 1:  # the others of this group have the same matrices, each of which is the work of one
            mine = mesh.axis("tensor").name
            by_group = [n for group, n in mesh.from_all((mine, len(done))) if group == mine]
            assert sum(by_group) == LAST * len(stepped), (layout, by_group)
        done.clear()


def _load_all(world: int, folder: Path) -> None:
    mesh.start_process("cpu")
    law, half = run_alone(LAST)[1], run_alone(SAVED)[0].state_dict()
    for layout in of_world(world):
        mesh.lay_out(*layout[1:])
        for saved_by in LAYOUTS:
            optimizer, own = of_process()
            into = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
            (path,) = list_checkpoints(folder / str(saved_by))
            assert load_tensors(read_state(path), into, share=(mesh.rank(), mesh.world()))
            optimizer.load_state_dict(into)
            whole = {name: torch.zeros_like(half[name]) for name in ("master", "m", "v")}
            load_tensors(read_state(path), whole)
            for name, expected in whole.items():
                torch.testing.assert_close(expected, half[name], rtol=1e-12, atol=1e-13)
            take_steps(optimizer, range(SAVED, LAST))
            assert_weights(own, law, (saved_by, layout))
            if saved_by == layout:  # bit for bit what it had come to without a stop
                undisturbed = torch.load(folder / f"{layout} of rank {mesh.rank()}")
                assert all(torch.equal(p.data, x) for p, x in zip(own.values(), undisturbed, strict=True)), layout


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    for world in (1, 2, 4, 8):
        assert by_ranks(world, _save_all, world, folder) == [0] * world
    return folder


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_layout_makes_the_steps_of_one_process_and_goes_on_with_any_others_checkpoint(world, saved):
    """17 layouts of up to eight processes: weights and norms; then each of the 17 checkpoints in each of the layouts."""
    assert by_ranks(world, _load_all, world, saved) == [0] * world


def _in_bf16() -> None:
    """What a GPU's run computes in: the same up to the rounding of directions, which five iterations enlarge."""
    mesh.start_process("cpu")
    mesh.lay_out(1, 2)
    optimizer, own = of_process(torch.bfloat16)
    flat, alone, _ = run_alone(0, torch.bfloat16)
    before = flat.master.clone()
    for share in range(SHARES):
        for name, grad in gradients(0, share).items():
            flat.grads[name] += grad
    flat.step(torch.tensor(float(SHARES), dtype=torch.float64))
    take_steps(optimizer, range(1))
    axis = mesh.axis("tensor")
    for name, p in own.items():
        assert p.dtype == torch.bfloat16
        moved = float((flat.master - before).abs().max())
        expected = alone[name].data[part(name, SHAPES[name], axis.rank, 2)]
        assert float((p.data.float() - expected.float()).abs().max()) < 0.1 * moved, name


def test_directions_travel_in_bf16():
    assert by_ranks(2, _in_bf16) == [0, 0]


LARGE = {"norm": (64,), "fc": (64, 192), "q": (128, 64), "gate": (192, 64), "down": (64, 192), "tall": (256, 64)}


def _measured(data: int, size: int) -> None:
    """By PyTorch's own count of what is allocated while Muon steps."""
    mesh.start_process("cpu")
    mesh.lay_out(1, size)
    axis, replicas = mesh.axis("tensor"), mesh.axis("replicas")
    place = partial(cut_part, {"fc": 0, "q": 0, "gate": 0, "down": 1, "tall": 0})
    parts = Parts({name: torch.Size(shape) for name, shape in LARGE.items()}, place, axis)
    config = CONFIG.model_copy(update={"muon_weights": [name for name in LARGE if name != "norm"], "weight_decay": 0.0})
    for dtype in (torch.float32, torch.bfloat16):
        own = {name: nn.Parameter(torch.randn(shape)) for name, shape in parts.local_shapes.items()}
        shared = SharedAdamW(own, config, 10, dtype, replicas, parts)
        flat = shared.own
        weights = None if flat.weights is flat.master else flat.weights
        args = flat.grad, flat.master, flat.m, weights, torch.ones(()), torch.ones(())
        count = sum(math.prod(shape) for shape in parts.local_shapes.values())
        with LiveBytes([x for x in args if x is not None], device="cpu") as live:
            flat.muon.step_(*args, 0.1)
        weights = matrices(parts.local_shapes, config, parts.shapes)
        predicted = muon_cost(weights, dtype.itemsize, count, data, size).num_bytes
        most = max(mesh.from_all(live.peak))
        # A thread of gloo's may hold what was sent for a moment after it has arrived.
        sent = dtype.itemsize * sum(w.end - w.start for w in weights)
        assert 0.6 * predicted <= most <= 1.02 * predicted + sent, (dtype, data, size, most / predicted)


@pytest.mark.parametrize(("data", "size"), [(1, 2), (1, 4), (2, 2)])
def test_the_memory_of_a_shared_step_of_muon_is_predicted(data, size):
    assert by_ranks(data * size, _measured, data, size) == [0] * (data * size)


def test_work_is_shared_out_alike_and_evenly():
    """Of Llama-3.1-8B's draft: each process finds the same, all is done, and none has much more than its share."""
    shapes = {"fc": (4096, 12288), "q": (4096, 8192), "k": (1024, 8192), "v": (1024, 8192), "o": (4096, 4096)}
    shapes |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
    weights = matrices(shapes, CONFIG.model_copy(update={"muon_weights": ["*"]}))
    assert muon_flops(weights) == sum(5 * 2 * min(s) ** 2 * (2 * max(s) + min(s)) for s in shapes.values())
    for n, most in ((1, 1.0), (2, 1.1), (4, 1.25)):
        theirs = shared_out(weights, n)
        assert sorted(w.name for those in theirs for w in those) == sorted(shapes)
        assert max(map(muon_flops, theirs)) <= most * muon_flops(weights) / n
    assert optim.shared_out(weights[:2], 4)[2:] == [[], []]
