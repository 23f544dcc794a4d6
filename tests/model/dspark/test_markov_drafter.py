"""A DSpark drafter's chain is what was trained: each token from the logits that its predecessor corrects."""

from __future__ import annotations

import pytest
import torch
from drafting import One
from small_drafts import dspark_shape, small_dspark

from fastdraft.model.dflash.ref import block_states_ref
from fastdraft.model.dspark.propose import MarkovDrafter
from fastdraft.model.proposal import DecodeSettings, probabilities


def states_at(case, anchor):
    with torch.no_grad():
        return block_states_ref(case.draft, case.batch, case.features, torch.tensor([anchor]))[0]


def test_a_greedy_chain_follows_its_own_tokens():
    case = small_dspark((23,))
    ids, g = case.batch.input_ids, case.features.g
    drafter, settings, done, differs = One(MarkovDrafter(case.draft, case.head, 1, 30)), DecodeSettings(num_steps=5), 0, 0
    with torch.no_grad():
        for root in (3, 4, 9, 22):
            proposal = drafter.propose(ids[done + 1 : root + 1], g[done:root], 5, settings, None)
            previous = torch.cat([ids[root : root + 1], proposal.tokens[:-1]])
            states = states_at(case, root)
            base = case.head.logits(states)
            bias = case.draft.markov_head.markov_w1.weight[previous] @ case.draft.markov_head.markov_w2.weight.T
            assert torch.equal(proposal.tokens, (base + bias).argmax(-1)) and proposal.parents == [0, 1, 2, 3, 4]
            differs += int((proposal.tokens != base.argmax(-1)).sum())
            done = root
    assert differs > 2, "the Markov head changed no token: the test shows nothing"


def test_sampled_tokens_are_drawn_from_the_q_that_is_given():
    """Each token's q is that of the tokens before it as they were drawn, and over many rounds it is how often it comes."""
    case = small_dspark((12,), block_size=2)
    settings, rounds = DecodeSettings(num_steps=2, temperature=0.7, top_k=4), 3000
    ids, g, generator = case.batch.input_ids, case.features.g, torch.Generator().manual_seed(0)
    drafter = One(MarkovDrafter(case.draft, case.head, 1, 20))
    states, vocab = states_at(case, 11), case.config.vocab_size
    pairs = torch.zeros(vocab, vocab, dtype=torch.float64)
    with torch.no_grad():
        drafter.extend(g[:11])
        of = lambda slot, previous: probabilities(case.draft.logits(states[slot], previous, case.head), settings)  # noqa: E731
        first, second = of(0, ids[11]), torch.stack([of(1, torch.tensor(token)) for token in range(vocab)])
        for _ in range(rounds):
            proposal = drafter.again(ids[11:12], g[10:11], 2, settings, generator)
            a, b = proposal.tokens.tolist()
            torch.testing.assert_close(proposal.q, torch.stack([first, second[a]]), rtol=1e-9, atol=1e-12)
            pairs[a, b] += 1
    law = first[:, None] * second
    assert float((pairs / rounds - law).abs().max()) < 4 * (0.25 / rounds) ** 0.5
    assert bool((pairs[law == 0] == 0).all()) and int((law > 0).sum()) > 4


def test_heads_that_are_not_made_are_named():
    fields = dspark_shape().model_dump()
    for kind in ("gated", "rnn"):
        with pytest.raises(ValueError, match=f"a Markov head of type '{kind}' is not made here, and vLLM builds vanilla"):
            type(dspark_shape())(**fields | {"markov_head_type": kind})
    with pytest.raises(ValueError, match="labels"):
        type(dspark_shape())(**fields | {"labels": "fill_in"})
