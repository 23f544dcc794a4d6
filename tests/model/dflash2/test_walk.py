"""A drafter's walk: each slot's best candidate given the token that was taken before it, greedy and sampled."""

from __future__ import annotations

import pytest
import torch
from drafting import One
from small_drafts import small_dflash2

from fastdraft.model.dflash.ref import block_states_ref
from fastdraft.model.dflash2.propose import SelectorDrafter
from fastdraft.model.proposal import DecodeSettings, probabilities


def scores_by_hand(case, state, before):
    """Every token's score [V]: -inf where it is no candidate."""
    selector, logits = case.draft.candidate_selector, case.head.logits(state)
    edges = selector.successor_codebook @ (selector.predecessor_codebook[before] * selector.hidden_projection(state))
    out = torch.full_like(logits, -torch.inf)
    best = logits.topk(case.config.selector_top_k).indices
    out[best] = (logits + edges)[best]
    return out


@pytest.mark.parametrize("labels", ["fill_in", "shifted"])
def test_a_greedy_walk_is_the_definition(labels):
    case = small_dflash2(lengths=(23,), labels=labels)
    ids, g, c = case.batch.input_ids, case.features.g, case.config
    drafter, done, turned = One(SelectorDrafter(case.draft, case.head, 1, 30)), 0, 0
    with torch.no_grad():
        for root in (3, 4, 9, 22):
            settings = DecodeSettings(num_steps=4)
            proposal = drafter.propose(ids[done + 1 : root + 1], g[done:root], 4, settings, torch.Generator())
            states = block_states_ref(case.draft, case.batch, case.features, torch.tensor([root]))[0, c.first_slot :]
            before, want = int(ids[root]), []
            for state in states[:4]:
                before = int(scores_by_hand(case, state, before).argmax())
                want.append(before)
            assert proposal.tokens.tolist() == want and proposal.parents == [0, 1, 2, 3] and proposal.q is None
            turned += want != case.head.logits(states[:4]).argmax(-1).tolist()
            done = root
    assert turned, "the selector never chose otherwise than the logits, so the walk was not tested"


def test_a_sampled_walk_draws_from_the_q_that_is_given():
    """q of a slot depends on the token before, is 0 but for candidates, and is what tokens are drawn from."""
    case = small_dflash2(lengths=(12,))
    settings = DecodeSettings(num_steps=3, temperature=0.7, top_k=4)
    drafter, generator, rounds = One(SelectorDrafter(case.draft, case.head, 1, 20)), torch.Generator().manual_seed(0), 2000
    counts = torch.zeros(case.config.vocab_size, dtype=torch.float64)
    with torch.no_grad():
        drafter.propose(case.batch.input_ids[1:12], case.features.g[:11], 3, settings, generator)
        states = block_states_ref(case.draft, case.batch, case.features, torch.tensor([11]))[0, 1:4]
        seen = set()
        for _ in range(rounds):
            proposal = drafter.again(case.batch.input_ids[11:12], case.features.g[10:11], 3, settings, generator)
            counts[proposal.tokens[0]] += 1
            path = tuple(proposal.tokens.tolist())
            if path in seen:
                continue
            seen.add(path)
            for slot, before in enumerate((int(case.batch.input_ids[11]), *path[:2])):
                want = probabilities(scores_by_hand(case, states[slot], before)[None], settings)[0]
                torch.testing.assert_close(proposal.q[slot], want, rtol=1e-9, atol=1e-12)
                assert proposal.q[slot, path[slot]] > 0
        q = probabilities(scores_by_hand(case, states[0], int(case.batch.input_ids[11]))[None], settings)[0]
    assert float((counts / rounds - q).abs().max()) < 4 * (0.25 / rounds) ** 0.5 and len(seen) > 3
