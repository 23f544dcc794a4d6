"""The processes of a run: who this one is, how many there are, and what they do together.

This is the only file that knows of ranks and process groups. A process that was started alone is rank 0 of 1, and every
function here then does nothing but return what it was given.
"""

from __future__ import annotations

import os
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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


def end_process() -> None:
    """Leaves the group that `start_process` joined."""
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


def is_rank_0() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(x: Tensor) -> Tensor:
    """Adds up all ranks' tensors, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def largest(number: int) -> int:
    """The largest of all ranks' numbers. Their hosts meet here, no GPU is waited for."""
    if not dist.is_initialized():
        return number
    of_all = torch.tensor(number)
    dist.all_reduce(of_all, dist.ReduceOp.MAX)
    return int(of_all)


def from_rank_0(thing: T) -> T:
    """What rank 0 has: anything that can be pickled. The others' argument is not looked at."""
    if not dist.is_initialized():
        return thing
    things = [thing]
    dist.broadcast_object_list(things, src=0)
    return things[0]
