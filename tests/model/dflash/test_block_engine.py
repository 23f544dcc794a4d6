"""The block engine against the reference, for every method of blocks: float64 to 1e-10 on packs, ragged blocks, sliding
layers, chunks of any size; bf16 no further off than plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from small_drafts import (
    anchors_of,
    compare,
    dflash2_shape,
    engine_step,
    reference_step,
    small_dflash,
    small_dflash2,
    small_dspark,
)

from bench.block_work import block_engine
from fastdraft.batch import Batch, Features, TargetHead
from fastdraft.kernels import dense_attention
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash import engine, memory
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.loss import BlockLoss
from fastdraft.model.dflash.ref import BlockReferenceEngine, block_ref_step, block_rows_ref
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dspark.loss import DSparkLoss

SLIDING = dict(
    num_hidden_layers=3,
    layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    sliding_window=6,
)
SHAPES = {
    "two layers": {},
    "one layer": dict(num_hidden_layers=1),
    "three layers, sliding first and last": SLIDING,
    "shifted": dict(labels="shifted"),
    "blocks of two": dict(block_size=2),
    "one target layer, no groups, partial RoPE": dict(
        layers=(3,),
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
    ),
}
SELECTOR_SHAPES = {
    "two layers": {},
    "one layer, three taps": dict(num_hidden_layers=1, conv_kernel_size=3),
    "three layers, sliding first and last": SLIDING,
    "blocks of two": dict(block_size=2),
    "shifted": dict(labels="shifted"),
    "one tap, groups of one, all tokens candidates": dict(conv_kernel_size=1, conv_group_size=1, selector_top_k=40),
}
SPARK_SHAPES = {
    "two layers": {},
    "one layer": dict(num_hidden_layers=1),
    "sliding": SLIDING,
    "blocks of two, rank 1": dict(block_size=2, markov_rank=1),
}
SPARK = DSparkLoss(3.0, 0.3, 0.7, 0.6)
TERMS = {  # of DSpark's loss, each nearly alone
    "ce": DSparkLoss(4.0, 1.0, 0.0, 1e-6),
    "l1": DSparkLoss(4.0, 0.0, 1.0, 1e-6),
    "confidence": DSparkLoss(4.0, 1e-6, 0.0, 1.0),
}
# The methods whose losses have a kind: a maker, the loss, and how near the engine is.
KINDS = {"dflash": (small_dflash, BlockLoss, 1e-10), "dflash2": (small_dflash2, SelectorLoss, 1e-12)}


def every_case() -> Iterator:
    """A small draft's maker, its loss, the blocks of a chunk, and the tolerance."""
    for name, shape in SHAPES.items():
        for kind in ("ce", "dpace", "kl", "lk_alpha", "lk_lambda"):
            loss = BlockLoss(kind, 3.0, 0.4, 0.9, 1.3)
            yield pytest.param(partial(small_dflash, **shape), loss, 3, 1e-10, id=f"dflash, {name}, {kind}")
    for name, shape in SELECTOR_SHAPES.items():
        for kind in ("ce", "dpace", "kl", "lk_lambda"):
            loss = SelectorLoss(kind, 3.0, 0.4, 0.9, 1.3, selector_alpha=0.7)
            yield pytest.param(partial(small_dflash2, **shape), loss, 3, 1e-12, id=f"dflash2, {name}, {kind}")
    for name, shape in SPARK_SHAPES.items():
        for chunk in (1, 3, 100):
            yield pytest.param(partial(small_dspark, **shape), SPARK, chunk, 1e-11, id=f"dspark, {name}, {chunk}")
    for name, loss in TERMS.items():
        yield pytest.param(small_dspark, loss, 3, 1e-10, id=f"dspark, {name}")
    for chunk in (1, 2, 5, 7, 100):
        yield pytest.param(partial(small_dflash, **SLIDING), BlockLoss("dpace"), chunk, 1e-10, id=f"dflash, {chunk}")
        yield pytest.param(partial(small_dflash2, **SLIDING), SelectorLoss("dpace"), chunk, 1e-12, id=f"dflash2, {chunk}")


