"""What the store keeps is what training needs, exactly; capture survives being killed; damage is found and named."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import at_step, by_two_ranks, losses
from tiny import save_target, tiny_llama, write_chats

from fastdraft.batch import Batch, Features
from fastdraft.cli import main
from fastdraft.data.loader import Loader, read_pack
from fastdraft.features.fp8 import dequantize, quantize
from fastdraft.features.meta import read_meta
from fastdraft.features.store import (
    Store,
    census,
    inspect_lines,
    list_shards,
    merge_stores,
    needed,
    shard_number,
    verify_store,
)
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.engine import ttt_engine_step
from fastdraft.model.eagle3.ref import ttt_ref_step
from fastdraft.model.proposal import DecodeSettings
from fastdraft.run.draft import draft_shape
from fastdraft.run.features import capture_features
from fastdraft.run.finished import evaluate_run
from fastdraft.run.inputs import load_data, open_source, open_target
from fastdraft.target import capture as capture_module
from fastdraft.target.hf import Target
from fastdraft.target.identity import target_fingerprint
from fastdraft.target.stored import StoreReader
from fastdraft.train import train

SELDOM = {"max_steps": 16, "eval.every": 8, "checkpoint.every": 8}  # a little under three epochs
CACHE = SELDOM | {"features.mode": "cache", "features.max_gib": 1.0}
SMALL = 16 * 1024  # bytes of a shard in these tests


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.fixture
def store(make_config, tmp_path) -> Path:
    """Of the documents of `make_config()`, in several shards."""
    capture_features(make_config(), tmp_path / "store", shard_bytes=SMALL)
    return tmp_path / "store"


def count_target(monkeypatch) -> list[int]:
    """Tokens of every capture by a target from now on."""
    tokens, original = [], Target.capture

    def counted(self, batch):
        tokens.append(batch.num_tokens)
        return original(self, batch)

    monkeypatch.setattr(Target, "capture", counted)
    return tokens


# --- which rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reference", "fused"])
def test_rows_that_are_not_kept_change_nothing(make_config, kind):
    """Junk in every other row of g and f: the same losses and gradients, bit for bit."""
    config = make_config()
    target = Target(tiny_llama().double(), draft_shape(config).layers)
    draft = Draft(draft_shape(config))
    draft.init_weights(0.1, torch.Generator().manual_seed(0))
    draft.set_vocab(torch.arange(64) * 3)
    draft.set_embedding(target.embedding.float())
    draft = draft.double()
    generator = torch.Generator().manual_seed(1)
    lengths = (17, 3, 30, 9, 5)
    ids = torch.randint(0, 192, (64,), generator=generator)
    mask = torch.rand(64, generator=generator) < 0.3
    mask[-5:] = torch.tensor([True, True, False, False, False])  # a dead document
    batch = Batch(ids, mask, lengths)
    wanted, features = needed(batch), target.capture(batch)
    assert wanted.f_rows[-1] == wanted.g_rows[-1] == 0
    assert len(wanted.g_index) < 60 and len(wanted.f_index) < 30
    junk = Features(torch.full_like(features.g, 7.0), torch.full_like(features.f, -3.0))
    junk.g[wanted.g_index], junk.f[wanted.f_index] = features.g[wanted.g_index], features.f[wanted.f_index]
    step = ttt_engine_step if kind == "fused" else ttt_ref_step
    found = [step(draft, batch, x, target.head, torch.ones(4, dtype=torch.float64)) for x in (features, junk)]
    assert float(found[0][0].loss.sum()) > 0
    for name in ("loss", "acceptance", "live", "masked_in"):
        assert torch.equal(getattr(found[0][0], name), getattr(found[1][0], name)), name
    for name, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][name], rtol=1e-12, atol=1e-12, msg=name)


def test_no_row_that_is_kept_could_be_left_out(make_config):
    """A change of any kept row of f changes a loss, and so does one of any kept row of g."""
    config = make_config(**{"draft.overrides": {"draft_vocab_size": 192}})
    target = Target(tiny_llama().double(), draft_shape(config).layers)
    draft = Draft(draft_shape(config))
    draft.init_weights(0.3, torch.Generator().manual_seed(0))
    draft.set_vocab(torch.arange(192))
    draft.set_embedding(target.embedding.float())
    draft = draft.double()
    batch = Batch(torch.arange(10, 22), torch.tensor([0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0]).bool(), (12,))
    wanted, features = needed(batch), target.capture(batch)
    assert wanted.g_index.tolist() == list(range(8)) and wanted.f_index.tolist() == [3, 4, 8]
    weights = torch.ones(3, dtype=torch.float64)
    loss = ttt_ref_step(draft, batch, features, target.head, weights)[0].loss.sum()
    for name, index in (("g", wanted.g_index), ("f", wanted.f_index)):
        for row in index.tolist():
            changed = Features(features.g.clone(), features.f.clone())
            getattr(changed, name)[row] *= 1.5
            assert ttt_ref_step(draft, batch, changed, target.head, weights)[0].loss.sum() != loss, (name, row)


# --- offline is online ---------------------------------------------------------------------------------------------------


def test_offline_equals_online(make_config, store, tmp_path, monkeypatch):
    """The first epoch bit for bit, without a layer of the target; later ones up to the rounding of other company."""
    online = make_config(max_steps=16)
    offline = make_config(max_steps=16, run_dir=str(tmp_path / "offline"), **{"features.path": str(store)})
    train(online)
    tokens = count_target(monkeypatch)
    monkeypatch.setattr("fastdraft.run.inputs.load_target", None)
    train(offline)
    assert tokens == []
    ours, theirs = losses(offline.run_dir), losses(online.run_dir)
    first_epoch = [r for r in theirs if "loss" in r and r["step"] <= 4]
    assert len(first_epoch) == 2 and [r for r in ours if "loss" in r and r["step"] <= 4] == first_epoch
    assert next(r for r in ours if "eval/loss" in r) == next(r for r in theirs if "eval/loss" in r)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_an_offline_run_resumes_bit_for_bit(make_config, store, tmp_path, monkeypatch):
    whole = make_config(run_dir=str(tmp_path / "whole"), **{"features.path": str(store)})
    train(whole)
    config = make_config(**{"features.path": str(store)})
    at_step(monkeypatch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert train(config).stopped_by == signal.SIGTERM
    monkeypatch.undo()
    train(config)
    assert losses(config.run_dir) == losses(whole.run_dir)
    held_out = evaluate_run(Path(config.run_dir), "last", None, 1, 1, DecodeSettings()).held_out  # runs the target
    last = [r for r in losses(config.run_dir) if "eval/tau_sim" in r][-1]
    assert held_out.overall.tau_sim == pytest.approx(last["eval/tau_sim"], rel=1e-6)


def test_bf16_and_fp8(make_config, tmp_path, cpu):
    """bf16 is the online run's; fp8 takes half the bytes and learns the same up to its rounding."""
    cpu(0.5)  # one that is slow in bf16 computes with a store's rows in fp32, and online as it was told
    found, sizes = {}, {}
    for name in ("online", "auto", "fp8"):
        changes = {"target.dtype": "bf16", "max_steps": 12, "run_dir": str(tmp_path / name / "run")}
        if name != "online":
            capture_features(make_config(**changes), tmp_path / name / "store", name, shard_bytes=SMALL)
            changes["features.path"] = str(tmp_path / name / "store")
            shards = Store(tmp_path / name / "store").shards
            sizes[name] = sum(x.numel() * x.element_size() for s in shards for x in s.tensors.values())
        train(make_config(**changes))
        found[name] = [r["loss"] for r in losses(changes["run_dir"]) if "loss" in r]
    assert found["auto"][:2] == found["online"][:2]
    assert found["auto"] == pytest.approx(found["online"], rel=1e-2)
    assert found["fp8"] != found["auto"] and found["fp8"] == pytest.approx(found["online"], rel=5e-2)
    assert found["fp8"][-1] < found["fp8"][0]
    assert sizes["fp8"] / sizes["auto"] == pytest.approx((32 + 4) / 64)  # scales: 4 bytes for 32 numbers


