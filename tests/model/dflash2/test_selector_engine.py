"""The block engine with convolutions and selector against the reference, in float64; what an untrained one does."""

from __future__ import annotations

import pytest
import torch
from small_dflash import Small, dflash_shape
from small_dflash2 import small_dflash2

from fastdraft.batch import Features, TargetHead
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash import memory
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.engine import BlockEngine, block_engine_step
from fastdraft.model.dflash.loss import BlockLoss
from fastdraft.model.dflash.ref import BlockReferenceEngine, block_ref_step, losses_of_logits
from fastdraft.model.dflash2.config import DFlash2Config
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.dflash2.head import SelectorHead
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dflash2.mixer import ConvolutionMixer
from fastdraft.model.dflash2.ref import selector_losses_ref

SLIDING = dict(layer_types=("sliding_attention", "full_attention", "sliding_attention"), sliding_window=6)
SHAPES = {
    "two layers": {},
    "one layer, three taps": dict(num_hidden_layers=1, conv_kernel_size=3),
    "three layers, sliding first and last": dict(num_hidden_layers=3, **SLIDING),
    "blocks of two": dict(block_size=2),
    "shifted": dict(labels="shifted"),
    "one tap, groups of one, all tokens candidates": dict(conv_kernel_size=1, conv_group_size=1, selector_top_k=40),
}


def anchors_of(case: Small, limit: int = 8) -> torch.Tensor:
    return draw_anchors(case.batch, limit, seed=3, step=1)


def reference(*args):
    return block_ref_step(*args, row_losses=selector_losses_ref)


def engine(*args, chunk_blocks=None):
    return block_engine_step(*args, chunk_blocks=chunk_blocks, head_type=SelectorHead, mixer=ConvolutionMixer(args[0]))


def compare(case: Small, loss: SelectorLoss, chunk_blocks, tolerance=1e-12):
    args = case.draft, case.batch, case.features, case.head, anchors_of(case), loss
    rows, grads = reference(*args)
    ours, found = engine(*args, chunk_blocks=chunk_blocks)
    assert torch.equal(rows.live, ours.live) and torch.equal(rows.hit, ours.hit) and bool(rows.live.any())
    torch.testing.assert_close(ours.loss, rows.loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.acceptance, rows.acceptance, rtol=tolerance, atol=tolerance)
    assert grads.keys() == found.keys()
    for name, grad in grads.items():
        assert loss.selector_alpha == 0 or bool(grad.any()), f"{name} has no gradient, so nothing is compared"
        error = float((found[name] - grad).abs().max() / grad.abs().max().clamp_min(1e-30))
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", ["ce", "dpace", "kl", "lk_lambda"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_engine_is_the_reference(shape, kind):
    compare(small_dflash2(**shape), SelectorLoss(kind, 3.0, 0.4, 0.9, 1.3, selector_alpha=0.7), chunk_blocks=3)


@pytest.mark.parametrize("chunk_blocks", [1, 2, 5, 7, 100])
def test_chunks_of_every_size_give_the_same(chunk_blocks):
    compare(small_dflash2(num_hidden_layers=3, **SLIDING), SelectorLoss("dpace"), chunk_blocks)


def test_the_head_in_parts_gives_the_same(monkeypatch):
    monkeypatch.setattr(memory, "head_room", lambda c, dtype: 4)
    for kind in ("ce", "dpace", "kl"):
        compare(small_dflash2(), SelectorLoss(kind), chunk_blocks=5)


def test_without_the_selectors_loss_its_weights_stay():
    case, loss = small_dflash2(), SelectorLoss(selector_alpha=0.0)
    compare(case, loss, chunk_blocks=3)
    _, grads = engine(case.draft, case.batch, case.features, case.head, anchors_of(case), loss)
    assert not any(grad.any() for name, grad in grads.items() if name.startswith("candidate_selector"))


