"""The block engine against the reference: float64 to 1e-10 on packs, ragged blocks, sliding layers, chunks of any size."""

from __future__ import annotations

import pytest
import torch
from small_dflash import Small, dflash_shape

from fastdraft.batch import Batch, Features, TargetHead
from fastdraft.kernels import dense_attention
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash import engine, memory
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.engine import BlockEngine, block_engine_step
from fastdraft.model.dflash.loss import BlockLoss
from fastdraft.model.dflash.ref import BlockReferenceEngine, block_ref_step, block_rows_ref

SLIDING = dict(layer_types=("sliding_attention", "full_attention", "sliding_attention"), sliding_window=6)
SHAPES = {
    "two layers": {},
    "one layer": dict(num_hidden_layers=1),
    "three layers, sliding first and last": dict(num_hidden_layers=3, **SLIDING),
    "shifted": dict(labels="shifted"),
    "blocks of two": dict(block_size=2),
    "one target layer, no groups, partial RoPE": dict(
        layers=(3,),
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
    ),
}


def anchors_of(case: Small, limit: int = 8) -> torch.Tensor:
    return draw_anchors(case.batch, limit, seed=3, step=1)


def compare(case: Small, anchors, loss: BlockLoss, chunk_blocks, tolerance=1e-10):
    args = case.draft, case.batch, case.features, case.head, anchors, loss
    rows, grads = block_ref_step(*args)
    ours, found = block_engine_step(*args, chunk_blocks=chunk_blocks)
    assert torch.equal(rows.live, ours.live) and torch.equal(rows.hit, ours.hit) and bool(rows.live.any())
    torch.testing.assert_close(ours.loss, rows.loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.acceptance, rows.acceptance, rtol=tolerance, atol=tolerance)
    assert grads.keys() == found.keys()
    for name, grad in grads.items():
        error = float((found[name] - grad).abs().max() / grad.abs().max().clamp_min(1e-30))
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", ["ce", "dpace", "kl", "lk_alpha", "lk_lambda"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_engine_is_the_reference(shape, kind):
    case = Small(dflash_shape(**shape))
    compare(case, anchors_of(case), BlockLoss(kind, 3.0, 0.4, 0.9, 1.3), chunk_blocks=3)


@pytest.mark.parametrize("chunk_blocks", [1, 2, 5, 7, 100])
def test_chunks_of_every_size_give_the_same(chunk_blocks):
    case = Small(dflash_shape(num_hidden_layers=3, **SLIDING))
    compare(case, anchors_of(case), BlockLoss("dpace"), chunk_blocks)


