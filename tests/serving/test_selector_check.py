"""A DFlash2 draft beside an engine: faults of its convolutions and its selector are found and named."""

from __future__ import annotations

import pytest
import torch
from drafting import One
from test_decode import prompts
from tiny import tiny_llama

from fastdraft.batch import Batch
from fastdraft.decode import generate_plain
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.parity import run_blocks
from fastdraft.model.dflash2.config import DFlash2Config
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.dflash2.head import SelectorHead
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dflash2.mixer import ConvolutionMixer
from fastdraft.model.dflash2.parity import OWN, read_selector_as, selector_readings
from fastdraft.model.dflash2.propose import SelectorDrafter
from fastdraft.model.proposal import DecodeSettings
from fastdraft.serving.engines import Output, Round
from fastdraft.serving.parity import Parity, diagnose
from fastdraft.target.hf import Target

STEPS = 5  # a block of six


@pytest.fixture(scope="module")
def trained():
    """A target, a draft that gets about half of its text right, the prompts and the target's outputs."""
    model = tiny_llama(0, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, initializer_range=0.15)
    changes = {"mask_token_id": 190, "block_size": STEPS + 1, "num_hidden_layers": 2, "layers": (2, 4)}
    changes |= {"selector_rank": 16, "selector_top_k": 8}
    c = DFlash2Config.from_target(model.config.to_dict() | {"bos_token_id": 1}, **changes)
    target, draft = Target(model, c.layers), DFlash2Draft(c)
    draft.init_weights(0.3, torch.Generator().manual_seed(0))
    draft.take_from_target(target.embedding)
    asked = prompts()
    texts = [generate_plain(target, prompt, 40).tokens for prompt in asked]
    ids = torch.cat([torch.tensor(prompt + text) for prompt, text in zip(asked, texts, strict=True)])
    lengths = tuple(len(prompt) + len(text) for prompt, text in zip(asked, texts, strict=True))
    mask = torch.cat([torch.arange(n) >= len(prompt) for n, prompt in zip(lengths, asked, strict=True)])
    batch = Batch(ids.where(ids != 190, 189), mask, lengths)
    features = target.capture(batch)
    draw = lambda batch, step: draw_anchors(batch, 64, 0, step)  # noqa: E731
    engine = BlockEngine(draft, target.head, SelectorLoss(gamma=4.0), draw, None, SelectorHead, ConvolutionMixer(draft))
    optimizer = torch.optim.AdamW(draft.trainable().values(), lr=5e-3)
    for _ in range(14):
        grads = flat_gradients(draft.trainable())
        rows = engine.step(batch, features, grads)
        for name, p in draft.trainable().items():
            p.grad = grads[name] / rows.live.sum()
        optimizer.step()
    return target, draft.requires_grad_(False), asked, texts


def served(trained, reading) -> list[Output]:
    """What an engine does that reads the draft so: its walks on the target's text."""
    target, draft, asked, texts = trained
    wrong = read_selector_as(draft, reading)
    outputs = []
    for prompt, text in zip(asked, texts, strict=True):
        ids = torch.tensor(prompt + text)
        g, rounds, after = target.forward(ids[None])[0][0], [], 1
        while after < len(text) - STEPS:
            root = len(prompt) + after - 1
            drafter = One(SelectorDrafter(wrong, target.head, 1, len(ids)))
            found = drafter.propose(ids[1 : root + 1], g[:root], STEPS, DecodeSettings(num_steps=STEPS), None)
            rounds.append(Round(after, drafted := found.tokens.tolist()))
            right = [a == b for a, b in zip(drafted, text[after:], strict=False)]
            after += 1 + (right.index(False) if False in right else len(right))
        outputs.append(Output(text, rounds))
    return outputs


def test_an_engine_that_reads_as_documented_agrees(trained):
    target, draft, asked, _ = trained
    documented = selector_readings(draft, target.num_layers)[0]
    told = diagnose(Parity(target, draft, asked, served(trained, documented), STEPS))
    assert told.agrees and not told.served_as and not told.trained_as
    assert told.reference.num_equal == told.reference.num_proposed > 20
    assert 1.2 < told.reference.accepted_length < 5.5


@pytest.mark.parametrize("reading", OWN, ids=lambda reading: reading.says)
def test_what_an_engine_reads_otherwise_is_named(reading, trained):
    target, draft, asked, _ = trained
    told = diagnose(Parity(target, draft, asked, served(trained, reading), STEPS))
    assert not told.agrees and told.served_as[0].reading == reading, told


def test_a_token_that_is_no_candidate_is_infinitely_far(trained):
    """The gap of a candidate is of scores; what the selector cannot choose is no near tie of anything."""
    target, draft, asked, texts = trained
    ids = torch.tensor(asked[0] + texts[0])
    g = target.forward(ids[None])[0][0]
    chain = torch.zeros(len(ids) - 1, STEPS, dtype=torch.int64)
    documented = selector_readings(draft, target.num_layers)[0]
    choice, gap = run_blocks(draft, documented, target.head, ids, g, chain)
    assert bool(gap.isinf().any()) and not bool(gap.isnan().any())
    chain[:, 0] = choice[:, 0]
    _, again = run_blocks(draft, documented, target.head, ids, g, chain)
    assert not again[:, 0].any()


def test_a_reading_leaves_the_draft_as_it_was(trained):
    _, draft, _, _ = trained
    before = {name: p.clone() for name, p in draft.state_dict().items()}
    for reading in OWN:
        read_selector_as(draft, reading)
    assert all(torch.equal(p, before[name]) for name, p in draft.state_dict().items())