def test_a_draft_made_of_dflash_drafts_what_it_did():
    """The losses, and all gradients of what both have, are DFlash's; the selector's first gradient moves its successors."""
    case = Small(dflash_shape())
    anchors = anchors_of(case)
    args = case.batch, case.features, case.head, anchors
    rows, grads = block_ref_step(case.draft, *args, BlockLoss())
    made = DFlash2Draft.of_dflash(case.draft, conv_group_size=4, selector_rank=6, selector_top_k=5)
    made.take_from_target(case.draft.embedding)
    ours, found = engine(made, *args, SelectorLoss(selector_alpha=0.0), chunk_blocks=3)
    torch.testing.assert_close(ours.loss, rows.loss, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.hit, rows.hit)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-10)
    _, found = engine(made, *args, SelectorLoss(), chunk_blocks=3)
    assert bool(found["candidate_selector.successor_codebook"].any())
    assert bool(found["layers.0.attention_conv.kernel_projection.weight"].any())


def test_a_draft_made_of_dflash_is_loaded_in_its_dtype_and_alike_every_time():
    case = Small(dflash_shape(), dtype=torch.bfloat16)
    one, two = (DFlash2Draft.of_dflash(case.draft, conv_group_size=4, selector_top_k=5).state_dict() for _ in range(2))
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, two[name]) for name, p in one.items())
    assert torch.equal(one["layers.1.mlp.down_proj.weight"], case.draft.layers[1].mlp.down_proj.weight)


def test_measuring_is_of_what_the_selector_drafts():
    """With the target's state acceptance is against its distribution, without it hits are of the text; both know the token
    before, which the logits alone do not."""
    case, loss = small_dflash2(), SelectorLoss()
    draw = lambda batch, step: anchors_of(case)  # noqa: E731
    ours = BlockEngine(case.draft, case.head, loss, draw, 3, SelectorHead, ConvolutionMixer(case.draft))
    law = BlockReferenceEngine(case.draft, case.head, loss, draw, selector_losses_ref)
    for features in (case.features, Features(case.features.g, None)):
        found, want = ours.rows(case.batch, features), law.rows(case.batch, features)
        for name in ("loss", "acceptance", "hit", "live"):
            torch.testing.assert_close(getattr(found, name), getattr(want, name), rtol=1e-10, atol=1e-12)
    of_logits = lambda draft, rows, head, loss: losses_of_logits(head.logits(rows.states), rows, head, loss)  # noqa: E731
    plain = BlockReferenceEngine(case.draft, case.head, loss, draw, of_logits).rows(case.batch, case.features)
    with_state = ours.rows(case.batch, case.features)
    assert 0 < float(with_state.acceptance.max()) <= 1
    assert not torch.equal(plain.hit, with_state.hit) and not torch.allclose(plain.acceptance, with_state.acceptance)


def test_bf16_is_no_further_off_than_plain_pytorch():
    lengths, anchors = (60, 40), None
    case, exact = (small_dflash2(lengths, torch.bfloat16, num_hidden_layers=3) for _ in range(2))
    exact.draft.double()
    exact.draft.embedding = exact.draft.embedding.double()
    features = Features(case.features.g.double(), case.features.f.double())
    anchors, loss = anchors_of(case, 20), SelectorLoss()
    _, truth = reference(exact.draft, case.batch, features, TargetHead(case.head.weight.double()), anchors, loss)
    args = case.draft, case.batch, case.features, case.head, anchors, loss
    plain, ours = reference(*args)[1], engine(*args, chunk_blocks=7)[1]
    for name, law in truth.items():
        off, allowed = (float((x[name].double() - law).abs().max() / law.abs().max()) for x in (ours, plain))
        assert off <= 2 * allowed + 2**-7, f"{name}: {off:.1e} where plain PyTorch is {allowed:.1e}"


def test_all_buffers_are_listed_and_used():
    """What the engine takes is what the shape lists; the plan is made of it."""
    case = small_dflash2()
    engine = BlockEngine(
        case.draft,
        case.head,
        SelectorLoss("kl"),
        lambda *_: anchors_of(case),
        4,
        SelectorHead,
        ConvolutionMixer(case.draft),
    )
    engine.step(case.batch, case.features, flat_gradients(case.draft.trainable()))
    c, dtype = case.config, torch.float64
    listed = memory.chunk_buffers(c, 4, dtype, dtype, "cpu", True) | memory.pack_buffers(c, memory.room_for(52), dtype)
    assert engine.take.table == listed
    mine = {name for name in listed if name in c.extra_buffers(1, 1, dtype)}
    assert mine and mine <= engine.take.held.keys()


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
        DFlash2Config(**dflash_shape().model_dump() | dict(conv_group_size=4, selector_top_k=5) | change)
