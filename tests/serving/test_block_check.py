"""A DFlash draft beside an engine: seeded faults, of the engine and of the checkpoint, are found and named."""

from __future__ import annotations

import copy

import pytest
import torch
from small_checks import FAULTS, STEPS, Trained, assert_agrees, assert_named, output_of, the_reading, train_briefly
from tiny import tiny_llama

from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.loss import BlockLoss
from fastdraft.model.dflash.parity import block_readings, run_blocks, served_steps
from fastdraft.model.reading import read_as
from fastdraft.serving.engines import Output
from fastdraft.serving.parity import Parity, diagnose
from fastdraft.target.hf import Target


@pytest.fixture(scope="module")
def trained() -> Trained:
    changes = {"mask_token_id": 190, "block_size": STEPS + 1, "num_hidden_layers": 2, "layers": (2, 4)}
    make = lambda target: DFlashDraft(DFlashConfig.from_target(target, **changes))  # noqa: E731
    return train_briefly(make, lambda draft, head, draw: BlockEngine(draft, head, BlockLoss(gamma=4.0), draw), steps=30)


def served(trained, reading) -> list[Output]:
    """What an engine does that reads the draft so: its rounds on the target's text."""
    target, draft, asked, texts = trained
    wrong = read_as(draft, reading)
    states = Target(target.model, reading.layers or draft.config.layers)
    outputs = []
    for prompt, text in zip(asked, texts, strict=True):
        ids = torch.tensor(prompt + text)
        chain = torch.zeros(len(ids) - 1, STEPS, dtype=torch.int64)
        choice, _ = run_blocks(wrong, reading, target.head, ids, states.forward(ids[None])[0][0], chain)
        drafted = choice[len(prompt) - 1 :].tolist()
        outputs.append(output_of(text, lambda after, drafted=drafted: drafted[after - 1]))
    return outputs


def readings_of(trained):
    return block_readings(trained[1], trained[0].num_layers)


def reading(trained, fault: str, words: str):
    return the_reading(readings_of(trained), fault, words)


def test_an_engine_that_reads_as_documented_agrees(trained):
    assert_agrees(trained, served(trained, readings_of(trained)[0]))


@pytest.mark.parametrize("fault, words", FAULTS)
def test_what_an_engine_reads_otherwise_is_named(fault, words, trained):
    assert_named(trained, served(trained, reading(trained, fault, words)), fault, words)


def test_keys_normed_by_the_first_layers_norm_are_named(trained):
    """What vLLM's build for CPUs does to the context's keys, seen where the layers' norms are far apart."""
    target, draft, asked, texts = trained
    draft, generator = copy.deepcopy(draft), torch.Generator().manual_seed(0)
    for layer in draft.layers:
        weight = layer.self_attn.k_norm.weight
        weight.copy_(weight * (0.7 * torch.randn(weight.shape, generator=generator)).exp())
    (wrong,) = [r for r in block_readings(draft, target.num_layers) if "first layer's k_norm" in r.says]
    told = diagnose(Parity(target, draft, asked, served((target, draft, asked, texts), wrong), STEPS))
    assert not told.agrees and told.served_as[0].reading == wrong and told.served_as[0].num_missed == 0
    assert told.reference.num_missed > 5


@pytest.mark.parametrize("fault, words", [f for f in FAULTS if f[0] in ("labels", "layer ids", "mask token")])
def test_a_checkpoint_that_was_trained_otherwise_is_named(fault, words, trained):
    """The config says one thing and the weights were trained with another: the other would be accepted more often."""
    target, draft, asked, texts = trained
    c = draft.config
    wrong = {
        "labels": {"labels": "shifted"},
        "layer ids": {"layers": tuple(x + (1 if "+" in words else -1) for x in c.layers)},
        "mask token": {"mask_token_id": c.pad_token_id, "pad_token_id": c.mask_token_id},
    }[fault]
    mistaken = read_as(draft, readings_of(trained)[0])
    mistaken.config = c.model_copy(update=wrong)
    outputs = [Output(text) for text in texts]
    told = diagnose(Parity(target, mistaken, asked, outputs, STEPS))
    named = [evidence.reading for evidence in told.trained_as]
    assert named and named[0].fault == fault, named


def test_a_reading_leaves_the_draft_as_it_was(trained):
    target, draft, asked, texts = trained
    before, ids = draft.state_dict(), torch.tensor(asked[0] + texts[0])
    g, chain = target.forward(ids[None])[0][0], torch.zeros(len(ids) - 1, STEPS, dtype=torch.int64)
    documented = readings_of(trained)[0]
    want, _ = run_blocks(draft, documented, target.head, ids, g, chain)
    for other in readings_of(trained):
        read_as(draft, other)
    assert torch.equal(run_blocks(draft, documented, target.head, ids, g, chain)[0], want)
    assert all(torch.equal(x, before[name]) for name, x in draft.state_dict().items())


def test_sliding_drafts_have_readings_of_their_window():
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    shape |= dict(head_dim=8, vocab_size=20, num_target_layers=8, layers=(1, 4), block_size=4, mask_token_id=19)
    shape |= dict(rms_norm_eps=1e-5, rope_parameters={"rope_theta": 1e4}, max_position_embeddings=64)
    kinds = dict(layer_types=("full_attention", "sliding_attention"), sliding_window=8)
    draft = DFlashDraft(DFlashConfig(**shape, **kinds))
    says = [r.says for r in block_readings(draft, 8) if r.fault == "window"]
    assert says == ["every layer in full attention", "a window of 7", "a window of 9"]


def test_part_of_a_block_is_not_served():
    c = DFlashConfig.from_target(tiny_llama().config.to_dict(), mask_token_id=190)
    assert served_steps(c, None) == served_steps(c, 15) == 15
    with pytest.raises(ValueError, match="num_steps is 3, and a block of 16 rows drafts 15 tokens"):
        served_steps(c, 3)
