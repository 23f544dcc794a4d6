"""A DSpark draft beside an engine: seeded faults, of the engine and of the checkpoint, are found and named."""

from __future__ import annotations

import pytest
import torch
from drafting import One
from small_checks import FAULTS as BLOCK_FAULTS
from small_checks import STEPS, Trained, assert_agrees, assert_named, output_of, the_reading, train_briefly

from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.parity import run_blocks
from fastdraft.model.dspark.config import DSparkConfig
from fastdraft.model.dspark.draft import DSparkDraft
from fastdraft.model.dspark.head import DSparkHead
from fastdraft.model.dspark.loss import DSparkLoss
from fastdraft.model.dspark.parity import dspark_readings
from fastdraft.model.dspark.propose import MarkovDrafter
from fastdraft.model.proposal import DecodeSettings
from fastdraft.model.reading import read_as
from fastdraft.serving.engines import Output
from fastdraft.serving.parity import Parity, diagnose
from fastdraft.target.hf import Target


@pytest.fixture(scope="module")
def trained() -> Trained:
    changes = {"mask_token_id": 190, "block_size": STEPS, "num_hidden_layers": 2, "layers": (2, 4), "markov_rank": 16}
    make = lambda target: DSparkDraft(DSparkConfig.from_target(target, **changes))  # noqa: E731
    loss = DSparkLoss(ce_weight=1.0)
    return train_briefly(
        make, lambda draft, head, draw: BlockEngine(draft, head, loss, draw, head_type=DSparkHead), steps=20
    )


def served(trained, reading) -> list[Output]:
    """What an engine does that reads the draft so: its rounds on the target's text, each token after its own last."""
    target, draft, asked, texts = trained
    wrong = read_as(draft, reading)
    states = Target(target.model, reading.layers or draft.config.layers)
    outputs = []
    for prompt, text in zip(asked, texts, strict=True):
        ids = torch.tensor(prompt + text)
        g = states.forward(ids[None])[0][0]
        chain = torch.zeros(len(ids) - 1, STEPS, dtype=torch.int64)
        for step in range(STEPS):
            chain[:, step] = run_blocks(wrong, reading, target.head, ids, g, chain)[0][:, step]
        drafted = chain[len(prompt) - 1 :].tolist()
        outputs.append(output_of(text, lambda after, drafted=drafted: drafted[after - 1]))
    return outputs


def reading(trained, fault: str, words: str):
    return the_reading(dspark_readings(trained[1], trained[0].num_layers), fault, words)


FAULTS = [
    ("labels", "labels shifted by one: slot k drafts x_{a+k}"),
    *BLOCK_FAULTS[1:],
    ("markov head", "the Markov head left out"),
    ("markov head", "swapped"),
]


def test_an_engine_that_reads_as_documented_agrees(trained):
    assert_agrees(trained, served(trained, dspark_readings(trained[1], trained[0].num_layers)[0]))


def test_what_an_engine_drafts_is_what_our_drafter_drafts(trained):
    target, draft, asked, texts = trained
    settings = DecodeSettings(num_steps=STEPS)
    outputs = served(trained, dspark_readings(draft, target.num_layers)[0])
    for prompt, text, output in zip(asked, texts, outputs, strict=True):
        ids = torch.tensor(prompt + text)
        g = target.forward(ids[None])[0][0]
        for r in output.rounds[:3]:
            root = len(prompt) + r.after - 1
            drafter = One(MarkovDrafter(draft, target.head, 1, len(ids)))
            assert drafter.propose(ids[1 : root + 1], g[:root], STEPS, settings, None).tokens.tolist() == r.drafted


@pytest.mark.parametrize("fault, words", FAULTS)
def test_what_an_engine_reads_otherwise_is_named(fault, words, trained):
    assert_named(trained, served(trained, reading(trained, fault, words)), fault, words)


@pytest.mark.parametrize("fault, words", [f for f in FAULTS if "off by one" in f[1] or "swapped" in f[1]])
def test_a_checkpoint_that_was_trained_otherwise_is_named(fault, words, trained):
    """The file says one thing and the weights were trained with another: the other would be accepted more often."""
    target, draft, asked, texts = trained
    wrong = reading(trained, fault, words)
    mistaken = read_as(draft, wrong)  # swapped twice is as trained
    if fault == "layer ids":
        by = -1 if "+" in words else 1
        mistaken.config = draft.config.model_copy(update={"layers": tuple(x - by for x in draft.config.layers)})
    target = Target(target.model, mistaken.config.layers)
    told = diagnose(Parity(target, mistaken, asked, [Output(text) for text in texts], STEPS))
    assert fault in [e.reading.fault for e in told.trained_as], told
