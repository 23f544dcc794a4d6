"""The selector and the convolutions in the block engine: what an untrained one does, what is measured, shapes that are
refused."""

from __future__ import annotations

import pytest
import torch
from small_drafts import anchors_of, compare, dflash2_shape, engine_step, reference_step, small_dflash, small_dflash2

from bench.block_work import block_engine, block_reference
from fastdraft.batch import Features
from fastdraft.model.dflash.loss import BlockLoss
from fastdraft.model.dflash.ref import BlockReferenceEngine, losses_of_logits
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.dflash2.loss import SelectorLoss


def test_without_the_selectors_loss_its_weights_stay():
    case, loss = small_dflash2(), SelectorLoss(selector_alpha=0.0)
    compare(case, loss, 3, 1e-12)
    _, grads = engine_step(case, anchors_of(case), loss)
    assert not any(grad.any() for name, grad in grads.items() if name.startswith("candidate_selector"))


def test_a_draft_made_of_dflash_drafts_what_it_did():
    """The losses, and all gradients of what both have, are DFlash's; the selector's first gradient moves its successors."""
    case = small_dflash()
    anchors = anchors_of(case)
    rows, grads = reference_step(case, anchors, BlockLoss())
    made = DFlash2Draft.of_dflash(case.draft, conv_group_size=4, selector_rank=6, selector_top_k=5)
    made.take_from_target(case.draft.embedding)
    case.draft = made
    ours, found = engine_step(case, anchors, SelectorLoss(selector_alpha=0.0), chunk_blocks=3)
    torch.testing.assert_close(ours.loss, rows.loss, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.hit, rows.hit)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-10)
    _, found = engine_step(case, anchors, SelectorLoss(), chunk_blocks=3)
    assert bool(found["candidate_selector.successor_codebook"].any())
    assert bool(found["layers.0.attention_conv.kernel_projection.weight"].any())


def test_a_draft_made_of_dflash_is_loaded_in_its_dtype_and_alike_every_time():
    case = small_dflash(dtype=torch.bfloat16)
    one, two = (DFlash2Draft.of_dflash(case.draft, conv_group_size=4, selector_top_k=5).state_dict() for _ in range(2))
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, two[name]) for name, p in one.items())
    assert torch.equal(one["layers.1.mlp.down_proj.weight"], case.draft.layers[1].mlp.down_proj.weight)


def test_measuring_is_of_what_the_selector_drafts():
    """With the target's state acceptance is against its distribution, without it hits are of the text; both know the token
    before, which the logits alone do not."""
    case, loss = small_dflash2(), SelectorLoss()
    given = case.draft, case.head, loss, lambda *_: anchors_of(case)
    ours, law = block_engine(*given, 3), block_reference(*given)
    for features in (case.features, Features(case.features.g, None)):
        found, want = ours.rows(case.batch, features), law.rows(case.batch, features)
        for name in ("loss", "acceptance", "hit", "live"):
            torch.testing.assert_close(getattr(found, name), getattr(want, name), rtol=1e-10, atol=1e-12)
    of_logits = lambda draft, rows, head, loss: losses_of_logits(head.logits(rows.states), rows, head, loss)  # noqa: E731
    plain = BlockReferenceEngine(*given, of_logits).rows(case.batch, case.features)
    with_state = ours.rows(case.batch, case.features)
    assert 0 < float(with_state.acceptance.max()) <= 1
    assert not torch.equal(plain.hit, with_state.hit) and not torch.allclose(plain.acceptance, with_state.acceptance)


def test_parameters_are_counted():
    case = small_dflash2(num_hidden_layers=3, conv_kernel_size=3)
    assert case.config.num_parameters()["trainable"] == sum(p.numel() for p in case.draft.trainable().values())


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(conv_group_size=12), "conv_group_size 12 is no power of two"),
        (dict(conv_group_size=32), "conv_group_size 32 does not divide hidden_size 16"),
        (dict(conv_kernel_size=6), "conv_kernel_size 6 is more than the 5 rows of a block"),
        (dict(selector_top_k=41), "selector_top_k 41 is more than the vocabulary of 40"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        dflash2_shape(**change)
