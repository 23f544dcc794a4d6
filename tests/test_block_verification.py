"""A drawn chain leaves the target's distribution as it is, and by block it is kept longer: enumerated, not sampled.

`every_way` runs one round of drafting and verification in all ways that its random choices can fall, each with its
probability. So what must hold holds to the last bits of float64, for any draft.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from small_drafts import small_dflash, small_dflash2, small_dspark
from test_decode import tiny_draft, tiny_target

from fastdraft import decode
from fastdraft.decode import _keep, _verify
from fastdraft.model.methods import method_of
from fastdraft.model.proposal import DecodeSettings, probabilities

SETTINGS = {name: DecodeSettings(num_steps=2, temperature=0.9, verify=name) for name in ("token", "block")}


class Ways:
    """Random choices that are taken in every way, one after the other."""

    def __init__(self):
        self.script: list[int] = []
        self.open: list[tuple[list[int], float]] = [([], 1.0)]

    def choose(self, weights: list[float]) -> int:
        """A choice among `weights`, which need not sum to 1; those without any weight are no choice."""
        if self.at == len(self.script):
            shares = [(place, w / sum(weights)) for place, w in enumerate(weights) if w > 0]
            for place, share in shares[1:]:
                self.open.append(([*self.script, place], self.probability * share))
            self.script.append(shares[0][0])
            self.probability *= shares[0][1]
        self.at += 1
        return self.script[self.at - 1]

    def __iter__(self) -> Iterator[None]:
        while self.open:
            self.script, self.probability = self.open.pop()
            self.at = 0
            yield


def chances_by_hand(p, q, tokens, verify) -> list[float]:  # p [m+1, V], q [m+1, V], tokens [m]
    """The chance of each place to stay, as the papers write it, in plain numbers."""
    p, q = p.tolist(), q.tolist()
    found, s = [], 1.0
    for i, y in enumerate(tokens.tolist()):
        ratio = p[i][y] / q[i][y]
        if verify == "token":
            found.append(min(1.0, ratio))
            continue
        s = min(1.0, s * ratio)
        left = sum(max(s * a - b, 0.0) for a, b in zip(p[i + 1], q[i + 1], strict=True))
        last = i + 1 == len(tokens)
        found.append(s if last else 1.0 if s == 1 else left / (left + 1 - s))
    return found


def kept_in(ways: Ways, p, q, tokens, settings):
    """`_keep` with draws that lie a hair below or above each place's chance."""
    draws = []
    for chance in chances_by_hand(p[0], q[0], tokens[0], settings.verify):
        stays = ways.choose([1 - chance, chance])
        draws.append(chance * (1 - 1e-9) if stays else chance + 1e-9 * (1 - chance))
    return _keep(p, q, tokens, torch.tensor([draws], dtype=p.dtype), settings)


def law_of(ways: Ways, round_: Callable[[], tuple[list[int], int]], next_p, length: int):
    """The distribution of the first `length` tokens, where a round's are followed by the target's own, and the mean of
    drafted tokens kept. `next_p` gives the target's distribution, a list of V, after the tokens that a round gained."""
    law: dict[tuple[int, ...], float] = {}
    mean = total = 0.0
    for _ in ways:
        gained, kept = round_()
        mean += ways.probability * kept
        total += ways.probability
        for rest in itertools.product(range(len(next_p(()))), repeat=max(0, length - len(gained))):
            text, probability = tuple(gained), ways.probability
            for token in rest:
                probability *= next_p(text)[token]
                text = (*text, token)
            law[text[:length]] = law.get(text[:length], 0.0) + probability
    assert total == pytest.approx(1, abs=1e-12)
    return law, mean


def target_law(next_p, length):
    law = {}
    for text in itertools.product(range(len(next_p(()))), repeat=length):
        probability = 1.0
        for place, token in enumerate(text):
            probability *= next_p(text[:place])[token]
        law[text] = probability
    return law


def assert_same_law(found, wanted):
    assert max(abs(found.get(text, 0.0) - probability) for text, probability in wanted.items()) < 1e-12
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)


# --- given distributions ------------------------------------------------------------------------------------------------


def random_tables(seed: int, vocab: int, depth: int, zeros: bool):
    """P and Q after every text up to `depth` tokens; with `zeros` each leaves some tokens out, and not the same."""
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for length in range(depth + 1):
        for text in itertools.product(range(vocab), repeat=length):
            x = (1.5 * torch.randn(2, vocab, generator=generator, dtype=torch.float64)).exp()
            if zeros:
                x[0, int(torch.randint(vocab, (1,), generator=generator))] = 0
                x[1, int(torch.randint(vocab, (1,), generator=generator))] = 0
            tables[text] = x / x.sum(-1, keepdim=True)
    return tables


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_any_chain_leaves_the_targets_law_and_a_block_keeps_more(seed, zeros):
    vocab, m = 3, 3
    tables = random_tables(seed, vocab, m, zeros)
    means = {}
    for verify in ("token", "block"):
        settings, ways = DecodeSettings(num_steps=m, temperature=1.0, verify=verify), Ways()

        def round_(ways=ways, settings=settings):
            text = ()
            for _ in range(m):
                text = (*text, ways.choose(tables[text][1].tolist()))
            p = torch.stack([tables[text[:i]][0] for i in range(m + 1)])
            q = torch.stack([tables[text[:i]][1] for i in range(m)] + [torch.zeros(vocab, dtype=torch.float64)])
            kept, rest = kept_in(ways, p[None], q[None], torch.tensor([text]), settings)
            return [*text[: int(kept)], ways.choose(rest[0].tolist())], int(kept)

        lists = {text: table[0].tolist() for text, table in tables.items()}
        next_p = lists.__getitem__
        law, means[verify] = law_of(ways, round_, next_p, m + 1)
        assert_same_law(law, target_law(next_p, m + 1))
    assert means["block"] >= means["token"] - 1e-12, means
    assert zeros or means["block"] > means["token"] + 1e-3, means


