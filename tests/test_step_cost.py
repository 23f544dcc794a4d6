"""What a step of the engine costs, seen from outside: every product and every tensor of real steps on the CPU.

The engine is used by its public interface alone. Its CPU attention is a reference that reads all keys and holds their
scores, so attention's products (batched) are left out of the count, and memory is measured with one narrow head.

# N packed tokens, M chains of a chunk, T TTT steps, H hidden, V target vocabulary, Vd draft vocabulary
"""

from __future__ import annotations

import pytest
import torch
from meta_step import LiveBytes, flop_counter

from bench.work import SHAPES, flop_parts, make_draft, make_head, make_work
from fastdraft.batch import Batch
from fastdraft.model.ttt import TTTEngine, flat_gradients

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


def run(config, batch: Batch, steps: int, chunk_rows: int, *modes, device=CPU):
    work = make_work(config, [batch], steps, torch.float32, device)
    draft, head = make_draft(config, torch.float32, device), make_head(config, torch.float32, device)
    engine = TTTEngine(draft, head, work.step_weights, chunk_rows=chunk_rows)
    grads = flat_gradients(draft)
    known = [*draft.parameters(), *draft.buffers(), *grads.values(), *vars(work.features[0]).values(), work.step_weights]
    for mode in modes:
        if isinstance(mode, LiveBytes):
            mode.known |= {id(x.untyped_storage()) for x in known}
        mode.__enter__()
    engine.step(batch, work.features[0], grads)
    for mode in reversed(modes):
        mode.__exit__(None, None, None)


def products(config, batch: Batch, steps: int, chunk_rows: int = 64) -> int:
    """FLOPs with weights, in a step."""
    counter = flop_counter()
    run(config, batch, steps, chunk_rows, counter)
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


WIDE = SHAPES["tiny"].model_copy(  # beside its hidden states, the CPU attention's scores and a chunk's rows are small
    update={
        "hidden_size": 1024,
        "target_hidden_size": 1024,
        "intermediate_size": 16,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "vocab_size": 330,
        "draft_vocab_size": 290,
    }
)


def cost(num_tokens: int, steps: int, chunk_rows: int = 32) -> LiveBytes:
    alive = LiveBytes([], device="cpu")
    run(WIDE, make_batch((num_tokens,), "all", WIDE.vocab_size), steps, chunk_rows, alive)
    return alive


def test_a_token_costs_the_same_memory_at_any_length_and_depth():
    """What the peak grows by for a token more stays below 3 hidden states, with 3 steps as with 9."""
    state = 4 * WIDE.hidden_size
    for steps in (3, 9):
        peak = [cost(n, steps).peak for n in (1024, 2048)]  # buffers grow by 1024 tokens
        assert state < (peak[1] - peak[0]) / 1024 < 3 * state


def test_nothing_as_wide_as_a_vocabulary_is_as_long_as_the_pack():
    n, steps, chunk_rows = 1024, 7, 32  # what is kept for a token is kept for a multiple of 1024
    made = cost(n, steps, chunk_rows)
    logits = [s for s in made.shapes if len(s) > 1 and s[-1] in (WIDE.draft_vocab_size, WIDE.vocab_size)]
    assert logits and max(torch.Size(s[:-1]).numel() for s in logits) <= steps * chunk_rows < n
    largest = max(torch.Size(s).numel() for s in made.shapes)
    assert largest <= n * 3 * WIDE.target_hidden_size < steps * n * WIDE.hidden_size
