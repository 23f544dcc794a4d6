"""DSpark's head in the block engine against the reference: float64 to 1e-11, chunks and parts of every size, bf16."""

from __future__ import annotations

import pytest
import torch
from small_dspark import SmallSpark, dspark_shape

from fastdraft.batch import Features, TargetHead
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash import memory
from fastdraft.model.dflash.blocks import draw_anchors, plan_blocks
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.ref import BlockReferenceEngine, live_steps
from fastdraft.model.dspark.head import DSparkHead, dspark_engine_step
from fastdraft.model.dspark.loss import DSparkLoss
from fastdraft.model.dspark.ref import dspark_losses_ref, dspark_ref_step

LOSS = DSparkLoss(3.0, 0.3, 0.7, 0.6)
SHAPES = {
    "two layers": {},
    "one layer": dict(num_hidden_layers=1),
    "sliding": dict(
        num_hidden_layers=3,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
        sliding_window=6,
    ),
    "blocks of two, rank 1": dict(block_size=2, markov_rank=1),
}


def anchors_of(case, limit=8):
    return draw_anchors(case.batch, limit, seed=3, step=1)


def compare(case, anchors, loss=LOSS, chunk_blocks=3, tolerance=1e-11):
    args = case.draft, case.batch, case.features, case.head, anchors, loss
    rows, grads = dspark_ref_step(*args)
    ours, found = dspark_engine_step(*args, chunk_blocks=chunk_blocks)
    assert torch.equal(rows.live, ours.live) and torch.equal(rows.hit, ours.hit) and bool(rows.live.any())
    torch.testing.assert_close(ours.loss, rows.loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.acceptance, rows.acceptance, rtol=tolerance, atol=tolerance)
    assert grads.keys() == found.keys() and "confidence_head.proj.bias" in grads
    for name, grad in grads.items():
        error = float((found[name] - grad).abs().max() / grad.abs().max())
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("chunk_blocks", [1, 3, 100])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_engine_is_the_reference(shape, chunk_blocks):
    case = SmallSpark(dspark_shape(**shape))
    compare(case, anchors_of(case), chunk_blocks=chunk_blocks)


@pytest.mark.parametrize(
    "loss",
    [DSparkLoss(4.0, 1.0, 0.0, 1e-6), DSparkLoss(4.0, 0.0, 1.0, 1e-6), DSparkLoss(4.0, 1e-6, 0.0, 1.0)],
    ids=["ce", "l1", "confidence"],
)
def test_each_term_alone(loss):
    case = SmallSpark()
    compare(case, anchors_of(case), loss, tolerance=1e-10)


def test_the_head_in_parts_gives_the_same(monkeypatch):
    case = SmallSpark()
    monkeypatch.setattr(memory, "head_room", lambda c, dtype: 4)
    compare(case, anchors_of(case), chunk_blocks=5)


def test_live_rows_end_at_the_first_without_a_label():
    case = SmallSpark()
    anchors = anchors_of(case)
    _, live = live_steps(case.batch, anchors, case.config)
    (chunk,) = plan_blocks(case.batch, anchors, case.config, 100, 10**6)
    planned = torch.zeros_like(live)
    planned[chunk.head_block, chunk.head_step] = True
    assert torch.equal(planned, live)
    assert bool((live.int().diff(dim=1) <= 0).all()) and bool((live.sum(1) >= 1).all())
    at, _ = live_steps(case.batch, anchors, case.config)
    mask = case.batch.loss_mask[at]
    assert bool((mask[:, 1:] & ~live[:, 1:] & ~mask[:, :-1]).any()), "no hole in any block: the test shows nothing"
    assert torch.equal(chunk.previous, case.batch.input_ids[at[live] - 1])


def test_a_step_without_gradients_measures_the_same():
    case = SmallSpark()
    anchors = anchors_of(case)
    ours = BlockEngine(case.draft, case.head, LOSS, lambda *_: anchors, head_type=DSparkHead)
    law = BlockReferenceEngine(case.draft, case.head, LOSS, lambda *_: anchors, dspark_losses_ref)
    grads = flat_gradients(case.draft.trainable())
    trained = ours.step(case.batch, case.features, grads)
    for rows in (ours.rows(case.batch, case.features), law.rows(case.batch, case.features)):
        for name in ("loss", "acceptance", "hit", "live"):
            torch.testing.assert_close(getattr(rows, name), getattr(trained, name), rtol=1e-11, atol=1e-12)
    assert 0 < float(trained.acceptance.max()) < 1


