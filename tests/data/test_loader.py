import io

import numpy as np
import pytest
import torch
from chats import chat, make_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fastdraft.data.conversations import Conversation
from fastdraft.data.loader import Loader, eval_batches
from fastdraft.data.pack import pack
from fastdraft.data.preview import preview
from fastdraft.data.samples import Sample, to_dataset
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
def test_global_order_does_not_depend_on_the_ranks(world):
    one = Loader(to_dataset(DATA), 64, 4, seed=5)
    ranks = [Loader(to_dataset(DATA), 64, 4, seed=5, rank=r, world_size=world) for r in range(world)]
    for _ in range(2 * one.steps_per_epoch):
        whole, parts = contents(next(one)), [contents(next(loader)) for loader in ranks]
        assert [whole[r::world] for r in range(world)] == parts
    assert one.state_dict() == ranks[0].state_dict()


def test_steps_run_over_the_end_of_an_epoch():
    loader = Loader(to_dataset(DATA), 64, 1)
    packs = [contents(next(loader))[0] for _ in range(3 * loader.num_packs)]
    for size in (3, 7, loader.num_packs * 2 + 1):
        steps = Loader(to_dataset(DATA), 64, size)
        assert steps.steps_per_epoch == -(-steps.num_packs // size)
        got = [batch for _ in range(len(packs) // size) for batch in contents(next(steps))]
        assert got == packs[: len(got)]


def test_resume_is_exact_at_every_step():
    straight = Loader(to_dataset(DATA), 64, 3, seed=2)
    states, steps = [], []
    for _ in range(2 * straight.steps_per_epoch + 1):
        states.append(straight.state_dict())
        steps.append(contents(next(straight)))
    assert states[-1]["epoch"] == 2
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
    with pytest.raises(ValueError, match="epoch 0, pack 9999"):
        Loader(to_dataset(DATA), 64, 2).load_state_dict({**state, "pack": 9999})
    Loader(to_dataset(DATA), 64, 4).load_state_dict(state)


def test_untrained_samples_never_enter_a_pack():
    dead = [Sample(np.array([900 + i, 5, 6], np.int32), np.array([1, 1, 0], bool)) for i in range(5)]
    loader = Loader(to_dataset([*dead, *DATA[:3], *dead]), 64, 1)
    seen = {d for _ in range(loader.num_packs) for batch in next(loader) for d in documents(batch)}
    assert seen == {0, 1, 2}
    with pytest.raises(ValueError, match="none of the 5 samples has a trained token"):
        Loader(to_dataset(dead), 64, 1)


def test_bad_settings():
    for kwargs, reason in (
        ({"packs_per_step": 3, "world_size": 2}, "packs_per_step 3 must be a positive multiple of the 2 ranks"),
        ({"packs_per_step": 0}, "must be a positive multiple"),
        ({"packs_per_step": 2, "rank": 2, "world_size": 2}, "rank 2 is not one of 2"),
        ({"packs_per_step": 2, "pack_tokens": 10}, "does not fit a pack"),
    ):
        with pytest.raises(ValueError, match=reason):
            Loader(to_dataset(DATA), **{"pack_tokens": 64, **kwargs})


def test_eval_batches():
    whole = [documents(b) for b in eval_batches(to_dataset(DATA), 64)]
    assert sorted(d for batch in whole for d in batch) == list(range(50))
    ranks = [[documents(b) for b in eval_batches(to_dataset(DATA), 64, r, 3)] for r in range(3)]
    assert [whole[r::3] for r in range(3)] == ranks


def test_loader_takes_a_users_own_dataset():
    rows = {"input_ids": [[1, 2, 3], [4, 5, 6, 7]], "loss_mask": [[0, 0, 1], [0, 1, 1, 1]]}
    (batch,) = next(Loader(Dataset.from_dict(rows), 8, 1))
    assert sorted(documents(batch)) == [1, 4] and batch.loss_mask.sum() == 4
    with pytest.raises(ValueError, match="a sample has 3 input_ids but 2 loss_mask entries"):
        Loader(Dataset.from_dict({"input_ids": [[1, 2, 3]], "loss_mask": [[1, 1]]}), 8, 1)


def test_vocab_map():
    pairs = [(np.array([5, 3, 3, 9]), np.array([1, 1, 1, 0])), (np.array([7, 9, 5]), np.array([1, 0, 1]))]
    assert token_counts(pairs, 10).tolist() == [0, 0, 0, 2, 0, 2, 0, 1, 0, 0]
    for size, ids in ((1, [3]), (2, [3, 5]), (3, [3, 5, 7]), (5, [0, 1, 3, 5, 7]), (10, list(range(10)))):
        made = build_vocab_map(pairs, size, 10)
        assert made.dtype == torch.int64 and made.tolist() == ids
    dataset = to_dataset([Sample(ids.astype(np.int32), mask.astype(bool)) for ids, mask in pairs])
    assert build_vocab_map(dataset, 5, 10).tolist() == [0, 1, 3, 5, 7]
    assert coverage(token_counts(pairs, 10), [1, 2, 3, 64]) == pytest.approx({1: 0.4, 2: 0.8, 3: 1.0, 64: 1.0})
    for size, vocab, reason in (
        (11, 10, "draft_vocab_size 11"),
        (0, 10, "draft_vocab_size 0"),
        (2, 9, "token id 9 is not in"),
    ):
        with pytest.raises(ValueError, match=reason):
            build_vocab_map(pairs, size, vocab)
    with pytest.raises(ValueError, match="no trained token"):
        coverage(np.zeros(10, np.int64), [1])


def test_preview_shows_trained_and_special_tokens():
    tokenizer = make_tokenizer()
    made = ChatTokenizer(tokenizer)(Conversation("f:1", 0, tuple(chat("Was [bold]?", "日本 🎉")))).samples
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=100)
    preview(made * 3, tokenizer, 2, console)
    out = console.file.getvalue()
    sample = made[0]
    assert f"sample 2: {len(sample.input_ids)} tokens, {sample.loss_mask.sum()} trained" in out and "sample 3" not in out
    assert "\x1b[32m日本 🎉" in out and "\x1b[7;32m<|im_end|>" in out and "\x1b[2m" in out
    assert "Was [bold]?" in out and "<|im_start|>" in out