def test_sequences_together_are_judged_as_each_alone():
    """Chains of other lengths in one call: what lies behind a sequence's own is never kept, and is not read."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(3, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    tokens, counts = torch.randint(7, (3, 4), generator=generator), (4, 1, 3)
    kept_some = 0
    for _ in range(200):
        draws = torch.rand(3, 4, generator=generator, dtype=torch.float64)
        for settings in SETTINGS.values():
            own = q.clone()
            for row, count in enumerate(counts):
                own[row, count:] = 0
            kept, rest = _keep(p, own, tokens, draws, settings)
            for row, n in enumerate(counts):
                alone = _keep(
                    p[row, None, : n + 1], own[row, None, : n + 1], tokens[row, None, :n], draws[row, None, :n], settings
                )
                assert int(kept[row]) == int(alone[0]) <= n
                torch.testing.assert_close(rest[row], alone[1][0], rtol=0, atol=0)
            kept_some += int(kept[0])
    assert kept_some > 100


def test_a_draft_that_equals_the_target_is_kept_whole():
    p = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    p = p / p.sum(-1, keepdim=True)
    q = torch.cat([p[:, :3], torch.zeros_like(p[:, 3:])], 1)
    tokens = torch.tensor([[1, 2, 3], [0, 0, 5]])
    kept, rest = _keep(p, q, tokens, torch.full((2, 3), 0.999), SETTINGS["block"])
    assert kept.tolist() == [3, 3] and torch.equal(rest, p[:, 3])


# --- every method's own chain -------------------------------------------------------------------------------------------

SHAPE = dict(vocab_size=3, mask_token_id=2)


def eagle3():
    target = tiny_target()
    target.vocab_size, target.embedding = 3, target.embedding[:3]
    draft = tiny_draft(target, num_draft_tokens=2).double()
    generator = torch.Generator().manual_seed(5)
    g = torch.randn(6, 3 * target.hidden_size, generator=generator, dtype=torch.float64)
    return draft, None, torch.tensor([1, 0, 2, 2, 1, 0]), g


def block(case):
    return case.draft, case.head, case.batch.input_ids[:6], case.features.g[:6]


METHODS = {
    "eagle3": eagle3,
    "dflash": lambda: block(small_dflash(**SHAPE)),
    "dspark": lambda: block(small_dspark(**SHAPE)),
    "dflash2": lambda: block(small_dflash2(selector_top_k=2, **SHAPE)),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_round_leaves_the_targets_law(monkeypatch, method):
    """A real drafter's proposal and `_verify`, with the target's distribution a table that no draft knows."""
    draft, head, ids, g = METHODS[method]()
    generator = torch.Generator().manual_seed(2)
    tables = {
        t: torch.randn(3, generator=generator, dtype=torch.float64)
        for n in range(3)
        for t in itertools.product(range(3), repeat=n)
    }
    means = {}
    for verify, settings in SETTINGS.items():
        ways = Ways()

        def draw_each(p, _, counts, ways=ways):
            assert len(p) == 1
            drawn = [ways.choose(row.tolist()) if place < counts[0] else 0 for place, row in enumerate(p[0])]
            return torch.tensor([drawn])

        # wherever it was imported: a draw left out would break the law below
        for name, module in list(sys.modules.items()):
            if name.startswith("fastdraft.") and hasattr(module, "draw_each"):
                monkeypatch.setattr(module, "draw_each", draw_each)
        monkeypatch.setattr(decode, "_keep", lambda p, q, t, _, s, ways=ways: kept_in(ways, p, q, t, s))

        def round_(settings=settings):
            drafter, generators = method_of(draft).drafter(draft, head, 1, 20), [torch.Generator()]
            with torch.no_grad():
                proposal = drafter.propose(ids[None], g[None], [len(g)], [2], settings, generators)
            text = tuple(proposal.tokens[0].tolist())
            logits = torch.stack([tables[text[:i]] for i in range(3)])[None]
            (path,), (gained,) = _verify(logits, proposal, settings, generators, drafter.draft_ids)
            return gained, len(path) - 1

        next_p = {text: probabilities(table[None], settings)[0].tolist() for text, table in tables.items()}.__getitem__
        law, means[verify] = law_of(ways, round_, next_p, 3)
        assert_same_law(law, target_law(next_p, 3))
    assert means["block"] >= means["token"] > 0.05, means
    assert means["block"] > means["token"] + 1e-4, means
