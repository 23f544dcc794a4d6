"""The target's own greedy answers, whatever company a prompt is answered in."""

from __future__ import annotations

import pytest
from tiny import tiny_llama

from fastdraft.answers.local import answer_batch
from fastdraft.decode import generate
from fastdraft.target.hf import Target

PREFIX = list(range(20, 31))


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_llama().double())


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("shared", [PREFIX, []], ids=["shared-prefix", "nothing-shared"])
def test_answers_are_the_targets_own(target, count, shared):
    tails = [[40, 41, 42], [50], [60 + i for i in range(9)], [45, 46], [70, 71, 72, 73], [81]]
    prompts = [shared + tail for tail in tails[:count]]
    answers = answer_batch(target, prompts, 12, do_sample=False)
    assert answers == [generate(target, None, prompt, 12).tokens for prompt in prompts]


def test_an_answer_ends_with_its_end_of_turn(target, monkeypatch):
    first = generate(target, None, [*PREFIX, 40], 6).tokens
    monkeypatch.setattr(target, "eos_ids", frozenset({first[2]}))
    answers = answer_batch(target, [[*PREFIX, 40], [*PREFIX, 50]], 6, do_sample=False)
    assert answers[0] == first[: first.index(first[2]) + 1]
    assert len(answers[1]) == 6 or answers[1][-1] == first[2]


def test_attention_is_the_models_own_again_afterwards(target):
    before = target.model.config._attn_implementation
    answer_batch(target, [[40, 41], [50]], 2, do_sample=False)
    assert target.model.config._attn_implementation == before == "sdpa"


def test_bf16_answers_are_finite_choices():
    target = Target(tiny_llama().bfloat16())
    answers = answer_batch(target, [[40, 41, 42], [50], [60, 61]], 5, do_sample=False)
    assert all(len(ids) == 5 or ids[-1] in target.eos_ids for ids in answers)
    assert any(token != 0 for ids in answers for token in ids)
