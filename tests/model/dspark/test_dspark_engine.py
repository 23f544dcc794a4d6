"""DSpark's head in the block engine: where live rows end, what is measured without gradients, and a GPU."""

from __future__ import annotations

import pytest
import torch
from small_drafts import anchors_of, small_dspark

from bench.block_work import block_engine, block_reference
from fastdraft.batch import Features, TargetHead
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash.blocks import plan_blocks
from fastdraft.model.dflash.ref import live_steps
from fastdraft.model.dspark.head import dspark_engine_step
from fastdraft.model.dspark.loss import DSparkLoss
from fastdraft.model.dspark.ref import dspark_ref_step

LOSS = DSparkLoss(3.0, 0.3, 0.7, 0.6)


def test_live_rows_end_at_the_first_without_a_label():
    case = small_dspark()
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
    case = small_dspark()
    anchors = anchors_of(case)
    ours, law = (make(case.draft, case.head, LOSS, lambda *_: anchors) for make in (block_engine, block_reference))
    grads = flat_gradients(case.draft.trainable())
    trained = ours.step(case.batch, case.features, grads)
    for rows in (ours.rows(case.batch, case.features), law.rows(case.batch, case.features)):
        for name in ("loss", "acceptance", "hit", "live"):
            torch.testing.assert_close(getattr(rows, name), getattr(trained, name), rtol=1e-11, atol=1e-12)
    assert 0 < float(trained.acceptance.max()) < 1


def gpu_errors(dtype, device="cuda"):
    """The fused step of a draft with heads of 64 against the reference in float64: error of each gradient and of losses and
    acceptance, and what the kernel rule allows it."""
    shape = dict(hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=4096, mask_token_id=4095, block_size=7)
    case = small_dspark((300, 5, 200), **shape, markov_rank=64)
    with torch.no_grad():
        for p in case.draft.parameters():
            if p.ndim == 2:
                p *= p.shape[1] ** -0.5 / p.std()  # states, and the logits behind them, of a trained draft's size
    weight = case.head.weight * 256**-0.5
    anchors = anchors_of(case, 64)
    rounded = lambda x: x.to(torch.bfloat16).to(dtype)  # noqa: E731

    def run(step, dtype, device):
        draft = small_dspark((300, 5, 200), **shape, markov_rank=64).draft
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
