"""The decoder drafts exactly what training trains, and leaves the target's output exactly as it was."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from drafting import One
from tiny import draft_shape, random_draft, tiny_llama

from fastdraft.answers.local import answer_batch
from fastdraft.batch import Batch, TargetHead
from fastdraft.decode import _reject, first_difference, generate, generate_batch
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.propose import DraftState
from fastdraft.model.eagle3.ref import ttt_ref
from fastdraft.model.proposal import DecodeSettings, Proposals
from fastdraft.target.hf import Target

VOCAB = 96
CHAINS = [DecodeSettings(num_steps=n) for n in (1, 3, 6)]
TREES = [
    DecodeSettings(num_steps=3, eagle_topk=2, num_draft_tokens=6),
    DecodeSettings(num_steps=4, eagle_topk=3, num_draft_tokens=16),
    DecodeSettings(num_steps=1, eagle_topk=4, num_draft_tokens=5),
]


def tiny_target(dtype=torch.float64, context=256) -> Target:
    shape = dict(num_hidden_layers=7, vocab_size=VOCAB, max_position_embeddings=context)
    # wide enough that greedy output wanders instead of repeating one token
    return Target(tiny_llama(**shape, initializer_range=0.3, eos_token_id=None, pad_token_id=None).to(dtype))


def tiny_draft(target, num_draft_tokens=60, seed=0, **changes) -> Draft:
    width = dict(hidden_size=32, target_hidden_size=target.hidden_size, intermediate_size=40, head_dim=12)
    heads = dict(num_attention_heads=4, rope_parameters={"rope_theta": 10000.0}, max_position_embeddings=256)
    of_target = dict(vocab_size=target.vocab_size, num_target_layers=7, layers=target.layers)
    config = draft_shape(**width, **heads, **of_target, draft_vocab_size=num_draft_tokens, **changes)
    return random_draft(config, target.embedding, 0.2, seed)


def prompts(lengths=(9, 1, 17), vocab=VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def train_on_own_output(target: Target, draft: Draft, num_tokens: int, steps: int = 40) -> None:
    """Fits the draft to what the target says to `prompts()`, so that decoding them accepts some tokens but not all."""
    texts = [p + generate(target, None, p, num_tokens).tokens for p in prompts()]
    ids = torch.tensor([token for text in texts for token in text])
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), tuple(len(x) for x in texts))
    features = target.capture(batch)
    optimizer = torch.optim.Adam(draft.trainable().values(), lr=1e-2)
    for _ in range(steps):
        rows = ttt_ref(draft, batch, features, target.head, 3)
        optimizer.zero_grad()
        (rows.loss.sum() / rows.live.sum()).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def plain(target) -> list[list[int]]:
    return [generate(target, None, prompt, 30).tokens for prompt in prompts()]


@pytest.fixture(scope="module")
def trained(target) -> Draft:
    draft = tiny_draft(target)
    train_on_own_output(target, draft, 30)
    return draft


# --- drafting is what training trains ---------------------------------------------------------------------------------


def reference_logits(draft, target, ids, num_steps):
    """[T, L, Vd]: the student's logits of `ttt_ref` over one document, read off the lm_head, and the document's g."""
    batch = Batch(torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool), (len(ids),))
    features = target.capture(batch)
    seen = []
    hook = draft.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        ttt_ref(draft, batch, features, target.head, num_steps)
    hook.remove()
    return torch.stack(seen), features.g


NORMS = [{}, {"fc_norm": True}, {"norm_output": True, "fc_norm": True}, {"norm_output": True, "norm_before_fc": True}]


@pytest.mark.parametrize("norms", NORMS, ids=lambda norms: ", ".join(norms) or "none")
def test_incremental_draft_equals_the_training_steps(target, norms):
    draft, num_steps = tiny_draft(target, **norms), 5
    ids = prompts((40,))[0]
    want, g = reference_logits(draft, target, ids, num_steps)
    x, state, compared = torch.tensor([ids]), DraftState(draft, 1, 64), 0
    with torch.no_grad():
        for rows in (7, 1, 3, 1, 1, 5, 2, 9, 4, 1):
            first = int(state.length)
            y = state.extend(x[:, first + 1 : first + rows + 1], g[None, first : first + rows], [rows])
            t = int(state.length) - 1
            for i in range(min(num_steps, len(ids) - 1 - t)):
                if i:  # the drafted token is forced to be the text's
                    y = state.step(x[:, t + 1 + i : t + 2 + i], y, i)
                torch.testing.assert_close(draft.logits(y)[0, 0], want[i, t], rtol=1e-10, atol=1e-10)
                compared += 1
    assert compared > 40


def drafted_tree(draft, ids, g, settings):
    drafter = One(DraftState(draft, 1, len(ids) + settings.num_steps * settings.eagle_topk))
    with torch.no_grad():
        return drafter.propose(torch.tensor(ids[1:]), g[: len(ids) - 1], settings.num_steps, settings, torch.Generator())


def paths(proposal):
    found = [()]
    for parent, token in zip(proposal.parents, proposal.tokens.tolist(), strict=True):
        found.append((*found[parent], token))
    return found[1:]


def best_paths(draft, ids, g, settings):
    """The engines' rule by brute force: every candidate's probability from a chain of its own."""

    def log_q(path):
        state = DraftState(draft, 1, len(ids) + len(path))
        y = state.extend(torch.tensor([ids[1:]]), g[None, : len(ids) - 1], [len(ids) - 1])
        for i, token in enumerate(path, 1):
            y = state.step(torch.tensor([[token]]), y, i)
        return state.log_q(y)[0, 0]

    def best(scored, k):
        return sorted(scored, key=lambda item: -item[1])[:k]

    k, everything, expand = settings.eagle_topk, [], [((), 0.0)]
    with torch.no_grad():
        for _ in range(settings.num_steps):
            level = []
            for path, score in expand:
                top = log_q(path).topk(k)
                ids_of = draft.draft_ids[top.indices].tolist()
                level += [((*path, d), score + s) for d, s in zip(ids_of, top.values.tolist(), strict=True)]
            everything += level
            expand = best(level, k)
    return [path for path, _ in best(everything, settings.num_verified - 1)]


@pytest.mark.parametrize("settings", [*CHAINS, *TREES])
def test_proposals_are_the_best_candidates(target, trained, settings):
    strong = tiny_draft(target, seed=2)
    strong.init_weights(0.6, torch.Generator().manual_seed(2))  # a branch's own keys weigh enough to change the ranking
    for draft in (trained, strong):
        for ids in prompts((12, 2, 1 + settings.num_steps)):
            g = target.forward(torch.tensor([ids]))[0][0]
            proposal = drafted_tree(draft, ids, g, settings)
            assert sorted(paths(proposal)) == sorted(best_paths(draft, ids, g, settings))


# --- greedy output is the target's own --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [*CHAINS, *TREES])
@pytest.mark.parametrize("kind", ["random", "trained"])
def test_greedy_output_is_the_targets(target, trained, plain, settings, kind):
    draft = trained if kind == "trained" else tiny_draft(target, seed=5)
    accepted = 0
    for prompt, own in zip(prompts(), plain, strict=True):
        ours = generate(target, draft, prompt, 30, settings)
        assert ours.tokens == own
        assert first_difference(target, prompt, ours.tokens, own) is None
        accepted += ours.accepted[0]
    if kind == "trained":
        assert accepted > 10  # the paths that keep tokens were taken, and the ones that reject:
        assert len(ours.tokens) - 1 < ours.num_rounds * (settings.num_steps + 1)


def test_greedy_output_is_the_targets_in_float32():
    target = tiny_target(torch.float32)
    draft = tiny_draft(target)
    train_on_own_output(target, draft, 12, steps=10)
    for settings in (CHAINS[1], TREES[1]):
        assert generate(target, draft, prompts()[0], 16, settings).tokens == generate(target, None, prompts()[0], 16).tokens


@pytest.mark.parametrize("settings", [CHAINS[1], TREES[1]])
def test_following_an_output_takes_its_tokens_for_the_targets(target, trained, plain, settings):
    prompt, own = prompts()[0], generate(target, trained, prompts()[0], 20, settings)
    followed = generate(target, trained, prompt, 0, settings, own.tokens)
    assert (followed.tokens, followed.per_round) == (own.tokens, own.per_round)
    # another target's output, one token changed: it is given as it is, and the round that ends there keeps no more
    other = list(own.tokens)
    other[7] = (other[7] + 1) % target.vocab_size
    followed = generate(target, trained, prompt, 0, settings, other)
    assert followed.tokens == other
    ends = [sum(followed.per_round[: k + 1]) for k in range(followed.num_rounds)]
    assert 7 in ends  # output token 7 is one no draft proposed: it is the last of its round (the prefill gave token 0)
    with pytest.raises(ValueError, match="only be followed greedily, not at temperature 1"):
        generate(target, trained, prompt, 0, DecodeSettings(temperature=1.0), other)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_every_round_accepts_what_training_says_it_would(target, trained, plain, num_steps):
    """A greedy chain's rounds follow from the teacher-forced hits alone: where a draft is accepted, it read the text."""
    for prompt, answer in zip(prompts(), plain, strict=True):
        ids = torch.tensor(prompt + answer)
        batch = Batch(ids, torch.ones(len(ids), dtype=torch.bool), (len(ids),))
        hit = ttt_ref(trained, batch, target.capture(batch), target.head, num_steps).hit
        known, rounds = len(prompt) + 1, []  # the prefill gave the first token
        while known < len(ids):
            accepted = 0
            while accepted < num_steps and known + accepted < len(ids) and bool(hit[accepted, known - 2]):
                accepted += 1
            rounds.append(min(accepted + 1, len(ids) - known))
            known += accepted + 1
        assert list(generate(target, trained, prompt, 30, DecodeSettings(num_steps)).per_round) == rounds


