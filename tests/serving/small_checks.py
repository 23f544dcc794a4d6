"""A small target with a draft of blocks briefly trained on its answers, and what an engine would hand over of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from test_decode import prompts
from tiny import tiny_llama
from torch import Tensor, nn

from fastdraft.batch import Batch, TargetHead
from fastdraft.decode import generate
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.reading import Reading
from fastdraft.serving.engines import Output, Round
from fastdraft.serving.parity import Parity, diagnose
from fastdraft.target.hf import Target

STEPS = 5  # drafted tokens of a block
Trained = tuple[Target, nn.Module, list[list[int]], list[list[int]]]
Draw = Callable[[Batch, int], Tensor]
FAULTS = [  # what can go wrong with every draft of blocks, and words of what is said
    ("labels", "labels shifted by one"),
    ("layer ids", "off by one, + 1"),
    ("layer ids", "off by one, - 1"),
    ("block", "a causal block"),
    ("mask token", "pad token"),
    ("norm", "hidden_norm left out"),
    ("norm", "the final norm left out"),
    ("norm", "queries and keys"),
]


def train_briefly(
    make: Callable[[dict], nn.Module],  # a draft for a target's config
    engine_of: Callable[[nn.Module, TargetHead, Draw], BlockEngine],
    steps: int,
    std: float = 0.1,  # of untrained weights
) -> Trained:
    """A target, a draft that gets about half of its text right, the prompts and the target's outputs."""
    model = tiny_llama(0, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, initializer_range=0.15)
    draft = make(model.config.to_dict() | {"bos_token_id": 1})
    target = Target(model, draft.config.layers)
    draft.init_weights(std, torch.Generator().manual_seed(0))
    draft.take_from_target(target.embedding)
    asked = prompts()
    texts = [generate(target, None, prompt, 40).tokens for prompt in asked]
    ids = torch.cat([torch.tensor(prompt + text) for prompt, text in zip(asked, texts, strict=True)])
    lengths = tuple(len(prompt) + len(text) for prompt, text in zip(asked, texts, strict=True))
    mask = torch.cat([torch.arange(n) >= len(prompt) for n, prompt in zip(lengths, asked, strict=True)])
    batch = Batch(ids.where(ids != 190, 189), mask, lengths)
    features = target.capture(batch)
    engine = engine_of(draft, target.head, lambda batch, step: draw_anchors(batch, 64, 0, step))
    optimizer = torch.optim.AdamW(draft.trainable().values(), lr=5e-3)
    for _ in range(steps):
        grads = flat_gradients(draft.trainable())
        rows = engine.step(batch, features, grads)
        for name, p in draft.trainable().items():
            p.grad = grads[name] / rows.live.sum()
        optimizer.step()
    return target, draft.requires_grad_(False), asked, texts


def output_of(
    text: list[int],
    drafted_after: Callable[[int], list[int]],  # the tokens drafted where so many of the text are known
) -> Output:
    """The rounds of an engine whose target says `text`."""
    rounds, after = [], 1
    while after < len(text) - STEPS:
        rounds.append(Round(after, drafted := drafted_after(after)))
        right = [a == b for a, b in zip(drafted, text[after:], strict=False)]
        after += 1 + (right.index(False) if False in right else len(right))
    return Output(text, rounds)


def the_reading(readings: list[Reading], fault: str, words: str) -> Reading:
    (found,) = [r for r in readings if r.fault == fault and words in r.says]
    return found


def assert_agrees(trained: Trained, outputs: list[Output]) -> None:
    """Of an engine that reads the draft as documented."""
    target, draft, asked, _ = trained
    told = diagnose(Parity(target, draft, asked, outputs, STEPS))
    assert told.agrees and not told.served_as and not told.trained_as
    assert told.reference.num_equal == told.reference.num_proposed > 20
    assert 1.2 < told.reference.accepted_length < 5.5


def assert_named(trained: Trained, outputs: list[Output], fault: str, words: str) -> None:
    """Of an engine that reads the draft with a fault."""
    target, draft, asked, _ = trained
    told = diagnose(Parity(target, draft, asked, outputs, STEPS))
    assert not told.agrees and told.served_as[0].reading.fault == fault, told
    assert words in told.served_as[0].reading.says
