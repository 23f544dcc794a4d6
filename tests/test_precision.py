"""What `auto` means for a dtype: measured on this CPU, recorded in runs and stores, kept on another machine."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tiny import save_target
from transformers import AutoModelForCausalLM

from fastdraft.answers.local import name_dtype
from fastdraft.checkpoint import _state_checksum, list_checkpoints, read_state
from fastdraft.features.meta import read_meta
from fastdraft.model import precision
from fastdraft.model.proposal import DecodeSettings
from fastdraft.run.dtypes import compute_dtype, name_dtypes, target_dtype
from fastdraft.run.features import capture_features
from fastdraft.run.finished import evaluate_run, export_run, open_run
from fastdraft.run.inputs import open_source
from fastdraft.run.plan import predict, print_plan
from fastdraft.target.hf import load_target
from fastdraft.target.identity import target_fingerprint
from fastdraft.train import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
AUTO = {"target.dtype": "auto", "precision": "auto"}
AVX2_ONLY = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def rewrite_dtypes(run_dir: Path, target: str, draft: str) -> None:
    """Makes the newest checkpoint say that it was computed in other dtypes."""
    file = list_checkpoints(run_dir)[-1] / "state.json"
    state = json.loads(file.read_text())
    state["config"]["target"]["dtype"], state["config"]["precision"] = target, draft
    file.write_text(json.dumps(state | {"checksum": _state_checksum(state)}))


def measured(environment: dict[str, str]) -> float:
    code = "from fastdraft.model.precision import bf16_slowdown; import torch; n = torch.get_num_threads()\n"
    code += "factor = bf16_slowdown(); assert torch.get_num_threads() == n; print(factor)"
    inherited = {name: value for name, value in os.environ.items() if name not in AVX2_ONLY}
    run = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return float(run.stdout)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="plays an x86 CPU of AVX2")
def test_a_cpu_without_bf16_instructions_is_found_out():
    """The variables are oneDNN's and PyTorch's own: they take the instructions away, as on an older CPU."""
    assert measured(AVX2_ONLY) > 2 * precision.SLOW


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="needs a CPU that has bf16 instructions")
def test_a_cpu_with_bf16_instructions_is_found_out():
    assert measured({}) < 1


def test_what_auto_means(make_config, cpu):
    for factor, expected in ((0.5, "bf16"), (1.1, "bf16"), (1.3, "fp32"), (20.0, "fp32")):
        cpu(factor)
        config, told = name_dtypes(make_config(**AUTO), CPU)
        assert (config.target.dtype, config.precision) == (expected, expected)
        assert len(told) == 1 and f"target.dtype and precision: auto is {expected} on this machine" in told[0]
        assert compute_dtype(config, CPU) == target_dtype(config, CPU) == precision.DTYPES[expected]
        config, told = name_dtypes(make_config(**AUTO), CUDA)
        assert (config.target.dtype, config.precision, told) == ("bf16", "bf16", [])


def test_bf16_that_was_asked_for_on_a_slow_cpu_gets_one_warning(make_config, cpu, capsys):
    cpu(20.0)
    changes = {"target.dtype": "bf16", "precision": "bf16", "max_steps": 1}
    train(make_config(**changes))
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(said) == 1 and said[0].startswith("warning: target.dtype and precision bf16, but")
    assert "20.0 times as long" in said[0] and "auto is fp32 here" in said[0]
    cpu(0.5)
    train(make_config(**changes), fresh=True)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(("first", "then"), [(0.5, 20.0), (20.0, 0.5)])
def test_a_run_goes_on_in_the_dtypes_it_was_begun_in(make_config, cpu, capsys, first, then):
    """Its target's weights are fp32: in another dtype they would be another target's."""
    expected = "bf16" if first < 1 else "fp32"
    cpu(first)
    train(make_config(**AUTO, max_steps=6, **{"eval.every": 100}))
    run_dir = Path(make_config().run_dir)
    whole = read_state(list_checkpoints(run_dir)[-1]).state
    assert (whole["config"]["target"]["dtype"], whole["config"]["precision"]) == (expected, expected)
    assert f"precision: {expected}" in (run_dir / "config.yaml").read_text()
    last = list_checkpoints(run_dir)[-1]
    tensors = load_file(last / "model-00001-of-00001.safetensors")
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    capsys.readouterr()
    cpu(then)
    train(make_config(**AUTO, max_steps=6, **{"eval.every": 100}))
    said = capsys.readouterr().out
    assert "going on from" in said and f"precision: auto is {expected}, because this run was begun so" in said
    assert ("warning: target.dtype and precision bf16" in said) == (expected == "bf16")
    found = load_file(list_checkpoints(run_dir)[-1] / "model-00001-of-00001.safetensors")
    assert torch.equal(found["master"], tensors["master"])
    other = "fp32" if expected == "bf16" else "bf16"
    with pytest.raises(ValueError, match=rf"precision: {expected} -> {other}"):
        train(make_config(**AUTO | {"precision": other}, max_steps=6, **{"eval.every": 100}))


def test_a_checkpoint_that_says_auto_is_of_what_auto_was(make_config, cpu, monkeypatch, capsys):
    """Versions before dtypes were recorded ran the target in bf16, and on a CPU the draft in fp32."""
    cpu(20.0)
    config = make_config(**{"target.dtype": "bf16", "precision": "fp32"}, max_steps=6)

    def stop(self, failed) -> bool:
        self.number = signal.SIGTERM
        return True

    with monkeypatch.context() as patch:
        patch.setattr("fastdraft.train.StopSignal.agreed", stop)
        assert train(config).steps == 1
    rewrite_dtypes(Path(config.run_dir), "auto", "auto")
    assert train(make_config(**AUTO, max_steps=6)).steps == 6
    assert "target.dtype: auto is bf16, because this run was begun so" in capsys.readouterr().out
    saved = read_state(list_checkpoints(Path(config.run_dir))[-1]).state["config"]
    assert (saved["target"]["dtype"], saved["precision"]) == ("bf16", "fp32")


def test_a_bf16_run_is_evaluated_and_exported_on_a_slow_cpu_in_fp32(make_config, cpu, tmp_path):
    """The weights are those that bf16 has, so the target is still the run's, and numbers differ by rounding alone."""
    cpu(0.5)
    config = make_config(**AUTO, max_steps=6)
    train(config)
    run_dir, prompts = Path(config.run_dir), tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "ba be"}\n')
    args = run_dir, "best", prompts, 1, 8, DecodeSettings(num_steps=2)
    fast = evaluate_run(*args)
    _, target, _ = open_run(run_dir)
    assert target.dtype == torch.bfloat16
    cpu(20.0)
    told: list[str] = []
    slow = evaluate_run(*args, told.append)
    assert len(told) == 1 and "computed with in fp32" in told[0] and "20.0 times as long" in told[0]
    assert slow.held_out.overall.tau_sim == pytest.approx(fast.held_out.overall.tau_sim, rel=2e-2)
    assert slow.held_out.overall.tau_sim != fast.held_out.overall.tau_sim
    _, widened, draft = open_run(run_dir)
    assert widened.dtype == draft.fc.weight.dtype == torch.float32
    assert torch.equal(widened.embedding, target.embedding.float())
    assert "verified" in export_run(run_dir, tmp_path / "out", "best", overwrite=False)[-1]