def test_trees_keep_branches_a_chain_does_not_have(target, trained):
    """The cache is compacted when a path skips nodes: only then does a tree gain over a chain of its depth."""
    chain, tree = (
        sum(generate(target, trained, p, 30, s).num_rounds for p in prompts())
        for s in (DecodeSettings(num_steps=4), DecodeSettings(num_steps=4, eagle_topk=4, num_draft_tokens=40))
    )
    assert tree < chain


def test_draft_over_the_whole_vocabulary(target, plain):
    draft = tiny_draft(target, num_draft_tokens=VOCAB)
    for settings in (CHAINS[1], TREES[1]):
        assert generate(target, draft, prompts()[0], 20, settings).tokens == plain[0][:20]


def test_counts(target, trained):
    result = generate(target, trained, prompts()[0], 30, DecodeSettings(num_steps=3))
    gained = result.num_rounds + sum(result.accepted)
    assert result.drafted == (result.num_rounds,) * 3
    assert 0 <= gained - (len(result.tokens) - 1) <= 3  # the last round may run past max_new_tokens
    assert sum(result.per_round) == 30 - 1
    assert list(result.accepted) == sorted(result.accepted, reverse=True)


# --- stops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [CHAINS[1], TREES[1]])
def test_stops_at_every_eos_position(target, trained, plain, settings):
    prompt, free = prompts()[0], plain[0][:12]
    stops = 0
    try:
        for eos in sorted(set(free)):
            target.eos_ids = frozenset([eos, VOCAB + 1])
            ours = generate(target, trained, prompt, 12, settings)
            assert ours.tokens == free[: free.index(eos) + 1] == generate(target, None, prompt, 12).tokens
            assert ours.stopped_by == "eos"
            stops += 1
    finally:
        target.eos_ids = frozenset()
    assert stops > 3


