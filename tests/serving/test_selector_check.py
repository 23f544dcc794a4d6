"""A DFlash2 draft beside an engine: faults of its convolutions and its selector are found and named."""

from __future__ import annotations

import pytest
import torch
from drafting import One
from small_checks import FAULTS, STEPS, Trained, assert_agrees, assert_named, output_of, the_reading, train_briefly

from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.parity import run_blocks
from fastdraft.model.dflash2.config import DFlash2Config
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.dflash2.head import SelectorHead
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dflash2.mixer import ConvolutionMixer
from fastdraft.model.dflash2.parity import OWN, selector_readings
from fastdraft.model.dflash2.propose import SelectorDrafter
from fastdraft.model.proposal import DecodeSettings
from fastdraft.model.reading import read_as
from fastdraft.serving.engines import Output
from fastdraft.serving.parity import Parity, diagnose
from fastdraft.target.hf import Target


@pytest.fixture(scope="module")
def trained() -> Trained:
    changes = {"mask_token_id": 190, "block_size": STEPS + 1, "num_hidden_layers": 2, "layers": (2, 4)}
    changes |= {"selector_rank": 16, "selector_top_k": 8}

    def engine_of(draft, head, draw):
        return BlockEngine(draft, head, SelectorLoss(gamma=4.0), draw, None, SelectorHead, ConvolutionMixer(draft))

    make = lambda target: DFlash2Draft(DFlash2Config.from_target(target, **changes))  # noqa: E731
    return train_briefly(make, engine_of, steps=18, std=0.3)


def served(trained, reading) -> list[Output]:
    """What an engine does that reads the draft so: its walks on the target's text."""
    target, draft, asked, texts = trained
    wrong = read_as(draft, reading)
    states, outputs = Target(target.model, reading.layers or draft.config.layers), []
    for prompt, text in zip(asked, texts, strict=True):
        ids = torch.tensor(prompt + text)
        g, known = states.forward(ids[None])[0][0], len(prompt) - 1

        def walk(after: int, ids=ids, g=g, known=known) -> list[int]:
            root, drafter = known + after, One(SelectorDrafter(wrong, target.head, 1, len(ids)))
            found = drafter.propose(ids[1 : root + 1], g[:root], STEPS, DecodeSettings(num_steps=STEPS), None)
            return found.tokens.tolist()

        outputs.append(output_of(text, walk))
    return outputs


def test_an_engine_that_reads_as_documented_agrees(trained):
    assert_agrees(trained, served(trained, selector_readings(trained[1], trained[0].num_layers)[0]))


def reading_of(trained, fault: str, words: str):
    return the_reading(selector_readings(trained[1], trained[0].num_layers), fault, words)


@pytest.mark.parametrize("reading", OWN, ids=lambda reading: reading.says)
def test_what_an_engine_reads_otherwise_is_named(reading, trained):
    target, draft, asked, _ = trained
    told = diagnose(Parity(target, draft, asked, served(trained, reading), STEPS))
    assert not told.agrees and told.served_as[0].reading == reading, told


@pytest.mark.parametrize("fault, words", FAULTS)
def test_what_an_engine_reads_otherwise_of_the_block_is_named(fault, words, trained):
    """Found through the selector's walk."""
    assert_named(trained, served(trained, reading_of(trained, fault, words)), fault, words)


@pytest.mark.parametrize("fault, words", [f for f in FAULTS if f[0] in ("labels", "layer ids", "mask token")])
def test_a_checkpoint_that_was_trained_otherwise_is_named(fault, words, trained):
    """The config says one thing and the weights were trained with another: the other would be accepted more often."""
    target, draft, asked, texts = trained
    c = draft.config
    mistaken = read_as(draft, selector_readings(draft, target.num_layers)[0])
    mistaken.config = c.model_copy(
        update={
            "labels": {"labels": "shifted"},
            "layer ids": {"layers": tuple(x + (1 if "+" in words else -1) for x in c.layers)},
            "mask token": {"mask_token_id": c.pad_token_id, "pad_token_id": c.mask_token_id},
        }[fault]
    )
    told = diagnose(Parity(target, mistaken, asked, [Output(text) for text in texts], STEPS))
    named = [evidence.reading.fault for evidence in told.trained_as]
    assert named and named[0] == fault, told


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
        read_as(draft, reading)
    assert all(torch.equal(p, before[name]) for name, p in draft.state_dict().items())