@pytest.mark.parametrize("make, loss, chunk_blocks, tolerance", list(every_case()))
def test_the_engine_is_the_reference(make, loss, chunk_blocks, tolerance):
    compare(make(), loss, chunk_blocks, tolerance)


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
    case = small_dflash((60, 19, 3, 41), **SHAPES[shape])
    compare(case, BlockLoss("ce"), chunk_blocks, 1e-10, anchors=anchors_of(case, 9))
    assert len(calls) >= 4 and max(keys for _, keys in calls) > 20 and min(keys for _, keys in calls) >= 5


@pytest.mark.parametrize(
    "make, loss, tolerance",
    [
        (small_dspark, SPARK, 1e-11),
        *((make, loss(kind), near) for make, loss, near in KINDS.values() for kind in ("ce", "dpace", "kl")),
    ],
)
def test_the_head_in_parts_gives_the_same(make, loss, tolerance, monkeypatch):
    monkeypatch.setattr(memory, "head_room", lambda c, dtype: 4)
    compare(make(), loss, 5, tolerance)


def test_buffers_used_again_leave_nothing_behind(poison_buffers):
    """Packs of other lengths and without any block go through one engine, whose buffers hold NaN before."""
    case, other = small_dflash(), small_dflash((40, 9), seed=1)
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
    case = small_dflash()
    anchors = anchors_of(case)
    loss = BlockLoss()
    whole, _ = engine_step(case, anchors, loss)
    begin, last = sum(case.batch.lengths[:-1]), case.batch.lengths[-1]
    part = slice(begin, begin + last)
    case.batch = Batch(case.batch.input_ids[part], case.batch.loss_mask[part], (last,))
    case.features = Features(case.features.g[part], case.features.f[part])
    inside = anchors[anchors >= begin]
    for chosen in (inside, inside[::2]):
        rows, _ = engine_step(case, chosen - begin, loss)
        torch.testing.assert_close(rows.loss[:, chosen - begin], whole.loss[:, chosen], rtol=1e-12, atol=1e-12)


def test_measuring_is_against_the_target_where_its_state_is_there():
    case = small_dflash()
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


@pytest.mark.parametrize(
    "make, loss, named", [(small_dflash, BlockLoss("kl"), "loss kl compares with "), (small_dspark, SPARK, "")]
)
@pytest.mark.parametrize("step", [engine_step, reference_step])
def test_a_teacher_that_is_missing_is_named(make, loss, named, step):
    case = make()
    case.features = Features(case.features.g, None)
    with pytest.raises(ValueError, match=f"{named}the target's last state, which these features lack"):
        step(case, anchors_of(case), loss)


@pytest.mark.parametrize("name", KINDS)
def test_bf16_is_no_further_off_than_plain_pytorch(name):
    make, loss, _ = KINDS[name]
    case, exact = (make((60, 40), torch.bfloat16, num_hidden_layers=3) for _ in range(2))
    in_float64(exact)
    anchors = anchors_of(case, 20)
    _, truth = reference_step(exact, anchors, loss())
    plain, ours = reference_step(case, anchors, loss())[1], engine_step(case, anchors, loss(), 7)[1]
    for name, law in truth.items():
        off, allowed = (float((x[name].double() - law).abs().max() / law.abs().max()) for x in (ours, plain))
        rounding = 2**-8 if make is small_dflash else 2**-7
        assert off <= 2 * allowed + rounding, f"{name}: {off:.1e} where plain PyTorch is {allowed:.1e}"


