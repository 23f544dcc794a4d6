"""Real vLLM drafts with an exported DFlash checkpoint what fastdraft drafts from it, in full and in sliding layers."""

from __future__ import annotations

import os

import pytest
import torch
from block_cases import NEW_TOKENS, make_block_case
from cases import engine_place
from drafting import One

from fastdraft.decode import generate
from fastdraft.model.dflash.propose import BlockDrafter
from fastdraft.model.proposal import DecodeSettings
from fastdraft.serving.engines import run_engine
from fastdraft.serving.export import load_draft

CASES = {
    "full": {"layers": (1, 4, 6)},
    "sliding": {"layer_types": ("sliding_attention",) * 2, "sliding_window": 8},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    cases = [make_block_case(changes, tmp_path_factory.mktemp("case")) for changes in CASES.values()]
    found = run_engine(engine_place("vllm", os.environ), [case.run for case in cases], 900)
    return dict(zip(CASES, zip(cases, found, strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_vllm_drafts_what_we_draft(name, served):
    case, found = served[name]
    draft = load_draft(case.checkpoint, case.target.config)
    draft.take_from_target(case.target.embedding)
    steps = case.run.num_steps
    equal = total = right = 0
    for prompt, output in zip(case.run.prompts, found.outputs, strict=True):
        assert output.tokens == generate(case.target, None, prompt, NEW_TOKENS).tokens
        ids = torch.tensor(prompt + output.tokens)
        g = case.target.forward(ids[None])[0][0]
        for r in output.rounds:
            root = len(prompt) + r.after - 1
            drafter = One(BlockDrafter(draft, case.target.head, 1, len(ids)))
            with torch.no_grad():
                ours = drafter.propose(ids[1 : root + 1], g[:root], steps, DecodeSettings(num_steps=steps), None)
            equal += sum(a == b for a, b in zip(ours.tokens.tolist(), r.drafted, strict=True))
            right += sum(a == b for a, b in zip(output.tokens[r.after :], r.drafted, strict=False))
            total += steps
    assert equal == total and 0.1 * total < right < 0.9 * total
