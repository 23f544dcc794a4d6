"""Training checkpoints: torch.distributed.checkpoint in safetensors, written aside, renamed; the last K and the best stay.

Training stands still while its tensors are copied into the host's memory; a thread beside it (`Writer`) writes the copy.

    run_dir/checkpoints/step-00000500/*.safetensors   flat fp32 master and moments, RNG states, the vocabulary map; each of
                                                      several processes writes its slice of the first three to its own file
    run_dir/checkpoints/step-00000500/state.json      step, data position, draft shape, target fingerprint; checksums of the
                                                      other files and, last, of itself
    run_dir/checkpoints/best.json                     the step with the best held-out tau_sim

Nothing is unpickled: tensors are safetensors, the rest is JSON. What was written by some number of processes is read by any
other: a file says which elements it holds. Processes of several hosts need a file system that all of them see.

torch.distributed.checkpoint's own `async_save` would put `dcp.save` alone into a thread. Here the checksums, the name and
what every process does of another's failure belong to the same piece of work, and one thread does all of it.
"""

from __future__ import annotations

import json
import math
import os
import queue
import shutil
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import filelock
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastdraft.dist import mesh
from fastdraft.dist.mesh import Group, barrier, count, from_all, from_rank_0, host, is_rank_0, rank, world
from fastdraft.dist.watch import Progress
from fastdraft.files import file_checksum, json_checksum, sync, write_file

T = TypeVar("T")
FORMAT = 2
ASIDE = ".writing-"  # before the name of what is being written
LONG_S = 1.0  # for which training waits for a checkpoint
MUCH = 0.1  # of its time
SLOW_S, SLOW = 60.0, 3  # a writing that lasts so long, and so many times as long as any before, is said to be slow
LOOK_S = 1.0  # between two looks at a writing that is waited for
PARTS = "parts of checkpoints written"  # what `mesh.count` counts of them


class Unreadable(ValueError):
    """A checkpoint that is missing parts, damaged, or of another format."""


