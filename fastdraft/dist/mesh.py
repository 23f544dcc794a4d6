"""The processes of a run: who this one is, how many there are, and what they do together.

This is the only file that knows of ranks and process groups. A process that was started alone is rank 0 of 1, and every
function here then does nothing but return what it was given.

The processes of a run form a grid of three axes, world = data x sequence x tensor, and neighbours in rank are neighbours on
the tensor axis, then on the sequence axis, so that both stay within a host. Along the data axis each process has packs of
its own; along the sequence axis they share the tokens of a pack; along the tensor axis they share the draft's weights.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard

from fastdraft.dist.watch import BEAT_S, Member, Progress, Watch
from fastdraft.files import json_checksum

T = TypeVar("T")
Group = dist.ProcessGroup
# PyTorch 2.13 has other names for these, and warns of the older ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
AxisName = Literal["data", "sequence", "tensor", "replicas"]


@dataclass(frozen=True)
class Begun:
    """A collective that was begun."""

    work: dist.Work
    those: str  # who take part

    def wait(self) -> None:
        """A host waits here until it is done, a GPU's stream alone from here on."""
        with _progress.meeting(self.those):
            self.work.wait()


@dataclass(frozen=True)
class Axis:
    """The processes that share one kind of work: this one's place among them, and what they do together.

    Each call is a collective: all of the axis make it, in the same order. Alone, each returns what it was given.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # None: this process is alone
    name: str = "all"  # of these processes, for whoever looks at how far each has come

    def sum_(self, x: Tensor) -> Tensor:
        """Adds up all processes' tensors, in place."""
        if self.group is not None:
            with _progress.meeting(self.name):
                dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:  # [size * n, ...]
        """All processes' tensors [n, ...] of the same shape, one under the other, in the order of their ranks."""
        if self.group is None:
            return x
        whole = x.new_empty(self.size * len(x), *x.shape[1:])
        with _progress.meeting(self.name):
            _all_gather(whole, x.contiguous(), group=self.group)
        return whole

    def sum_scatter(self, x: Tensor) -> Tensor:  # [n / size, ...]
        """This process's part, along the first dimension, of the sum of all processes' tensors [n, ...]."""
        if self.group is None:
            return x
        part = x.new_empty(len(x) // self.size, *x.shape[1:])
        with _progress.meeting(self.name):
            _reduce_scatter(part, x.contiguous(), group=self.group)
        return part

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers. Their hosts meet here, no GPU is waited for."""
        if self.group is None:
            return number
        of_all = torch.tensor(number)
        with _progress.meeting(self.name):
            dist.all_reduce(of_all, dist.ReduceOp.MAX, group=self.group)
        return int(of_all)

    def exchange(self, x: Tensor, sends: Sequence[int], gets: Sequence[int]) -> Tensor:  # [sum of gets, ...]
        """Sends so many rows of x [sum of sends, ...] to each process, in the order of their ranks, and gives what each has
        sent to this one."""
        if self.group is None:
            return x
        got = x.new_empty(sum(gets), *x.shape[1:])
        with _progress.meeting(self.name):
            dist.all_to_all_single(got, x.contiguous(), list(gets), list(sends), group=self.group)
        return got

    def start_sum(self, x: Tensor) -> Begun:
        """Begins `sum_` of several processes; `wait` of what is returned makes it true."""
        return Begun(dist.all_reduce(x, group=self.group, async_op=True), self.name)

    def start_sum_scatter(
        self,
        x: Tensor,  # [size * n]
        part: Tensor,  # [n]
    ) -> Begun:
        """Begins `sum_scatter` of several processes into `part`; `wait` of what is returned makes it true."""
        return Begun(_reduce_scatter(part, x, group=self.group, async_op=True), self.name)

    def gather_into(
        self,
        whole: Tensor,  # [size * n], written
        x: Tensor,  # [n]
    ) -> None:
        """`gather` of several processes into memory that is there already."""
        with _progress.meeting(self.name):
            _all_gather(whole, x, group=self.group)

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
_timeout = timedelta(minutes=30)  # of `start_process`
_progress = Progress(_timeout.total_seconds())  # of this process, for `ending_together`
_tidy: Callable[[], None] | None = None  # of `tidy_at_end`


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


def start_process(device: str, timeout_s: float = 1800.0) -> torch.device:
    """`own_device`; and joins the other processes when torchrun started this one. They wait for each other for at most
    `timeout_s` seconds, here and later."""
    global _timeout
    mine = own_device(device)
    on_gpu = mine.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(mine)
    if "RANK" in os.environ and not dist.is_initialized():
        # Gloo is there for hosts with GPUs, too: the ranks agree on a stop without waiting for what their GPUs are doing.
        _timeout = timedelta(seconds=timeout_s)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        store, me, size = next(rendezvous("env://", timeout=_timeout))
        store = dist.PrefixStore(_name_of_start(store, me, size), store)
        if size > host_size():
            _name_interface(store, me, size)
        on = mine if on_gpu else None
        dist.init_process_group(backend, store=store, rank=me, world_size=size, timeout=_timeout, device_id=on)
    return mine


def _name_of_start(store: dist.Store, me: int, size: int) -> str:
    """A name that no earlier start of these processes had, the same for all of them.

    When torchrun starts processes again it keeps the store, and with it the addresses of those that have died: under a
    new name nobody finds them. Rank 0 makes it, and answers each process under a word that this one has made up. Raises
    ValueError, on rank 0, where one does not come.
    """
    word = uuid.uuid4().hex
    if me > 0:
        store.set(f"hello/{me}", word)
        name = store.get(f"welcome/{word}").decode()
        store.set(f"here/{name}/{me}", "")
        return name
    name, welcomed, end = word, set(), time.monotonic() + _timeout.total_seconds()
    while missing := [other for other in range(1, size) if not store.check([f"here/{name}/{other}"])]:
        for other in missing:
            said = store.get(f"hello/{other}") if store.check([f"hello/{other}"]) else None
            if said is not None and said not in welcomed:
                store.set(f"welcome/{said.decode()}", name)
                welcomed.add(said)
        if time.monotonic() > end:
            raise ValueError(
                f"rank {missing[0]} did not come within dist.timeout_s={_timeout.total_seconds():g} s of the start"
            )
        time.sleep(0.02)
    return name


def _name_interface(store: dist.Store, me: int, size: int) -> None:
    """Where this host's name leads to itself alone, names the interface by which other hosts reach it, for gloo.

    gloo tells the others the address that this host's name has here, which on many machines is 127.0.1.1, and where it has
    none 127.0.0.1. The interface is the one that leads to rank 0's host; there it is the one that leads to another.
    NCCL leaves the loopback out by itself.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    mine = _address_towards(address, port)
    store.set(f"address/{me}", mine)
    told = _address_of_name()
    if "GLOO_SOCKET_IFNAME" in os.environ or not _is_loopback(told):
        return
    if _is_loopback(mine):  # this is rank 0's host; a host's ranks are neighbours, so the last one is on another
        mine = _address_towards(store.get(f"address/{size - 1}").decode(), port)
    here = psutil.net_if_addrs().items()
    name = next((name for name, found in here for each in found if each.address.split("%")[0] == mine), None)
    if name is None or _is_loopback(mine):
        return
    os.environ["GLOO_SOCKET_IFNAME"] = name
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"{speaker()}: {host()} is {told} to itself, so other hosts meet it at {mine} ({name}); "
            "GLOO_SOCKET_IFNAME would name another interface",
            flush=True,
        )