def test_fp8_error_is_bounded():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3 * 64, generator=generator) * torch.logspace(-3, 3, 50)[:, None]
    x[:, 5] *= 1000  # an outlier channel in the first layer
    x[7] = 0
    q, scale = quantize(x, 3)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (50, 3)
    error = (dequantize(q, scale, torch.float32) - x).abs()
    bound = torch.maximum(x.abs() * 2**-4, scale.repeat_interleave(64, 1) * 2**-10)
    assert bool((error <= bound * 1.0001).all()) and float(error.max()) > 0
    x[3, 0] = torch.inf
    assert not quantize(x, 3)[1][3, 0].isfinite()


# --- capture -------------------------------------------------------------------------------------------------------------


def capture_slowly(config, out: Path, reports) -> None:
    """In a process of its own, so that it can be killed."""
    original = Target.capture

    def slow(self, batch):
        time.sleep(0.05)
        reports.put(None)
        return original(self, batch)

    Target.capture = slow
    capture_features(config, out, shard_bytes=SMALL)


def test_killed_and_resumed_is_byte_for_byte_the_same(make_config, tmp_path):
    """SIGKILL in the midst of it, two processes at once, then again; then to the end."""
    config = make_config(**{"data.paths": [str(write_chats(tmp_path / "chats.jsonl", 90))]})
    store, out = tmp_path / "store", tmp_path / "killed"
    capture_features(config, store, shard_bytes=SMALL)
    rng, fork = random.Random(0), multiprocessing.get_context("fork")
    for _ in range(2):
        reports = [fork.SimpleQueue(), fork.SimpleQueue()]
        both = [fork.Process(target=capture_slowly, args=(config, out, r)) for r in reports]
        for process in both:
            process.start()
        for process, report in zip(both, reports, strict=True):
            for _ in range(rng.randint(2, 4)):
                report.get()
            process.kill()
            process.join()
    before = {path.name: path.stat().st_mtime_ns for path in list_shards(out)}
    assert 0 < len(before) < read_meta(store).shards
    capture_features(config, out, shard_bytes=SMALL)
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in list_shards(out)}.items()
    assert files(out) == files(store) and len(list_shards(out)) == read_meta(store).shards > 3


