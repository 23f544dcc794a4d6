import io
import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from chats import chat, make_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fastdraft.data.conversations import Conversation
from fastdraft.data.loader import Ahead, Loader, eval_batches, eval_packs, spread
from fastdraft.data.pack import deal, pack
from fastdraft.data.prepare import Stats
from fastdraft.data.preview import preview
from fastdraft.data.samples import Sample, record_batch
from fastdraft.data.statistics import Statistics, statistics
from fastdraft.data.tokenize import ChatTokenizer
from fastdraft.data.vocab import build_vocab_map, coverage, token_counts


def samples(n=50, seed=0):
    """Samples of 3..40 tokens; token 0 names the sample, so what a batch holds can be told."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        ids = rng.integers(1000, 2000, rng.integers(3, 41)).astype(np.int32)
        ids[0] = i
        mask = rng.random(len(ids)) < 0.5
        mask[2] = True
        made.append(Sample(ids, mask, i))
    return made


def to_dataset(made):
    """Samples as an in-memory data set, like the ones `prepare` returns."""
    return Dataset(pa.Table.from_batches([record_batch(list(made))]))


DATA = samples()


def contents(step):
    return [(b.input_ids.tolist(), b.loss_mask.tolist(), b.lengths) for b in step]


def documents(batch):
    return [ids[0].item() for ids in batch.input_ids.split(batch.lengths)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=80))
def test_pack_holds_everything_once_within_the_budget(lengths):
    packs = pack(lengths, 64)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in p) <= 64 for p in packs)
    loads = sorted(sum(lengths[i] for i in p) for p in packs)
    assert len(loads) < 2 or loads[0] + loads[1] > 64, "two packs that fit one"


def test_pack_is_best_fit():
    # Longest first: 50 and 40 open packs with 14 and 24 free; 14 fits the former exactly, 24 the latter.
    assert pack([14, 40, 24, 50], 64) == [[3, 0], [1, 2]]
    # 5 and 4 leave 1 free; 3, 3 and 2 leave 2. The last, 1, goes where least is left; worst-fit puts it with the others.
    assert pack([5, 4, 3, 3, 2, 1], 10) == [[0, 1, 5], [2, 3, 4]]
    with pytest.raises(ValueError, match=r"a sample of 65 tokens does not fit a pack of 1 \.\. 64"):
        pack([3, 65], 64)


def test_an_epoch_is_every_sample_once_as_it_was():
    loader = Loader(to_dataset(DATA), 64, 1, seed=1)
    for _ in range(2):
        seen = {}
        for _ in range(loader.num_packs):
            (batch,) = next(loader)
            assert batch.num_tokens <= 64 and batch.input_ids.dtype == torch.int64 and batch.loss_mask.dtype == torch.bool
            for ids, mask in zip(batch.input_ids.split(batch.lengths), batch.loss_mask.split(batch.lengths), strict=True):
                assert seen.setdefault(ids[0].item(), (ids, mask))[0] is ids
        assert sorted(seen) == list(range(50))
        assert all(
            np.array_equal(seen[i][0], s.input_ids) and np.array_equal(seen[i][1], s.loss_mask) for i, s in enumerate(DATA)
        )
    assert loader.utilisation == pytest.approx(sum(len(s.input_ids) for s in DATA) / (64 * loader.num_packs))
    assert loader.utilisation > 0.9


def test_order_depends_on_seed_and_epoch():
    def epoch(seed, skip=0):
        loader = Loader(to_dataset(DATA), 64, 1, seed)
        steps = [contents(next(loader)) for _ in range((skip + 1) * loader.num_packs)]
        return steps[skip * loader.num_packs :]

    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1) and epoch(0) != epoch(0, skip=1)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("pair_cost", [0.0, 0.1])
def test_a_steps_packs_do_not_depend_on_the_ranks(world, pair_cost):
    one = Loader(to_dataset(DATA), 64, 4, seed=5)
    ranks = [Loader(to_dataset(DATA), 64, 4, 5, rank, world, pair_cost) for rank in range(world)]
    for _ in range(2 * one.num_steps(1)):
        whole, parts = contents(next(one)), [contents(next(loader)) for loader in ranks]
        assert {len(part) for part in parts} == {4 // world}
        assert sorted(pack for part in parts for pack in part) == sorted(whole)
    assert one.state_dict() == ranks[0].state_dict()


def test_ranks_get_equal_work_by_cost():
    # Eight packs of 64 tokens each: by tokens all are alike, by pairs the one-document packs cost the most.
    made = [Sample(np.arange(n, dtype=np.int32), np.ones(n, bool)) for n in [64] * 4 + [4] * 64]
    loads = {}
    for pair_cost in (0.0, 1.0):
        loads[pair_cost] = []
        for rank in range(4):
            step = next(Loader(to_dataset(made), 64, 8, 0, rank, 4, pair_cost))
            loads[pair_cost].append(sum(n + n * n for batch in step for n in batch.lengths))
    assert len(set(loads[1.0])) == 1 < len(set(loads[0.0]))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("pair_cost", [0.0, 0.1])
def test_the_work_of_ranks_is_that_of_the_packs_they_are_dealt(world, pair_cost):
    """Also where a document trains nothing, so that no pack has it, and only some of the others' tokens are trained."""
    masked = [Sample(s.input_ids, np.zeros(len(s.input_ids), bool)) for s in samples(5, seed=1)]
    data = to_dataset([*masked, *DATA])
    ranks = [Loader(data, 64, 4, 5, rank, world, pair_cost) for rank in range(world)]
    predicted = ranks[0].work(token=2.0, row=5.0)
    steps = ranks[0].num_packs // 4
    assert predicted.shape == (steps, world) and steps > 2

    def counted(batch) -> float:
        work = 2.0 * batch.num_tokens
        for mask, n in zip(batch.loss_mask.split(batch.lengths), batch.lengths, strict=True):
            work += 5.0 * int(mask[2:].sum()) + pair_cost * 7.0 * n**2
        return work

    for step in predicted:
        assert step.tolist() == pytest.approx([sum(map(counted, next(loader))) for loader in ranks])
    if world > 1:
        assert (predicted.max(axis=1) > predicted.mean(axis=1)).any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=8), st.integers(1, 5))
