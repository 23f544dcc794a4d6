"""What a step of the engine costs, seen from outside: every product of real steps on the CPU.

The engine is used by its public interface alone. Its CPU attention is a reference that reads all keys, so attention's
products (batched) are left out of the count. Memory is tests/test_cost.py's and tests/model/eagle3/test_engine.py's.
"""

from __future__ import annotations

import pytest
import torch
from meta_step import flop_counter

from bench.work import SHAPES, flop_parts, make_draft, make_head, make_work
from fastdraft.batch import Batch
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.eagle3.engine import TTTEngine

CPU = torch.device("cpu")


def make_batch(lengths: tuple[int, ...], trained: str, vocab: int) -> Batch:
    """Trained on: `all`, the `last` tenth of each document, `one` token in the middle of each, or `random` three in ten."""
    generator = torch.Generator().manual_seed(0)
    masks = []
    for n in lengths:
        place = torch.arange(n)
        match trained:
            case "all":
                masks.append(place >= 0)
            case "last":
                masks.append(place >= 0.9 * n)
            case "one":
                masks.append(place == n // 2)
            case "random":
                masks.append(torch.rand(n, generator=generator) < 0.3)
    ids = torch.randint(vocab, (sum(lengths),), generator=generator)
    return Batch(ids, torch.cat(masks), lengths)


def products(config, batch: Batch, steps: int, chunk_rows: int = 64) -> int:
    """FLOPs with weights, in a step."""
    work = make_work(config, [batch], steps, torch.float32, CPU)
    draft, head = make_draft(config, torch.float32, CPU), make_head(config, torch.float32, CPU)
    engine, grads = TTTEngine(draft, head, work.step_weights, chunk_rows=chunk_rows), flat_gradients(draft.trainable())
    with flop_counter() as counter:
        engine.step(batch, work.features[0], grads)
    aten = torch.ops.aten
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if op not in (aten.bmm, aten.baddbmm))


SMALL = SHAPES["tiny"].model_copy(update={"vocab_size": 400, "draft_vocab_size": 200, "intermediate_size": 96})


@pytest.mark.parametrize("trained", ["all", "last", "one", "random"])
@pytest.mark.parametrize("lengths", [(150,), (40, 90, 3, 60)])
def test_no_product_is_done_for_nothing(lengths, trained):
    """Not more than the mathematics needs row by row, though rows come in chunks: embeddings' halves are shared."""
    batch = make_batch(lengths, trained, SMALL.vocab_size)
    needed, _ = flop_parts(SMALL, batch, 7)
    assert 0.5 * needed < products(SMALL, batch, 7) <= needed


def test_dead_work_is_not_done():
    """The last tenth of each document trained on: well below a fifth of the work of everything trained on."""
    counted = [products(SMALL, make_batch((120, 120), trained, SMALL.vocab_size), 7) for trained in ("all", "last")]
    assert counted[1] < 0.2 * counted[0]
