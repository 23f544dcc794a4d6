"""A drafter's block is the block that was trained: the reference's states at that anchor, in every kind of layer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from drafting import One
from small_drafts import dflash_shape, dspark_shape, small_dflash, small_dflash2, small_dspark

from fastdraft.model.dflash.propose import BlockDrafter, refuse_settings
from fastdraft.model.dflash.ref import block_states_ref
from fastdraft.model.methods import method_of
from fastdraft.model.proposal import DecodeSettings, probabilities

SLIDING = dict(num_hidden_layers=3, layer_types=("sliding_attention", "full_attention", "sliding_attention"))
SHAPES = {"full": {}, "sliding": SLIDING | {"sliding_window": 6}, "shifted": dict(labels="shifted")}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_block_is_the_references(shape):
    case = small_dflash((23,), **shape)
    ids, g, c = case.batch.input_ids, case.features.g, case.config
    drafter = One(BlockDrafter(case.draft, case.head, 1, 30))
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
    case = small_dflash((12,))
    settings = DecodeSettings(num_steps=3, temperature=0.7, top_k=5)
    counts, rounds = torch.zeros(3, case.config.vocab_size, dtype=torch.float64), 3000
    drafter = One(BlockDrafter(case.draft, case.head, 1, 20))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        proposal = drafter.propose(case.batch.input_ids[1:12], case.features.g[:11], 3, settings, generator)
        states = block_states_ref(case.draft, case.batch, case.features, torch.tensor([11]))[0, 1:4]
        torch.testing.assert_close(proposal.q, probabilities(case.head.logits(states), settings), rtol=1e-9, atol=1e-12)
        for _ in range(rounds):
            again = drafter.again(case.batch.input_ids[11:12], case.features.g[10:11], 3, settings, generator)
            counts[torch.arange(3), again.tokens] += 1
    assert float((counts / rounds - proposal.q).abs().max()) < 4 * (0.25 / rounds) ** 0.5
    assert bool((counts[proposal.q == 0] == 0).all())


EVERY = {name: partial(small_dflash, **shape) for name, shape in SHAPES.items()}
EVERY |= {"dspark": small_dspark, "dflash2": small_dflash2}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_blocks_of_several_sequences_are_each_ones_own(make, temperature):
    """Sequences of other lengths, one of which ends, and depths of their own, over several rounds."""
    case, settings = make((23,)), DecodeSettings(num_steps=4, temperature=temperature)
    ids, g, drafter = case.batch.input_ids, case.features.g, method_of(case.draft).drafter
    alone = [One(drafter(case.draft, case.head, 1, 40)) for _ in range(3)]
    single = [torch.Generator().manual_seed(row) for row in range(3)]
    many = [torch.Generator().manual_seed(row) for row in range(3)]
    together, rows = drafter(case.draft, case.head, 3, 40), [0, 1, 2]
    done = [0, 0, 0]
    with torch.no_grad():
        for counts, depths in (((5, 1, 9), (4, 4, 4)), ((1, 3, 2), (4, 2, 3)), ((5, 1), (1, 3))):
            if len(counts) < len(rows):
                together.select([0, 2])
                rows = [0, 2]
            token_ids = torch.zeros(len(rows), max(counts), dtype=torch.int64)
            states = torch.full((len(rows), max(counts), g.shape[1]), 9.0, dtype=g.dtype)
            want = []
            for place, (row, count, depth) in enumerate(zip(rows, counts, depths, strict=True)):
                first, end = done[row], done[row] + count
                token_ids[place, :count], states[place, :count] = ids[first + 1 : end + 1], g[first:end]
                own = token_ids[place, :count], states[place, :count]
                want.append(alone[row].propose(*own, depth, settings, single[row]))
                done[row] = end
            ours = together.propose(token_ids, states, list(counts), list(depths), settings, [many[row] for row in rows])
            assert ours.counts == list(depths)
            for place, proposal in enumerate(want):
                count = ours.counts[place]
                assert torch.equal(ours.tokens[place, :count], proposal.tokens)
                assert ours.parents[place, :count].tolist() == proposal.parents
                if proposal.q is not None:
                    torch.testing.assert_close(ours.q[place, :count], proposal.q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape, title, most", [(dflash_shape(), "DFlash", 4), (dspark_shape(), "DSpark", 5)])
def test_what_a_block_cannot_do_is_refused(shape, title, most):
    with pytest.raises(ValueError, match=f"num_steps {most + 1} is more than the {most} tokens"):
        refuse_settings(shape, DecodeSettings(num_steps=most + 1))
    with pytest.raises(ValueError, match=f"a {title} draft proposes a chain, not a tree of eagle_topk 2"):
        refuse_settings(shape, DecodeSettings(num_steps=3, eagle_topk=2))
    refuse_settings(shape, DecodeSettings(num_steps=most))