def _address_towards(address: str, port: int) -> str:
    """This host's address that packets to another one bear; nothing is sent."""
    family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)
        return probe.getsockname()[0].split("%")[0]


def _address_of_name() -> str:
    """What gloo takes for this host's address: the first of its name's that is one of its own, or else the loopback's."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, kind, protocol, _, place in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(place)
            return place[0].split("%")[0]
    return "127.0.0.1"


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


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
            group = dist.new_group(ranks, timeout=_timeout) if len(ranks) > 1 else None
            if rank() in ranks:
                _axes[name] = Axis(ranks.index(rank()), len(ranks), group, f"{name} of {ranks[0]}")


def everyone() -> Axis:
    """All processes of the run."""
    return Axis(rank(), world(), dist.group.WORLD) if dist.is_initialized() and world() > 1 else Axis()


def axis(name: AxisName) -> Axis:
    """This process's neighbours on an axis. Replicas are those who have the same part of the weights, data x sequence of
    them: gradients are added up over them. Before `lay_out` all processes are along the data axis."""
    return _axes.get(name) or (everyone() if name in ("data", "replicas") else Axis())


def host_size() -> int:
    """Processes of this run on one host, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def holders(size: int) -> Axis:
    """The `size` processes, consecutive in rank and this one among them, that hold a sharded target together. Every process
    of the run calls it, with the same number, a divisor of `world()`; groups that were made before are kept."""
    if size == world():
        return everyone()
    if size not in _holders:
        for first in range(0, world(), size):
            group = dist.new_group(list(range(first, first + size)), timeout=_timeout) if size > 1 else None
            if first <= rank() < first + size:
                _holders[size] = Axis(rank() - first, size, group, f"{size} holders of {first}")
    return _holders[size]


def group_beside() -> Group | None:
    """Connections between all processes for a thread beside the training: what the two do must not mix. Every process calls
    it, in its main thread. None: this process is alone."""
    return dist.new_group(backend="gloo", timeout=_timeout) if world() > 1 else None


def slice_on_host(x: DTensor, own: Tensor) -> DTensor:
    """x with `own`, a copy on the host, as this process's slice."""
    hosts = DeviceMesh.from_group(x.device_mesh.get_group(), "cpu")
    return DTensor.from_local(own, hosts, x.placements, run_check=False, shape=x.shape, stride=x.stride())


