"""Sequences that run together have the states that each has alone, or the target says why they cannot."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY, tiny_llama
from transformers import AutoModelForCausalLM, BloomConfig, MistralConfig, MixtralConfig, Qwen3Config

from fastdraft.target.hf import Target
from fastdraft.target.ragged import RaggedCache, why_apart

PROMPTS = [[5, 9, 11, 4, 3], [7], [8, 8, 1, 2, 60, 61, 62, 63, 64]]


def alone(target: Target, tokens: list[int]) -> torch.Tensor:
    return torch.cat(target.forward(torch.tensor([tokens])), -1)[0]  # [L, 4*Ht]


@pytest.mark.parametrize(("run_tokens", "shapes"), [(100, [(3, 9)]), (10, [(2, 5), (1, 9)])], ids=["whole", "in parts"])
def test_trees_of_several_sequences_see_what_each_sees_alone(monkeypatch, run_tokens, shapes):
    target = Target(tiny_llama().double())
    lengths = [len(prompt) for prompt in PROMPTS]
    monkeypatch.setattr("fastdraft.target.ragged.RUN_TOKENS", run_tokens)
    forwards, forward = [], target.forward
    monkeypatch.setattr(target, "forward", lambda ids, *rest: forwards.append(tuple(ids.shape)) or forward(ids, *rest))
    cache = RaggedCache(target, 3, 20)
    g, f = cache.prefill(PROMPTS)
    assert forwards == shapes
    for row, prompt in enumerate(PROMPTS):
        states = alone(target, prompt)
        torch.testing.assert_close(g[row, : lengths[row]], states[:, : g.shape[2]], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(f[row], states[-1, g.shape[2] :], rtol=1e-9, atol=1e-11)
    tokens = torch.tensor([[20, 21, 22, 23], [30, 31, 32, 33], [40, 41, 42, 43]])
    parents = torch.tensor([[0, 1, 2], [0, 0, 1], [0, 0, 2]])
    paths = ([0, 1, 2, 3], [0, 1, 3], [0, 2, 3])  # of each sequence's last node
    states = torch.cat(cache.run(tokens, parents, lengths, 511), -1)
    for row, path in enumerate(paths):
        whole = alone(target, PROMPTS[row] + tokens[row, path].tolist())
        torch.testing.assert_close(states[row, path], whole[-len(path) :], rtol=1e-9, atol=1e-11)

    # The paths are kept, the first row leaves, and the others go on from what they kept.
    cache.keep(lengths, torch.tensor([[0, 1, 2, 3], [0, 1, 3, 0], [0, 2, 3, 0]]))
    cache.select([1, 2])
    more = torch.tensor([[50], [51]])
    states = torch.cat(cache.run(more, torch.empty(2, 0, dtype=torch.int64), [lengths[1] + 3, lengths[2] + 3], 511), -1)
    for row in (0, 1):
        text = PROMPTS[row + 1] + tokens[row + 1, paths[row + 1]].tolist() + more[row].tolist()
        torch.testing.assert_close(states[row], alone(target, text)[-1:], rtol=1e-9, atol=1e-11)


SMALL = TINY | dict(num_hidden_layers=7, head_dim=8)
WINDOWS = dict(sliding_window=16, use_sliding_window=True, layer_types=["full_attention"] * 3 + ["sliding_attention"] * 4)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen3Config(**SMALL), None),
        (MixtralConfig(**SMALL, **EXPERTS, sliding_window=None), None),
        (MistralConfig(**SMALL, sliding_window=16), "window of 16 tokens"),
        (Qwen3Config(**SMALL, **WINDOWS), "sliding_attention"),
        (BloomConfig(hidden_size=32, n_layer=7, n_head=4, vocab_size=192), "Bloom|fails|off by"),
    ],
    ids=["qwen3", "mixtral", "window", "window in layers", "alibi"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reason_for_one_at_a_time(config, reason, dtype):
    torch.manual_seed(0)
    found = why_apart(Target(AutoModelForCausalLM.from_config(config).to(dtype)))
    if reason is None:
        assert found is None
    else:
        assert any(word in found for word in reason.split("|")), found


def test_a_target_whose_states_differ_is_found_out(monkeypatch):
    """The trial sees positions that are off by one, and a node that sees its sibling."""
    target = Target(tiny_llama())
    assert why_apart(target) is None
    forward = target.forward

    def shifted(ids, cache=None, position_ids=None, mask=None):
        return forward(ids, cache, position_ids if cache is None else position_ids + (ids.shape[1] == 4), mask)

    monkeypatch.setattr(target, "forward", shifted)
    assert "off by" in why_apart(target)

    def open_to_siblings(ids, cache=None, position_ids=None, mask=None):
        if ids.shape[1] == 4:
            mask = mask.clone()
            mask[:, :, 2, -3] = 0
        return forward(ids, cache, position_ids, mask)

    monkeypatch.setattr(target, "forward", open_to_siblings)
    assert "off by" in why_apart(target)