@dataclass(frozen=True)
class Saved:
    """One complete checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]


class Writer:
    """Writes checkpoints in a thread beside the training, one after the other. Every process of a run has one, enters it in
    the same order, and makes the same calls.

    What fails in the thread is raised by the next call that waits, in every process. Unless it is `idle` the training asks
    `failed` at each step, and once a process has a True all of them call `raise_failure`. A writing that lasts long is said
    once; one that lasts longer than `Progress` allows has failed, since its disk or file system may hang for ever.
    Leaving waits for what is under way, also where an error leaves, but then for `limit_s` at most. That error goes on, and
    of a checkpoint that could not be written it is only said.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int,  # latest checkpoints kept, besides the best one
        limit_s: float = 600.0,  # for which the thread may be waited for, as `mesh.begin` knows it
        say: Callable[[str], None] = print,
        first_s: float = 1800.0,  # for which the first two checkpoints may be written, as `mesh.start_process` knows it
        measure: str = "",  # on what tau_sim is measured: of different ones none is better
    ):
        self.run_dir, self.keep, self.limit_s, self.say, self.measure = run_dir, keep, limit_s, say, measure
        self.stood = 0.0  # seconds for which the training stood still for checkpoints; the caller sets it back
        self.idle = True  # nothing is being written, and nothing has failed
        self.best = from_rank_0(read_best(run_dir) if is_rank_0() else None)
        self._group = mesh.group_beside()
        self._copies: dict[str, Tensor] = {}
        self._jobs: queue.Queue[tuple[str, int, Callable[[], object]] | None] = queue.Queue()  # what, of which step, how
        self._failure: BaseException | None = None
        self._under_way = Progress(first_s)  # the thread's: what it writes, and how long it may
        self._since: tuple[str, float] | None = None  # of what is being written: its name, and when it was begun
        self._longest = 0.0  # seconds that a writing took
        self._saved = math.inf  # when `save` was called
        self._said = self._said_long = False
        self._thread = threading.Thread(target=self._work, name="fastdraft-checkpoints", daemon=True)

    def __enter__(self) -> Writer:
        self._tidy()
        mesh.tidy_at_end(self._tidy)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._jobs.put(None)
            mesh.begin("waiting for a checkpoint to be written", self.limit_s)
            self._thread.join(0 if self._hangs() else self.limit_s)
            mesh.tidy_at_end(None)
        failure = self._failure
        if error is not None and failure is not None and failure is not error and not mesh.is_lost_peer(failure):
            self.say(str(failure) if isinstance(failure, ValueError) else repr(failure))

    def failed(self) -> bool:
        """Whether something could not be written, or is being written for longer than it may. One process may know it
        before another. What takes long is said here."""
        since = self._since
        if self._failure is None and since is not None and not self._said_long:
            what, seconds = since[0], time.monotonic() - since[1]
            if seconds > max(SLOW_S, SLOW * self._longest):
                self._said_long = True
                before = f"the longest before it took {self._longest:.1f} s" if self._longest else "it is the first"
                self.say(
                    f"{what} has been under way for {seconds:.0f} s, and {before}: is the disk of {self.run_dir} slow? "
                    f"After {self._under_way.allowed_s():.0f} s the run ends"
                )
        return self._failure is not None or self._hangs()

    def raise_failure(self) -> None:
        """Every process calls it once one has `failed`. Raises ValueError that says why, the same in all of them; where a
        process has failed of what the others do not see, it ends, and they with it."""
        since, failure = self._since, self._failure
        own = failure is not None and not mesh.is_lost_peer(failure)  # else a library is tired of waiting for another
        came = mesh.counted("beside the training") + mesh.counted(PARTS)
        of_all = from_all((own, came, host(), (time.monotonic() - since[1], since[0]) if since is not None else (0.0, "")))
        if not any(own for own, *_ in of_all):
            _, behind, where = min((came, other, where) for other, (_, came, where, _) in enumerate(of_all))
            seconds, what = max(under_way for *_, under_way in of_all)
            who = "" if world() == 1 else f" (rank {behind} on {where} has come less far than the others)"
            raise ValueError(
                f"{what} is not written after {seconds:.0f} s{who}: a disk or file system under {self.run_dir} hangs, or "
                "is slower than dist.disk_s allows; the previous checkpoints are untouched. Mend it and run the same "
                "command again to go on from the last one"
            )
        self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises ValueError where something could not be written, or where it lasts
        longer than it may, and what a library says where another process has ended."""
        if self._jobs.unfinished_tasks:
            mesh.begin("waiting for a checkpoint to be written", self.limit_s)
        began = time.perf_counter()
        with self._jobs.all_tasks_done:
            while self._jobs.unfinished_tasks:
                self._jobs.all_tasks_done.wait(LOOK_S)
                if world() == 1 and self.failed():  # of several processes the watch says who hangs
                    break
        self.stood += time.perf_counter() - began
        if self._failure is not None:
            raise self._failure
        if self._jobs.unfinished_tasks:
            self.raise_failure()

    def wait_for_last(self) -> None:
        """`wait`, before the next `save`. Where that is long, and much of the time since the last one, it says so, once."""
        began, stood = time.perf_counter(), self.stood
        self.wait()
        waited = self.stood - stood
        if waited > max(LONG_S, MUCH * (began - self._saved)) and not self._said:
            self._said = True
            self.say(
                f"training has waited {waited:.1f} s for the checkpoint before to be written, {began - self._saved:.1f} s "
                "after it began (`checkpoint_wait` in the metrics); a larger checkpoint.every would wait less"
            )

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Copies `tensors` and `state` (JSON) as they are now, and begins to write them (`save_checkpoint`); what was begun
        before is waited for. The copies take as much of the host's memory as the tensors, from the first call on; those of
        tensors on a GPU are page-locked. Raises as `wait`."""
        self.wait()
        mesh.begin("copying the weights for a checkpoint", self.limit_s)
        began = time.perf_counter()
        copies = {name: self._copy(name, x) for name, x in _own(tensors).items()}
        if any(x.is_cuda for x in tensors.values()):
            torch.cuda.current_stream().synchronize()
        then = json.loads(json.dumps(state))  # what it holds may change
        self._jobs.put(
            ("checkpoint", then["step"], lambda: save_checkpoint(self.run_dir, copies, then, self.keep, self._group))
        )
        self._saved = time.perf_counter()
        self.stood += self._saved - began

    def beats_best(self, tau_sim: float) -> bool:
        return self.best is None or tau_sim > self.best["tau_sim"]

    def mark_best(self, step: int, tau_sim: float) -> None:
        """Once the checkpoint of `step`, for which `save` was called, has its name, it is remembered as the best one."""
        self.best = {"step": step, "tau_sim": tau_sim}
        mark = lambda: mark_best(self.run_dir, step, tau_sim, self.keep, self._group, self.measure)  # noqa: E731
        self._jobs.put(("best.json", step, mark))

    def _copy(self, name: str, x: Tensor) -> Tensor:
        own = x.to_local() if isinstance(x, DTensor) else x
        copy = self._copies.get(name)
        if copy is None or copy.shape != own.shape or copy.dtype != own.dtype:
            copy = self._copies[name] = torch.empty(own.shape, dtype=own.dtype, pin_memory=own.is_cuda)
        copy.copy_(own.detach(), non_blocking=True)
        return mesh.slice_on_host(x, copy) if isinstance(x, DTensor) else copy

    def _tidy(self) -> None:
        """Removes what was not written to its end, by a run that was killed or by this one."""
        for left in (self.run_dir / "checkpoints").glob(f"{ASIDE}step-*") if is_rank_0() else ():
            shutil.rmtree(left, ignore_errors=True)

    def _hangs(self) -> bool:
        since = self._since
        return since is not None and time.monotonic() - since[1] > self._under_way.allowed_s()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            what, step, write = job
            began = time.monotonic()
            try:
                if self._failure is None:
                    self._under_way.begin(what, self.limit_s)
                    self._since, self.idle = (f"the {what} of step {step}", began), False
                    write()
            except BaseException as error:  # it is the training's to raise
                self._failure = error
            finally:
                self._since, self.idle = None, self._failure is None
                self._under_way.begin(None)
                self._longest = max(self._longest, time.monotonic() - began)
                self._jobs.task_done()