@pytest.mark.parametrize("chunk_blocks", [2, 3, 7])
@pytest.mark.parametrize("shape", ["two layers", "one layer", "three layers, sliding first and last"])
def test_keys_before_a_chunk_may_go_to_another_kernel(shape, chunk_blocks, monkeypatch):
    """As FlashAttention would take them: long and short documents, few rows in the last layer, chunks of two documents."""
    calls = []

    def forward(q, k, v, scale, out, lse):
        calls.append((len(q), len(k)))
        scores = torch.einsum("mhd,nhd->hmn", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
        lse.copy_(scores.logsumexp(-1))
        out.copy_(torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v.repeat_interleave(q.shape[1] // v.shape[1], 1)))

    def backward(dout, q, k, v, out, lse, scale, dk, dv, take):
        group = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
        p = (torch.einsum("mhd,nhd->hmn", q, keys) * scale - lse[..., None]).exp()
        ds = p * (torch.einsum("mhd,nhd->hmn", dout, values) - (dout * out).sum(-1).T[..., None])
        dk += torch.einsum("hmn,mhd->nhd", ds, q).unflatten(1, (-1, group)).sum(2) * scale
        dv += torch.einsum("hmn,mhd->nhd", p, dout).unflatten(1, (-1, group)).sum(2)
        dq = take("dense.dq", len(q))
        dq.copy_(torch.einsum("hmn,nhd->mhd", ds, keys) * scale)
        return dq

    def buffers(heads, kv_heads, dim, rows, dtype):
        return {"dense.dq": (rows, (heads, dim), torch.promote_types(dtype, torch.float32))}

    for module in (engine, memory):
        monkeypatch.setattr(module, "dense_attention_covers", lambda *_: True)
    monkeypatch.setattr(engine, "dense_attention_fwd", forward)
    monkeypatch.setattr(engine, "dense_attention_bwd", backward)
    monkeypatch.setattr(memory, "dense_buffers", buffers)
    monkeypatch.setattr(dense_attention, "MIN_KEYS", 5)
    monkeypatch.setattr(dense_attention, "MIN_ROWS", 4)
    case = Small(dflash_shape(**SHAPES[shape]), lengths=(60, 19, 3, 41))
    compare(case, anchors_of(case, 9), BlockLoss("ce"), chunk_blocks)
    assert len(calls) >= 4 and max(keys for _, keys in calls) > 20 and min(keys for _, keys in calls) >= 5


def test_the_head_in_parts_gives_the_same(monkeypatch):
    case = Small()
    monkeypatch.setattr(memory, "head_room", lambda c, dtype: 4)
    for kind in ("ce", "dpace", "kl"):
        compare(case, anchors_of(case), BlockLoss(kind), chunk_blocks=5)


def test_buffers_used_again_leave_nothing_behind(poison_buffers):
    """Packs of other lengths and without any block go through one engine, whose buffers hold NaN before."""
    case, other = Small(), Small(lengths=(40, 9), seed=1)
    engine = BlockEngine(case.draft, case.head, BlockLoss(), lambda batch, step: draw_anchors(batch, 6, 3, step), 4)
    grads = flat_gradients(case.draft.trainable())
    none = Batch(case.batch.input_ids, torch.zeros_like(case.batch.loss_mask), case.batch.lengths)
    for batch, features in ((case.batch, case.features), (none, case.features), (other.batch, other.features)):
        engine.begin(2)
        engine.step(batch, features, grads)
    want = {name: torch.zeros_like(grad) for name, grad in grads.items()}
    for batch, features in ((case.batch, case.features), (other.batch, other.features)):
        anchors = draw_anchors(batch, 6, 3, 2)
        for name, grad in block_ref_step(case.draft, batch, features, case.head, anchors, BlockLoss())[1].items():
            want[name] += grad
    for name, grad in want.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-10, atol=1e-10)


@pytest.fixture
def poison_buffers(monkeypatch):
    empty = torch.empty

    def poisoned(*size, **kwargs):
        out = empty(*size, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


def test_documents_and_blocks_do_not_see_each_other():
    """A document's rows are the same alone and in a pack, and a block's whatever other blocks there are."""
    case = Small()
    anchors = anchors_of(case)
    loss = BlockLoss()
    whole, _ = block_engine_step(case.draft, case.batch, case.features, case.head, anchors, loss)
    begin, last = sum(case.batch.lengths[:-1]), case.batch.lengths[-1]
    part = slice(begin, begin + last)
    alone = Batch(case.batch.input_ids[part], case.batch.loss_mask[part], (last,))
    features = Features(case.features.g[part], case.features.f[part])
    inside = anchors[anchors >= begin]
    for chosen in (inside, inside[::2]):
        rows, _ = block_engine_step(case.draft, alone, features, case.head, chosen - begin, loss)
        torch.testing.assert_close(rows.loss[:, chosen - begin], whole.loss[:, chosen], rtol=1e-12, atol=1e-12)


def test_measuring_is_against_the_target_where_its_state_is_there():
    case = Small()
    anchors = anchors_of(case)
    engines = [
        make(case.draft, case.head, BlockLoss(), lambda batch, step: anchors)
        for make in (BlockEngine, BlockReferenceEngine)
    ]
    ours, law = (engine.rows(case.batch, case.features) for engine in engines)
    for name in ("loss", "acceptance", "hit", "live"):
        torch.testing.assert_close(getattr(ours, name), getattr(law, name), rtol=1e-10, atol=1e-12)
    assert 0 < float(ours.acceptance.max()) < 1
    text = [engine.rows(case.batch, Features(case.features.g, None)) for engine in engines]
    for rows in text:
        assert torch.equal(rows.acceptance, rows.hit.to(rows.acceptance.dtype))
        torch.testing.assert_close(rows.loss, law.loss)  # the loss is of the text in any case
    assert not torch.equal(text[0].hit, ours.hit)


def test_a_teacher_that_is_missing_is_named():
    case = Small()
    with pytest.raises(ValueError, match="loss kl compares with the target's last state, which these features lack"):
        block_engine_step(
            case.draft, case.batch, Features(case.features.g, None), case.head, anchors_of(case), BlockLoss("kl")
        )


def test_bf16_is_no_further_off_than_plain_pytorch():
    case = Small(dflash_shape(num_hidden_layers=3), dtype=torch.bfloat16, lengths=(60, 40))
    exact = Small(dflash_shape(num_hidden_layers=3), dtype=torch.bfloat16, lengths=(60, 40))
    exact.draft.double()
    exact.draft.embedding = exact.draft.embedding.double()
    features = Features(case.features.g.double(), case.features.f.double())
    anchors, loss = anchors_of(case, 20), BlockLoss()
    _, truth = block_ref_step(exact.draft, case.batch, features, TargetHead(case.head.weight.double()), anchors, loss)
    args = case.draft, case.batch, case.features, case.head, anchors, loss
    plain, ours = block_ref_step(*args)[1], block_engine_step(*args, chunk_blocks=7)[1]
    for name, law in truth.items():
        off, allowed = (float((x[name].double() - law).abs().max() / law.abs().max()) for x in (ours, plain))
        assert off <= 2 * allowed + 2**-8, f"{name}: {off:.1e} where plain PyTorch is {allowed:.1e}"


def test_dpace_weights_are_the_derivative_of_the_expected_length():
    """sum_j D_j d(log s_j) is the derivative of sum_i prod_{m <= i} s_m."""
    from fastdraft.model.dflash.loss import dpace_weights

    q = torch.rand(3, 6, dtype=torch.float64)
    live = torch.rand(3, 6) < 0.7
    s = (0.5 * q + 0.5).requires_grad_()
    expected = torch.where(live, torch.where(live, s, 1.0).cumprod(1), 0.0).sum()
    (want,) = torch.autograd.grad(expected, s)
    torch.testing.assert_close(dpace_weights(q, live, 0.5), want * s.detach())


@pytest.mark.parametrize("kind", [BlockEngine, BlockReferenceEngine])
@pytest.mark.parametrize(
    "ids, words",
    [([39] * 4, "a document has token 39, which is the draft's mask_token_id"), ([40] * 4, "do not fit the draft's vocab")],
)
def test_ids_that_do_not_fit_are_named(ids, words, kind):
    case = Small(lengths=(4,))
    batch = Batch(torch.tensor(ids), torch.ones(4, dtype=torch.bool), (4,))
    engine = kind(case.draft, case.head, BlockLoss(), lambda batch, step: torch.tensor([1]))
    with pytest.raises(ValueError, match=words):
        engine.step(batch, case.features, flat_gradients(case.draft.trainable()))


def test_a_head_that_engines_would_not_give_is_refused():
    case = Small()
    weight = case.head.weight
    for head, words in (
        (TargetHead(weight, bias=weight[:, 0]), "a bias"),
        (TargetHead(weight, scale=0.5, softcap=30.0), "a scale of 0.5 and a soft-cap of 30.0"),
    ):
        with pytest.raises(ValueError, match=words):
            BlockEngine(case.draft, head, BlockLoss(), lambda batch, step: torch.tensor([1]))


def test_gradients_must_lie_end_to_end():
    case = Small()
    grads = {name: torch.zeros_like(p) for name, p in case.draft.trainable().items()}
    engine = BlockEngine(case.draft, case.head, BlockLoss(), lambda batch, step: anchors_of(case))
    with pytest.raises(ValueError, match="end to end"):
        engine.step(case.batch, case.features, grads)


def test_all_buffers_are_listed_and_sized():
    """What the engine takes is what `memory.py` predicts; the plan is made of it."""
    case = Small()
    engine = BlockEngine(case.draft, case.head, BlockLoss("kl"), lambda batch, step: anchors_of(case), 4)
    engine.step(case.batch, case.features, flat_gradients(case.draft.trainable()))
    c, dtype = case.config, torch.float64
    listed = memory.chunk_buffers(c, 4, dtype, dtype, "cpu", True) | memory.pack_buffers(c, memory.room_for(52), dtype)
    assert engine.take.table == listed
    assert engine.take.held.keys() == listed.keys()


def test_rows_of_the_reference_can_be_summed():
    case = Small()
    rows, total = block_rows_ref(case.draft, case.batch, case.features, case.head, anchors_of(case), BlockLoss())
    loss, _, _, live, masked_in = rows.sums()
    weights = torch.tensor(BlockLoss().weights(4), dtype=torch.float64)
    torch.testing.assert_close((loss * weights).sum(), total)
    assert torch.equal(live, masked_in)
