"""Training checkpoints: torch.distributed.checkpoint in safetensors, written aside, renamed; the last K and the best stay.

    run_dir/checkpoints/step-00000500/*.safetensors   flat fp32 master and moments, RNG states, the vocabulary map; each of
                                                      several processes writes its slice of the first three to its own file
    run_dir/checkpoints/step-00000500/state.json      step, data position, draft shape, target fingerprint; checksums of the
                                                      other files and, last, of itself
    run_dir/checkpoints/best.json                     the step with the best held-out tau_sim

Nothing is unpickled: tensors are safetensors, the rest is JSON. What was written by some number of processes is read by any
other: a file says which elements it holds. Processes of several hosts need a file system that all of them see.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import filelock
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastdraft.dist.mesh import barrier, count, from_all, from_rank_0, host, is_rank_0, rank, world
from fastdraft.files import file_checksum, json_checksum, write_file

T = TypeVar("T")
FORMAT = 2


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


def save_checkpoint(run_dir: Path, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Writes `tensors` and `state` (JSON) as the checkpoint of state["step"]; every process calls it.

    Of a DTensor each process writes its slice; the rest is the same everywhere, and rank 0 writes it. The checkpoint gets
    its name once all of it is on the disk. Raises ValueError on every process when it cannot be written.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step-{state['step']:08d}"
    aside = folder / f".writing-{final.name}"
    try:
        # A process that cannot write must say so before the others wait for it in `dcp.save`.
        _everywhere(lambda: _make_empty(aside) if is_rank_0() else None)
        _everywhere(lambda: _refuse_unseen(aside))
        files = _everywhere(lambda: _write(aside, tensors))
        _everywhere(lambda: _publish(aside, final, state, files, keep) if is_rank_0() else None)
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


def _everywhere(act: Callable[[], T]) -> list[T]:  # by rank
    """What `act` returns in each process. _Failed in all of them, once all are done with it, where one could not."""
    result, failure = None, None
    try:
        result = act()
    except (OSError, RuntimeError, SafetensorError, dcp.api.CheckpointException) as error:
        of_dcp = isinstance(error, dcp.api.CheckpointException)
        culprit = next(iter(error.failures)) if of_dcp else rank()  # DCP raises what one process met in all of them
        failure = culprit, _reason(error)
    of_all = from_all((result, failure, host()))
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


def _write(folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """This process's file, or files, in the folder: their checksums by name."""
    if world() == 1:
        with _alone():
            dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(folder)), no_dist=True)
        mine = "*"
    else:
        own = {name: x for name, x in tensors.items() if is_rank_0() or isinstance(x, DTensor)}
        dcp.save(own, storage_writer=_Writer(str(folder), save_distributed=True))
        mine = f"shard-{rank() + 1:05d}-*"  # DCP's name for it
    return {path.name: file_checksum(path) for path in sorted(folder.glob(mine))}


class _Writer(dcp.HuggingFaceStorageWriter):
    """DCP's processes wait for each other where this program does not see it: each says here that its part is written."""

    def write_data(self, *args: Any, **more: Any) -> Any:
        written = super().write_data(*args, **more)
        count("parts of checkpoints written")
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


def beats_best(run_dir: Path, tau_sim: float) -> bool:
    best = read_best(run_dir)
    return best is None or tau_sim > best["tau_sim"]


def mark_best(run_dir: Path, step: int, tau_sim: float, keep: int) -> None:
    """Remembers the checkpoint of `step` as the one with the best held-out tau_sim; it outlives the last `keep`."""
    barrier()
    if is_rank_0():
        file = run_dir / "checkpoints" / "best.json"
        write_file(file, json.dumps({"step": step, "tau_sim": tau_sim}).encode())
        _delete_old(file.parent, keep)
    barrier()


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """Raises ValueError when best.json is there and damaged."""
    file = run_dir / "checkpoints" / "best.json"
    if not file.exists():
        return None
    try:
        best = json.loads(file.read_text())
        return {"step": int(best["step"]), "tau_sim": float(best["tau_sim"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); delete it, the next evaluation writes it again") from error


def rewind(run_dir: Path, step: int, damaged: list[Path]) -> None:
    """Before going on from `step`: later, `damaged` checkpoints are renamed so that they do not count among the last K, and
    a best one later than `step` is forgotten, since its step comes again."""
    if is_rank_0():
        for path in damaged:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        best = read_best(run_dir)
        if best is not None and best["step"] > step:
            (run_dir / "checkpoints" / "best.json").unlink()
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