def save_checkpoint(
    run_dir: Path,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    group: Group | None = None,  # of `mesh.group_beside`, in a thread beside the training
) -> Path:
    """Writes `tensors` and `state` (JSON) as the checkpoint of state["step"]; every process calls it.

    Of a DTensor each process writes its slice; the rest is the same everywhere, and rank 0 writes it. The checkpoint gets
    its name once all of it is on the disk. Raises ValueError on every process when it cannot be written.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step-{state['step']:08d}"
    aside = folder / f"{ASIDE}{final.name}"
    try:
        # A process that cannot write must say so before the others wait for it in `dcp.save`.
        _everywhere(lambda: _make_empty(aside) if is_rank_0() else None, group)
        _everywhere(lambda: _refuse_unseen(aside), group)
        files = _everywhere(lambda: _write(aside, tensors, group), group)
        _everywhere(lambda: _publish(aside, final, state, files, keep) if is_rank_0() else None, group)
    except _Failed as failure:
        raise ValueError(
            f"checkpoint {final} could not be written ({failure}); the previous ones are untouched. "
            f"Free space under {folder} and run the same command again to go on from the last checkpoint"
        ) from failure
    finally:
        if is_rank_0():
            shutil.rmtree(aside, ignore_errors=True)
    return final


class _Failed(Exception):
    """Something that every process does has failed in one of them; all of them raise it."""


def _everywhere(act: Callable[[], T], group: Group | None) -> list[T]:  # by rank
    """What `act` returns in each process. _Failed in all of them, once all are done with it, where one could not."""
    result, failure = None, None
    try:
        result = act()
    except (OSError, RuntimeError, SafetensorError, dcp.api.CheckpointException) as error:
        if mesh.is_lost_peer(error):  # DCP has met nobody, and nor would this
            raise
        of_dcp = isinstance(error, dcp.api.CheckpointException)
        culprit = next(iter(error.failures)) if of_dcp else rank()  # DCP raises what one process met in all of them
        failure = culprit, _reason(error)
    of_all = from_all((result, failure, host()), group)
    for _, failure, _ in of_all:
        if failure is not None:
            culprit, why = failure
            raise _Failed(why if world() == 1 else f"rank {culprit} on {of_all[culprit][2]}: {why}")
    return [result for result, _, _ in of_all]


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)


def _refuse_unseen(folder: Path) -> None:
    """OSError for a folder that rank 0 has made and this process does not see."""
    if not folder.is_dir():
        raise OSError("it does not see rank 0's run_dir, which must lie on a file system that all hosts share")


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this process writes, or has a slice of."""
    return {name: x for name, x in tensors.items() if is_rank_0() or isinstance(x, DTensor)}


