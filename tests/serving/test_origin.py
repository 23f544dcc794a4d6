"""For which target a draft was trained: an export says it, and a command that is given another one of its sizes says so."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_blocks import OVERRIDES, block_run
from tiny import refusal, save_target

from fastdraft.serving import check
from fastdraft.serving.engines import EnginePlace
from fastdraft.serving.export import export_draft, load_draft
from fastdraft.target.identity import origin


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another target of the same sizes."""
    return save_target(tmp_path_factory.mktemp("other") / "another", seed=7)


@pytest.fixture(params=["eagle3", *OVERRIDES])
def run_yaml(request, tree, tmp_path):
    tree["max_steps"] = 1
    return block_run(tree, tmp_path, request.param)


def test_each_command_says_whose_draft_it_is(run_yaml, runs, fastdraft, target_dir, other, tmp_path):
    runs("train", run_yaml)
    out = tmp_path / "out"
    assert "verified for SGLang and vLLM" in runs("export", tmp_path / "run", out)
    said = runs("check", "--checkpoint", out, "--target", target_dir)
    assert "verified for SGLang and vLLM" in said and f"trained for this very target ({target_dir.name})" in said

    code, said, _ = fastdraft("check", "--checkpoint", out, "--target", other)
    assert code == 1 and "verified" not in said and "out: 1 error" in said
    assert f"error: The draft was trained for {target_dir.name}, and {other} is another model of the same sizes" in said
    tuned = shutil.copytree(target_dir, tmp_path / "tuned")
    weights = load_file(tuned / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] += 1
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    said = runs("check", "--checkpoint", out, "--target", tuned)
    assert "verified" in said and f"{tuned} has its embedding and head with other layers: quantised, or tuned?" in said

    # A folder that is no draft is named, and nothing else is said of it.
    run = tmp_path / "run"
    said = f"{run} is a run folder: write its draft with `fastdraft export {run} OUT`, and name OUT"
    code, lines, _ = fastdraft("check", "--checkpoint", run, "--target", target_dir)
    assert code == 1 and lines.splitlines()[0] == f"error: {said}." and "trained for" not in lines
    warm = ("draft.overrides={}", f"draft.init_from={run}")
    assert refusal(fastdraft("train", run_yaml, *warm)) == f"fastdraft: {said}"

    # A run goes on from it for a tuned target, and for another one with a warning.
    warm = ("draft.overrides={}", f"draft.init_from={out}", "--fresh")
    assert "draft.init_from: The draft was trained for this very target" in runs("train", run_yaml, *warm)
    assert "draft.init_from: The draft was trained for" in runs("train", run_yaml, *warm, f"target.path={tuned}")
    said = runs("train", run_yaml, *warm, f"target.path={other}")
    assert f"draft.init_from: warning: The draft was trained for {target_dir.name}, and {other} is another" in said
    # What the checkpoint of a run was trained for is compared, too.
    shutil.copytree(target_dir, tmp_path / "there")
    runs("train", run_yaml, "--fresh", f"target.path={tmp_path / 'there'}")
    shutil.rmtree(tmp_path / "there")
    shutil.copytree(other, tmp_path / "there")
    for command in (("evaluate", tmp_path / "run"), ("export", tmp_path / "run", tmp_path / "second")):
        assert "was trained for another target than" in refusal(fastdraft(*command))

    config = json.loads((out / "config.json").read_text())
    assert set(config.pop("trained_for")) == {"name", "weights", "ends"}
    (out / "config.json").write_text(json.dumps(config))
    for target in (target_dir, other):
        said = runs("check", "--checkpoint", out, "--target", target)
        assert "or another one of its sizes cannot be told: config.json has no trained_for" in said


@pytest.mark.parametrize("mark", [3, {"name": "x"}, {"name": "x", "weights": "y", "ends": None, "more": 1}])
def test_a_mark_that_is_none_of_ours_tells_nothing(run_yaml, runs, target_dir, tmp_path, mark):
    runs("train", run_yaml)
    runs("export", tmp_path / "run", tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_for": mark}))
    assert "cannot be told" in runs("check", "--checkpoint", tmp_path / "out", "--target", target_dir)


def test_the_mark_changes_no_weight(run_yaml, runs, target_dir, tmp_path):
    runs("train", run_yaml)
    runs("export", tmp_path / "run", tmp_path / "out")
    config = json.loads((target_dir / "config.json").read_text())
    draft = load_draft(tmp_path / "out", config)
    if hasattr(draft, "embed_tokens"):
        draft.take_from_target(torch.zeros(192, 32))
    plain = export_draft(draft, tmp_path / "plain", torch.float32)
    assert (plain / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", plain))
    assert ours == theirs | {"trained_for": ours["trained_for"]}


def test_no_engine_serves_a_draft_for_another_target(run_yaml, runs, target_dir, other, tmp_path, monkeypatch):
    runs("train", run_yaml)
    runs("export", tmp_path / "run", tmp_path / "out")
    monkeypatch.setattr(check, "refuse_old_engine", lambda place: "0.32.0")
    monkeypatch.setattr(check, "run_engine", lambda *_: pytest.fail("an engine was started"))
    with pytest.raises(ValueError, match=r"was trained for .* is another model of the same sizes.* It is not served"):
        check.check_engine(EnginePlace("vllm", "python"), tmp_path / "out", other)


def test_a_target_that_is_no_safetensors_is_said(run_yaml, runs, target_dir, tmp_path):
    folder = shutil.copytree(target_dir, tmp_path / "t")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    runs("train", run_yaml, f"target.path={folder}")
    said = runs("export", tmp_path / "run", tmp_path / "out")
    assert "does not say which target it was trained for" in said and "verified" in said
    assert "cannot be told" in runs("check", "--checkpoint", tmp_path / "out", "--target", folder)
    with pytest.raises(ValueError, match="safetensors"):
        origin(str(folder))
