"""Drafts of blocks beside an engine: seeded faults, of the engine and of the checkpoint, are found and named."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import pytest
import torch
from drafting import One
from small_blocks import MASK, Trained, train_briefly
from tiny import tiny_llama
from torch import nn

from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.loss import BlockLoss, StepLoss
from fastdraft.model.dflash.parity import block_readings, run_blocks, served_steps
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dflash2.parity import OWN as OF_SELECTOR
from fastdraft.model.dspark.loss import DSparkLoss
from fastdraft.model.dspark.parity import OWN as OF_MARKOV_HEAD
from fastdraft.model.methods import method_of
from fastdraft.model.proposal import DecodeSettings
from fastdraft.model.reading import Reading, read_as
from fastdraft.serving.engines import Output, Round
from fastdraft.serving.parity import Diagnosis, Parity, diagnose
from fastdraft.target.hf import Target

STEPS = 5  # drafted tokens of a block


class Kind(NamedTuple):
    """How a method's draft is trained, and the faults that it alone can have."""

    fields: dict[str, int]  # of its shape
    loss: StepLoss
    steps: int
    std: float = 0.1
    own: Sequence[Reading] = ()
    labels: str = "labels shifted by one"  # what is said of labels that are shifted


SELECTOR = {"block_size": STEPS + 1, "selector_rank": 16, "selector_top_k": 8}
KINDS = {
    "dflash": Kind({"block_size": STEPS + 1}, BlockLoss(gamma=4.0), 30),
    "dspark": Kind(
        {"block_size": STEPS, "markov_rank": 16},
        DSparkLoss(ce_weight=1.0),
        20,
        own=OF_MARKOV_HEAD,
        labels="labels shifted by one: slot k drafts x_{a+k}",
    ),
    "dflash2": Kind(SELECTOR, SelectorLoss(gamma=4.0), 18, std=0.3, own=OF_SELECTOR),
}
FAULTS = [  # what can go wrong with every draft of blocks besides labels, and words of what is said
    ("layer ids", "off by one, + 1"),
    ("layer ids", "off by one, - 1"),
    ("block", "a causal block"),
    ("mask token", "pad token"),
    ("norm", "hidden_norm left out"),
    ("norm", "the final norm left out"),
    ("norm", "queries and keys"),
]
EVERY_FAULT = [
    (name, *fault)
    for name, kind in KINDS.items()
    for fault in [("labels", kind.labels), *FAULTS, *((reading.fault, reading.says) for reading in kind.own)]
]


@cache
def trained(name: str) -> Trained:
    kind = KINDS[name]
    made = train_briefly(name, kind.fields | {"layers": (2, 4)}, kind.loss, kind.steps, kind.std, facts={"bos_token_id": 1})
    made.draft.requires_grad_(False)
    return made


def readings_of(case: Trained) -> list[Reading]:
    return method_of(case.draft).readings.every(case.draft, case.target.num_layers)


def reading_of(case: Trained, fault: str, words: str) -> Reading:
    (found,) = [r for r in readings_of(case) if r.fault == fault and words in r.says]
    return found


def served(case: Trained, reading: Reading) -> list[Output]:
    """What an engine does that reads the draft so: the rounds of our drafter on the target's text."""
    wrong = read_as(case.draft, reading)
    states = Target(case.target.model, reading.layers or case.draft.config.layers)
    outputs = []
    for prompt, text in zip(case.prompts, case.texts, strict=True):
        ids = torch.tensor(prompt + text)
        g, rounds, after = states.forward(ids[None])[0][0], [], 1
        while after < len(text) - STEPS:
            root, drafter = len(prompt) - 1 + after, One(method_of(wrong).drafter(wrong, case.target.head, 1, len(ids)))
            found = drafter.propose(ids[1 : root + 1], g[:root], STEPS, DecodeSettings(num_steps=STEPS), None)
            rounds.append(Round(after, found.tokens.tolist()))
            right = [a == b for a, b in zip(rounds[-1].drafted, text[after:], strict=False)]
            after += 1 + (right.index(False) if False in right else len(right))
        outputs.append(Output(text, rounds))
    return outputs


def diagnosed(case: Trained, outputs: list[Output], draft: nn.Module | None = None) -> Diagnosis:
    return diagnose(Parity(case.target, draft or case.draft, case.prompts, outputs, STEPS))


@pytest.mark.parametrize("name", KINDS)
def test_an_engine_that_reads_as_documented_agrees(name):
    case = trained(name)
    told = diagnosed(case, served(case, readings_of(case)[0]))
    assert told.agrees and not told.served_as and not told.trained_as
    assert told.reference.num_equal == told.reference.num_proposed > 20
    assert 1.2 < told.reference.accepted_length < 5.5


