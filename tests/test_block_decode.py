"""Drafts that fill blocks decode many prompts at once as they decode each alone: the same tokens, rounds and draws."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from small_drafts import dflash2_shape, dflash_shape, dspark_shape
from test_decode import prompts, timeless, tiny_target

from bench.block_work import HEADS
from fastdraft.batch import Batch
from fastdraft.decode import generate, generate_batch
from fastdraft.evaluate import evaluate_decode
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.loss import BlockLoss
from fastdraft.model.dflash.ref import block_rows_ref
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dspark.loss import DSparkLoss
from fastdraft.model.methods import method_of
from fastdraft.model.proposal import DecodeSettings
from fastdraft.target.hf import Target

CONTEXT, NEW = 40, 20  # tokens that the target holds; that are asked for
LENGTHS = (9, 1, 36, 17, 3, 39)  # of the prompts: two are shorter than a block of five, two leave the context little room
SLIDING = dict(num_hidden_layers=3, layer_types=("sliding_attention", "full_attention", "sliding_attention"))


DRAFTS = {  # the shape, changes of it, and the loss
    "dflash": (dflash_shape, {}, BlockLoss("kl")),
    "dflash, sliding and shifted": (dflash_shape, SLIDING | {"sliding_window": 6, "labels": "shifted"}, BlockLoss("kl")),
    "dspark": (dspark_shape, {}, DSparkLoss()),
    "dflash2, sliding": (dflash2_shape, SLIDING | {"sliding_window": 6}, SelectorLoss("kl")),
}
SETTINGS = {
    "greedy": DecodeSettings(num_steps=4),
    "drawn": DecodeSettings(num_steps=4, temperature=1.0),
    "drawn, by block": DecodeSettings(num_steps=4, temperature=1.0, verify="block"),
    # Three of the four tokens that a block drafts.
    "filtered": DecodeSettings(num_steps=3, temperature=0.7, top_k=8, top_p=0.9, seed=3),
    "filtered, by block": DecodeSettings(num_steps=3, temperature=0.7, top_k=8, top_p=0.9, seed=3, verify="block"),
    "argmax chain": DecodeSettings(num_steps=4, temperature=0.3, sample_draft=False),
}


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(context=CONTEXT)


@pytest.fixture(scope="module", params=DRAFTS)
def draft(request, target):
    """Trained until the target keeps some of what it drafts, and not all."""
    shape, changes, loss = DRAFTS[request.param]
    like = dict(hidden_size=target.hidden_size, vocab_size=target.vocab_size, mask_token_id=target.vocab_size - 1)
    config = shape(**like, num_target_layers=7, layers=target.layers, **changes)
    made = method_of(config).draft(config)
    made.init_weights(0.2, torch.Generator().manual_seed(1))
    made.double().take_from_target(target.embedding)
    texts = []
    for said in (DecodeSettings(), DecodeSettings(temperature=1.0)):
        for prompt, own in zip(prompts(LENGTHS), generate_batch(target, None, prompts(LENGTHS), NEW, said), strict=True):
            texts.append([token for token in prompt + own.tokens if token != config.mask_token_id])
    ids = torch.tensor([token for text in texts for token in text])
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), tuple(map(len, texts)))
    features = target.capture(batch)
    optimizer = torch.optim.Adam(made.trainable().values(), lr=1e-2)
    for step in range(1, 41):
        anchors = draw_anchors(batch, 5, 0, step)
        _, total = block_rows_ref(made, batch, features, target.head, anchors, loss, row_losses=HEADS[type(config)][1])
        optimizer.zero_grad()
        (total / len(anchors)).backward()
        optimizer.step()
    return made


def a_token_inside_a_round(target, draft, settings) -> int:
    """A token that the draft got right, not last in its round: as a stop token it ends a round in its middle."""
    for free in generate_batch(target, draft, prompts(LENGTHS), NEW, settings):
        ends = {sum(free.per_round[: k + 1]) for k in range(free.num_rounds)}
        for place in range(1, len(free.tokens) - 1):
            if place not in ends and free.tokens[place] not in free.tokens[:place]:
                return free.tokens[place]
    raise AssertionError("no round kept a drafted token")


def ran_past_its_stop(result) -> bool:
    """Whether the last round kept drafted tokens behind the stop token, which are no output."""
    return result.stopped_by == "eos" and 1 + result.num_rounds + sum(result.accepted) > len(result.tokens)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_batch_decodes_as_each_prompt_alone(target, draft, settings, monkeypatch):
    asked = prompts(LENGTHS)
    monkeypatch.setattr(target, "eos_ids", frozenset([a_token_inside_a_round(target, draft, settings)]))
    alone = timeless(generate(target, draft, prompt, NEW, settings) for prompt in asked)
    for size in (4, 64):
        assert timeless(generate_batch(target, draft, asked, NEW, settings, size)) == alone
    assert timeless(generate_batch(target, draft, asked[::-1], NEW, settings)) == alone[::-1]

    assert {result.stopped_by for result in alone} >= {"eos", "context"}
    assert any(map(ran_past_its_stop, alone)) and len({result.num_rounds for result in alone}) > 2
    kept, rounds = sum(result.accepted[0] for result in alone), sum(result.num_rounds for result in alone)
    assert 0 < kept < rounds  # paths that keep tokens were taken, and others
    if settings.temperature == 0:
        assert [result.tokens for result in alone] == [generate(target, None, prompt, NEW).tokens for prompt in asked]


@pytest.mark.parametrize("settings", [SETTINGS["greedy"], SETTINGS["drawn, by block"]], ids=["greedy", "drawn, by block"])
def test_evaluate_reports_the_same_of_prompts_together_and_alone(target, draft, settings):
    timeless_report = partial(replace, tokens_per_s=0.0, plain_tokens_per_s=0.0, batch_size=0)
    reports = [
        timeless_report(evaluate_decode(target, draft, prompts(LENGTHS), settings, NEW, batch_size=size))
        for size in (1, 64)
    ]
    assert reports[0] == reports[1] and reports[0].accepted_length > 1
    assert reports[0].num_equal == (len(LENGTHS) if settings.temperature == 0 else None)