def test_weights_rounded_to_bf16_and_computed_with_in_fp32_are_the_same_target(tmp_path):
    path = str(save_target(tmp_path / "target"))
    rounded = load_target(path, torch.bfloat16, "cpu", run_in=torch.float32)
    assert rounded.dtype == torch.float32 == next(rounded.model.parameters()).dtype
    assert target_fingerprint(rounded) == target_fingerprint(load_target(path, torch.bfloat16, "cpu"))
    assert target_fingerprint(rounded) != target_fingerprint(load_target(path, torch.float32, "cpu"))
    own = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).float()
    ids = torch.arange(5)[None]
    torch.testing.assert_close(rounded.head.logits(rounded.forward(ids)[1]), own(input_ids=ids).logits)


@pytest.mark.parametrize("mode", ["read", "cache"])
def test_a_store_keeps_the_dtype_it_was_begun_in(make_config, cpu, tmp_path, capsys, mode):
    store = tmp_path / "store"
    features = {"features.path": str(store)} | (
        {"features.mode": "cache", "features.max_gib": 1} if mode == "cache" else {}
    )
    cpu(0.5)
    if mode == "read":
        capture_features(make_config(**AUTO), store)
    else:
        train(make_config(**AUTO, **features, max_steps=2))
    assert read_meta(store).target_dtype == "bf16"
    cpu(20.0)
    config = make_config(**AUTO, **features, run_dir=str(tmp_path / "slow"))
    named, told = name_dtypes(config, CPU, store=store, runs_target=mode == "cache")
    assert (named.target.dtype, named.precision) == ("bf16", "fp32")
    assert any("target.dtype: auto is bf16, because the feature store" in line for line in told)
    assert any("warning: target.dtype bf16" in line for line in told) == (mode == "cache")
    assert train(config).steps == 6
    if mode == "read":  # nothing is computed in bf16, not the teacher either
        capsys.readouterr()
        source = open_source(named, (1, 3, 4), CPU, [])
        assert source.ends.dtype == source.ends.head.weight.dtype == source.dtype == torch.float32
        told = []
        capture_features(make_config(**AUTO), store, say=told.append)  # goes on in what it was begun in
        assert "because the feature store" in told[0]