@pytest.mark.parametrize("name, fault, words", EVERY_FAULT)
def test_what_an_engine_reads_otherwise_is_named(name, fault, words):
    case = trained(name)
    told = diagnosed(case, served(case, reading_of(case, fault, words)))
    assert not told.agrees and told.served_as[0].reading.fault == fault, told
    assert words in told.served_as[0].reading.says


def test_keys_normed_by_the_first_layers_norm_are_named():
    """What vLLM's build for CPUs does to the context's keys, seen where the layers' norms are far apart."""
    case = trained("dflash")
    draft, generator = copy.deepcopy(case.draft), torch.Generator().manual_seed(0)
    for layer in draft.layers:
        weight = layer.self_attn.k_norm.weight
        weight.copy_(weight * (0.7 * torch.randn(weight.shape, generator=generator)).exp())
    case = case._replace(draft=draft)
    wrong = reading_of(case, "norm", "first layer's k_norm")
    told = diagnosed(case, served(case, wrong))
    assert not told.agrees and told.served_as[0].reading == wrong and told.served_as[0].num_missed == 0
    assert told.reference.num_missed > 5


@pytest.mark.parametrize(
    "name, fault, words",
    [
        *((name, "labels", "") for name in ("dflash", "dflash2")),
        *((name, "layer ids", sign) for name in KINDS for sign in "+-"),
        *((name, "mask token", "pad token") for name in ("dflash", "dflash2")),
        ("dspark", "markov head", "swapped"),
    ],
)
def test_a_checkpoint_that_was_trained_otherwise_is_named(name, fault, words):
    """The file says one thing and the weights were trained with another: the other would be accepted more often."""
    case = trained(name)
    c = case.draft.config
    mistaken = read_as(case.draft, reading_of(case, fault, words) if fault == "markov head" else readings_of(case)[0])
    wrong = {
        "labels": {"labels": "shifted"},
        "layer ids": {"layers": tuple(x + (1 if words == "+" else -1) for x in c.layers)},
        "mask token": {"mask_token_id": c.pad_token_id, "pad_token_id": c.mask_token_id},
        "markov head": {},  # swapped twice is as trained
    }[fault]
    mistaken.config = c.model_copy(update=wrong)
    told = diagnosed(case, [Output(text) for text in case.texts], mistaken)
    named = [evidence.reading.fault for evidence in told.trained_as]
    assert named and named[0] == fault, told


@pytest.mark.parametrize("name", KINDS)
def test_a_reading_leaves_the_draft_as_it_was(name):
    target, draft, asked, texts = trained(name)
    before, ids = {name: p.clone() for name, p in draft.state_dict().items()}, torch.tensor(asked[0] + texts[0])
    g, chain = target.forward(ids[None])[0][0], torch.zeros(len(ids) - 1, STEPS, dtype=torch.int64)
    documented, *others = readings_of(trained(name))
    want, _ = run_blocks(draft, documented, target.head, ids, g, chain)
    for other in others:
        read_as(draft, other)
    assert torch.equal(run_blocks(draft, documented, target.head, ids, g, chain)[0], want)
    assert all(torch.equal(p, before[name]) for name, p in draft.state_dict().items())


def test_a_token_that_is_no_candidate_is_infinitely_far():
    """The gap of a candidate is of scores; what the selector cannot choose is no near tie of anything."""
    target, draft, asked, texts = trained("dflash2")
    ids = torch.tensor(asked[0] + texts[0])
    g = target.forward(ids[None])[0][0]
    chain = torch.zeros(len(ids) - 1, STEPS, dtype=torch.int64)
    documented = readings_of(trained("dflash2"))[0]
    choice, gap = run_blocks(draft, documented, target.head, ids, g, chain)
    assert bool(gap.isinf().any()) and not bool(gap.isnan().any())
    chain[:, 0] = choice[:, 0]
    _, again = run_blocks(draft, documented, target.head, ids, g, chain)
    assert not again[:, 0].any()


def test_sliding_drafts_have_readings_of_their_window():
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    shape |= dict(head_dim=8, vocab_size=20, num_target_layers=8, layers=(1, 4), block_size=4, mask_token_id=19)
    shape |= dict(rms_norm_eps=1e-5, rope_parameters={"rope_theta": 1e4}, max_position_embeddings=64)
    kinds = dict(layer_types=("full_attention", "sliding_attention"), sliding_window=8)
    draft = DFlashDraft(DFlashConfig(**shape, **kinds))
    says = [r.says for r in block_readings(draft, 8) if r.fault == "window"]
    assert says == ["every layer in full attention", "a window of 7", "a window of 9"]


def test_part_of_a_block_is_not_served():
    c = DFlashConfig.from_target(tiny_llama().config.to_dict(), mask_token_id=MASK)
    assert served_steps(c, None) == served_steps(c, 15) == 15
    with pytest.raises(ValueError, match="num_steps is 3, and a block of 16 rows drafts 15 tokens"):
        served_steps(c, 3)