def end_process() -> None:
    """Leaves the group that `start_process` joined."""
    _axes.clear()
    _holders.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def ending_together(silent_s: float, then: str = "the same command, given again, goes on") -> Iterator[None]:
    """Within it, what ends one process ends all of them, within a minute and with a sentence (dist/watch.py).

    `silent_s`: seconds without a sign of life after which a process counts as lost. `then`: what its user can do. Raises
    LostPeer where a library says that another process does not answer. Alone it does nothing.
    """
    if world() == 1:
        yield
        return
    # A connection of its own: those of the process group are taken while they wait. A name of its own: torchrun keeps the
    # store when it starts the processes again.
    global _progress
    _progress = Progress(_timeout.total_seconds())
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    store = dist.PrefixStore(from_rank_0(f"fastdraft-{uuid.uuid4().hex}"), store)
    watch = Watch(
        store, rank(), from_all(Member.here(host())), silent_s, _progress, speaker(), then, lambda: _tidy and _tidy()
    )
    watch.start()
    try:
        yield
    except BaseException as error:
        # torchrun, which has seen a process die, asks the others to end; they are about to, and first say why.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if is_lost_peer(error):
            watch.lost_peer(error, _timeout.total_seconds())
        _tell_why(watch, error)
        raise
    finally:
        watch.stop()
    # The first to leave may be the one that holds the store: it waits until nobody looks at it. Whoever dies now has
    # nothing left to do, and nor have the others.
    try:
        from_all(None)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise


def tidy_at_end(act: Callable[[], None] | None) -> None:
    """Within `ending_together`: what is done before this process is ended without its training's help. None: nothing."""
    global _tidy
    _tidy = act


def begin(work: str | None, least_s: float = 0.0) -> None:
    """Says what this process turns to, in words that follow "has been". Within `ending_together`, work that takes much
    longer than `least_s` and than what came before ends all processes (`Progress`). None: what follows is not timed."""
    _progress.begin(work, least_s)


def count(those: str) -> None:
    """Says that this process has come further in something that others do, too, and which they do not meet in."""
    _progress.count(those)


def counted(those: str) -> int:
    """How often this process has said so (`count`)."""
    return _progress.counts.get(those, 0)


def _tell_why(watch: Watch, error: BaseException) -> None:
    """Tells the others why this process ends, and leaves them the time to hear it."""
    text = str(error).strip().splitlines()
    why = text[0] if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {''.join(text[:1])}"
    try:
        watch.tell(f"another process of this run has ended: {watch.named(rank())}, which said: {why}")
    except RuntimeError:  # The store is gone, and with it those who would hear.
        return
    time.sleep(2 * BEAT_S)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is how a library says that another process has ended, or cannot be reached."""
    words = ("/gloo/transport/", "ncclRemoteError", "closed by remote peer")  # as gloo and NCCL say it
    unreachable = isinstance(error, dist.DistNetworkError)  # of the store that ranks meet in
    return unreachable or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


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


def refuse_unlike(mine: Callable[[], dict[str, Any]]) -> None:
    """Raises ValueError, on every process, where one was started with other things (`mine`, by name) than rank 0."""
    if world() == 1:
        return
    things = mine()
    if len(set(from_all(json_checksum(things)))) == 1:
        return
    where = from_all(host())
    first, *others = from_all(things)
    for other, theirs in enumerate(others, 1):
        for name in sorted(theirs.keys() | first.keys()):
            if theirs.get(name) != first.get(name):
                raise ValueError(
                    f"the processes of this run were started differently: {name} is {first.get(name)!r} on rank 0 "
                    f"({where[0]}) and {theirs.get(name)!r} on rank {other} ({where[other]}); start all of them with the "
                    "same command, config and versions"
                )


def host() -> str:
    """This machine's name, as messages give it."""
    return platform.node() or "an unnamed host"


def is_rank_0() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        with _progress.meeting("all"):
            dist.barrier()


def largest(number: int) -> int:
    """The largest of all ranks' numbers. Their hosts meet here, no GPU is waited for."""
    return everyone().largest(number)


def from_all(thing: T, group: Group | None = None) -> list[T]:  # by rank
    """What each process has: anything that can be pickled. Their hosts meet here, no GPU is waited for. `group`: of
    `group_beside`, where a thread beside the training asks."""
    if not dist.is_initialized():
        return [thing]
    things: list[T] = [thing] * dist.get_world_size()
    if group is not None:
        # The training does not wait here, so that only how far each thread has come is said.
        _progress.count("beside the training")
        dist.all_gather_object(things, thing, group=group)
        return things
    with _progress.meeting("all"):
        dist.all_gather_object(things, thing)
    return things


def from_rank_0(thing: T) -> T:
    """What rank 0 has: anything that can be pickled. The others' argument is not looked at."""
    if not dist.is_initialized():
        return thing
    things = [thing]
    with _progress.meeting("all"):
        dist.broadcast_object_list(things, src=0)
    return things[0]
