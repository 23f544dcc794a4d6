import gzip
import json
import multiprocessing
from pathlib import Path

import fsspec
import pytest
from chats import chat, make_tokenizer
from datasets import Dataset

from fastdraft.data.config import DataConfig
from fastdraft.data.conversations import Line, parse
from fastdraft.data.loader import Ahead, Loader
from fastdraft.data.prepare import prepare, write_samples
from fastdraft.data.stream import Stream, open_stream
from fastdraft.data.tokenize import ChatTokenizer
from fastdraft.dist import mesh

CHATS = [{"messages": chat(f"Question {i}?", f"Answer {i} " + "and two " * (i % 9))} for i in range(50)]


@pytest.fixture
def settings(tmp_path, write):
    """Three files and small blocks."""
    files = [write(CHATS[a:b], f"{a}.jsonl") for a, b in ((0, 20), (20, 27), (27, 50))]
    return dict(paths=files, streaming=True, block_conversations=9, num_workers=0, eval_fraction=0.2, max_length=64)


@pytest.fixture
def loader(settings, tmp_path):
    """loader(packs_per_step, ...) on a stream of its own, in a cache of its own unless told."""
    opened = []

    def loader(packs_per_step=2, rank=0, world=1, cache=None, **changes):
        cache = cache or tmp_path / f"cache{len(opened)}"
        config = DataConfig(**settings | {"cache_dir": str(cache), "pack_tokens": 100} | changes)
        opened.append(open_stream(config, make_tokenizer()))
        return Loader(opened[-1].stream, 100, packs_per_step, config.seed, rank, world)

    yield loader
    for prepared in opened:
        prepared.stream.close()


def test_processes_of_one_machine_share_its_cores(settings, monkeypatch):
    monkeypatch.setattr("fastdraft.data.stream.os.cpu_count", lambda: 16)
    chat = ChatTokenizer(make_tokenizer())
    for machine_share, asked, workers in ((1, None, 16), (4, None, 4), (32, None, 1), (4, 0, 0), (4, 7, 7)):
        stream = Stream(DataConfig(**settings | {"num_workers": asked}), chat, machine_share)
        assert stream._num_workers == workers
        stream.close()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert mesh.machine_share() == 4


@pytest.mark.parametrize("fails", ["sample", "block"])
def test_a_stream_that_cannot_begin_leaves_no_workers(settings, monkeypatch, tmp_path, fails):
    def full(lines, mapped, file, lowest_key=0):
        if fails == "block" and "-sample-" in str(file):
            return write_samples(lines, mapped, file, lowest_key)
        list(mapped([list(lines)]))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdraft.data.stream.write_samples", full)
    with pytest.raises(OSError, match=f"cannot write the token cache under {tmp_path}") as raised:
        opened = open_stream(DataConfig(**settings | {"num_workers": 2, "cache_dir": str(tmp_path)}), make_tokenizer())
        opened.stream.block(Stream.first)
    assert not multiprocessing.active_children() and raised.tb  # whose frames hold the stream


def contents(step):
    return [(b.input_ids.tolist(), b.loss_mask.tolist(), b.lengths) for b in step]


def documents(step):
    return [tuple(ids.tolist()) for b in step for ids in b.input_ids.split(b.lengths)]


def rows(dataset):
    return sorted(tuple(row["input_ids"]) for row in dataset)


def test_an_epoch_is_what_prepare_would_train_on(settings, loader, tmp_path):
    whole = prepare(DataConfig(**settings | {"streaming": False, "cache_dir": str(tmp_path / "whole")}), make_tokenizer())
    sampled = open_stream(DataConfig(**settings | {"cache_dir": str(tmp_path / "sample")}), make_tokenizer())
    assert rows(sampled.train) == rows(whole.train) and rows(sampled.eval) == rows(whole.eval) != []
    assert sampled.lines()[0] == "streaming; of a sample of the data:"
    few = open_stream(DataConfig(**settings | {"cache_dir": str(tmp_path / "few"), "vocab_samples": 9}), make_tokenizer())
    assert few.stats.conversations == 9 and set(rows(few.train)) < set(rows(whole.train))
    stream = loader(1)
    epochs: list[list] = [[], []]
    while (epoch := stream.state_dict()["place"][0]) < 2:
        epochs[epoch] += documents(next(stream))
    assert [sorted(epoch) for epoch in epochs] == [rows(whole.train)] * 2 and epochs[0] != epochs[1]
    kept = [path for path in (tmp_path / "cache0").glob("stream-*-*-*-*-*") if (path / "samples.arrow").exists()]
    assert 1 <= len(kept) <= 5, "blocks that are done with are deleted"