def _write(folder: Path, tensors: dict[str, Tensor], group: Group | None) -> dict[str, str]:
    """This process's file, or files, in the folder: their checksums by name."""
    if world() == 1:
        with _alone():
            dcp.save(dict(tensors), storage_writer=_FileWriter(str(folder)), no_dist=True)
        mine = "*"
    else:
        dcp.save(_own(tensors), storage_writer=_FileWriter(str(folder), save_distributed=True), process_group=group)
        mine = f"{_shard()}*"
    return {path.name: file_checksum(path) for path in sorted(folder.glob(mine))}


def _shard() -> str:
    """How the name of this process's file begins, as DCP would call it."""
    return f"shard-{rank() + 1:05d}-"


class _Place(NamedTuple):
    """Where DCP's index of one process's checkpoint looks for a tensor."""

    relative_path: str
    length: int  # bytes


class _FileWriter(dcp.HuggingFaceStorageWriter):
    """DCP's writer, whose file safetensors writes from where the tensors lie.

    DCP's own lays the file out in memory first, and keeps all other threads from Python meanwhile: with 300 MB one stood
    still for 0.7 s on a CPU, here for 0.01 to 0.08 s.
    """

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future[list[Any]]:
        file = Path(self.path) / f"{_shard() if self.save_distributed else ''}model-00001-of-00001.safetensors"
        tensors, offsets, results = {}, {}, []
        for item in plan.items:
            name, x = item.index.fqn, planner.resolve_data(item).detach().cpu().contiguous()
            tensors[name] = x
            offsets[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
            results.append(dcp.storage.WriteResult(item.index, x.nbytes, _Place(file.name, x.nbytes)))
        save_file(tensors, file, {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"})
        sync(file)
        # DCP's processes wait for each other where this program does not see it: each says here that its part is written.
        count(PARTS)
        written: torch.futures.Future[list[Any]] = torch.futures.Future()
        written.set_result(results)
        return written


def _publish(aside: Path, final: Path, state: dict[str, Any], files: list[dict[str, str]], keep: int) -> None:
    """Adds the JSON to a folder that has all tensors, gives it its name, and deletes old checkpoints."""
    names = {name: checksum for of_one in files for name, checksum in of_one.items()}
    whole = json.loads(json.dumps({"format": FORMAT, **state, "files": names}))  # as it will be read
    write_file(aside / "state.json", json.dumps(whole | {"checksum": _state_checksum(whole)}, indent=1).encode())
    shutil.rmtree(final, ignore_errors=True)
    os.rename(aside, final)
    _delete_old(final.parent, keep)


def _reason(error: BaseException) -> str:
    """One line: DCP wraps what went wrong, by rank, in an exception whose text is a traceback."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _alone() -> Iterator[None]:
    """DCP without collectives, on purpose: it warns of exactly that, and has no argument to say so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


def _state_checksum(state: dict[str, Any]) -> str:
    return json_checksum({k: v for k, v in state.items() if k != "checksum"})


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first. A copy that somebody made beside them under another name is none."""
    found = (p for p in (run_dir / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdigit())
    return sorted(p for p in found if (p / "state.json").exists())


def read_state(path: Path) -> Saved:
    """The JSON half of a checkpoint. Raises Unreadable when it is damaged, ValueError when it is of another format."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Unreadable(f"checkpoint {path} is unreadable: {error}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise Unreadable(f"checkpoint {path} is unreadable: state.json is not one that fastdraft wrote")
    if state["format"] != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {state['format']!r}, this version of fastdraft reads {FORMAT}; use the version "
            "that wrote it, or start anew with --fresh"
        )
    if state.get("checksum") != _state_checksum(state):
        raise Unreadable(f"checkpoint {path} is unreadable: state.json is not as it was written")
    return Saved(path, state)


def load_tensors(
    saved: Saved,
    into: dict[str, Tensor],
    may_lack: str | None = None,
    share: tuple[int, int] = (0, 1),  # which of how many processes this is, that look at all files together
) -> bool:
    """Fills `into` in place, of a DTensor this process's slice. False: all but `may_lack`, which the checkpoint has not.
    Raises Unreadable naming the checkpoint when a file is missing, damaged or of other shapes."""
    try:
        for name, checksum in sorted(saved.state["files"].items())[share[0] :: share[1]]:
            if file_checksum(saved.path / name) != checksum:
                raise ValueError(f"{name} is not as it was written")
        reader = dcp.HuggingFaceStorageReader(str(saved.path))
        found = reader.read_metadata().state_dict_metadata
        wanted = {name: tensor for name, tensor in into.items() if name != may_lack or name in found}
        for name, tensor in wanted.items():
            if name not in found:
                raise ValueError(f"it has no tensor {name!r}")
            if tuple(found[name].size) != tuple(tensor.shape):
                raise ValueError(f"{name} is {tuple(found[name].size)} there and {tuple(tensor.shape)} here")
        with _alone():
            dcp.load(dict(wanted), storage_reader=reader, no_dist=True)
    except Exception as error:  # safetensors, DCP and the file system each raise their own kinds
        raise Unreadable(f"checkpoint {saved.path} is unreadable: {_reason(error)}") from error
    return len(wanted) == len(into)


def mark_best(run_dir: Path, step: int, tau_sim: float, keep: int, group: Group | None = None, measure: str = "") -> None:
    """Remembers the checkpoint of `step` as the one with the best held-out tau_sim by its `measure`; it outlives the last
    `keep`. Every process calls it, as `save_checkpoint`, and ValueError is raised on all where it cannot be written."""
    file = run_dir / "checkpoints" / "best.json"

    def mark() -> None:
        write_file(file, json.dumps({"step": step, "tau_sim": tau_sim, "measure": measure}).encode())
        _delete_old(file.parent, keep)

    try:
        _everywhere(lambda: mark() if is_rank_0() else None, group)
    except _Failed as failure:
        raise ValueError(
            f"{file} could not be written ({failure}); the checkpoints are untouched. Free space there and run the same "
            "command again to go on from the last one"
        ) from failure


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """Raises ValueError when best.json is there and damaged."""
    file = run_dir / "checkpoints" / "best.json"
    if not file.exists():
        return None
    try:
        best = json.loads(file.read_text())
        return {"step": int(best["step"]), "tau_sim": float(best["tau_sim"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}); delete it, and the newest checkpoint counts as the best until an "
            "evaluation writes it again"
        ) from error


def forget_other_best(run_dir: Path, measure: str) -> str | None:  # what to say of it
    """Forgets a best checkpoint whose tau_sim was measured on other data than is measured on now."""
    file = run_dir / "checkpoints" / "best.json"
    best = read_best(run_dir)
    if best is None or (then := json.loads(file.read_text()).get("measure")) == measure:
        return None
    file.unlink()
    on = "data that nothing names" if then is None else "other held-out data, or with another eval.max_packs"
    return (
        f"step {best['step']} was the best, with a held-out tau_sim of {best['tau_sim']:.3f} that was measured on {on}; "
        "the evaluations from here on say anew which is"
    )


def rewind(run_dir: Path, step: int, damaged: list[Path]) -> None:
    """Before going on from `step`: later, `damaged` checkpoints are renamed so that they do not count among the last K, and
    a best one is forgotten that is later than `step`, since its step comes again, or whose checkpoint is gone."""
    if is_rank_0():
        for path in damaged:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        best, folder = read_best(run_dir), run_dir / "checkpoints"
        if best is not None and (best["step"] > step or not (folder / f"step-{best['step']:08d}").exists()):
            (folder / "best.json").unlink()
    barrier()


def checkpoints_of_run(run_dir: Path, which: str = "best") -> list[Path]:
    """`which`: best, last, or a step number. The checkpoint asked for; where no step is named also those to turn to, newest
    first, should it be damaged. Raises ValueError when the run has none."""
    found = {int(p.name.removeprefix("step-")): p for p in list_checkpoints(run_dir)}
    if not found:
        raise ValueError(f"{run_dir} holds no checkpoint; train first, or name a run folder that has checkpoints/step-*")
    best = read_best(run_dir)
    if which == "best":
        step = best["step"] if best is not None and best["step"] in found else max(found)
    elif which == "last":
        step = max(found)
    elif which.isdigit() and int(which) in found:
        step = int(which)
    else:
        raise ValueError(f"checkpoint {which!r} of {run_dir} is none of best, last, {', '.join(map(str, sorted(found)))}")
    others = [] if which.isdigit() else [found[n] for n in sorted(found, reverse=True) if n != step]
    return [found[step], *others]


def _delete_old(folder: Path, keep: int) -> None:
    best = read_best(folder.parent)
    complete = list_checkpoints(folder.parent)
    for path in complete[:-keep]:
        if best is None or path.name != f"step-{best['step']:08d}":
            shutil.rmtree(path)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"].cpu())


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Makes the run folder, and keeps other runs out of it as long as this process lives, where the file system has locks.
    ValueError: one is in it, or a process does not see the folder that rank 0 sees."""
    if not is_rank_0():
        _meet_in(run_dir)
        yield
        return
    lock = filelock.FileLock(run_dir / ".lock")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # no locks on this file system
            lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(
            f"another process is training in {run_dir}; wait for it, stop it, or choose another run_dir"
        ) from None
    except OSError as error:
        raise ValueError(f"run_dir {run_dir} cannot be written to ({error}); choose another run_dir") from error
    try:
        _meet_in(run_dir)
        yield
    finally:
        lock.release()


def _meet_in(run_dir: Path) -> None:
    """Raises ValueError, in every process, where one does not see what rank 0 writes: all write checkpoints there."""
    if world() == 1:
        return
    mark = run_dir / f".met-{from_rank_0(uuid.uuid4().hex)}"
    if is_rank_0():
        mark.touch()
    barrier()
    seen = from_all((host(), mark.exists()))
    if is_rank_0():
        mark.unlink(missing_ok=True)
    for blind, (name, sees) in enumerate(seen):
        if not sees:
            raise ValueError(
                f"rank {blind} on {name} does not see the run_dir {run_dir} of rank 0 on {seen[0][0]}; "
                "put it on a file system that all hosts share"
            )
