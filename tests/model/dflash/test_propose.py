"""A drafter's block is the block that was trained: the reference's states at that anchor, in every kind of layer."""

from __future__ import annotations

import pytest
import torch
from small_dflash import Small, dflash_shape

from fastdraft.model.dflash.propose import BlockDrafter, refuse_settings
from fastdraft.model.dflash.ref import block_states_ref
from fastdraft.model.proposal import DecodeSettings, probabilities

SLIDING = dict(num_hidden_layers=3, layer_types=("sliding_attention", "full_attention", "sliding_attention"))
SHAPES = {"full": {}, "sliding": SLIDING | {"sliding_window": 6}, "shifted": dict(labels="shifted")}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_block_is_the_references(shape):
    case = Small(dflash_shape(**shape), lengths=(23,))
    ids, g, c = case.batch.input_ids, case.features.g, case.config
    drafter = BlockDrafter(case.draft, case.head, 30)
    settings, generator = DecodeSettings(num_steps=4), torch.Generator()
    done = 0
    with torch.no_grad():
        for root in (3, 4, 9, 22):  # the target runs some tokens between two rounds
            proposal = drafter.propose(ids[done + 1 : root + 1], g[done:root], 4, settings, generator)
            states = block_states_ref(case.draft, case.batch, case.features, torch.tensor([root]))[0]
            logits = case.head.logits(states[c.first_slot :][:4])
            assert torch.equal(proposal.tokens, logits.argmax(-1)) and proposal.parents == [0, 1, 2, 3]
            done = root
            torch.testing.assert_close(drafter.block(ids[root : root + 1]), states, rtol=1e-10, atol=1e-10)


def test_sampled_tokens_are_drawn_from_the_q_that_is_given():
    case = Small(lengths=(12,))
    settings = DecodeSettings(num_steps=3, temperature=0.7, top_k=5)
    counts, rounds = torch.zeros(3, case.config.vocab_size, dtype=torch.float64), 3000
    drafter = BlockDrafter(case.draft, case.head, 20)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        proposal = drafter.propose(case.batch.input_ids[1:12], case.features.g[:11], 3, settings, generator)
        states = block_states_ref(case.draft, case.batch, case.features, torch.tensor([11]))[0, 1:4]
        torch.testing.assert_close(proposal.q, probabilities(case.head.logits(states), settings), rtol=1e-9, atol=1e-12)
        for _ in range(rounds):
            again = drafter.propose(case.batch.input_ids[11:12], case.features.g[:0], 3, settings, generator)
            counts[torch.arange(3), again.tokens] += 1
    assert float((counts / rounds - proposal.q).abs().max()) < 4 * (0.25 / rounds) ** 0.5
    assert bool((counts[proposal.q == 0] == 0).all())


def test_what_a_block_cannot_do_is_refused():
    c = dflash_shape()
    with pytest.raises(ValueError, match="num_steps 5 is more than the 4 tokens"):
        refuse_settings(c, DecodeSettings(num_steps=5))
    with pytest.raises(ValueError, match="a chain, not a tree of eagle_topk 2"):
        refuse_settings(c, DecodeSettings(num_steps=3, eagle_topk=2))
    refuse_settings(c, DecodeSettings(num_steps=4))