def test_a_teacher_that_is_missing_is_named():
    case = SmallSpark()
    without = Features(case.features.g, None)
    for run in (dspark_engine_step, dspark_ref_step):
        with pytest.raises(ValueError, match="the target's last state, which these features lack"):
            run(case.draft, case.batch, without, case.head, anchors_of(case), LOSS)


def test_bf16_is_no_further_off_than_plain_pytorch():
    """Over several draws, each gradient's part of all of them: a single tiny draft's is off by its own few roundings, where
    the L1 term changes its sign."""
    shape, parts = dspark_shape(num_hidden_layers=3), {}
    for seed in range(4):
        case, exact = (SmallSpark(shape, (60, 40), torch.bfloat16, seed) for _ in range(2))
        exact.draft.double()
        exact.draft.embedding = exact.draft.embedding.double()
        features = Features(case.features.g.double(), case.features.f.double())
        anchors, head = anchors_of(case, 20), TargetHead(case.head.weight.double())
        _, truth = dspark_ref_step(exact.draft, case.batch, features, head, anchors, LOSS)
        args = case.draft, case.batch, case.features, case.head, anchors, LOSS
        plain, ours = dspark_ref_step(*args)[1], dspark_engine_step(*args, chunk_blocks=7)[1]
        for name, law in truth.items():
            part = next((x for x in ("markov", "confidence", "layers") if x in name), "ends")
            errors = [float((x[name].double() - law).square().sum() / law.square().sum()) for x in (ours, plain)]
            parts.setdefault(part, []).append(errors)
    for part, errors in parts.items():
        off, allowed = torch.tensor(errors).mean(0).sqrt().tolist()
        assert off <= 1.5 * allowed + 2**-8, f"{part}: {off:.1e} where plain PyTorch is {allowed:.1e}"


def test_all_buffers_are_listed_and_sized():
    case = SmallSpark()
    engine = BlockEngine(case.draft, case.head, LOSS, lambda *_: anchors_of(case), 4, DSparkHead)
    engine.step(case.batch, case.features, flat_gradients(case.draft.trainable()))
    c, dtype = case.config, torch.float64
    listed = memory.chunk_buffers(c, 4, dtype, dtype, "cpu", True) | memory.pack_buffers(c, memory.room_for(52), dtype)
    assert engine.take.table == listed and engine.take.held.keys() == listed.keys()
    assert {"markov.e", "markov.de", "confidence.input"} <= listed.keys()


def gpu_errors(dtype, device="cuda"):
    """The fused step of a draft with heads of 64 against the reference in float64: error of each gradient and of losses and
    acceptance, and what the kernel rule allows it."""
    shape = dict(hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=4096, mask_token_id=4095, block_size=7)
    case = SmallSpark(dspark_shape(**shape, markov_rank=64), (300, 5, 200))
    with torch.no_grad():
        for p in case.draft.parameters():
            if p.ndim == 2:
                p *= p.shape[1] ** -0.5 / p.std()  # states, and the logits behind them, of a trained draft's size
    weight = case.head.weight * 256**-0.5
    anchors = anchors_of(case, 64)
    rounded = lambda x: x.to(torch.bfloat16).to(dtype)  # noqa: E731

    def run(step, dtype, device):
        draft = SmallSpark(dspark_shape(**shape, markov_rank=64), (300, 5, 200)).draft
        draft.load_state_dict({name: rounded(p) for name, p in case.draft.state_dict().items()})
        draft = draft.to(device, dtype)
        draft.embedding = rounded(case.draft.embedding).to(device, dtype)
        features = Features(*(rounded(x).to(device, dtype) for x in (case.features.g, case.features.f)))
        rows, grads = step(draft, case.batch, features, TargetHead(rounded(weight).to(device, dtype)), anchors, LOSS)
        return {"loss": rows.loss, "acceptance": rows.acceptance, **{f"grad {name}": x for name, x in grads.items()}}

    truth = run(dspark_ref_step, torch.float64, "cpu")
    plain, ours = run(dspark_ref_step, dtype, "cpu"), run(dspark_engine_step, dtype, device)
    found = {}
    for name, law in truth.items():
        off, rough = (float((x[name].cpu().double() - law).norm() / law.norm()) for x in (ours, plain))
        found[name] = off, 2 * rough + (2**-8 if dtype == torch.bfloat16 else 1e-5)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_it_is_no_further_off_than_plain_pytorch(dtype):
    found = gpu_errors(dtype)
    assert len(found) > 20
    for name, (off, allowed) in found.items():
        assert off <= allowed, f"{name}: {off:.1e}, allowed {allowed:.1e}"
