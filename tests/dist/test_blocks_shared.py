"""Block drafts whose packs' tokens are shared by processes: losses and gradients are those of one process.

Everything runs over gloo on the CPU, in float64. The processes are forked with the law at hand, which the engine of one
process has computed; that it is the reference's is what tests/model/ holds.

# N packed tokens, T steps of a block
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from typing import NamedTuple

import pytest
import torch
from small_drafts import Small, dflash_shape, small_dflash, small_dflash2, small_dspark
from small_runs import by_ranks

from bench.block_work import block_engine
from fastdraft.batch import Batch, Features, PackShare, TargetHead, own_features
from fastdraft.dist import mesh
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash.blocks import deal_anchors, draw_anchors, teacher_rows
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.loss import BlockLoss, StepLoss
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dspark.loss import DSparkLoss

CPU = torch.device("cpu")
SLIDING = dict(num_hidden_layers=3, layer_types=("sliding_attention", "full_attention", "full_attention"), sliding_window=6)
ONE_SLIDING = dict(num_hidden_layers=1, layer_types=("sliding_attention",), sliding_window=6)
# The documents of each pack: one longer than all others together, single tokens, one alone, one that nothing is trained on.
PACKS = ((19, 1, 2, 7, 23), (2, 40, 5), (61,), (3, 1, 1), (9, 9))


class Kind(NamedTuple):
    case: Callable[..., Small]
    loss: StepLoss


KINDS = {
    "dflash, hard labels": Kind(partial(small_dflash, **SLIDING), BlockLoss("ce", 3.0)),
    "dflash, dpace": Kind(small_dflash, BlockLoss("dpace", dpace_alpha=0.4)),
    "dflash, lk_lambda, shifted": Kind(
        partial(small_dflash, labels="shifted"), BlockLoss("lk_lambda", 3.0, lk_scale=0.9, lk_decay=1.3)
    ),
    "dspark": Kind(small_dspark, DSparkLoss(3.0, 0.3, 0.6, 0.7)),
    "dflash2": Kind(small_dflash2, SelectorLoss("kl", 3.0, selector_alpha=0.8)),
}


def engine_of(kind: Kind, case: Small, sequence=None, chunk_blocks: int = 3) -> BlockEngine:
    return block_engine(case.draft, case.head, kind.loss, partial(draw_some, limit=8), chunk_blocks, sequence=sequence)


def draw_some(batch: Batch, number: int, limit: int) -> torch.Tensor:
    return draw_anchors(batch, limit, seed=3, step=number)


def packs_of(kind: Kind) -> list[tuple[Batch, Features]]:
    """Masks with holes; the last pack has none that a block could begin at."""
    packs = []
    for k, lengths in enumerate(PACKS):
        case = kind.case(lengths=lengths, seed=k)
        mask = case.batch.loss_mask if k < len(PACKS) - 1 else torch.arange(sum(lengths)) % 2 == 0
        packs.append((Batch(case.batch.input_ids, mask, lengths), case.features))
    return packs


def law_of(kind: Kind):
    case = kind.case()
    engine, grads = engine_of(kind, case), flat_gradients(case.draft.trainable())
    engine.begin(7)
    rows = [engine.step(*pack, grads) for pack in packs_of(kind)]
    return rows, [engine.rows(*pack) for pack in packs_of(kind)], grads


def close(got: torch.Tensor, law: torch.Tensor, what: object, tolerance: float = 1e-10) -> None:
    error = float((got.cpu().double() - law.double()).abs().max()) / max(float(law.double().abs().max()), 1e-3)
    assert error <= tolerance, f"{what}: {error:.1e}"


@pytest.mark.parametrize("world", [2, 4])
def test_processes_that_share_a_packs_tokens_are_one(world):
    law = {name: law_of(kind) for name, kind in KINDS.items()}
    for rows, _, _ in law.values():
        assert all(r.live.any() for r in rows[:3]) and not rows[-1].live.any()
    assert by_ranks(world, _shared, law) == [0] * world


def _shared(law) -> None:
    mesh.start_process("cpu")
    for size in {mesh.world(), 2}:
        mesh.lay_out(sequence=size)
        for name, kind in KINDS.items():
            _one(kind, *law[name], (name, size))


def _one(kind: Kind, rows_law, held_out_law, grads_law, what, place=CPU, dtype=torch.float64) -> None:
    sequence, data, tolerance = mesh.axis("sequence"), mesh.axis("data"), 1e-10 if dtype == torch.float64 else 1e-4
    case = kind.case()
    case.draft.to(place, dtype)
    case.head = TargetHead(case.head.weight.to(place, dtype))
    engine, grads = engine_of(kind, case, sequence), flat_gradients(case.draft.trainable())
    engine.begin(7)
    for k, (batch, features) in enumerate(packs_of(kind)):
        if k % data.size != data.rank:
            continue
        share = PackShare(batch.num_tokens, sequence.rank, sequence.size, halo=case.config.num_drafted)
        own = own_features(Features(*(x.to(place, dtype) for x in (features.g, features.f))), share)
        for ours, theirs in ((engine.step(batch, own, grads), rows_law[k]), (engine.rows(batch, own), held_out_law[k])):
            for x, y in zip(astuple(ours), astuple(theirs), strict=True):
                close(sequence.sum_(x.double()), y, (*what, k), tolerance)
    for name, grad in grads.items():
        close(mesh.axis("replicas").sum_(grad), grads_law[name], (*what, name), tolerance)


ON_GPUS = dict(hidden_size=32, head_dim=16)  # what the kernels cover
LOSSES = {"ce": BlockLoss("ce", 3.0), "lk_lambda": BlockLoss("lk_lambda", 3.0, lk_scale=0.9, lk_decay=1.3)}


def on_gpus(loss: str) -> Kind:
    return Kind(partial(small_dflash, **SLIDING | ON_GPUS), LOSSES[loss])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_that_share_a_packs_tokens_are_one():
    """In float32, by the kernels, over NCCL."""
    law = {loss: law_of(on_gpus(loss)) for loss in LOSSES}
    assert by_ranks(2, _shared_in_float32, law, "cuda", start="spawn", seconds=200) == [0] * 2


def test_what_gpus_are_asked_runs_on_two_processes_of_a_cpu():
    assert by_ranks(2, _shared_in_float32, {"ce": law_of(on_gpus("ce"))}, "cpu") == [0] * 2


def _shared_in_float32(law, device: str) -> None:
    place = mesh.start_process(device)
    mesh.lay_out(sequence=2)
    for loss, of_one in law.items():
        _one(on_gpus(loss), *of_one, (loss, device), place, torch.float32)


@pytest.mark.parametrize(("shape", "window"), [({}, None), (ONE_SLIDING, 6)], ids=["all keys", "a window"])
def test_blocks_are_dealt_in_runs_of_equal_work(shape, window):
    """Late anchors of a long document see many keys, and in a sliding layer no more than its window."""
    n, c = 40_000, dflash_shape(**shape)
    batch = Batch(torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool), (n,))
    anchors = torch.arange(1, n - 1, 7)
    runs = deal_anchors(anchors, batch, c, 4)
    assert torch.equal(torch.cat(runs), anchors)
    products = c.block_size * 6 * c.num_parameters()["trainable"] + c.num_drafted * 4 * c.hidden_size * c.vocab_size
    pair = 14 * c.block_size * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    work = [sum(products + pair * min(a, window or a) for a in run.tolist()) for run in runs]
    assert max(work) < 1.002 * min(work)
    assert (len(runs[0]) > 1.5 * len(runs[3])) is (window is None)


def test_few_blocks_and_none_are_dealt():
    batch = Batch(torch.zeros(9, dtype=torch.int64), torch.ones(9, dtype=torch.bool), (9,))
    for anchors in ([2, 5], [4], []):
        runs = deal_anchors(torch.tensor(anchors, dtype=torch.int64), batch, dflash_shape(), 4)
        assert len(runs) == 4 and torch.cat(runs).tolist() == anchors and max(map(len, runs)) <= 1


def test_the_teacher_is_asked_for_tokens_that_have_a_successor():
    batch = Batch(torch.zeros(9, dtype=torch.int64), torch.ones(9, dtype=torch.bool), (5, 4))
    assert teacher_rows(torch.tensor([1, 2, 6]), batch, 3).tolist() == [1, 2, 3, 6, 7]
    assert teacher_rows(torch.tensor([4, 8]), batch, 3).tolist() == []