@pytest.mark.parametrize("settings", [CHAINS[2], TREES[1]])
def test_stops_when_the_context_is_full(settings):
    target = tiny_target(context=24)
    draft = tiny_draft(target)
    train_on_own_output(target, draft, 7, steps=20)
    for length in (10, 22, 23):
        prompt = prompts((length,))[0]
        used = []  # the largest position of each target forward
        hook = target.decoder.rotary_emb.register_forward_hook(
            lambda _m, args, kw, _out, used=used: used.append(int(kw.get("position_ids", args[-1]).max())), with_kwargs=True
        )
        ours = generate(target, draft, prompt, 50, settings)
        hook.remove()
        assert ours.stopped_by == "context" and len(prompt) + len(ours.tokens) == 24
        assert ours.tokens == generate(target, None, prompt, 50).tokens
        assert max(used) <= 23
    with pytest.raises(ValueError, match="fills the target's context of 24"):
        generate(target, draft, prompts((24,))[0], 5, settings)


# --- sampled output is distributed as the target's --------------------------------------------------------------------

STATES = 8


class MarkovTarget:
    """A target whose next token depends on the last alone: transitions of one long output show its distribution."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.head = TargetHead(1.2 * torch.randn(STATES, STATES, generator=generator))
        self.vocab_size = self.hidden_size = STATES
        self.layers, self.eos_ids = (1, 2, 3), frozenset()
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = SimpleNamespace()
        self.embedding = torch.eye(STATES)

    def forward(self, input_ids, cache=None, position_ids=None, attention_mask=None):
        f = self.embedding[input_ids]
        return f.repeat(1, 1, 3), f


def chi_square_per_freedom(counts, p):
    """About 1, with deviation sqrt(2 / cells), when `counts` [rows, V] were drawn from `p` [rows, V]."""
    often = counts.sum(1) >= 50
    counts, p = counts[often], p[often]
    expected = counts.sum(1, keepdim=True) * p
    allowed = p > 0
    assert not counts[~allowed].any()
    return float(((counts - expected) ** 2 / expected)[allowed].sum() / (allowed.sum() - len(p)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        DecodeSettings(num_steps=3, temperature=1.0),
        DecodeSettings(num_steps=2, temperature=0.7, top_k=4, top_p=0.95),
        DecodeSettings(num_steps=3, temperature=1.0, verify="block"),
        DecodeSettings(num_steps=3, temperature=1.0, sample_draft=False),
        DecodeSettings(num_steps=3, eagle_topk=2, num_draft_tokens=7, temperature=1.0),
    ],
    ids=["chain", "chain-filtered", "chain-by-block", "chain-argmax", "tree"],
)
def test_sampled_output_has_the_targets_distribution(settings):
    target, n = MarkovTarget(), 1500
    draft = tiny_draft(target, num_draft_tokens=5)
    result = generate(target, draft, [0], n, settings)
    if settings.top_k:
        p = torch.zeros(STATES, STATES)
        for row, logits in enumerate(target.head.weight.T / settings.temperature):
            order = logits.argsort(descending=True)[: settings.top_k]
            q = logits[order].softmax(-1)
            order = order[q.cumsum(0) - q < settings.top_p]
            p[row, order] = logits[order].softmax(-1)
    else:
        p = (target.head.weight.T / settings.temperature).softmax(-1)
    counts = torch.zeros(STATES, STATES)
    for a, b in zip([0, *result.tokens[:-1]], result.tokens, strict=True):
        counts[a, b] += 1
    assert 0.02 < result.accepted[0] / result.drafted[0] < 0.98
    assert chi_square_per_freedom(counts.double(), p.double()) < 1.8
    uniform = torch.full_like(counts, 1 / STATES).double()
    assert settings.top_k or chi_square_per_freedom(counts.double(), uniform) > 5  # the bound above can fail


def test_rejection_rule_on_given_distributions():
    """Token after the prefix: P_0 whatever Q is; and the share kept is sum_v min(P, Q)."""
    generator = torch.Generator().manual_seed(0)
    draft_ids = torch.tensor([1, 2, 5, 6, 7, 11])
    p = (2 * torch.randn(3, 16, generator=generator, dtype=torch.float64)).softmax(-1)
    q = (2 * torch.randn(2, 6, generator=generator, dtype=torch.float64)).softmax(-1)
    n, first, second, kept_count = 8000, torch.zeros(1, 16), torch.zeros(1, 16), 0
    for _ in range(n):
        tokens = draft_ids[torch.multinomial(q, 1, generator=generator)[:, 0]]
        proposal = Proposals(tokens[None], torch.tensor([[0, 1]]), [2], q[None])
        (out,) = _reject(p.log()[None], proposal, DecodeSettings(temperature=1.0), [generator], draft_ids)[1]
        first[0, out[0]] += 1
        if len(out) > 1:
            second[0, out[1]] += 1
            kept_count += 1
    assert chi_square_per_freedom(first.double(), p[:1]) < 2.2
    assert chi_square_per_freedom(second.double(), p[1:2]) < 2.2
    assert kept_count / n == pytest.approx(float(torch.minimum(p[0, draft_ids], q[0]).sum()), abs=0.02)


def test_a_draft_that_equals_the_target_is_never_rejected():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(4, 12, generator=generator).softmax(-1)
    for _ in range(200):
        tokens = torch.multinomial(p[:3], 1, generator=generator)[:, 0]
        proposal = Proposals(tokens[None], torch.tensor([[0, 1, 2]]), [3], p[None, :3])
        (path,) = _reject(p.log()[None], proposal, DecodeSettings(temperature=1.0), [generator], torch.arange(12))[0]
        assert path == [0, 1, 2, 3]


def test_a_seed_gives_the_same_sample_again(target, trained):
    settings = DecodeSettings(temperature=0.8, seed=4)
    again, same = (generate(target, trained, prompts()[0], 12, settings).tokens for _ in range(2))
    assert again == same != generate(target, trained, prompts()[0], 12, replace(settings, seed=5)).tokens


def test_every_prompt_has_random_numbers_of_its_own():
    """This target's next token depends on the last alone, so outputs after the same last token differ by what is drawn."""
    target, settings = MarkovTarget(), DecodeSettings(temperature=1.0)
    asked = [[first, 0] for first in range(STATES)]
    outputs = [tuple(r.tokens) for r in generate_batch(target, None, [*asked, asked[3]], 40, settings, None)]
    assert len(set(outputs)) == STATES and outputs[-1] == outputs[3]


