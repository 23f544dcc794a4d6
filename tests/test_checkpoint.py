"""Checkpoints on disk: whole or not there, the last K and the best, damage named, nothing unpickled."""

from __future__ import annotations

import errno
import json
import re
import resource
import shutil
import threading
import time
import warnings

import pytest
import torch

from fastdraft import checkpoint
from fastdraft.checkpoint import (
    Unreadable,
    Writer,
    alone_in,
    checkpoints_of_run,
    list_checkpoints,
    load_tensors,
    mark_best,
    read_state,
    rewind,
    save_checkpoint,
)


def make_tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "master": torch.randn(50, generator=generator),
        "t2d": torch.rand(9, generator=generator) < 0.5,
        "d2t": torch.randint(9, (4,), generator=generator),
        "step_count": torch.tensor(step),
        "half": torch.randn(3, 2, generator=generator).bfloat16(),
        "rng.cpu": generator.get_state(),
    }


def save(run_dir, step, keep=2, **state):
    return save_checkpoint(run_dir, make_tensors(step), {"step": step, **state}, keep)


def beats_best(run_dir, tau_sim) -> bool:
    return Writer(run_dir, keep=2).beats_best(tau_sim)


def empty_like(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def steps(run_dir) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run_dir)]


def test_round_trip_is_exact_and_quiet(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = save(tmp_path, 7, loader={"epoch": 1}, sum=0.1 + 0.2)
        saved, into = read_state(path), empty_like(make_tensors(7))
        load_tensors(saved, into)
    assert saved.step == 7 and saved.state["loader"] == {"epoch": 1} and saved.state["sum"] == 0.1 + 0.2
    for name, tensor in make_tensors(7).items():
        assert torch.equal(into[name], tensor) and into[name].dtype == tensor.dtype, name


def test_files_are_safetensors_and_json(tmp_path):
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_part_of_a_checkpoint_can_be_read(tmp_path):
    into = {"master": torch.zeros(50)}
    load_tensors(read_state(save(tmp_path, 3)), into)
    assert torch.equal(into["master"], make_tensors(3)["master"])


def test_the_last_k_and_the_best_stay(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
        if step == 2:
            assert beats_best(tmp_path, 1.5)
            mark_best(tmp_path, step, 1.5, keep=2)
    assert steps(tmp_path) == [2, 4, 5]
    assert not beats_best(tmp_path, 1.5) and beats_best(tmp_path, 1.6)
    mark_best(tmp_path, 5, 1.6, keep=2)
    assert steps(tmp_path) == [4, 5]
    assert checkpoints_of_run(tmp_path)[0].name == "step-00000005"


def test_which_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint; train first"):
        checkpoints_of_run(tmp_path)
    for step in (10, 20, 30):
        save(tmp_path, step, keep=5)
    order = lambda which: [int(path.name[5:]) for path in checkpoints_of_run(tmp_path, which)]  # noqa: E731
    assert order("best") == [30, 20, 10]
    mark_best(tmp_path, 20, 2.0, keep=5)
    assert [order(which) for which in ("best", "last", "10")] == [[20, 30, 10], [30, 20, 10], [10]]
    with pytest.raises(ValueError, match=r"'15' of .* is none of best, last, 10, 20, 30"):
        checkpoints_of_run(tmp_path, "15")


def test_a_killed_write_leaves_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    torn = tmp_path / "checkpoints" / ".writing-step-00000002"
    torn.mkdir()
    (torn / "model-00001-of-00001.safetensors").write_bytes(b"torn")
    (tmp_path / "checkpoints" / "step-00000003").mkdir()  # renamed, but its state never reached the disk
    assert steps(tmp_path) == [1]
    save(tmp_path, 2)
    assert steps(tmp_path) == [1, 2] and not torn.exists()


@pytest.mark.parametrize("where", ["tensors", "state", "rename"])
def test_a_full_disk_is_a_sentence_and_the_previous_stays(tmp_path, monkeypatch, where):
    save(tmp_path, 1)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **kwargs):
        raise full

    if where == "tensors":
        monkeypatch.setattr(checkpoint, "save_file", fail)
    elif where == "state":
        monkeypatch.setattr(checkpoint.json, "dump", fail)
    else:
        monkeypatch.setattr(checkpoint.os, "rename", fail)
    with pytest.raises(ValueError, match=r"step-00000002 could not be written .*the previous ones are untouched") as error:
        save(tmp_path, 2)
    assert "No space left on device" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.undo()
    assert steps(tmp_path) == [1] and not list((tmp_path / "checkpoints").glob(".writing*"))
    into = empty_like(make_tensors(1))
    load_tensors(read_state(checkpoints_of_run(tmp_path)[0]), into)
    assert torch.equal(into["master"], make_tensors(1)["master"])


def weights_file(path):
    return next(path.glob("*.safetensors"))


def test_damage_is_named(tmp_path):
    path = save(tmp_path, 1)
    whole = weights_file(path).read_bytes()
    for name, data in {"cut": whole[: len(whole) // 2], "empty": b"", "garbage": b"\xff" * 100}.items():
        weights_file(path).write_bytes(data)
        with pytest.raises(Unreadable, match="step-00000001 is unreadable") as error:
            load_tensors(read_state(path), empty_like(make_tensors(1)))
        assert "\n" not in str(error.value), name
    weights_file(path).unlink()
    with pytest.raises(Unreadable, match=r"step-00000001 is unreadable: .*No such file"):
        load_tensors(read_state(path), empty_like(make_tensors(1)))


def test_one_tensor_may_be_missing(tmp_path):
    saved = read_state(save(tmp_path, 1))
    into = {"master": torch.zeros(50), "rng.cuda": torch.arange(16)}
    assert load_tensors(saved, dict(master=into["master"]), may_lack="rng.cuda")
    assert not load_tensors(saved, into, may_lack="rng.cuda")
    assert torch.equal(into["master"], make_tensors(1)["master"]) and torch.equal(into["rng.cuda"], torch.arange(16))
    with pytest.raises(Unreadable, match=r"it has no tensor 'rng\.cuda'"):
        load_tensors(saved, into)


def test_every_damaged_byte_is_seen(tmp_path):
    """Also in the middle of the numbers, where nothing but a checksum can tell; and in what stays JSON."""
    path, into = save(tmp_path, 1, loader={"pack": 0}), empty_like(make_tensors(1))
    load_tensors(read_state(path), into)
    for file in path.iterdir():
        whole = file.read_bytes()
        for place in range(0, len(whole), 1 + len(whole) // 97):
            if whole[place : place + 1].isspace():
                continue
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=r"checkpoint .* is unreadable|has format .* reads 2"):
                load_tensors(read_state(path), into)
        file.write_bytes(whole)
    load_tensors(read_state(path), into)


def test_a_copy_beside_the_checkpoints_is_none(tmp_path):
    path = save(tmp_path, 1)
    shutil.copytree(path, path.with_name("step-00000001.bak"))
    save(tmp_path, 2, keep=1)
    assert [p.name for p in checkpoints_of_run(tmp_path)] == ["step-00000002"]
    assert path.with_name("step-00000001.bak").is_dir()


def test_a_damaged_best_is_said(tmp_path):
    save(tmp_path, 1)
    for text in ("", "[]", "{}", '{"step": 1}', '{"step": null, "tau_sim": 1}', "\xff"):
        (tmp_path / "checkpoints" / "best.json").write_text(text)
        with pytest.raises(ValueError, match=r"best.json is damaged .*; delete it"):
            checkpoints_of_run(tmp_path)


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def no_locks(*_args, **_more):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(checkpoint.filelock.FileLock, "acquire", no_locks)
    with alone_in(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_one_run_at_a_time_in_a_folder(tmp_path):
    said = r"another process is training in .*run; wait"
    with alone_in(tmp_path / "run"), pytest.raises(ValueError, match=said), alone_in(tmp_path / "run"):
        pass
    with alone_in(tmp_path / "run"):
        pass
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"run_dir .* cannot be written to .*choose another"), alone_in(place):
            pass


def test_another_shape_is_named(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(Unreadable, match=r"master is \(50,\) there and \(51,\) here"):
        load_tensors(read_state(path), {"master": torch.zeros(51)})


def test_damaged_state(tmp_path):
    path = save(tmp_path, 1)
    for text in ("", "{", "[1]", "{}", '{"step": 1}'):
        (path / "state.json").write_text(text)
        with pytest.raises(Unreadable, match="step-00000001 is unreadable"):
            read_state(path)
    (path / "state.json").write_bytes(b"\xff\xfe")
    with pytest.raises(Unreadable):
        read_state(path)
    (path / "state.json").write_text(json.dumps({"format": 99, "step": 1}))
    with pytest.raises(ValueError, match="has format 99, this version of fastdraft reads 2") as error:
        read_state(path)
    assert not isinstance(error.value, Unreadable)


def test_a_pickle_is_not_read(tmp_path):
    path = save(tmp_path, 1)
    torch.save({"master": torch.ones(50)}, weights_file(path))
    with pytest.raises(Unreadable):
        load_tensors(read_state(path), {"master": torch.zeros(50)})


def test_rewind_sets_damaged_checkpoints_aside(tmp_path):
    """With keep=1 a damaged newer checkpoint must not push out the one just written."""
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    mark_best(tmp_path, 30, 1.9, keep=3)
    rewind(tmp_path, 20, [tmp_path / "checkpoints" / "step-00000030"])
    assert steps(tmp_path) == [10, 20] and (tmp_path / "checkpoints" / "damaged-step-00000030").is_dir()
    assert beats_best(tmp_path, 1.0)
    save(tmp_path, 25, keep=1)
    assert steps(tmp_path) == [25]


def test_rewind_keeps_an_earlier_best(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    mark_best(tmp_path, 10, 1.9, keep=2)
    rewind(tmp_path, 20, [])
    assert not beats_best(tmp_path, 1.8)


def test_rng_state_goes_on(tmp_path):
    torch.manual_seed(5)
    save_checkpoint(tmp_path, checkpoint.rng_state(torch.device("cpu")), {"step": 1}, 1)
    expected = torch.rand(4)
    torch.manual_seed(6)
    into = {name: t.clone() for name, t in checkpoint.rng_state(torch.device("cpu")).items()}
    load_tensors(read_state(checkpoints_of_run(tmp_path)[0]), into)
    checkpoint.set_rng_state(into)
    assert torch.equal(torch.rand(4), expected)


# --- beside the training --------------------------------------------------------------------------------------------------


def until(happened) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


class Gate:
    """Safetensors' `save_file`, which waits until it is let through; what it was given, by call."""

    def __init__(self, monkeypatch):
        self.open, self.reached, self.given = threading.Event(), threading.Semaphore(0), []
        self._save_file = checkpoint.save_file
        monkeypatch.setattr(checkpoint, "save_file", self)

    def __call__(self, tensors, file, metadata):
        self.given.append(tensors)
        self.reached.release()
        assert self.open.wait(60)
        self._save_file(tensors, file, metadata)


def test_what_is_written_is_what_was_when_it_was_saved(tmp_path, monkeypatch):
    gate, tensors, state = Gate(monkeypatch), make_tensors(1), {"step": 1, "loader": {"pack": 7}}
    with Writer(tmp_path, keep=2) as writer:
        writer.save(tensors, state)
        assert gate.reached.acquire(timeout=60)
        for tensor in tensors.values():
            tensor.zero_()
        state["loader"]["pack"] = 8
        assert steps(tmp_path) == [] and not writer.failed()
        gate.open.set()
    saved, into = read_state(checkpoints_of_run(tmp_path)[0]), empty_like(make_tensors(1))
    load_tensors(saved, into)
    assert saved.state["loader"] == {"pack": 7}
    assert all(torch.equal(into[name], tensor) for name, tensor in make_tensors(1).items())


def test_the_next_checkpoint_waits_for_the_one_before_and_takes_its_memory(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with Writer(tmp_path, keep=2) as writer:
        writer.save(make_tensors(1), {"step": 1})
        assert gate.reached.acquire(timeout=60)
        stood = writer.stood
        threading.Timer(0.5, gate.open.set).start()
        writer.save(make_tensors(2), {"step": 2})
        assert steps(tmp_path)[0] == 1 and writer.stood - stood >= 0.4
    assert steps(tmp_path) == [1, 2] and len(gate.given) == 2
    into = empty_like(make_tensors(2))
    load_tensors(read_state(checkpoints_of_run(tmp_path, "last")[0]), into)
    assert all(torch.equal(into[name], tensor) for name, tensor in make_tensors(2).items())
    first, second = ({name: x.data_ptr() for name, x in tensors.items()} for tensors in gate.given)
    assert first == second


def test_the_best_is_one_that_has_its_name(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with Writer(tmp_path, keep=1) as writer:
        assert writer.beats_best(1.5)
        writer.save(make_tensors(1), {"step": 1})
        writer.mark_best(1, 1.5)
        assert gate.reached.acquire(timeout=60)
        assert not writer.beats_best(1.5) and writer.beats_best(1.6)
        assert checkpoint.read_best(tmp_path) is None
        gate.open.set()
        writer.save(make_tensors(2), {"step": 2})
        assert checkpoint.read_best(tmp_path) == {"step": 1, "tau_sim": 1.5}
    assert steps(tmp_path) == [1, 2] and not beats_best(tmp_path, 1.5)


@pytest.mark.parametrize("at_end", [False, True])
def test_a_write_that_fails_is_raised_by_whoever_waits_next(tmp_path, monkeypatch, at_end):
    said = r"step-00000002 could not be written .*the previous ones are untouched"
    with pytest.raises(ValueError, match=said), Writer(tmp_path, keep=2) as writer:
        writer.save(make_tensors(1), {"step": 1})
        writer.wait()
        monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        writer.save(make_tensors(2), {"step": 2})
        writer.mark_best(2, 1.5)
        if not at_end:
            with pytest.raises(ValueError, match=said):
                writer.save(make_tensors(3), {"step": 3})
            assert writer.failed()
    assert steps(tmp_path) == [1] and checkpoint.read_best(tmp_path) is None


def test_an_error_leaves_after_the_checkpoint_before_it(tmp_path, monkeypatch):
    gate, told = Gate(monkeypatch), []
    threading.Timer(0.3, gate.open.set).start()
    with pytest.raises(ValueError, match="not finite"), Writer(tmp_path, keep=2, say=told.append) as writer:
        writer.save(make_tensors(1), {"step": 1})
        raise ValueError("not finite")
    assert steps(tmp_path) == [1] and told == []
    monkeypatch.setattr(checkpoint.os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(ValueError, match="not finite"), Writer(tmp_path, keep=2, say=told.append) as writer:
        writer.save(make_tensors(2), {"step": 2})
        raise ValueError("not finite")
    assert steps(tmp_path) == [1] and len(told) == 1 and "step-00000002 could not be written (" in told[0]


def test_an_error_leaves_though_the_disk_hangs(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with pytest.raises(ValueError, match="not finite"), Writer(tmp_path, keep=2, limit_s=0.2) as writer:
        writer.save(make_tensors(1), {"step": 1})
        raise ValueError("not finite")
    assert steps(tmp_path) == []
    gate.open.set()
    until(lambda: steps(tmp_path) == [1])  # the thread goes on


def test_a_writing_that_lasts_is_said_once_and_then_is_a_failure(tmp_path, monkeypatch):
    """Between two checkpoints, too: the training asks at each step."""
    monkeypatch.setattr(checkpoint, "SLOW_S", 0.1)
    gate, told = Gate(monkeypatch), []
    gate.open.set()
    said = r"the checkpoint of step 4 is not written after \d+ s: .* hangs, or is slower .*are untouched.*to go on"
    with pytest.raises(ValueError, match=said), Writer(tmp_path, 2, limit_s=1.0, say=told.append, first_s=1.0) as writer:
        for step in (1, 2, 3):
            writer.save(make_tensors(step), {"step": step})
            writer.wait()
        assert not writer.failed() and told == []
        gate.open.clear()
        writer.save(make_tensors(4), {"step": 4})
        until(lambda: told != [] or writer.failed())
        assert not writer.failed() and len(told) == 1
        words = r"the checkpoint of step 4 has been under way for \d+ s, and the longest before .*After \d+ s the run ends"
        assert re.search(words, told[0])
        until(writer.failed)
        writer.raise_failure()
    assert len(told) == 1 and steps(tmp_path) == [2, 3]
    gate.open.set()


def test_who_waits_for_a_writing_that_hangs_ends_too(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    said = r"the checkpoint of step 1 is not written after \d+ s: a disk"
    with pytest.raises(ValueError, match=said), Writer(tmp_path, 2, limit_s=0.7, first_s=0.7) as writer:
        writer.save(make_tensors(1), {"step": 1})
        writer.save(make_tensors(2), {"step": 2})
    assert steps(tmp_path) == []
    gate.open.set()


def test_a_fault_of_the_writing_is_said_beside_the_error_that_leaves(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: {}["no such key"])
    with pytest.raises(ValueError, match="not finite"), Writer(tmp_path, keep=2, say=told.append) as writer:
        writer.save(make_tensors(1), {"step": 1})
        raise ValueError("not finite")
    assert len(told) == 1 and "no such key" in told[0]


def test_a_slow_disk_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LONG_S", 0.05)
    save_file, told = checkpoint.save_file, []
    monkeypatch.setattr(checkpoint, "save_file", lambda *given: (threading.Event().wait(0.2), save_file(*given)))
    with Writer(tmp_path, keep=2, say=told.append) as writer:
        for step in (1, 2, 3):
            writer.wait_for_last()
            writer.save(make_tensors(step), {"step": step})
    assert len(told) == 1 and "a larger checkpoint.every would wait less" in told[0]
    with Writer(tmp_path, keep=2, say=told.append) as writer:  # where training lasts longer than the writing
        for step in (4, 5):
            writer.wait()
            writer.wait_for_last()
            writer.save(make_tensors(step), {"step": step})
    assert len(told) == 1


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    torn = tmp_path / "checkpoints" / ".writing-step-00000007"
    torn.mkdir()
    (torn / "model-00001-of-00001.safetensors").write_bytes(b"torn")
    with Writer(tmp_path, keep=2):
        assert not torn.exists()
    assert steps(tmp_path) == [1]


def test_a_file_that_cannot_grow_is_a_sentence(tmp_path):
    """As the system says it, through safetensors: here a process may write 64 KiB to a file."""
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"master": torch.zeros(1 << 16)}
    said = r"step-00000002 could not be written \(.*File too large"
    try:
        with pytest.raises(ValueError, match=said), Writer(tmp_path, keep=2) as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
            writer.save(large, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps(tmp_path) == [1] and not list((tmp_path / "checkpoints").glob(".writing*"))
