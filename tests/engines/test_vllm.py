"""Real vLLM drafts, token for token, what fastdraft decodes from the same checkpoint, and counts the same acceptance."""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CASES, CHAIN, NEW_TOKENS, engine_place, make_case

from fastdraft.config import load_config
from fastdraft.data.prompts import prompt_ids, read_prompts
from fastdraft.decode import generate
from fastdraft.evaluate import evaluate_decode
from fastdraft.model.eagle3.propose import DraftState
from fastdraft.run.finished import export_run
from fastdraft.serving.engines import Run, run_engine
from fastdraft.serving.export import load_draft
from fastdraft.serving.parity import Parity, diagnose
from fastdraft.target.hf import load_target, load_tokenizer
from fastdraft.train import train

DEMO = Path(__file__).parents[2] / "examples" / "demo"
SMOL_TOKENS = 32


@pytest.fixture(scope="module")
def vllm():
    return engine_place("vllm", os.environ)


@pytest.fixture(scope="module")
def served(vllm, tmp_path_factory):
    """Every case, and what one vLLM process made of it."""
    cases = [make_case(name, tmp_path_factory.mktemp("case")) for name in CASES]
    runs = [run for case in cases for run in with_and_without(case.run())]
    found = run_engine(vllm, runs, 900)
    return dict(zip(CASES, zip(cases, found[::2], found[1::2], strict=True), strict=True))


def with_and_without(run: Run) -> list[Run]:
    return [run, replace(run, checkpoint=None)]


def record_proposals(monkeypatch) -> list[list[int]]:
    """The tokens of each round's chain, as they are proposed from here on."""
    made, propose = [], DraftState.propose

    def recorded(state, *args):
        proposals = propose(state, *args)
        made.append(proposals.tokens[0, : proposals.counts[0]].tolist())
        return proposals

    monkeypatch.setattr(DraftState, "propose", recorded)
    return made


def assert_same(target, draft, prompts, served, alone, new_tokens, monkeypatch):
    """Drafted tokens, output and accepted length, the engine's beside ours."""
    made = record_proposals(monkeypatch)
    for prompt, output, plain in zip(prompts, served.outputs, alone.outputs, strict=True):
        made.clear()
        ours = generate(target, draft, prompt, new_tokens, CHAIN)
        assert output.tokens == plain.tokens == ours.tokens == generate(target, None, prompt, new_tokens).tokens
        assert [r.drafted for r in output.rounds] == made
        assert len(output.rounds) == ours.num_rounds
    monkeypatch.undo()
    report = evaluate_decode(target, draft, prompts, CHAIN, new_tokens)
    assert served.num_rounds == report.num_rounds
    assert served.accepted_length == pytest.approx(1 + sum(report.step_acceptance), rel=1e-6)  # vLLM counts past a stop
    counted = sum(len(o.tokens) - 1 for o in served.outputs) / sum(len(o.rounds) for o in served.outputs)
    assert counted == pytest.approx(report.accepted_length, rel=1e-6)
    return report


@pytest.mark.parametrize("name", CASES)
def test_tiny_targets(served, name, monkeypatch):
    case, found, alone = served[name]
    assert found.dtype == "float32"
    draft = load_draft(case.checkpoint, case.target.config)
    if not draft.embed_tokens.weight.isfinite().all():
        draft.set_embedding(case.target.embedding)
    report = assert_same(case.target, draft, case.prompts, found, alone, NEW_TOKENS, monkeypatch)
    assert 1.2 < report.accepted_length < 3.9  # some are accepted and some are not
    told = diagnose(Parity(case.target, draft, case.prompts, found.outputs, CHAIN.num_steps))
    assert told.agrees and not told.served_as
    assert told.reference.num_equal == told.reference.num_proposed
    assert told.reference.accepted_length == pytest.approx(report.accepted_length)


def demo():
    spec = importlib.util.spec_from_file_location("demo", DEMO / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_smollm2(vllm, tmp_path, monkeypatch):
    """A real target and tokenizer, a draft trained for a minute by `fastdraft train`."""
    target_dir = str(demo().smollm2())
    tokenizer = load_tokenizer(target_dir)
    answers = tmp_path / "answers.jsonl"
    overrides = [f"target.path={target_dir}", f"data.paths=[{answers}]", f"run_dir={tmp_path / 'run'}", "max_steps=40"]
    overrides += [f"features.path={tmp_path / 'features'}", "draft.overrides.draft_vocab_size=4096"]
    config = load_config(DEMO / "demo.yaml", overrides)
    target = load_target(target_dir, torch.bfloat16, "cpu")
    asked = prompt_ids(read_prompts(DEMO / "train_prompts.jsonl")[:64], tokenizer)
    with answers.open("w") as file:
        for rows in demo().answer_rows(target, tokenizer, asked, 48):
            file.writelines(json.dumps(row) + "\n" for row in rows)
    train(config)
    export_run(Path(config.run_dir), tmp_path / "export", "last", overwrite=False)

    prompts = prompt_ids(read_prompts(DEMO / "heldout_prompts.jsonl")[:4], tokenizer)
    target = load_target(target_dir, torch.float32, "cpu")  # so that near-ties fall alike
    draft = load_draft(tmp_path / "export", target.config).float()
    draft.set_embedding(target.embedding)
    run = Run(
        target_dir, str(tmp_path / "export"), prompts, SMOL_TOKENS, sorted(target.eos_ids), "float32", algorithm="eagle3"
    )
    found, alone = run_engine(vllm, with_and_without(run), 900)
    report = assert_same(target, draft, prompts, found, alone, SMOL_TOKENS, monkeypatch)
    assert report.accepted_length > 1.05