def test_regeneration_goes_on_in_the_dtype_it_was_begun_in(cpu, fastdraft, target_dir, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "ba be"}\n{"prompt": "be ba"}\n')
    command = "data", "regenerate", prompts, "--out", out, "--target", target_dir, "--device", "cpu"
    command += "--max-new-tokens", 4, "--temperature", 0
    recorded = lambda: json.loads(Path(f"{out}.meta.json").read_text())["settings"]["dtype"]  # noqa: E731
    cpu(0.5)
    code, said, err = fastdraft(*command)
    assert code == 0 and "--dtype: auto is bf16 on this machine" in said and recorded() == "bfloat16", err
    cpu(20.0)
    code, said, err = fastdraft(*command)
    assert code == 0 and "warning: --dtype bf16" in said and "--fresh" in said, err
    code, said, err = fastdraft(*command, "--fresh")
    assert code == 0 and "auto is fp32 on this machine" in said and "in float32" in said, err
    assert recorded() == "float32"


def test_what_the_option_of_regenerate_means(cpu):
    cpu(20.0)
    assert name_dtype("fp32", CPU, {}) == ("fp32", [])
    dtype, told = name_dtype("bf16", CPU, {})
    assert dtype == "bf16" and told[0].startswith("warning: --dtype bf16") and "20.0 times" in told[0]
    assert name_dtype("auto", CUDA, {}) == ("bf16", [])
    assert name_dtype("auto", CUDA, {"dtype": "float32"}) == ("fp32", [])
    with pytest.raises(ValueError, match="--dtype fp16 is not one of auto, bf16, fp32"):
        name_dtype("fp16", CPU, {})


def test_the_plan_shows_and_counts_what_auto_is(make_config, cpu):
    sizes = []
    for factor, expected in ((0.5, "bf16"), (20.0, "fp32")):
        cpu(factor)
        printed = io.StringIO()
        print_plan(make_config(**AUTO), Console(file=printed, width=500))
        assert f"\nprecision: {expected}\n" in printed.getvalue()
        assert f"# target.dtype and precision: auto is {expected}" in printed.getvalue()
        sizes.append(predict(make_config(**AUTO), CPU))
        assert sizes[-1].memory == predict(make_config(**dict.fromkeys(AUTO, expected)), CPU).memory
    assert sizes[0].memory != sizes[1].memory


def test_a_plan_is_of_the_run_that_goes_on_or_with_fresh_of_a_new_one(make_config, cpu, runs, tmp_path):
    """A plan of a new one deletes no checkpoint of the one that is there."""
    cpu(20.0)
    config = make_config(**AUTO, max_steps=1)
    train(config)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    cpu(0.5)
    plan = "train", tmp_path / "run.yaml", "--plan"
    out = runs(*plan)
    assert "\nprecision: fp32\n" in out and "precision: auto is fp32, because this run was begun so" in out
    out = runs(*plan, "--fresh")
    assert "\nprecision: bf16\n" in out and "begun so" not in out
    assert len(list_checkpoints(Path(config.run_dir))) == 1


def test_fp8s_bf16_weights_are_widened_too(make_config, cpu):
    """A run that was trained in fp8 on a GPU is evaluated on a slow CPU by the plain products."""
    cpu(20.0)
    config = make_config(max_steps=2)
    train(config)
    run_dir = Path(config.run_dir)
    args = run_dir, "last", None, 1, 8, DecodeSettings(num_steps=2)
    exact, told = evaluate_run(*args).held_out.overall.tau_sim, []
    rewrite_dtypes(run_dir, "fp32", "fp8")
    assert evaluate_run(*args, told.append).held_out.overall.tau_sim == pytest.approx(exact, rel=2e-2)
    assert len(told) == 1 and "computed with in fp32" in told[0]