@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_exact_at_every_step_on_any_number_of_ranks(loader, tmp_path, world):
    straight = loader(2)
    states, steps = [], []
    while straight.state_dict()["place"][0] < 2:
        states.append(json.loads(json.dumps(straight.state_dict())))
        steps.append(contents(next(straight)))
    assert len({tuple(state["place"]) for state in states}) > 8
    for i in range(0, len(states), 3):
        resumed = [
            loader(2, rank, world, cache=tmp_path / "shared" if world > 1 and i % 2 else None) for rank in range(world)
        ]
        for one in resumed:
            one.load_state_dict(states[i])
        for step in steps[i : i + 3]:
            assert sorted(pack for one in resumed for pack in contents(next(one))) == sorted(step)


def test_the_order_depends_on_the_seed_and_not_on_workers(loader):
    first = [contents(next(one)) for one in (loader(9), loader(9, num_workers=1), loader(9, seed=1))]
    assert first[0] == first[1] != first[2]


def test_a_bad_line_is_named_when_its_block_comes(settings, loader, write, tmp_path):
    write([*CHATS[27:46], "not JSON", *CHATS[47:]], "27.jsonl")
    with pytest.raises(ValueError, match=r"27\.jsonl:20: not JSON"):
        loader()
    with Ahead(loader(vocab_samples=3)) as ahead, pytest.raises(ValueError, match=r"27\.jsonl:20: not JSON"):
        for _ in range(99):
            next(ahead)
    skipping = loader(1, on_bad_line="skip")
    while skipping.state_dict()["place"][0] < 1:
        next(skipping)


def test_a_stream_of_held_out_conversations_alone_ends(loader, write):
    lines = [Line("f:1", row) for row in CHATS]
    one = write([next(line.content for line in lines if parse(line).key < 0.2 * 2**64)], "one.jsonl")
    with pytest.raises(ValueError, match=r"one\.jsonl: no conversation to train on: all .* held out"):
        loader(paths=[one])


def test_blocks_in_which_nothing_trains_are_passed_over_and_deleted(loader, write, tmp_path):
    path = write([*CHATS[:9], *[{"messages": chat("?")}] * 18, *CHATS[9:26]], "gap.jsonl")
    one = loader(1, paths=[path], eval_fraction=0)
    epochs: list[list] = [[], [], [], []]
    while (epoch := one.state_dict()["place"][0]) < 4:
        epochs[epoch] += documents(next(one))
    assert len(epochs[0]) >= 26 and [sorted(epoch) for epoch in epochs] == [sorted(epochs[0])] * 4
    one._blocks._background.submit(int).result()  # deletes what was given before in the order it was given
    assert len([path for path in (tmp_path / "cache0").glob("stream-*-*-*-*-*") if path.is_dir()]) <= 5


def test_resume_refuses_other_data(loader, write):
    one = loader()
    while one.state_dict()["place"][0] < 1:
        state = one.state_dict()
        next(one)
    for place in ([0], [0, 3, 0, 0], [0, 0, -1, 0]):
        with pytest.raises(ValueError, match="is not in a stream of 3 files"):
            loader().load_state_dict({**state, "place": place})
    for first in (0, 20, 27):
        write([{"messages": chat("x", "y" * 200)}] * 30, f"{first}.jsonl")
    with pytest.raises(ValueError, match=r"cannot resume at the same place in the data: data was|not JSON"):
        loader().load_state_dict(state)


def test_compressed_columnar_and_remote_files(settings, loader, tmp_path):
    expected = [contents(next(one)) for one in [loader(3)] for _ in range(12)]
    packed = []
    for path in map(Path, settings["paths"]):
        packed.append(str(path.with_suffix(".jsonl.gz")))
        Path(packed[-1]).write_bytes(gzip.compress(path.read_bytes()))
    tables = []
    for path in map(Path, settings["paths"]):
        tables.append(str(path.with_suffix(".parquet")))
        Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()]).to_parquet(tables[-1])
    for path in map(Path, settings["paths"]):
        fsspec.filesystem("memory").pipe(f"/chats/{int(path.stem):02}.jsonl", path.read_bytes())
    for paths in (packed, tables, ["memory://chats/*.jsonl"]):
        made = [contents(next(one)) for one in [loader(3, paths=paths)] for _ in range(12)]
        assert made == expected, paths
    with pytest.raises(ValueError, match="streaming reads URLs"):
        prepare(DataConfig(paths=["memory://chats/*.jsonl"], cache_dir=str(tmp_path)), make_tokenizer())
    for url, reason in (("memory://chats/*.json", "no such file"), ("nothing://a", "cannot be listed")):
        with pytest.raises(ValueError, match=reason):
            loader(paths=[url])


def test_a_stream_whose_first_conversations_give_nothing_to_hold_out_says_so(settings, tmp_path):
    few = dict(cache_dir=str(tmp_path / "cache"), eval_fraction=1e-9)
    prepared = open_stream(DataConfig(**settings | few | {"vocab_samples": 6}), make_tokenizer())
    prepared.stream.close()
    assert len(prepared.eval) == 0
    assert "data.eval_fraction is 1e-09, but by it the 6 conversations that were read first" in prepared.lines()[-1]
    assert "data.vocab_samples" in prepared.lines()[-1]