def test_bf16_of_dspark_is_no_further_off_than_plain_pytorch():
    """Over several draws, each gradient's part of all of them: a single tiny draft's is off by its own few roundings, where
    the L1 term changes its sign."""
    parts = {}
    for seed in range(4):
        case, exact = (small_dspark((60, 40), torch.bfloat16, seed, num_hidden_layers=3) for _ in range(2))
        in_float64(exact)
        anchors = anchors_of(case, 20)
        _, truth = reference_step(exact, anchors, SPARK)
        plain, ours = reference_step(case, anchors, SPARK)[1], engine_step(case, anchors, SPARK, 7)[1]
        for name, law in truth.items():
            part = next((x for x in ("markov", "confidence", "layers") if x in name), "ends")
            errors = [float((x[name].double() - law).square().sum() / law.square().sum()) for x in (ours, plain)]
            parts.setdefault(part, []).append(errors)
    for part, errors in parts.items():
        off, allowed = torch.tensor(errors).mean(0).sqrt().tolist()
        assert off <= 1.5 * allowed + 2**-8, f"{part}: {off:.1e} where plain PyTorch is {allowed:.1e}"


def in_float64(case) -> None:
    case.draft.double()
    case.draft.embedding = case.draft.embedding.double()
    case.features = Features(case.features.g.double(), case.features.f.double())
    case.head = TargetHead(case.head.weight.double())


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
    case = small_dflash((4,))
    batch = Batch(torch.tensor(ids), torch.ones(4, dtype=torch.bool), (4,))
    engine = kind(case.draft, case.head, BlockLoss(), lambda batch, step: torch.tensor([1]))
    with pytest.raises(ValueError, match=words):
        engine.step(batch, case.features, flat_gradients(case.draft.trainable()))


def test_a_head_that_engines_would_not_give_is_refused():
    case = small_dflash()
    weight = case.head.weight
    for head, words in (
        (TargetHead(weight, bias=weight[:, 0]), "a bias"),
        (TargetHead(weight, scale=0.5, softcap=30.0), "a scale of 0.5 and a soft-cap of 30.0"),
    ):
        with pytest.raises(ValueError, match=words):
            BlockEngine(case.draft, head, BlockLoss(), lambda batch, step: torch.tensor([1]))


def test_gradients_must_lie_end_to_end():
    case = small_dflash()
    grads = {name: torch.zeros_like(p) for name, p in case.draft.trainable().items()}
    engine = BlockEngine(case.draft, case.head, BlockLoss(), lambda batch, step: anchors_of(case))
    with pytest.raises(ValueError, match="end to end"):
        engine.step(case.batch, case.features, grads)


@pytest.mark.parametrize(
    "make, loss, own",
    [
        (small_dflash, BlockLoss("kl"), set()),
        (small_dspark, SPARK, {"markov.e", "markov.de", "confidence.input"}),
        (small_dflash2, SelectorLoss("kl"), set(dflash2_shape().extra_buffers(1, 1, torch.float64))),
    ],
)
def test_all_buffers_are_listed_and_sized(make, loss, own):
    """What the engine takes is what `memory.py` and the shape predict; the plan is made of it."""
    case = make()
    engine = block_engine(case.draft, case.head, loss, lambda *_: anchors_of(case), 4)
    engine.step(case.batch, case.features, flat_gradients(case.draft.trainable()))
    c, dtype = case.config, torch.float64
    listed = memory.chunk_buffers(c, 4, dtype, dtype, "cpu", True) | memory.pack_buffers(c, memory.room_for(52), dtype)
    assert engine.take.table == listed
    assert own <= listed.keys() and bool(own) == (make is not small_dflash)
    # Where rows are mixed, some of what DFlash's first layer takes is never asked for.
    assert engine.take.held.keys() >= own if c.mixes else engine.take.held.keys() == listed.keys()


def test_rows_of_the_reference_can_be_summed():
    case = small_dflash()
    rows, total = block_rows_ref(case.draft, case.batch, case.features, case.head, anchors_of(case), BlockLoss())
    loss, _, _, live, masked_in = rows.sums()
    weights = torch.tensor(BlockLoss().weights(4), dtype=torch.float64)
    torch.testing.assert_close((loss * weights).sum(), total)
    assert torch.equal(live, masked_in)
