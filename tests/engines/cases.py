"""Tiny random targets of several shapes, each with a draft trained a little on what its target says."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_decode import prompts, train_on_own_output
from tiny import random_draft, tiny_llama

from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.proposal import DecodeSettings
from fastdraft.serving.engines import EnginePlace, Run, engine_version
from fastdraft.serving.export import export_draft, verify
from fastdraft.target.hf import Target
from fastdraft.target.identity import origin

NEW_TOKENS = 30
CHAIN = DecodeSettings(num_steps=3)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # so that the prompts are long enough to tell
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}

# name: what is unusual about the target, and about the draft
CASES: dict[str, tuple[dict, dict]] = {
    "gqa": ({"num_attention_heads": 4, "num_key_value_heads": 1}, {}),
    "layers": ({}, {"layers": (0, 2, 5)}),
    "whole vocabulary": ({}, {"draft_vocab_size": 192}),
    "narrow draft": ({}, {"hidden_size": 32}),
    "wide draft": ({}, {"hidden_size": 96}),
    "llama3": ({"rope_parameters": LLAMA3}, {}),
    "yarn": ({"rope_parameters": YARN}, {}),
    "fc_norm": ({}, {"fc_norm": True}),
    "norm_output": ({}, {"norm_output": True, "fc_norm": True}),
    "norm_before_fc": ({}, {"norm_before_fc": True, "norm_output": True, "layers": (0, 2, 5)}),
}


@dataclass(frozen=True)
class Case:
    name: str
    target: Target
    draft: Draft
    prompts: list[list[int]]
    target_dir: Path
    checkpoint: Path

    def run(self) -> Run:
        return Run(str(self.target_dir), str(self.checkpoint), self.prompts, NEW_TOKENS, [2], "float32", algorithm="eagle3")


def make_case(name: str, folder: Path, steps: int = 40) -> Case:
    target_changes, draft_changes = CASES[name]
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    model = tiny_llama(0, **shape | {"initializer_range": 0.15} | target_changes)
    model.save_pretrained(folder / "target")
    c = DraftConfig.from_target(model.config.to_dict(), **{"draft_vocab_size": 120} | draft_changes)
    target = Target(model, c.layers)
    draft = random_draft(c, target.embedding, 0.15)
    train_on_own_output(target, draft, NEW_TOKENS, steps)
    checkpoint = export_draft(draft, folder / "draft", torch.float32, trained_for=origin(str(folder / "target")))
    findings = verify(checkpoint, folder / "target")
    assert not findings.errors
    return Case(name, target, draft, prompts(), folder / "target", checkpoint)


def rewrite_config(checkpoint: Path, **changes) -> None:
    """Changes fields of an exported config.json; None takes one out."""
    file = checkpoint / "config.json"
    config = {key: value for key, value in (json.loads(file.read_text()) | changes).items() if value is not None}
    file.write_text(json.dumps(config))


def engine_place(name: str, environ: dict[str, str]) -> EnginePlace:
    """The engine that `make test-engines` installed."""
    variable = f"FASTDRAFT_{name.upper()}_PYTHON"
    if variable not in environ:
        pytest.fail(f"{variable} names no interpreter; run these tests with `make test-engines`")
    return EnginePlace(name, environ[variable], environ.get(f"FASTDRAFT_{name.upper()}_PYTHONPATH"))


def load_in_sglang(folder: Path, work: list[dict]) -> list[dict[str, torch.Tensor] | str]:
    """What one process of SGLang's loader (`sglang_loader.py`) made of each checkpoint, or its sentence of refusal."""
    place = engine_place("sglang", os.environ)
    assert engine_version(place) == "0.5.23"
    outs = [folder / f"{i}.safetensors" for i in range(len(work))]
    (folder / "job.json").write_text(json.dumps([w | {"out": str(out)} for w, out in zip(work, outs, strict=True)]))
    script = Path(__file__).with_name("sglang_loader.py")
    done = subprocess.run(
        [place.python, str(script), str(folder / "job.json")],
        env=place.environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused = [Path(f"{out}.refused") for out in outs]
    return [r.read_text() if r.exists() else load_file(out) for r, out in zip(refused, outs, strict=True)]
