"""The processes of a run: who this one is, how many there are, and what they do together.

This is the only file that knows of ranks and process groups. A process that was started alone is rank 0 of 1, and every
function here then does nothing but return what it was given.

The processes of a run form a grid of three axes, world = data x sequence x tensor, and neighbours in rank are neighbours on
the tensor axis, then on the sequence axis, so that both stay within a host. Along the data axis each process has packs of
its own; along the sequence axis they share the tokens of a pack; along the tensor axis they share the draft's weights.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

T = TypeVar("T")
AxisName = Literal["data", "sequence", "tensor", "replicas"]


@dataclass(frozen=True)
class Axis:
    """The processes that share one kind of work: this one's place among them, and what they do together.

    Each call is a collective: all of the axis make it, in the same order. Alone, each returns what it was given.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # None: this process is alone

    def sum_(self, x: Tensor) -> Tensor:
        """Adds up all processes' tensors, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:  # [size * n, ...]
        """All processes' tensors [n, ...] of the same shape, one under the other, in the order of their ranks."""
        if self.group is None:
            return x
        whole = x.new_empty(self.size * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(whole, x.contiguous(), group=self.group)
        return whole

    def sum_scatter(self, x: Tensor) -> Tensor:  # [n / size, ...]
        """This process's part, along the first dimension, of the sum of all processes' tensors [n, ...]."""
        if self.group is None:
            return x
        part = x.new_empty(len(x) // self.size, *x.shape[1:])
        dist.reduce_scatter_tensor(part, x.contiguous(), group=self.group)
        return part

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers. Their hosts meet here, no GPU is waited for."""
        if self.group is None:
            return number
        of_all = torch.tensor(number)
        dist.all_reduce(of_all, dist.ReduceOp.MAX, group=self.group)
        return int(of_all)

    def start_sum(self, x: Tensor) -> dist.Work:
        """Begins `sum_` of several processes; `wait` of what is returned makes it true."""
        return dist.all_reduce(x, group=self.group, async_op=True)

    def start_sum_scatter(
        self,
        x: Tensor,  # [size * n]
        part: Tensor,  # [n]
    ) -> dist.Work:
        """Begins `sum_scatter` of several processes into `part`; `wait` of what is returned makes it true."""
        return dist.reduce_scatter_tensor(part, x, group=self.group, async_op=True)

    def gather_into(
        self,
        whole: Tensor,  # [size * n], written
        x: Tensor,  # [n]
    ) -> None:
        """`gather` of several processes into memory that is there already."""
        dist.all_gather_into_tensor(whole, x, group=self.group)

    def slice_of(
        self,
        x: Tensor,  # [ceil(P / size)] of which those past P are no elements
        count: int,  # P
    ) -> DTensor:  # [P]
        """This process's slice as a part of the whole that lies slice by slice on all of them, as a checkpoint knows it."""
        kept = min(max(count - self.rank * len(x), 0), len(x))
        everyone = self.device_mesh(x.device)
        return DTensor.from_local(x[:kept], everyone, [Shard(0)], run_check=False, shape=(count,), stride=(1,))

    def device_mesh(self, device: torch.device) -> DeviceMesh:
        """The same processes as PyTorch's own parallel modules want them named."""
        return DeviceMesh.from_group(self.group, device.type)


_axes: dict[AxisName, Axis] = {}  # of `lay_out`
_holders: dict[int, Axis] = {}  # by their number


def own_device(device: str) -> torch.device:
    """This process's device, of the kind that a config names. Raises ValueError for one that this machine lacks."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {device} is not one of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: cuda, but PyTorch sees no CUDA GPU here; set device=cpu or install a CUDA build of PyTorch"
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")


def planned_device(device: str) -> torch.device:
    """What a plan is made for: `own_device`, or the GPU that a config names, whether one is here or not."""
    return torch.device("cuda") if device == "cuda" else own_device(device)


def start_process(device: str) -> torch.device:
    """`own_device`; and joins the other processes when torchrun started this one."""
    mine = own_device(device)
    on_gpu = mine.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(mine)
    if "RANK" in os.environ and not dist.is_initialized():
        # gloo also where there are GPUs: the ranks agree on a stop without waiting for what their GPUs are doing
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", device_id=mine if on_gpu else None)
    return mine


def lay_out(sequence: int = 1, tensor: int = 1) -> None:
    """Arranges the processes in the grid; every process calls it once, after `start_process`.

    Raises ValueError when they are not a multiple of sequence x tensor.
    """
    if world() % (sequence * tensor):
        raise ValueError(
            f"dist.sequence={sequence} and dist.tensor={tensor} need a multiple of {sequence * tensor} processes, "
            f"this run has {world()}; change them, or --nproc-per-node"
        )
    data = world() // (sequence * tensor)
    grid = torch.arange(world()).view(data, sequence, tensor)
    # Every process takes part in making every group. The rows of each of these are the groups of an axis.
    axes: dict[AxisName, Tensor] = {
        "data": grid.permute(1, 2, 0).reshape(-1, data),
        "sequence": grid.permute(0, 2, 1).reshape(-1, sequence),
        "tensor": grid.reshape(-1, tensor),
        "replicas": grid.permute(2, 0, 1).reshape(tensor, -1),
    }
    for name, groups in axes.items():
        for ranks in groups.tolist():
            group = dist.new_group(ranks) if len(ranks) > 1 else None
            if rank() in ranks:
                _axes[name] = Axis(ranks.index(rank()), len(ranks), group)


def axis(name: AxisName) -> Axis:
    """This process's neighbours on an axis. Replicas are those who have the same part of the weights, data x sequence of
    them: gradients are added up over them. Before `lay_out` all processes are along the data axis."""
    if name in _axes:
        return _axes[name]
    if name in ("data", "replicas") and dist.is_initialized() and world() > 1:
        return Axis(rank(), world(), dist.group.WORLD)
    return Axis()


def host_size() -> int:
    """Processes of this run on one host, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def holders(size: int) -> Axis:
    """The `size` processes, consecutive in rank and this one among them, that hold a sharded target together. Every process
    of the run calls it, with the same number, a divisor of `world()`; groups that were made before are kept."""
    if size == world() and dist.is_initialized() and size > 1:
        return Axis(rank(), size, dist.group.WORLD)
    if size not in _holders:
        for first in range(0, world(), size):
            group = dist.new_group(list(range(first, first + size))) if size > 1 else None
            if first <= rank() < first + size:
                _holders[size] = Axis(rank() - first, size, group)
    return _holders[size]


def end_process() -> None:
    """Leaves the group that `start_process` joined."""
    _axes.clear()
    _holders.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """0 .. world() - 1. Before `start_process`, the one that torchrun gave this process."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world() -> int:
    """Processes of the run. Before `start_process`, as torchrun says."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def machine_share() -> int:
    """Processes of the run on this machine, which share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def speaker() -> str:
    """How this process names itself in a message: under torchrun all of them speak."""
    return f"fastdraft, rank {rank()}" if "RANK" in os.environ else "fastdraft"


def host() -> str:
    """This machine's name, as messages give it."""
    return platform.node() or "an unnamed host"


def is_rank_0() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def largest(number: int) -> int:
    """The largest of all ranks' numbers. Their hosts meet here, no GPU is waited for."""
    if not dist.is_initialized():
        return number
    of_all = torch.tensor(number)
    dist.all_reduce(of_all, dist.ReduceOp.MAX)
    return int(of_all)


def from_all(thing: T) -> list[T]:  # by rank
    """What each process has: anything that can be pickled. Their hosts meet here, no GPU is waited for."""
    if not dist.is_initialized():
        return [thing]
    things: list[T] = [thing] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def from_rank_0(thing: T) -> T:
    """What rank 0 has: anything that can be pickled. The others' argument is not looked at."""
    if not dist.is_initialized():
        return thing
    things = [thing]
    dist.broadcast_object_list(things, src=0)
    return things[0]
