"""What ends one process ends all of them, in time, with a sentence; and the run goes on as if nothing had been."""

from __future__ import annotations

import errno
import faulthandler
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import at_step, by_ranks, losses, start_ranks
from tiny import write_chats

from fastdraft import checkpoint, cli
from fastdraft import train as training
from fastdraft.checkpoint import list_checkpoints
from fastdraft.data.loader import Ahead
from fastdraft.dist import mesh, watch
from fastdraft.dist.watch import Member, Progress
from fastdraft.metrics import read_metrics
from fastdraft.model.precision import DTYPES
from fastdraft.target.hf import Target
from fastdraft.train import train

HOST = platform.node()
GPUS = torch.cuda.device_count()
DEATHS = int(os.environ.get("FASTDRAFT_DEATHS", "4"))  # at random moments; those after the fourth are over 4 processes


def said_by(folder: Path, rank: int) -> str:
    """The red lines of a rank's standard error, without what ended them."""
    return (folder / f"said by rank {rank}").read_text()


def command(file: Path, spoil=None) -> None:
    """`fastdraft train`, in float64, where `spoil` may have changed this process first."""
    folder = file.parent
    DTYPES["fp32"] = torch.float64
    if spoil is not None:
        spoil()
    sys.argv = ["fastdraft", "train", str(file)]
    with (folder / f"said by rank {os.environ['RANK']}").open("w") as sys.stderr:
        cli.main()


def written(config, folder: Path) -> Path:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return file


# --- at a known place -----------------------------------------------------------------------------------------------------


def on_rank_1(act) -> None:
    if os.environ["RANK"] == "1":
        act()


def out_of_memory() -> None:
    def fail(_batches):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")

    on_rank_1(lambda: at_step(pytest.MonkeyPatch(), 3, fail))


