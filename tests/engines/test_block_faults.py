"""`fastdraft check` beside real vLLM: each fault seeded in a DFlash draft is named, a sound draft passes.

Three faults are in the file that vLLM is given, and the sound file is what it is compared with. The labels are those that a
draft was trained with, while its file says nothing of them: vLLM 0.32 reads no DFlash draft's `sample_from_anchor`. The
norm is vLLM's own fault: its build for CPUs norms the context's keys of every layer with the first layer's weight.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from block_cases import far_apart, make_block_case
from cases import engine_place

from fastdraft.serving.check import compare
from fastdraft.serving.engines import run_engine
from fastdraft.serving.export import load_draft

# How config.json's dflash_config is changed, and what the report then says.
FAULTS = {
    "layer ids": ({"target_layer_ids": [0, 3, 5]}, "outputs of layers [0, 3, 5] (off by one, - 1)"),
    "block": ({"causal": True}, "a causal block"),
    "mask token": ({"mask_token_id": 2}, "the target's pad token, 2, as mask"),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_block_case({"layers": (1, 4, 6)}, tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A draft whose layers' norms differ much, as they do after long training."""
    return make_block_case({"layers": (1, 4, 6)}, tmp_path_factory.mktemp("apart"), start=far_apart)


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """A draft that was trained with shifted labels, in a file that engines read without."""

    def deny(draft) -> None:
        draft.config = draft.config.model_copy(update={"labels": "fill_in"})

    changes = {"layers": (1, 4, 6), "labels": "shifted"}
    made = make_block_case(changes, tmp_path_factory.mktemp("shifted"), steps=29, end=deny)
    return replace(made, run=replace(made.run, num_steps=5))


def seeded(case, changes: dict, folder: Path) -> str:
    shutil.copytree(case.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["dflash_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def served(case, apart, shifted, tmp_path_factory):
    """vLLM with every fault, in one process; "plain" is the target alone, which all drafts have."""
    folder = tmp_path_factory.mktemp("faults")
    wrong = [seeded(case, changes, folder / fault.replace(" ", "-")) for fault, (changes, _) in FAULTS.items()]
    runs = [replace(case.run, checkpoint=None), case.run, apart.run, shifted.run]
    runs += [replace(case.run, checkpoint=checkpoint) for checkpoint in wrong]
    found = run_engine(engine_place("vllm", os.environ), runs, 1800)
    return dict(zip(["plain", "sound", "norm", "labels", *FAULTS], found, strict=True))


def reported(case, served, what: str):
    draft = load_draft(case.checkpoint, case.target.config)
    return compare(case.target, draft, case.run.prompts, served[what], served["plain"], case.run.num_steps)


def test_a_sound_draft_passes(case, served):
    report = reported(case, served, "sound")
    assert not report.errors and any(line.startswith("drafted tokens: ") for line in report.facts), report.lines()


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_is_named(case, served, fault):
    report = reported(case, served, fault)
    assert report.errors and report.errors[0].startswith(f"{fault}: vllm drafts as with {FAULTS[fault][1]}"), report.lines()


def test_the_norm_is_named(apart, served):
    report = reported(apart, served, "norm")
    says = "norm: vllm drafts as with the context's keys of every layer normed by the first layer's k_norm"
    assert report.errors and report.errors[0].startswith(says), report.lines()


def test_labels_that_a_draft_was_trained_with_are_named(shifted, served):
    report = reported(shifted, served, "labels")
    named = [line for line in report.errors if line.startswith("labels: with labels shifted by one")]
    assert named and "the draft was trained so" in named[0], report.lines()
