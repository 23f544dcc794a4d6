"""Reports: means are over what they say, packing and ranks change nothing, and lengths count what the engines count."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from test_decode import prompts, tiny_draft, tiny_target

from fastdraft.batch import Batch, Rows
from fastdraft.decode import DecodeResult, generate
from fastdraft.evaluate import evaluate_decode, evaluate_tau
from fastdraft.model.eagle3.ref import ttt_ref
from fastdraft.model.proposal import DecodeSettings

STEPS = 3


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def draft(target):
    return tiny_draft(target)


def documents(lengths):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(96, (n,), generator=generator), torch.rand(n, generator=generator) < 0.7) for n in lengths]


def pack(docs) -> Batch:
    return Batch(torch.cat([d[0] for d in docs]), torch.cat([d[1] for d in docs]), tuple(len(d[0]) for d in docs))


@pytest.fixture(scope="module")
def step_rows(target, draft):
    return lambda batch: ttt_ref(draft, batch, target.capture(batch), target.head, STEPS)


def numbers(report):
    """Every number of a report, to compare reports to rounding."""
    found = []

    def walk(x):
        if isinstance(x, dict):
            x = x.values()
        if isinstance(x, (int, float)) or x is None:
            found.append(-1.0 if x is None else float(x))
        else:
            for item in x:
                walk(item)

    walk(asdict(report))
    return found


def test_means_of_known_rows():
    batch = Batch(torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.bool), (4, 2))
    live = torch.tensor([[1, 1, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0]]).bool()
    rows = Rows(
        loss=torch.tensor([[1.0, 2, 3, 0, 6, 0], [0, 0, 5, 0, 0, 0]]),
        acceptance=torch.tensor([[0.5, 0.5, 1, 0, 0.4, 0], [0, 0, 0.25, 0, 0, 0]]),
        hit=torch.tensor([[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool(),
        live=live,
        masked_in=live | torch.tensor([0, 0, 0, 1, 0, 0]).bool(),
    )
    report = evaluate_tau(lambda _: rows, [batch, batch], 2, position_edges=(0, 2, 8))
    whole = report.overall
    assert whole.acceptance == pytest.approx([0.6, 0.25])
    assert whole.loss == pytest.approx([3.0, 5.0])
    assert whole.top1 == pytest.approx([2 / 5, 0.0])
    assert whole.num_live == [8, 2]
    assert whole.tau_sim == pytest.approx(1 + 0.6 + 0.6 * 0.25)
    assert whole.greedy_tau == pytest.approx(1.4)
    early, late = report.by_position  # nothing reaches the bucket from 8 on
    assert (early.start, early.end, late.start, late.end) == (0, 2, 2, 8)
    assert early.means.acceptance == [pytest.approx(1.4 / 3), None]  # no live row of step 1 there
    assert early.means.tau_sim == pytest.approx(1 + 1.4 / 3)
    assert late.means.acceptance == [1.0, 0.25] and late.means.num_live == [2, 2]


def test_packing_does_not_change_the_report(step_rows):
    docs = documents((9, 14, 3, 20, 11))
    edges = (0, 4, 8, 16)
    together = evaluate_tau(step_rows, [pack(docs)], STEPS, edges)
    for cut in (1, 2, 4):
        packs = [pack(docs[:cut]), pack(docs[cut:][::-1])]
        assert numbers(evaluate_tau(step_rows, packs, STEPS, edges)) == pytest.approx(numbers(together), rel=1e-12)
    assert len(together.by_position) == 4
    assert sum(b.means.num_live[0] for b in together.by_position) == together.overall.num_live[0]
    json.loads(json.dumps(asdict(together), allow_nan=False))


def test_ranks_add_up_also_with_an_empty_one(step_rows):
    docs = documents((9, 14, 12))
    sums = []

    def keep(x):
        sums.append(x)
        return torch.ones_like(x)

    for part in ([pack(docs[:1])], [pack(docs[1:])], []):
        evaluate_tau(step_rows, part, STEPS, reduce=keep)
    assert [(x.dtype, x.device.type, x.shape) for x in sums] == [(torch.float64, "cpu", sums[0].shape)] * 3
    ranks = evaluate_tau(step_rows, [pack(docs[:1])], STEPS, reduce=lambda _: sum(sums))
    assert numbers(ranks) == pytest.approx(numbers(evaluate_tau(step_rows, [pack(docs)], STEPS)), rel=1e-12)


def test_the_loss_is_evaluated_without_a_graph(step_rows):
    graphs = []

    def watched(batch):
        rows = step_rows(batch)
        graphs.append(rows.loss.requires_grad)
        return rows

    evaluate_tau(watched, [pack(documents((9,)))], STEPS)
    assert graphs == [False]


def test_nothing_to_evaluate_is_an_error(step_rows):
    masked = [(ids, torch.zeros_like(mask)) for ids, mask in documents((9, 5))]
    for batches in ([], [pack(masked)]):
        with pytest.raises(ValueError, match="no live row"):
            evaluate_tau(step_rows, batches, STEPS)
    for edges in ((), (1, 4), (0, 4, 4), (0, 8, 4)):
        with pytest.raises(ValueError, match="must ascend from 0"):
            evaluate_tau(step_rows, [], STEPS, edges)
    with pytest.raises(ValueError, match=r"not \[4 steps, 9 tokens\]"):
        evaluate_tau(step_rows, [pack(documents((9,)))], 4)


@pytest.mark.parametrize("settings", [DecodeSettings(), DecodeSettings(num_steps=2, eagle_topk=3, num_draft_tokens=8)])
def test_decode_report_is_the_total_of_its_prompts(target, draft, settings):
    results = [generate(target, draft, p, 12, settings) for p in prompts()]
    report = evaluate_decode(target, draft, prompts(), settings, 12)
    rounds = sum(r.num_rounds for r in results)
    assert (report.num_prompts, report.num_tokens, report.num_rounds) == (3, 36, rounds)
    assert report.accepted_length == (36 - 3) / rounds
    assert report.spec_accept_length == 36 / rounds
    assert report.step_acceptance == pytest.approx(
        [sum(r.accepted[j] for r in results) / rounds for j in range(settings.num_steps)]
    )
    assert (report.num_equal, report.first_difference, report.first_difference_prompt) == (3, None, None)
    assert report.tokens_per_s > 0 and report.plain_tokens_per_s > 0
    json.loads(json.dumps(asdict(report), allow_nan=False))


def test_an_output_that_is_not_the_targets_is_reported(target, draft):
    plain = [generate(target, None, p, 8) for p in prompts()]
    t = plain[1].tokens
    wrong = DecodeResult([*t[:5], (t[5] + 1) % 96, *t[6:]], "length", 0, (), (), (), 1.0)
    report = evaluate_decode(target, draft, prompts(), DecodeSettings(), 8, plain=[plain[0], wrong, plain[2]])
    assert (report.num_equal, report.first_difference_prompt, report.first_difference.index) == (2, 1, 5)
    assert report.first_difference.logit_gap < 0  # the target prefers our token
    assert report.largest_logit_gap == -report.first_difference.logit_gap
    assert report.plain_tokens_per_s == pytest.approx(24 / (plain[0].seconds + 1.0 + plain[2].seconds))
    json.loads(json.dumps(asdict(report), allow_nan=False))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_changes_nothing_in_the_report_but_the_time(target, draft, temperature):
    settings = DecodeSettings(temperature=temperature)
    alone, together = (evaluate_decode(target, draft, prompts(), settings, 10, None, size) for size in (1, 2))
    assert (alone.batch_size, together.batch_size) == (1, 2)
    clocks = dict(tokens_per_s=0.0, plain_tokens_per_s=0.0, batch_size=0)
    assert replace(alone, **clocks) == replace(together, **clocks)


def test_a_target_that_cannot_be_batched_is_decoded_one_at_a_time(target, draft, monkeypatch):
    want = evaluate_decode(target, draft, prompts(), DecodeSettings(), 8)
    assert want.one_at_a_time is None and want.batch_size == len(prompts()) == 3
    monkeypatch.setattr("fastdraft.evaluate.why_apart", lambda target: "it has windows")
    report = evaluate_decode(target, draft, prompts(), DecodeSettings(), 8)
    assert (report.one_at_a_time, report.batch_size) == ("it has windows", 1)
    assert report.accepted_length == want.accepted_length


def test_one_prompt_needs_no_trial(target, draft, monkeypatch):
    """The trial takes nine forwards of the target, which one prompt has nothing of."""
    monkeypatch.setattr("fastdraft.evaluate.why_apart", lambda target: pytest.fail("a trial was made"))
    report = evaluate_decode(target, draft, prompts()[:1], DecodeSettings(), 8)
    assert (report.one_at_a_time, report.batch_size) == (None, 1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate_decode(target, draft, prompts()[:1], DecodeSettings(), 8, None, 0)


def test_sampled_outputs_are_not_compared(target, draft):
    report = evaluate_decode(target, draft, prompts(), DecodeSettings(temperature=1.0), 6)
    assert report.num_equal is None and report.first_difference is None


def test_prompts_that_give_no_round(target, draft):
    with pytest.raises(ValueError, match="no prompts"):
        evaluate_decode(target, draft, [], DecodeSettings(), 8)
    with pytest.raises(ValueError, match="no draft was ever verified"):
        evaluate_decode(target, draft, prompts(), DecodeSettings(), 1)
    with pytest.raises(ValueError, match="1 plain results were given for 3 prompts"):
        evaluate_decode(target, draft, prompts(), DecodeSettings(), 8, plain=[generate(target, None, [1], 2)])