def full_disk() -> None:
    def fail(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    on_rank_1(lambda: setattr(checkpoint, "save_file", fail))


def disk_of_rank_0_fills() -> None:
    """While training goes on: it has come to step 4."""
    begun = threading.Event()

    def fail(*_args):
        assert begun.wait(60)
        raise OSError(errno.ENOSPC, "No space left on device")

    if os.environ["RANK"] == "0":
        at_step(pytest.MonkeyPatch(), 4, lambda _: begun.set())
        checkpoint.save_file = fail


def writing_hangs() -> None:
    on_rank_1(lambda: setattr(checkpoint, "save_file", lambda *_: time.sleep(100)))


def other_settings() -> None:
    main = cli.main

    def with_it() -> None:
        sys.argv += ["optim.lr=0.5"] if os.environ["RANK"] == "1" else []
        main()

    cli.main = with_it


def other_code() -> None:
    on_rank_1(lambda: setattr(training, "file_checksum", lambda path: "0123456789abcdef"))


def stopped() -> None:
    on_rank_1(lambda: at_step(pytest.MonkeyPatch(), 3, lambda _: os.kill(os.getpid(), signal.SIGSTOP)))


def late() -> None:
    on_rank_1(lambda: at_step(pytest.MonkeyPatch(), 3, lambda _: time.sleep(60)))


def looping() -> None:
    on_rank_1(lambda: at_call(4, loop_for_ever))


def reading() -> None:
    on_rank_1(lambda: at_step(pytest.MonkeyPatch(), 3, lambda _: time.sleep(60)))


def at_call(number: int, act) -> None:
    """Calls act() as the training loop looks at the features of so many packs, a part of its step of the draft."""
    original, count = training.all_finite, itertools.count(1)

    def looked_at(features):
        if next(count) == number:
            act()
        return original(features)

    training.all_finite = looked_at


def loop_for_ever() -> None:
    while True:
        pass


def only_rank_0() -> None:
    """A fault that rank 0 alone has: another run is in the folder."""
    if os.environ["RANK"] == "0":
        training.checkpoint.alone_in = no_room


def no_room(_run_dir):
    raise ValueError("another process is training in this folder")


SPOILT = {
    out_of_memory: (
        "another process of this run has ended: rank 1 on {host}, which said: OutOfMemoryError: CUDA out of memory. "
        "Tried to allocate 20.00 GiB.; once that is mended, the same command, given again, goes on",
        "out of memory: CUDA out of memory.",
    ),
    full_disk: (
        "step-00000002 could not be written (rank 1 on {host}: ",
        "step-00000002 could not be written (rank 1 on {host}: ",
    ),
    disk_of_rank_0_fills: ("step-00000002 could not be written (rank 0 on {host}: [Errno 28] No space left on device)",)
    * 2,
    writing_hangs: ("rank 1 on {host}, which is alive and has ",) * 2,
    other_settings: ("optim.lr is 0.01 on rank 0 ({host}) and 0.5 on rank 1 ({host}); start all",) * 2,
    other_code: ("fastdraft's code is '",) * 2,
    stopped: (
        "another process of this run has ended or hangs: rank 1 on {host}, which gave no sign of life for "
        "dist.silent_s=5 s (its process is stopped)",
        "",
    ),
    late: (
        "a process of this run did not come where the others waited for dist.timeout_s=4 s: rank 1 on {host}, which is "
        "alive",
        "rank 1 on {host}, which is alive",
    ),
    looping: (
        "a process of this run does not get on: rank 1 on {host}, which is alive and has been taking a training step of "
        "the draft for ",
        "in loop_for_ever (",
    ),
    reading: ("rank 1 on {host}, which is alive and has been reading data for ",) * 2,
    only_rank_0: (
        "another process is training in this folder",
        "rank 0 on {host}, which said: another process is training in this folder",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_all_end_in_time_and_say_who_it_was(make_config, tmp_path, spoil):
    limits = {"dist.silent_s": 5, "dist.timeout_s": {late: 4, writing_hangs: 10}.get(spoil, 100), "dist.stuck_s": 5}
    limits["dist.disk_s"] = 5 if spoil in (reading, writing_hangs) else 100
    config = make_config(**limits, **{"eval.every": 100})
    began = time.monotonic()
    ranks = start_ranks(2, command, written(config, tmp_path), spoil)
    ranks[0].join(60)
    if spoil is not stopped:
        ranks[1].join(max(0, 60 - (time.monotonic() - began)))
    took = time.monotonic() - began
    for process in ranks:
        process.kill()
        process.join()
    assert ranks[0].exitcode == 1 and ranks[1].exitcode == (-signal.SIGKILL if spoil is stopped else 1), took
    for rank, words in enumerate(SPOILT[spoil]):
        said = said_by(tmp_path, rank)
        assert words.format(host=HOST) in said and "Traceback" not in said, said
        assert spoil is stopped or said.startswith(f"fastdraft, rank {rank}: ")
    assert not list(Path(config.run_dir).glob("checkpoints/.writing*"))
    assert [path.name for path in list_checkpoints(Path(config.run_dir))] in ([], ["step-00000002"])


def told_to_end(place: str, others_wait: bool) -> None:
    """Rank 1 gets SIGTERM before training begins; rank 0 waits for it, or is at something that takes long."""
    original = getattr(training, place)

    def act(*given, **more):
        on_rank_1(lambda: signal.raise_signal(signal.SIGTERM))
        if not others_wait:
            time.sleep(60)
        return original(*given, **more)

    setattr(training, place, act)


@pytest.mark.slow
@pytest.mark.parametrize("others_wait", [True, False])
@pytest.mark.parametrize("place", ["load_data", "open_source"])
def test_a_signal_before_training_begins_ends_all(make_config, tmp_path, place, others_wait):
    config = make_config(**{"eval.every": 100, "checkpoint.every": 100})
    began = time.monotonic()
    spoil = partial(told_to_end, place, others_wait)
    ranks = by_ranks(2, command, written(config, tmp_path), spoil)
    assert ranks == [128 + signal.SIGTERM] * 2 and time.monotonic() - began < 30, said_by(tmp_path, 0)
    came = "SIGTERM came before training began, so no step is lost; the same command, given again, goes on"
    assert said_by(tmp_path, 1) == f"fastdraft, rank 1: {came}\n"
    other = f"another process of this run has ended: rank 1 on {HOST}, which said: StoppedEarly: {came}\n"
    assert said_by(tmp_path, 0) == f"fastdraft, rank 0: {other}"
    assert list_checkpoints(Path(config.run_dir)) == []
    assert by_ranks(2, command, written(config, tmp_path)) == [0, 0]


def hangs_between_checkpoints() -> None:
    writing_hangs()
    original, count = Ahead.__next__, itertools.count(1)

    def slowly(ahead):
        time.sleep(0.4 if next(count) > 20 else 0)
        return original(ahead)

    Ahead.__next__ = slowly


@pytest.mark.slow
def test_a_checkpoint_that_hangs_ends_all_long_before_the_next(make_config, tmp_path):
    limits = {"dist.stuck_s": 100, "dist.disk_s": 5, "dist.timeout_s": 5, "eval.every": 1000}
    config = make_config(**limits, **{"checkpoint.every": 20, "max_steps": 400, "metrics.log_every": 1})
    ranks = by_ranks(2, command, written(config, tmp_path), hangs_between_checkpoints)
    assert ranks == [1, 1], said_by(tmp_path, 0)
    for rank in (0, 1):
        words = rf"fastdraft, rank {rank}: the checkpoint of step 20 is not written after \d+ s \(rank 1 on {HOST} has come"
        assert re.match(words, said_by(tmp_path, rank)), said_by(tmp_path, rank)
    assert 20 < read_metrics(config.run_dir)[-1]["step"] < 40 and list_checkpoints(Path(config.run_dir)) == []


def slow_but_alive() -> None:
    """Kernels are compiled in the first steps, and a disk is slow later on."""
    write = checkpoint.save_file

    def slowly(*args):
        time.sleep(8)
        return write(*args)

    on_rank_1(lambda: at_call(1, lambda: time.sleep(8)))
    on_rank_1(lambda: setattr(checkpoint, "save_file", slowly))


@pytest.mark.slow
def test_a_first_step_that_compiles_and_a_slow_disk_end_nobody(make_config, tmp_path):
    limits = {"dist.stuck_s": 5, "dist.disk_s": 100, "eval.every": 100, "checkpoint.every": 2, "max_steps": 6}
    config = make_config(**limits)
    assert by_ranks(2, command, written(config, tmp_path), slow_but_alive) == [0, 0], said_by(tmp_path, 1)


def called(arguments: list[str], folder: Path, spoil=None) -> None:
    """Another command than `train`."""
    if spoil is not None:
        spoil()
    sys.argv = ["fastdraft", *arguments]
    with (folder / f"said by rank {os.environ['RANK']}").open("w") as sys.stderr, open(os.devnull, "w") as sys.stdout:
        cli.main()


def in_forward(number: int, act) -> None:
    """Calls act() as the target begins so many forwards, which decoding and capturing make."""
    original, count = Target.forward, itertools.count(1)

    def counted(self, *args, **kwargs):
        if next(count) == number:
            act()
        return original(self, *args, **kwargs)

    Target.forward = counted


def killed_in_forward() -> None:
    on_rank_1(lambda: in_forward(12, lambda: os.kill(os.getpid(), signal.SIGKILL)))


def looping_in_forward() -> None:
    on_rank_1(lambda: in_forward(12, loop_for_ever))


def looping_wherever() -> None:
    in_forward(12, loop_for_ever)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "spoil"),
    [
        ("decoding prompts", killed_in_forward),
        ("decoding prompts", looping_in_forward),
        ("running the target over a pack", looping_wherever),
    ],
)
def test_other_commands_end_in_time_and_say_who_it_was(make_config, tmp_path, work, spoil):
    """`evaluate` while it decodes, and `features capture`: a process is killed, or loops for ever. Of those that capture
    whoever is first at the only shard loops, and the other too when it takes over."""
    config = make_config(max_steps=1, **{"dist.silent_s": 5, "dist.stuck_s": 5, "dist.disk_s": 5, "data.pack_tokens": 64})
    if work == "decoding prompts":
        train(config)
        prompts = write_chats(tmp_path / "prompts.jsonl", 8, turns=1)
        arguments = ["evaluate", config.run_dir, "--which", "last", "--prompts", prompts, "--batch-size", 1]
        end = "give the same command again"
    else:
        arguments = ["features", "capture", written(config, tmp_path), tmp_path / "store"]
        end = "the same command, given again, goes on"
    began = time.monotonic()
    ranks = start_ranks(2, called, list(map(str, arguments)), tmp_path, spoil)
    for process in ranks:
        process.join(max(0, 60 - (time.monotonic() - began)))
        process.kill()
    killed = spoil is killed_in_forward
    assert [process.exitcode for process in ranks] == [1, -signal.SIGKILL if killed else 1], said_by(tmp_path, 0)
    for rank in range(1 if killed else 2):
        said = said_by(tmp_path, rank)
        assert end in said and "Traceback" not in said, said
        assert f"rank 1 on {HOST}" in said or (spoil is looping_wherever and f"rank 0 on {HOST}" in said), said
        assert killed or f"which is alive and has been {work} for" in said, said


class Dict(dict):
    """The store of a Watch, in this process."""

    set, check = dict.__setitem__, lambda self, keys: all(key in self for key in keys)

    def get(self, key: str) -> bytes:
        return self[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self[key] for key in keys]


def test_how_long_a_piece_of_work_may_take(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    progress = Progress(first_s=1800)
    assert progress.allowed_s() == float("inf")  # nothing was begun

    def works(name: str, least_s: float, seconds: float, waits: float = 0.0) -> float:
        progress.begin(name, least_s)
        allowed = progress.allowed_s()
        now[0] += seconds
        with progress.meeting("all"):
            now[0] += waits
        return allowed

    assert works("stepping", 60, 400) == 1800  # it compiles
    assert works("stepping", 60, 2, waits=500) == 1800
    assert works("stepping", 60, 30) == 60  # the first is no measure, and nor is what others kept it waiting
    assert works("writing", 600, 300) == 1800
    assert works("stepping", 60, 1) == 150  # five times the longest
    assert works("writing", 600, 10) == 1800
    assert works("writing", 600, 10) == 600
    progress.begin(None)
    assert progress.allowed_s() == float("inf")


def test_who_is_behind_is_the_one_that_does_not_get_on():
    """A process says nothing of itself while one with which it shares work has come less far."""
    own, store = Progress(1800), Dict()
    members = [Member("a", 1, None), Member("b", 2, None), Member("c", 3, None)]
    judge = watch.Watch(store, 0, members, 5, own, "fastdraft", "begin anew")
    for _ in range(3):
        own.count("all")
        own.count("tensor of 0")
    for behind, expected in (
        ({"all": 2}, True),
        ({"all": 3, "tensor of 0": 2}, True),
        ({"all": 3, "tensor of 2": 0}, False),
    ):
        signs = [own.counts, behind, {"all": 4}]
        for rank, counts in enumerate(signs):
            store.set(f"sign/{rank}", json.dumps([7, counts]))
        assert judge._waits_for_another() is expected, behind


def test_a_run_dir_that_another_host_does_not_see(tmp_path):
    assert by_ranks(2, _meet_apart, tmp_path) == [0, 0]


def _meet_apart(folder: Path) -> None:
    mesh.start_process("cpu")
    said = (
        rf"rank 1 on {HOST} does not see the run_dir .* of rank 0 on {HOST}; put it on a file system that all hosts share"
    )
    with pytest.raises(ValueError, match=said), checkpoint.alone_in(folder / f"of rank {mesh.rank()}"):
        pass
    with checkpoint.alone_in(folder / "shared"):
        assert not list((folder / "shared").glob(".met*")) or mesh.rank() == 1


# --- one after the other --------------------------------------------------------------------------------------------------


def trained(file: Path, rank_says: str) -> None:
    """`fastdraft train` as a user's run is, on the device that the config names."""
    sys.argv = ["fastdraft", "train", str(file)]
    with (file.parent / f"{rank_says} {os.environ['RANK']}").open("w") as sys.stderr:
        faulthandler.dump_traceback_later(90, file=sys.stderr)  # of a run that hangs, before its test gives up
        cli.main()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "kills"),
    [("cpu", 2), pytest.param("cuda", 5, marks=[pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")])],
)
def test_a_run_goes_on_through_one_kill_after_the_other(make_config, tmp_path, device, kills):
    """One of two processes is killed while it trains, and the same command given again, over gloo or NCCL."""
    changes = {"device": device, "step": "reference", "metrics.log_every": 1, "max_steps": 8 * (kills + 1)}
    changes |= {"checkpoint.every": 4, "eval.every": 12, "eval.max_packs": 1}
    rng, rel = random.Random(0), 1e-6 if device == "cpu" else 1e-3  # of float32, and of NCCL's sums
    context = "fork" if device == "cpu" else "forkserver"
    multiprocessing.set_forkserver_preload(["fastdraft.cli", "fastdraft.train", "transformers.models.llama.modeling_llama"])
    config = make_config(run_dir=str(tmp_path / "run"), **changes)
    file = written(config, tmp_path)
    for kill in range(kills):
        dies = rng.randrange(2)
        ranks = start_ranks(2, trained, file, "said by rank", start=context)
        metrics, until = Path(config.run_dir) / "metrics.jsonl", 8 * kill + rng.randrange(5, 9)
        deadline = time.monotonic() + 100
        while not (metrics.exists() and any(r["step"] >= until for r in read_metrics(config.run_dir))):
            assert time.monotonic() < deadline and all(process.is_alive() for process in ranks), said_by(tmp_path, 1 - dies)
            time.sleep(0.02)
        os.kill(ranks[dies].pid, signal.SIGKILL)
        began = time.monotonic()
        ranks[1 - dies].join(60)
        print(
            f"{device}: rank {dies} was killed after step {until}, the other ended after {time.monotonic() - began:.1f} s"
        )
        code = ranks[1 - dies].exitcode
        for process in ranks:
            process.kill()
            process.join()
        said = said_by(tmp_path, 1 - dies)
        assert code == 1 and f"rank {dies} on {HOST}" in said and "Traceback" not in said, (code, said)
    assert finished(start_ranks(2, trained, file, "said by rank", start=context)) == [0, 0], said_by(tmp_path, 0)

    whole = make_config(run_dir=str(tmp_path / "whole"), **changes)
    (tmp_path / "alone").mkdir()
    assert finished(start_ranks(2, trained, written(whole, tmp_path / "alone"), "rank", start=context)) == [0, 0]
    ours, theirs = losses(config.run_dir), losses(whole.run_dir)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=rel, abs=rel)


def finished(ranks) -> list[int | None]:
    for process in ranks:
        process.join(150)
        process.kill()
    return [process.exitcode for process in ranks]


# --- at any moment --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, list[dict]]:
    """The curve of the run that nothing happens to."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(DEATHS))
def test_a_death_at_any_moment_costs_no_step(make_config, tmp_path, seed, uninterrupted):
    """A process is killed or stopped somewhere between the first look at the data and the last line of metrics. The others
    end within a minute and name it, and any number of processes goes on to the curve of a run that nothing happened to."""
    rng = random.Random(seed)
    changes = {"optim.packs_per_step": 4, "metrics.log_every": 1, "max_steps": 16, "eval.every": 6, "eval.max_packs": 3}
    changes |= {"checkpoint.every": 2, "dist.silent_s": 5}
    config = make_config(run_dir=str(tmp_path / "run"), **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DTYPES, "fp32", torch.float64)
        if not uninterrupted:
            whole = make_config(run_dir=str(tmp_path / "whole"), **changes)
            began = time.monotonic()
            train(whole)
            uninterrupted["seconds"] = time.monotonic() - began
            uninterrupted["curve"] = losses(whole.run_dir)

        world = 2 if seed < 4 else 4
        dies, how = rng.randrange(world), rng.choice([signal.SIGKILL, signal.SIGSTOP])
        ranks = start_ranks(world, command, written(config, tmp_path))
        while not (Path(config.run_dir) / ".lock").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, uninterrupted["seconds"]))
        os.kill(ranks[dies].pid, how)
        began = time.monotonic()
        others = [process for rank, process in enumerate(ranks) if rank != dies]
        for process in others:
            process.join(max(0, 60 - (time.monotonic() - began)))
        took = time.monotonic() - began
        codes = [process.exitcode for process in others]
        for process in ranks:
            process.kill()
            process.join()
        words = [said_by(tmp_path, rank) for rank in range(world) if rank != dies]
        print(f"{how.name} of rank {dies} of {world}: the others ended after {took:.1f} s, {codes}")
        assert all(code in (0, 1) for code in codes), (took, codes)  # 0: it was done already
        for code, said in zip(codes, words, strict=True):
            assert code == 0 or (f"rank {dies} on {HOST}" in said and "Traceback" not in said), said

        steps = [path.name for path in list_checkpoints(Path(config.run_dir))]
        then = rng.choice([1, 2, 4])
        print(f"going on with {then} from {steps}")
        assert by_ranks(then, command, written(config, tmp_path)) == [0] * then
        found = losses(config.run_dir)
        assert len(found) == len(uninterrupted["curve"])
        for ours, theirs in zip(found, uninterrupted["curve"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