# --- many sequences at once are each what they are alone --------------------------------------------------------------

SAMPLED = [
    DecodeSettings(num_steps=3, temperature=1.0),
    DecodeSettings(num_steps=2, temperature=0.7, top_k=8, top_p=0.9, seed=3),
    DecodeSettings(num_steps=3, temperature=1.0, verify="block"),
    DecodeSettings(num_steps=2, temperature=0.7, top_k=8, top_p=0.9, seed=3, verify="block"),
    DecodeSettings(num_steps=3, temperature=0.3, sample_draft=False),
    DecodeSettings(num_steps=3, eagle_topk=2, num_draft_tokens=7, temperature=1.0),
]


def timeless(results):
    return [replace(result, seconds=0.0) for result in results]


@pytest.fixture(scope="module")
def narrow() -> tuple[Target, Draft]:
    """A target whose context ends some outputs, with stop tokens that end others, and a draft that it half agrees with."""
    target = tiny_target(context=40)
    draft = tiny_draft(target)
    train_on_own_output(target, draft, 12, steps=25)
    return target, draft


@pytest.mark.parametrize("settings", [*CHAINS, *TREES, *SAMPLED])
def test_a_batch_decodes_as_each_prompt_alone(narrow, settings):
    target, draft = narrow
    asked, stops = prompts((9, 1, 36, 17, 3, 39)), set()
    free = generate(target, draft, asked[0], 20, settings).tokens
    try:
        target.eos_ids = frozenset([free[5], free[-2]])
        alone = timeless(generate(target, draft, prompt, 20, settings) for prompt in asked)
        plain = timeless(generate(target, None, prompt, 20, settings) for prompt in asked)
        for size in (1, 4, 64):
            assert timeless(generate_batch(target, draft, asked, 20, settings, size)) == alone
        assert timeless(generate_batch(target, None, asked, 20, settings, 4)) == plain
        stops = {result.stopped_by for result in alone}
    finally:
        target.eos_ids = frozenset()
    assert stops >= {"eos", "context"}
    kept, rounds = sum(r.accepted[0] for r in alone), sum(r.num_rounds for r in alone)
    assert 0 < kept < rounds  # paths that keep tokens were taken, and others