def test_deal_gives_every_pack_to_one_rank(costs, ranks):
    costs = [c + i for c in costs for i in range(ranks)]
    dealt = deal(costs, ranks)
    assert sorted(p for packs in dealt for p in packs) == list(range(len(costs)))
    assert {len(packs) for packs in dealt} == {len(costs) // ranks}
    loads = [sum(costs[p] for p in packs) for packs in dealt]
    assert max(loads) - min(loads) <= max(costs) + 1e-9


def test_steps_run_over_the_end_of_an_epoch():
    loader = Loader(to_dataset(DATA), 64, 1)
    packs = [contents(next(loader))[0] for _ in range(3 * loader.num_packs)]
    for size in (3, 7, loader.num_packs):
        steps = Loader(to_dataset(DATA), 64, size)
        assert [steps.num_steps(n) for n in (1, 3)] == [math.ceil(n * loader.num_packs / size) for n in (1, 3)]
        got = [batch for _ in range(len(packs) // size) for batch in contents(next(steps))]
        assert got == packs[: len(got)]


def test_resume_is_exact_at_every_step():
    straight = Loader(to_dataset(DATA), 64, 3, seed=2)
    states, steps = [], []
    for _ in range(2 * straight.num_steps(1) + 1):
        states.append(straight.state_dict())
        steps.append(contents(next(straight)))
    assert states[-1]["place"] == [2]
    for state, step in zip(states, steps, strict=True):
        resumed = Loader(to_dataset(DATA), 64, 3, seed=2)
        resumed.load_state_dict(state)
        assert contents(next(resumed)) == step


def test_resume_refuses_other_data():
    state = Loader(to_dataset(DATA), 64, 2).state_dict()
    changed = [Sample(s.input_ids.copy(), s.loss_mask.copy()) for s in DATA]
    changed[30].loss_mask[-1] ^= True
    for name, loader in (
        ("data", Loader(to_dataset(changed), 64, 2)),
        ("data", Loader(to_dataset(DATA[::-1]), 64, 2)),
        ("seed", Loader(to_dataset(DATA), 64, 2, seed=1)),
        ("pack_tokens", Loader(to_dataset(DATA), 65, 2)),
    ):
        with pytest.raises(ValueError, match=f"cannot resume at the same place in the data: {name} was"):
            loader.load_state_dict(state)
    with pytest.raises(ValueError, match=r"at \[0\], pack 9999"):
        Loader(to_dataset(DATA), 64, 2).load_state_dict({**state, "pack": 9999})
    Loader(to_dataset(DATA), 64, 4).load_state_dict(state)


def test_ahead_gives_the_same_steps_and_the_state_of_the_last_one_taken():
    straight = Loader(to_dataset(DATA), 64, 3, seed=2)
    with Ahead(Loader(to_dataset(DATA), 64, 3, seed=2), depth=4) as ahead:
        assert ahead.state_dict() == straight.state_dict()
        for _ in range(2 * straight.num_steps(1)):
            assert contents(next(ahead)) == contents(next(straight))
            assert ahead.state_dict() == straight.state_dict()
        assert ahead.waited > 0


def test_ahead_raises_what_the_loader_raises_where_it_is_awaited():
    class Breaks(Loader):
        def __next__(self):
            if self.state_dict()["pack"] >= 2:
                raise ValueError("no more")
            return super().__next__()

    with Ahead(Breaks(to_dataset(DATA), 64, 1)) as ahead:
        next(ahead), next(ahead)
        with pytest.raises(ValueError, match="no more"):
            next(ahead)
        assert ahead.state_dict()["pack"] == 2


def test_untrained_samples_never_enter_a_pack():
    dead = [Sample(np.array([900 + i, 5, 6], np.int32), np.array([1, 1, 0], bool)) for i in range(5)]
    loader = Loader(to_dataset([*dead, *DATA[:3], *dead]), 64, 1)
    seen = {d for _ in range(loader.num_packs) for batch in next(loader) for d in documents(batch)}
    assert seen == {0, 1, 2}
    with pytest.raises(ValueError, match="none of the 5 samples has a trained token"):
        Loader(to_dataset(dead), 64, 1)


def test_bad_settings():
    packs = Loader(to_dataset(DATA), 64, 1).num_packs
    for kwargs, reason in (
        ({"packs_per_step": 3, "world_size": 2}, "packs_per_step 3 must be a positive multiple of the 2 ranks"),
        ({"packs_per_step": 0}, "must be a positive multiple"),
        ({"packs_per_step": 2, "rank": 2, "world_size": 2}, "rank 2 is not one of 2"),
        ({"packs_per_step": 2, "pack_tokens": 10}, "does not fit a pack"),
        ({"packs_per_step": 10**12}, r"optim\.packs_per_step 1000000000000 is more than the \d\d packs of 64 tokens"),
        ({"packs_per_step": packs + 1}, f"{packs + 1} is more than the {packs} packs of 64 tokens that all the training"),
    ):
        with pytest.raises(ValueError, match=reason):
            Loader(to_dataset(DATA), **{"pack_tokens": 64, **kwargs})


def test_eval_batches():
    whole = [documents(b) for b in eval_batches(to_dataset(DATA), 64)]
    assert sorted(d for batch in whole for d in batch) == list(range(50))
    ranks = [[documents(b) for b in eval_batches(to_dataset(DATA), 64, r, 3)] for r in range(3)]
    assert [whole[r::3] for r in range(3)] == ranks


@pytest.mark.parametrize("taken", [16, 64, 200])
def test_some_of_the_held_out_packs_have_documents_as_long_as_all(taken):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4, 0.9, 8000).astype(int), 3, 512)
    made = [Sample(np.full(n, 5, np.int32), np.ones(n, bool), i) for i, n in enumerate(lengths)]
    packs = eval_packs(to_dataset(made), 512)
    seen = np.concatenate([b.lengths for b in itertools.islice(eval_batches(to_dataset(made), 512), taken)])
    assert len(packs) > 2 * taken and lengths[packs[0]].mean() > 5 * lengths.mean()
    assert seen.mean() == pytest.approx(lengths.mean(), rel=0.15)


@pytest.mark.parametrize("n", [1, 2, 65, 100, 1234])
def test_every_beginning_of_the_order_is_spread_evenly(n):
    order = spread(n)
    assert sorted(order) == list(range(n)) and order[0] == n // 2 and len(order) == n
    for taken in range(1, n + 1, max(1, n // 20)):
        gaps = np.diff([-1, *sorted(order[:taken]), n])
        assert gaps.max() <= 3 * n / taken + 1


def test_loader_takes_a_users_own_dataset():
    rows = {"input_ids": [[1, 2, 3], [4, 5, 6, 7]], "loss_mask": [[0, 0, 1], [0, 1, 1, 1]]}
    (batch,) = next(Loader(Dataset.from_dict(rows), 8, 1))
    assert sorted(documents(batch)) == [1, 4] and batch.loss_mask.sum() == 4
    with pytest.raises(ValueError, match="a sample has 3 input_ids but 2 loss_mask entries"):
        Loader(Dataset.from_dict({"input_ids": [[1, 2, 3]], "loss_mask": [[1, 1]]}), 8, 1)


def test_vocab_map():
    pairs = ([5, 3, 3, 9], [1, 1, 1, 0]), ([7, 9, 5], [1, 0, 1])
    dataset = to_dataset([Sample(np.array(ids, np.int32), np.array(mask, bool)) for ids, mask in pairs])
    counts = token_counts(dataset, 10)
    assert counts.tolist() == [0, 0, 0, 2, 0, 2, 0, 1, 0, 0]
    for size, ids in ((1, [3]), (2, [3, 5]), (3, [3, 5, 7]), (5, [0, 1, 3, 5, 7]), (10, list(range(10)))):
        made = build_vocab_map(counts, size)
        assert made.dtype == torch.int64 and made.tolist() == ids
    assert coverage(counts, [1, 2, 3, 64]) == pytest.approx({1: 0.4, 2: 0.8, 3: 1.0, 64: 1.0})
    for size in (11, 0):
        with pytest.raises(ValueError, match=f"draft_vocab_size {size} must be between 1 and .* 10"):
            build_vocab_map(counts, size)
    with pytest.raises(ValueError, match="token id 9 is not in"):
        token_counts(dataset, 9)
    with pytest.raises(ValueError, match="no trained token"):
        coverage(np.zeros(10, np.int64), [1])


def test_statistics():
    made = [Sample(np.array(ids, np.int32), np.array(mask, bool)) for ids, mask in (
        ([1, 2, 3, 4], [0, 0, 1, 1]), ([5, 3, 3, 9, 9, 9], [0, 0, 1, 1, 1, 0]), ([1, 1, 4], [0, 0, 1])
    )]  # fmt: skip
    numbers = statistics(to_dataset(made), 10, 8)
    assert numbers.lengths.tolist() == [4, 6, 3] and numbers.trained.tolist() == [2, 3, 1]
    assert numbers.counts.tolist() == [0, 0, 0, 2, 2, 0, 0, 0, 0, 2] and sorted(numbers.fill) == [6, 7]
    assert numbers.coverage(2) == pytest.approx({2: 4 / 6})
    lines = numbers.lines(2)
    assert lines[0] == "train samples: 3 to 6 tokens, mean 4.3; half up to 4, 90 % up to 6, 99 % up to 6"
    assert "of all train tokens 46%" in lines[1] and "3 of 10 tokens" in lines[2] and lines[2].endswith("2: 66.67%")
    assert lines[3] == "2 packs of 8 tokens, 81.2% full"
    wide = Statistics(numbers.lengths, numbers.trained, np.ones(70000, np.int64), 8, numbers.fill)
    assert list(wide.coverage(32000)) == [8192, 16384, 32000, 32768, 65536]


def test_preview_shows_trained_and_special_tokens():
    tokenizer = make_tokenizer()
    made = ChatTokenizer(tokenizer)(Conversation("f:1", 0, tuple(chat("Was [bold]?", "日本 🎉")))).samples
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=100)
    preview(made * 3, tokenizer, 2, console)
    out = console.file.getvalue()
    sample = made[0]
    assert f"sample 2: {len(sample.input_ids)} tokens, {sample.loss_mask.sum()} trained" in out and "sample 3" not in out
    assert "\x1b[32m日本 🎉" in out and "\x1b[7;32m<|im_end|>" in out and "\x1b[2m" in out
    assert "Was [bold]?" in out and "<|im_start|>" in out and "[[" not in out


def test_preview_shows_trained_tokens_in_a_pipe_too():
    tokenizer, stats = make_tokenizer(), Stats()
    messages = [*chat("[a]", "日本", "b", ""), {"role": "user", "content": "c"}]
    done = ChatTokenizer(tokenizer)(Conversation("f:1", 0, tuple(messages)))
    stats.count(done)
    console = Console(file=io.StringIO(), width=100)
    preview(done.samples, tokenizer, 2, console, stats)
    out = console.file.getvalue()
    assert "assistant\n[[日本<|im_end|>]]\n" in out and out.count("[[") == 2 and out.endswith("[[in double brackets]]\n")
    assert "1 assistant turns are not trained: they are empty; the first: f:1, message 4" in out and "\x1b" not in out