def test_a_shard_is_a_safetensors_file(make_config, store):
    for shard in Store(store).shards:
        found = load_file(shard.path)
        assert found.keys() == {"g", "f", "keys", "rows", "checksums"}
        assert all(torch.equal(found[name], x) for name, x in shard.tensors.items())
        assert found["g"].shape == (int(found["rows"][:, 0].sum()), 96)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_on_a_gpu(make_config, tmp_path, dtype):
    """Pinned copies and streams of their own: what is read is what the target gave."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    config = make_config(device="cuda", **{"target.dtype": "bf16"})
    capture_features(config, tmp_path / "store", dtype, shard_bytes=SMALL)
    opened = Store(tmp_path / "store")
    reader = StoreReader(opened, torch.device("cuda"))
    target = open_target(config, draft_shape(config).layers, torch.device("cuda"))
    data = load_data(config, draft_shape(config)).train
    batches = [read_pack(data.with_format("arrow"), rows) for rows in Loader(data, 96, 1).packs]
    reader.expect(batches)
    for batch in batches:
        kept, (same, ours) = needed(batch), reader.capture(batch)
        theirs = target.capture(batch.to("cuda"))
        assert same is batch and ours.g.is_cuda
        for index, a, b in ((kept.g_index, ours.g, theirs.g), (kept.f_index, ours.f, theirs.f)):
            rest = torch.ones(batch.num_tokens, dtype=torch.bool)
            rest[index] = False
            torch.testing.assert_close(a[index.cuda()], b[index.cuda()], rtol=2**-4 if dtype == "fp8" else 0, atol=1e-2)
            assert not a[rest.cuda()].any()
    reader.close()
    changes = {"target.dtype": "bf16", "precision": "bf16", "features.path": str(tmp_path / "store")}
    assert train(make_config(device="cuda", **changes)).steps == 6


def test_captured_twice_runs_nothing(make_config, store, monkeypatch):
    tokens = count_target(monkeypatch)
    capture_features(make_config(), store, shard_bytes=SMALL)
    assert tokens == []


def test_merged_parts_are_the_whole(make_config, store, tmp_path, monkeypatch):
    parts = [tmp_path / "a", tmp_path / "b"]
    for i, part in enumerate(parts):
        capture_features(make_config(), part, part=(i, 2), shard_bytes=SMALL)
        assert {shard_number(p) % 2 for p in list_shards(part)} == {i} and not Store(part).is_complete
    with monkeypatch.context() as small:
        small.setattr("fastdraft.files.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100_000}))
        with pytest.raises(ValueError, match="the merged store needs"):
            merge_stores(tmp_path / "merged", parts)
    capture_features(make_config(), tmp_path / "fp8", "fp8", part=(1, 2), shard_bytes=SMALL)
    with pytest.raises(ValueError, match=r"fp8 holds other features than .*/a holds \(dtype: fp8 there, fp32 here\)"):
        merge_stores(tmp_path / "merged", [parts[0], tmp_path / "fp8"])
    merge_stores(tmp_path / "merged", parts)
    assert files(tmp_path / "merged") == files(store)
    with pytest.raises(ValueError, match="is not empty"):
        merge_stores(tmp_path / "merged", parts)
    with pytest.raises(ValueError, match=r"not complete: \d+ of \d+ documents are missing"):
        train(make_config(**{"features.path": str(parts[0])}))


def test_merged_stores_of_other_data_serve_both(make_config, store, tmp_path):
    other = make_config(**{"data.paths": [str(write_chats(tmp_path / "more.jsonl", 9, seed=5))]})
    capture_features(other, tmp_path / "more", shard_bytes=SMALL)
    merge_stores(tmp_path / "merged", [store, tmp_path / "more"])
    for config in (make_config(), other):
        merged = config.features.model_copy(update={"path": str(tmp_path / "merged")})
        update = {"features": merged, "max_steps": 2, "run_dir": str(tmp_path / f"run{len(config.data.paths[0])}")}
        assert train(config.model_copy(update=update)).steps == 2


def test_a_repeated_document_is_stored_once(make_config, chats, tmp_path):
    twice = tmp_path / "twice.jsonl"
    twice.write_text(chats.read_text() * 2)
    once = make_config(**{"data.eval_fraction": 0})
    capture_features(once, tmp_path / "once")
    config = make_config(**{"data.paths": [str(twice)], "data.eval_fraction": 0})
    capture_features(config, tmp_path / "twice")
    keys = [sorted(key for s in Store(tmp_path / name).shards for key in s.keys) for name in ("once", "twice")]
    assert keys[0] == keys[1] and len(set(keys[0])) == len(keys[0])
    train(config.model_copy(update={"features": config.features.model_copy(update={"path": str(tmp_path / "twice")})}))


def test_the_plan_is_what_is_written(tree, tmp_path, store, capsys, monkeypatch):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(sys, "argv", ["fastdraft", "features", "capture", str(tmp_path / "run.yaml"), "new", "--plan"])
    monkeypatch.setattr("fastdraft.run.inputs.load_target", None)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().out
    assert not ended.value.code and not Path("new").exists()
    size = sum(x.numel() * x.element_size() for s in Store(store).shards for x in s.tensors.values())
    documents = sum(len(s) for s in Store(store).shards)
    assert f"{documents:,} documents" in said and f" {size + 40 * documents:,} bytes (0.000 GiB)" in said


def test_a_part_needs_room_for_its_own_shards(make_config, store, tmp_path, monkeypatch):
    """As many bytes as its files, but for their headers; nothing more once they are there."""
    ends = 2 * 192 * 32 * 4
    for i in (0, 1):
        own = [p for p in list_shards(store) if shard_number(p) % 2 == i]
        features = sum(p.stat().st_size for p in own)
        for where, need in ((tmp_path / "new", features + ends), (store, ends)):
            for free, refused in ((need, False), (need - 1024 * len(own) - 1, True)):
                usage = type("Usage", (), {"free": free})
                monkeypatch.setattr("fastdraft.files.shutil.disk_usage", lambda path, usage=usage: usage)
                plan = partial(capture_features, make_config(), where, "auto", (i, 2), True, shard_bytes=SMALL)
                if refused:
                    with pytest.raises(ValueError, match="the feature store needs"):
                        plan()
                else:
                    plan()


@pytest.mark.parametrize("plan_only", [True, False])
def test_a_disk_too_small_is_refused(make_config, tmp_path, monkeypatch, plan_only):
    monkeypatch.setattr("fastdraft.files.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100_000})())
    monkeypatch.setattr("fastdraft.run.inputs.load_target", None)
    with pytest.raises(ValueError, match=r"the feature store needs .* GiB at .*store, which has .* GiB free"):
        capture_features(make_config(), tmp_path / "store", plan_only=plan_only)
    assert not (tmp_path / "store").exists()


def test_a_disk_that_becomes_full_stops_the_capture(make_config, tmp_path, monkeypatch):
    def full(*args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdraft.features.writer.write_shard", full)
    with pytest.raises(ValueError, match=r"could not be written to .*No space left on device.* run the same command again"):
        capture_features(make_config(), tmp_path / "store", shard_bytes=SMALL)


def test_states_that_are_not_finite_are_refused(make_config, tmp_path, monkeypatch):
    original = Target.capture

    def broken(self, batch):
        features = original(self, batch)
        features.g[3, 5] = torch.nan
        return features

    monkeypatch.setattr(Target, "capture", broken)
    for dtype in ("auto", "fp8"):
        with pytest.raises(ValueError, match=r"states of document [0-9a-f]{32} .* are not finite"):
            capture_features(make_config(), tmp_path / dtype, dtype, shard_bytes=SMALL)


# --- damage and mismatch -------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_found_wherever_it_is(make_config, store, capsys, monkeypatch):
    shard = list_shards(store)[1]
    good, rng = shard.read_bytes(), random.Random(1)
    assert [wrong for _, wrong in verify_store(store)] == [None] * (1 + len(list_shards(store)))
    for at in (0, 9, 40, *(rng.randrange(len(good)) for _ in range(20))):
        flip(shard, at)
        wrong = {name: reason for name, reason in verify_store(store) if reason}
        assert list(wrong) == [shard.name] and "is damaged" in wrong[shard.name], at
        shard.write_bytes(good)
    flip(shard, len(good) // 2)
    monkeypatch.setattr(sys, "argv", ["fastdraft", "features", "verify", str(store)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and f"{shard} is damaged: 1 of its" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["features", "header"])
def test_a_damaged_shard_is_named_by_training_or_skipped(make_config, store, tmp_path, where):
    shard = list_shards(store)[0]
    flip(shard, shard.stat().st_size // 2 if where == "features" else 20)
    with pytest.raises(ValueError, match=f"{shard.name} is damaged.*features.on_bad_shard=skip"):
        train(make_config(max_steps=16, **{"features.path": str(store)}))
    config = make_config(
        max_steps=16, run_dir=str(tmp_path / "skip"), **{"features.path": str(store), "features.on_bad_shard": "skip"}
    )
    assert train(config).steps == 16
    skipped = [r.get("skipped_documents", 0) for r in losses(config.run_dir) if "loss" in r]
    assert skipped[-1] >= 2 and skipped == sorted(skipped)
    assert all(r["loss"] > 0 for r in losses(config.run_dir) if "loss" in r)


def test_a_truncated_shard_is_named(make_config, store):
    shard = list_shards(store)[0]
    good = shard.read_bytes()
    for size in (0, 5, 300, len(good) - 1):
        shard.write_bytes(good[:size])
        with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
            train(make_config(**{"features.path": str(store)}))
    assert census(Store(store)).num_bytes == sum(path.stat().st_size for path in list_shards(store)[1:])


def test_a_store_of_something_else_is_refused_by_field(make_config, tree, store, tmp_path, target_dir):
    other = save_target(tmp_path / "other", seed=3)
    wider = save_target(tmp_path / "rope", rope_theta=5e5)
    vocabulary = save_target(tmp_path / "words")
    text = (vocabulary / "tokenizer.json").read_text()
    (vocabulary / "tokenizer.json").write_text(text.replace('"zus"', '"zuz"'))
    used = {"features.path": str(store)}
    for changes, named in (
        ({"target.path": str(other)}, r"\(target weights: "),
        ({"target.path": str(wider)}, r"\(target config.json: "),
        ({"target.path": str(vocabulary)}, r"\(tokenizer: "),
        (
            {"draft.overrides": {"draft_vocab_size": 64, "layers": [0, 3, 4]}},
            r"\(captured layers: \(1, 3, 4\) there, \(0, 3, 4\)",
        ),
        ({"target.dtype": "bf16"}, r"\(target.dtype: fp32 there, bf16 here\)"),
        ({"data.max_length": 40}, r"lacks \d+ of the run's \d+ documents"),
    ):
        with pytest.raises(ValueError, match=named):
            train(make_config(**used, **changes))
    with pytest.raises(ValueError, match="no feature store"):
        train(make_config(**{"features.path": str(tmp_path)}))
    meta = store / "meta.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="has format 2"):
        train(make_config(**used))


def test_another_capture_does_not_go_into_a_store(make_config, store):
    for changes, dtype, named in (
        ({"data.pack_tokens": 128}, "auto", "data"),
        ({"data.max_length": 40}, "auto", "data"),
        ({}, "fp8", "dtype: fp32 there, fp8 here"),
    ):
        with pytest.raises(ValueError, match=named):
            capture_features(make_config(**changes), store, dtype, shard_bytes=SMALL)


def test_a_damaged_target_file_is_named(make_config, store):
    flip(store / "target.safetensors", 5000)
    assert "is damaged" in dict(verify_store(store))["target.safetensors"]
    with pytest.raises(ValueError, match=r"target.safetensors is damaged"):
        train(make_config(**{"features.path": str(store)}))


# --- the store as a cache ------------------------------------------------------------------------------------------------


def test_a_cache_runs_every_document_once(make_config, tmp_path, monkeypatch):
    changes = CACHE | {"features.path": str(tmp_path / "cache")}
    online = make_config(run_dir=str(tmp_path / "online"), **SELDOM)
    train(online)
    tokens = count_target(monkeypatch)
    config = make_config(**changes)
    train(config)
    prepared = load_data(config, draft_shape(config))
    assert sum(tokens) == sum(len(ids) for part in (prepared.train, prepared.eval) for ids in part["input_ids"])
    ours, theirs = losses(config.run_dir), losses(online.run_dir)
    assert [r for r in ours if r["step"] <= 4] == [r for r in theirs if r["step"] <= 4]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    tokens.clear()
    train(config.model_copy(update={"run_dir": str(tmp_path / "again")}))
    assert tokens == [] and not list((tmp_path / "cache").glob(".writing*"))


def test_a_cache_takes_its_targets_fingerprint_once(make_config, tmp_path, monkeypatch):
    taken = []
    for module in ("fastdraft.target.identity", "fastdraft.target.source"):
        monkeypatch.setattr(
            f"{module}.target_fingerprint", lambda target: taken.append(target_fingerprint(target)) or taken[-1]
        )
    config = make_config(**CACHE | {"features.path": str(tmp_path / "cache")})
    source = open_source(config, (1, 3, 4), torch.device("cpu"), [])
    source.close()
    assert taken == [source.ends.fingerprint] == [source.store.meta.target]


def test_a_stopped_cache_run_resumes_bit_for_bit(make_config, tmp_path, monkeypatch):
    """In the second epoch: what was captured before the stop is read, not run in other company."""
    paths = [{"features.path": str(tmp_path / name), "run_dir": str(tmp_path / f"run-{name}")} for name in ("a", "b")]
    whole, config = (make_config(**CACHE | path) for path in paths)
    train(whole)
    at_step(monkeypatch, 9, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert train(config).stopped_by == signal.SIGTERM
    monkeypatch.undo()
    train(config)
    assert losses(config.run_dir) == losses(whole.run_dir)


def test_a_damaged_cache_runs_the_target_instead(make_config, tmp_path, monkeypatch):
    config = make_config(**CACHE | {"features.path": str(tmp_path / "cache")})
    train(config)
    shard = list_shards(tmp_path / "cache")[0]
    flip(shard, shard.stat().st_size // 2)
    tokens = count_target(monkeypatch)
    again = config.model_copy(update={"run_dir": str(tmp_path / "again")})
    train(again)
    assert tokens and [r for r in losses(again.run_dir) if "loss" in r][-1]["damaged_documents"] >= 2
    for ours, theirs in zip(losses(again.run_dir), losses(config.run_dir), strict=True):
        assert {k: v for k, v in ours.items() if "documents" not in k} == pytest.approx(theirs, rel=1e-3)


def test_a_cache_keeps_to_its_room(make_config, tmp_path, monkeypatch):
    room = 120_000
    config = make_config(**CACHE | {"features.path": str(tmp_path / "cache"), "features.max_gib": room / 2**30})
    tokens = count_target(monkeypatch)
    train(config)
    size = sum(len(content) for content in files(tmp_path / "cache").values())
    assert 0.75 * room < size <= room
    again = len(tokens)
    train(config.model_copy(update={"run_dir": str(tmp_path / "again")}))
    assert len(tokens) > again
    assert sum(len(content) for content in files(tmp_path / "cache").values()) <= room
    small = {"features.path": str(tmp_path / "small"), "features.max_gib": 40_000 / 2**30}
    with pytest.raises(ValueError, match=r"max_gib is 40,000 bytes, .* head, takes 49,\d+"):
        train(make_config(**CACHE | small))


def test_a_file_in_a_stores_place_is_named(make_config, chats, tmp_path):
    said = f"{chats} is a file, and a feature store is a folder"
    cache = {"features.mode": "cache", "features.max_gib": 1}
    for act in (
        lambda: train(make_config(**{"features.path": str(chats)})),
        lambda: train(make_config(**{"features.path": str(chats)} | cache)),
        lambda: capture_features(make_config(), chats),
        lambda: inspect_lines(chats),
        lambda: merge_stores(chats, [tmp_path, tmp_path]),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            act()


def test_the_setting_of_a_file_that_is_missing_is_named(make_config, tmp_path):
    for key in ("data.paths", "data.eval_paths"):
        with pytest.raises(ValueError, match=f"^{key}: .*none.jsonl: no such file"):
            train(make_config(**{key: [str(tmp_path / "none.jsonl")]}))


def test_a_capture_is_no_cache_and_a_cache_no_capture(make_config, store, tmp_path):
    with pytest.raises(ValueError, match=r"filled by a capture.*set features.mode=read"):
        train(make_config(**CACHE | {"features.path": str(store)}))
    train(make_config(**CACHE | {"features.path": str(tmp_path / "cache"), "max_steps": 1}))
    with pytest.raises(ValueError, match=r"is a cache.*capture into another folder"):
        capture_features(make_config(), tmp_path / "cache")


def test_a_cache_is_filled_by_one_run(make_config, tmp_path):
    changes = CACHE | {"features.path": str(tmp_path / "cache"), "max_steps": 2}
    train(make_config(**changes))
    lock = capture_module.filelock.FileLock(tmp_path / "cache" / ".cache.lock")
    with lock, pytest.raises(ValueError, match="another run is filling"):
        train(make_config(run_dir=str(tmp_path / "second"), **changes))


# --- several processes ---------------------------------------------------------------------------------------------------


def test_two_ranks_fill_and_read_one_store(make_config, store, tmp_path):
    fill = lambda: capture_features(make_config(), tmp_path / "two", shard_bytes=SMALL)  # noqa: E731
    assert by_two_ranks(fill) == [0, 0]
    assert files(tmp_path / "two") == files(store)
    runs = [make_config(run_dir=str(tmp_path / name), **{"features.path": str(store)}) for name in ("one", "both")]
    train(runs[0])
    assert by_two_ranks(train, runs[1]) == [0, 0]
    for ours, theirs in zip(*(losses(run.run_dir) for run in runs), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


def test_two_ranks_fill_one_cache(make_config, tmp_path, monkeypatch):
    cache = CACHE | {"features.path": str(tmp_path / "cache")}
    config, online = make_config(**cache), make_config(run_dir=str(tmp_path / "online"), **SELDOM)
    assert by_two_ranks(train, config) == [0, 0]
    train(online)
    for ours, theirs in zip(losses(config.run_dir), losses(online.run_dir), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    tokens = count_target(monkeypatch)
    train(make_config(run_dir=str(tmp_path / "again"), **cache))
    assert tokens == []


def test_the_plan_of_an_offline_run_has_no_target(tree, tmp_path, fastdraft):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    online, offline = (
        fastdraft("train", tmp_path / "run.yaml", "--plan", *more)[1] for more in ([], ["features.path=anywhere"])
    )
    assert "target weights" in online and "target forward" in online
    assert "embedding and head" in offline and "target weights" not in offline and "target forward" not in offline