def test_a_batch_of_long_prompts_is_cut(narrow, monkeypatch):
    """No batch has more than BATCH_TOKENS tokens, and seconds are shared by those that were decoded together."""
    target, draft = narrow
    asked, seen = prompts((20, 20, 20, 5)), []
    want = timeless(generate(target, draft, prompt, 6) for prompt in asked)
    monkeypatch.setattr("fastdraft.decode.BATCH_TOKENS", 45)
    forward = target.forward
    monkeypatch.setattr(target, "forward", lambda ids, *rest: seen.append(ids.numel()) or forward(ids, *rest))
    results = generate_batch(target, draft, asked, 6)
    assert timeless(results) == want
    assert max(seen) == 40  # 5 and 20 tokens go together, padded to twice 20
    with pytest.raises(ValueError, match="out of memory with 1 prompts at once: lower the batch size"):
        monkeypatch.setattr(target, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
        generate_batch(target, draft, [asked[0]], 6)
    assert results[3].seconds == results[0].seconds != results[1].seconds == results[2].seconds > 0


def test_generating_never_asks_for_cudnns_attention(narrow, monkeypatch):
    """On a Hopper GPU PyTorch prefers it, and it makes a plan for every new shape: decoding took minutes for seconds."""
    target, draft = narrow
    monkeypatch.setattr(target, "eos_ids", frozenset({0}))
    enabled = []
    hook = target.decoder.register_forward_pre_hook(lambda *_: enabled.append(torch.backends.cuda.cudnn_sdp_enabled()))
    generate_batch(target, draft, prompts((5, 9)), 4)
    generate(target, draft, prompts((5,))[0], 4)
    answer_batch(target, prompts((5, 9)), 4, do_sample=False)
    assert len(enabled) > 6 and not any(enabled)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # elsewhere shapes stay, and it is fast
    hook.remove()


def test_what_a_batch_refuses(narrow):
    target, draft = narrow
    with pytest.raises(ValueError, match="batch_size is 0"):
        generate_batch(target, draft, [[1]], 4, batch_size=0)
    with pytest.raises(ValueError, match="this one has none"):
        generate_batch(target, draft, [[1], []], 4)
    with pytest.raises(ValueError, match="fills the target's context of 40"):
        generate_batch(target, None, [[1] * 40], 4)
    assert generate_batch(target, draft, [], 4) == []


# --- comparing, and what is refused -----------------------------------------------------------------------------------


def test_first_difference_says_where_and_by_how_much(target, plain):
    prompt, plain = prompts()[0], plain[0][:10]
    other = (plain[6] + 1) % VOCAB
    found = first_difference(target, prompt, [*plain[:6], other, 0, 0, 0], plain)
    logits = target.model(torch.tensor([prompt + plain[:6]])).logits[0, -1]
    assert (found.index, found.token, found.plain_token) == (6, other, plain[6])
    assert found.logit_gap == pytest.approx(float(logits[plain[6]] - logits[other]), rel=1e-5)
    assert found.logit_gap > 0
    with pytest.raises(ValueError, match="limits differed"):
        first_difference(target, prompt, plain[:4], plain)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_steps": 0}, "at least 1"),
        ({"eagle_topk": 2, "num_draft_tokens": 40}, "must lie in 2..11"),
        ({"eagle_topk": 2, "num_draft_tokens": 1}, "must lie in 2..11"),
        ({"num_steps": 3, "num_draft_tokens": 3}, "leave num_draft_tokens out"),
        ({"temperature": -1.0}, "must be 0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"verify": "blocks"}, "verify 'blocks' must be one of token, block"),
        ({"verify": "block"}, "needs temperature > 0, eagle_topk 1"),
        ({"verify": "block", "temperature": 1.0, "sample_draft": False}, "kept token by token"),
        ({"verify": "block", "temperature": 1.0, "eagle_topk": 2, "num_draft_tokens": 6}, "eagle_topk 2"),
    ],
)
def test_settings_that_cannot_be(wrong, says):
    with pytest.raises(ValueError, match=says):
        DecodeSettings(**wrong)


def test_a_draft_or_prompt_that_does_not_fit_is_refused(target, trained):
    other = tiny_draft(SimpleNamespace(**{**vars(target), "layers": (1, 2, 4), "dtype": torch.float64}))
    with pytest.raises(ValueError, match=r"the draft is for a target with .*\(1, 2, 4\)"):
        generate(target, other, [1, 2], 4)
    with pytest.raises(ValueError, match="ids from 3 to 96"):
        generate(target, trained, [3, 96], 4)
    with pytest.raises(ValueError, match="this one has none"):
        generate(target, trained, [], 4)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(target, None, [1], 0)
    small = tiny_draft(target, num_draft_tokens=2)
    with pytest.raises(ValueError, match="more than the draft vocabulary of 2"):
        generate(target, small, [1], 4, TREES[1])
