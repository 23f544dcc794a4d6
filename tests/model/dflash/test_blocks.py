"""Anchors: where they may stand, how many there are, and what a draw depends on."""

from __future__ import annotations

import pytest
import torch
from small_drafts import small_dflash

from fastdraft.batch import Batch
from fastdraft.model.dflash.blocks import draw_anchors, plan_blocks


def batch_of(*documents: str) -> Batch:
    """A document is a word: a digit or a capital is a token that is trained on."""
    text = "".join(documents)
    ids = torch.tensor([ord(c) for c in text])
    return Batch(ids, torch.tensor([c.isupper() for c in text]), tuple(map(len, documents)))


def test_an_anchor_and_its_next_token_are_trained_on():
    batch = batch_of("abCDEfGhIJ", "ABc", "aB", "B", "xxYZ")
    assert draw_anchors(batch, 99, 0, 1).tolist() == [2, 3, 8, 18]


def test_a_limit_takes_some_of_each_document_without_repeats():
    batch = batch_of("a" + "B" * 50, "a" + "C" * 5, "a" + "D" * 30)
    anchors = draw_anchors(batch, 10, 7, 3)
    assert sorted(set(anchors.tolist())) == anchors.tolist()
    each = [int(((anchors >= lo) & (anchors < hi)).sum()) for lo, hi in ((0, 51), (51, 57), (57, 88))]
    assert each == [10, 4, 10]


def test_a_draw_is_of_seed_step_and_document_alone():
    first, second, third = "a" + "B" * 50, "a" + "C" * 40, "aaa" + "D" * 30
    alone = [draw_anchors(batch_of(d), 6, 5, 2) for d in (first, second, third)]
    packed = draw_anchors(batch_of(third, first, second), 6, 5, 2)
    assert packed.tolist() == [*alone[2].tolist(), *(33 + alone[0]).tolist(), *(84 + alone[1]).tolist()]
    assert draw_anchors(batch_of(first), 6, 5, 3).tolist() != alone[0].tolist()
    assert draw_anchors(batch_of(first), 6, 6, 2).tolist() != alone[0].tolist()
    other_mask = batch_of(first)
    other_mask.loss_mask[10] = False
    assert draw_anchors(other_mask, 6, 5, 2).tolist() != alone[0].tolist()


def test_every_place_is_drawn_about_as_often():
    batch, count = batch_of("a" + "B" * 21), torch.zeros(22)
    for step in range(1, 2001):
        count[draw_anchors(batch, 5, 0, step)] += 1
    assert count[0] == count[21] == 0  # nothing before, nothing behind
    assert bool(((count[1:21] > 420) & (count[1:21] < 580)).all())  # 500 each, four standard deviations


def test_a_batch_without_room_has_none():
    assert draw_anchors(batch_of("abc", "A", "aB"), 5, 0, 1).tolist() == []


@pytest.mark.parametrize("room", [3, 10**6])
def test_the_plan_counts_each_teacher_row_once_in_a_part(room):
    case = small_dflash(block_size=4)
    anchors = draw_anchors(case.batch, 99, 0, 1)
    for chunk in plan_blocks(case.batch, anchors, case.config, 6, room):
        for part in chunk.parts:
            positions = chunk.teacher_pos[part.teacher]
            assert positions.tolist() == sorted(set(positions.tolist()))
            label_at = chunk.anchor[chunk.head_block[part.rows]] + 1 + chunk.head_step[part.rows]
            assert torch.equal(positions[chunk.teacher_row[part.rows]], label_at - 1)
            assert torch.equal(case.batch.input_ids[label_at], chunk.label[part.rows])
        assert [p.rows.start for p in chunk.parts] == list(range(0, len(chunk.label), room))
