"""`fastdraft check --engine vllm` on real vLLM: each seeded fault is named, a sound draft passes."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_decode
import torch
from cases import LLAMA3, engine_place, make_case, rewrite_config
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer, random_draft, save_target, tiny_llama

from bench import engines as bench
from fastdraft import cli
from fastdraft.data.prompts import prompt_ids, read_prompts
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.serving.check import compare
from fastdraft.serving.engines import run_engine
from fastdraft.serving.export import export_draft, load_draft
from fastdraft.target.hf import Target, load_target

# A vLLM that leaves all steps of a checkpoint named "position" at the position of the first.
SITECUSTOMIZE = """
import importlib.abc, importlib.util, sys

class Patch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "vllm.model_executor.models.llama_eagle3":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            patch(module.Eagle3LlamaForCausalLM)
        spec.loader.exec_module = exec_module
        return spec

def patch(cls):
    init, combine, forward = cls.__init__, cls.combine_hidden_states, cls.forward
    def patched_init(self, *, vllm_config, prefix=""):
        init(self, vllm_config=vllm_config, prefix=prefix)
        self.stuck = vllm_config.speculative_config.model.endswith("/position")
        self.step = -1
    def patched_combine(self, hidden_states):
        self.step = -1
        return combine(self, hidden_states)
    def patched_forward(self, input_ids, positions, *args, **kwargs):
        self.step += 1
        return forward(self, input_ids, positions - self.step if self.stuck else positions, *args, **kwargs)
    cls.__init__, cls.combine_hidden_states, cls.forward = patched_init, patched_combine, patched_forward

sys.meta_path.insert(0, Patch())
"""

FAULTS = {
    "layer ids": "outputs of layers [0, 2, 3] (off by one, - 1)",
    "norm": "the state after the final norm goes to the next step (norm_output)",
    "vocabulary map": "d2t ignored, draft ids taken for target ids",
    "config field": "RoPE without its scaling (rope_parameters)",
    "position": "every step at the position of the first",
}


def seed(fault: str, checkpoint: Path) -> None:
    """Changes a checkpoint so that vLLM does with it what a wrong engine would do with the right one."""
    if fault == "layer ids":
        ids = "eagle_aux_hidden_state_layer_ids"
        rewrite_config(checkpoint, **{"eagle_config": {ids: [0, 2, 3]}, ids: [1, 3, 4]})
    elif fault == "norm":
        rewrite_config(checkpoint, norm_output=True)
    elif fault == "vocabulary map":
        tensors = load_file(checkpoint / "model.safetensors")
        tensors["d2t"].zero_()
        save_file(tensors, checkpoint / "model.safetensors")
    elif fault == "config field":
        plain = {"rope_type": "default", "rope_theta": LLAMA3["rope_theta"]}
        rewrite_config(checkpoint, rope_parameters=plain, rope_scaling=None)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case("llama3", tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def served(case, tmp_path_factory):
    """vLLM with every fault, and in bf16, in one process."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    runs = []
    for fault in FAULTS:
        checkpoint = folder / fault.replace(" ", "-")
        shutil.copytree(case.checkpoint, checkpoint)
        seed(fault, checkpoint)
        runs.append(replace(case.run(), checkpoint=str(checkpoint)))
    runs.append(replace(case.run(), dtype="bfloat16"))
    runs += [replace(run, checkpoint=None) for run in (case.run(), runs[-1])]
    place = replace(engine_place("vllm", os.environ), pythonpath=str(folder))
    return dict(zip([*FAULTS, "dtype", "float32", "bfloat16"], run_engine(place, runs, 900), strict=True))


def reported(case, target, served, alone):
    return compare(target, load_draft(case.checkpoint, target.config), case.prompts, served, alone, 3)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_is_named(case, served, fault):
    report = reported(case, case.target, served[fault], served["float32"])
    assert report.errors and report.errors[0].startswith(f"{fault}: vllm drafts as with {FAULTS[fault]}")
    said = report.errors[0].rpartition("(")[2].split()
    assert said[0] == said[2]  # "N of N drafted tokens are those, M the checkpoint's"


def test_another_dtype_is_named(case, served):
    target = load_target(str(case.target_dir), torch.bfloat16, "cpu", case.target.layers)
    report = reported(case, target, served["dtype"], served["bfloat16"])
    assert "dtype: vllm ran in bfloat16, the checkpoint's weights are float32" in report.warnings[0]
    assert not report.errors  # what bf16 rounds differently are near-ties


def check(monkeypatch, capsys, *args) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fastdraft", "check", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code, *capsys.readouterr()


def test_the_command(tmp_path, monkeypatch, capsys):
    """From directories and text prompts to a verdict; out of time; and the same draft in bench.engines."""
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    shape["initializer_range"] = 0.15
    target_dir = save_target(tmp_path / "target", **shape)
    target = Target(tiny_llama(**shape))
    draft = random_draft(DraftConfig.from_target(target.config.to_dict(), draft_vocab_size=120), target.embedding, 0.15)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ba be bi"}\n{"prompt": "do du dan ka"}\n')
    asked = prompt_ids(read_prompts(tmp_path / "prompts.jsonl"), make_tokenizer())
    monkeypatch.setattr(test_decode, "prompts", lambda: asked)
    test_decode.train_on_own_output(target, draft, 24, 30)
    export_draft(draft, tmp_path / "draft", torch.float32)
    place = engine_place("vllm", os.environ)
    options = ["--target", target_dir, "--engine", "vllm", "--engine-python", place.python, "--max-new-tokens", 24]
    code, out, err = check(
        monkeypatch, capsys, "--checkpoint", tmp_path / "draft", *options, "--prompts", tmp_path / "prompts.jsonl"
    )
    assert code == 0, out + err
    assert "greedy output with and without the draft: equal for 2 of 2 prompts" in out
    assert "what the engine drafts is what fastdraft drafts" in out

    code, _, err = check(monkeypatch, capsys, "--checkpoint", tmp_path / "draft", *options, "--timeout", 1)
    assert code == 1 and "did not finish within 1 s" in err

    args = ["--target", target_dir, "--draft", tmp_path / "draft", "--prompts", tmp_path / "prompts.jsonl"]
    args += ["--engine", "vllm", "--engine-python", place.python, "--settings", "chain", "--dtype", "fp32"]
    args += ["--max-new-tokens", 24, "--commit", "abc", "--results", tmp_path]
    monkeypatch.setattr(sys, "argv", ["engines.py", *map(str, args)])
    bench.main()
    (row,) = [json.loads(line) for line in (tmp_path / "engines.jsonl").read_text().splitlines()]
    assert row["relative_difference"] == 0 and row["num_equal_to_plain"] == 2
    assert row["spec_accept_length"] > row["accepted_length"] > 1
