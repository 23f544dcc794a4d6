"""The target's own greedy answers, whatever company a prompt is answered in."""

from __future__ import annotations

import pytest
from tiny import make_tokenizer, tiny_llama

from fastdraft.data.answer_local import Answer, answer
from fastdraft.decode import generate_plain
from fastdraft.target.hf import Target

PREFIX = list(range(20, 31))


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_llama().double())


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("shared", [PREFIX, []], ids=["shared-prefix", "nothing-shared"])
def test_answers_are_the_targets_own(target, batch_size, shared):
    tails = [[40, 41, 42], [50], [60 + i for i in range(9)], [45, 46], [70, 71, 72, 73], [81]]
    prompts = [shared + tail for tail in tails]
    answers = {a.index: a for batch in answer(target, prompts, 12, batch_size) for a in batch}
    assert sorted(answers) == list(range(len(prompts)))
    for index, prompt in enumerate(prompts):
        assert answers[index].prompt_ids == prompt
        assert answers[index].answer_ids == generate_plain(target, prompt, 12).tokens


def test_an_answer_ends_with_its_end_of_turn(target, monkeypatch):
    first = generate_plain(target, [*PREFIX, 40], 6).tokens
    monkeypatch.setattr(target, "eos_ids", frozenset({first[2]}))
    (batch,) = answer(target, [[*PREFIX, 40], [*PREFIX, 50]], 6, 2)
    answers = {a.index: a.answer_ids for a in batch}
    assert answers[0] == first[: first.index(first[2]) + 1]
    assert len(answers[1]) == 6 or answers[1][-1] == first[2]


def test_attention_is_the_models_own_again_afterwards(target):
    before = target.model.config._attn_implementation
    list(answer(target, [[40, 41], [50]], 2, 2))
    assert target.model.config._attn_implementation == before == "sdpa"


def test_bf16_answers_are_finite_choices():
    target = Target(tiny_llama().bfloat16())
    (batch,) = answer(target, [[40, 41, 42], [50], [60, 61]], 5, 3)
    assert all(len(a.answer_ids) == 5 or a.answer_ids[-1] in target.eos_ids for a in batch)
    assert any(token != 0 for a in batch for token in a.answer_ids)


def test_rows_mask_the_prompt():
    row = Answer(0, [3, 4], [5, 6, 2]).row(make_tokenizer())
    assert row["input_ids"] == [3, 4, 5, 6, 2] and row["loss_mask"] == [0, 0, 1, 1, 1]
    assert row["text"]
