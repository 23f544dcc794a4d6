"""Every command as a user calls it: what it prints, what it leaves behind, its exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import torch
import yaml
from matplotlib.image import imread
from safetensors.torch import load_file, save_file
from small_runs import at_step
from tiny import make_tokenizer, refusal, save_target, write_chats

from fastdraft import cli, threads_beside_others
from fastdraft import train as training
from fastdraft.data.loader import Loader
from fastdraft.files import GIB
from fastdraft.model.method import rates_to_try
from fastdraft.model.methods import named_method
from fastdraft.run import finished
from fastdraft.run.draft import draft_shape
from fastdraft.run.inputs import load_data
from fastdraft.run.plan import predict

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def config_file(tree, tmp_path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture
def trained(fastdraft, config_file, tree) -> Path:
    """The folder of a finished run."""
    code, _, err = fastdraft("train", config_file, "max_steps=2", "checkpoint.every=1")
    assert code == 0, err
    return Path(tree["run_dir"])


# --- train ---------------------------------------------------------------------------------------------------------------


def test_train_prints_data_progress_and_held_out(fastdraft, config_file, tree):
    code, out, _ = fastdraft("train", config_file, "optim.lr=2e-3", "metrics.tensorboard=true")
    assert code == 0
    assert "24 conversations, 24 samples" in out and "held-out" in out and "step 6/6" in out
    assert (Path(tree["run_dir"]) / "tensorboard").is_dir()
    assert yaml.safe_load((Path(tree["run_dir"]) / "config.yaml").read_text())["optim"]["lr"] == 2e-3


@pytest.mark.parametrize(
    ("cores", "busy", "own", "expected"),
    [
        (2, [90.0, 5.0], {}, {"GOMP_SPINCOUNT": "1000"}),
        (2, [20.0, 5.0], {}, {}),  # nobody else is there
        (2, [20.0, 5.0, 90.0, 90.0], {}, {}),  # nobody else is on the cores that this process may use
        (9, [90.0] * 9, {}, {}),
        (2, [90.0, 5.0], {"GOMP_SPINCOUNT": "7"}, {}),
        (2, [90.0, 5.0], {"OMP_WAIT_POLICY": "ACTIVE"}, {}),
    ],
)
def test_threads_sleep_soon_beside_other_programs(monkeypatch, cores, busy, own, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(cores)}, raising=False)
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percpu: busy)
    monkeypatch.setattr(os, "environ", own)
    assert threads_beside_others() == expected


@pytest.mark.parametrize(("command", "settled"), [("evaluate", "1000"), ("check", None)])
def test_a_command_settles_its_threads_before_pytorch_is_there(command, settled):
    """One that starts no engine, which would have them, too."""
    code = "import os, psutil, sys; os.sched_getaffinity = lambda _: {0, 1}; psutil.cpu_percent = lambda *_, **__: [99.0]; "
    code += f"from fastdraft import cli; before = 'torch' in sys.modules; sys.argv = ['fastdraft', '{command}']\n"
    code += "sys.argv += ['/nowhere'] * (sys.argv[1] == 'evaluate')\ntry: cli.main()\n"
    code += "finally: print(before, 'torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    unset = {name: x for name, x in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    said = subprocess.run([sys.executable, "-c", code], env=unset, capture_output=True, text=True).stdout
    assert said.splitlines()[-1] == f"False True {settled}"


def test_a_signal_exits_with_its_number_and_the_same_command_goes_on(fastdraft, config_file, monkeypatch):
    at_step(monkeypatch, 3, lambda _: signal.raise_signal(signal.SIGTERM))
    code, out, _ = fastdraft("train", config_file)
    assert code == 128 + 15 and "stopped by SIGTERM after step 3" in out
    code, out, _ = fastdraft("train", config_file)
    assert code == 0 and "going on from" in out
    code, out, _ = fastdraft("train", config_file, "--fresh")
    assert code == 0 and "going on from" not in out


def test_plan_needs_no_weights_and_no_data_and_trains_nothing(fastdraft, config_file, target_dir, tree, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(target_dir, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    code, out, err = fastdraft(
        "train", config_file, "--plan", f"target.path={bare}", "data.paths=[none.jsonl]", "optim.lr=3"
    )
    assert code == 0, err
    resolved = yaml.safe_load(out[: out.index("parameters:")])
    assert resolved["optim"]["lr"] == 3 and resolved["ttt_length"] == 3 and resolved["target"]["path"] == str(bare)
    # fc, attention, mlp, norms, lm_head; embedding; target
    trained = 3 * 32 * 32 + 2 * 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48 + 4 * 32 + 64 * 32
    weights = sum(t.numel() for t in load_file(target_dir / "model.safetensors").values())
    assert f"draft {trained:,} trained + {192 * 32:,} frozen embedding, target {weights:,}" in out
    assert "Memory of one device" in out and "Disk" in out and "GFLOP/token" in out
    assert not Path(tree["run_dir"]).exists()


def test_bad_configs_are_one_red_line(fastdraft, config_file, tmp_path, monkeypatch):
    assert "unknown key 'optim.lrr'; did you mean 'lr'?" in refusal(fastdraft("train", config_file, "optim.lrr=1"))
    assert "none.yaml cannot be read" in refusal(fastdraft("train", tmp_path / "none.yaml"))
    assert "has no readable config.json" in refusal(fastdraft("train", config_file, f"target.path={tmp_path}"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": 3}\n')
    assert "bad.jsonl:1" in refusal(fastdraft("train", config_file, f"data.paths=[{bad}]"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, _, err = fastdraft("train", config_file, "optim.lrr=1")
    assert code == 1 and "\x1b[31m" in err


def test_a_target_config_of_wrong_types_is_one_red_line(fastdraft, config_file, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    said = refusal(fastdraft("train", config_file, "--plan", f"target.path={tmp_path}"))
    assert "has no readable config.json" in said and "hidden_size" in said and "expected int" in said
    assert "expected int" in refusal(fastdraft("init", tmp_path))


def test_out_of_memory_says_what_to_do_and_our_faults_keep_their_traceback(fastdraft, config_file, monkeypatch):
    full = (torch.OutOfMemoryError("CUDA: full"), RuntimeError("DefaultCPUAllocator: can't allocate memory: full"))
    for error in full:
        monkeypatch.setattr(training, "train", Mock(side_effect=error))
        code, _, err = fastdraft("train", config_file)
        assert code == 1 and "full\nTo need less, lower data.pack_tokens" in err and "Traceback" not in err
    monkeypatch.setattr(training, "train", lambda *_: {}["absent"])
    monkeypatch.setattr(sys, "argv", ["fastdraft", "train", str(config_file)])
    with pytest.raises(KeyError):
        cli.main()


def test_plan_says_the_recipe_and_why(fastdraft, config_file):
    code, out, _ = fastdraft("train", config_file, "--plan")
    said = [line for line in out.splitlines() if line.startswith("# ")]
    assert code == 0 and "# the recipe, and why (docs/recipe.md)" in said
    for sentence in (
        "An optimizer step takes 2 packs of up to 96 tokens, 192 in all",
        " at a rate of 0.04: such a step",
        "AdamW steps the rest at 0.01.",
        "rises over the first 20.0% of the steps, then falls to 0 by a cosine",
        "Every chain runs all 3 steps",
        "What is good for a narrower draft was not measured, and higher rates may be too high: for this one, 32 wide, "
        "try optim.lr 2.0e-03 with optim.muon_lr 4.0e-03, 8.0e-03 and 1.6e-02, each in a short run.",
    ):
        assert any(sentence in line for line in said), sentence
    out = fastdraft("train", config_file, "--plan", "optim.optimizer=adamw")[1]
    assert "AdamW steps all weights at a rate of 0.01." in out
    assert "for this one, 32 wide, try optim.lr 1.0e-03, 2.0e-03 and 4.0e-03, each in a short run." in out
    changes = (
        "optim.schedule=wsd",
        "optim.min_lr_ratio=0.1",
        "sampled_depth=0.5",
        "optim.muon_lr=0.3",
    )
    out = fastdraft("train", config_file, "--plan", *changes)[1]
    for sentence in (
        # fc, q, k, v, o, gate, up and down of the tiny draft, and all but its head and norms
        f"Muon steps 8 matrices, {1 - (64 * 32 + 4 * 32) / 14976:.0%} of the trained weights, at a rate of 0.3",
        "AdamW steps the rest at 0.01.",
        "with AdamW's rate at 0.002, Muon did better at 0.008, 4 times that, than at 0.002 and 0.016",
        "32 wide, try optim.lr 2.0e-03 with optim.muon_lr 4.0e-03, 8.0e-03 and 1.6e-02, each in a short run",
        "stays, and falls to 0.1 of that over the last 20%",
        "A chain runs step i of 3 with probability 0.5^i, and its loss weighs 1 / 0.5^i there: 58% of the rows",
    ):
        assert sentence in out, sentence
    out = fastdraft("train", config_file, "--plan", "draft={method: dflash}", "ttt_length=7")[1]
    assert "Up to 512 blocks of each document are trained" in out
    assert "32 wide, try optim.lr 2.0e-03 with optim.muon_lr 8.0e-03, 1.6e-02 and 3.2e-02, each in a short run" in out
    assert "The loss dpace compares a slot" in out and "with block.loss=dpace" not in out
    out = fastdraft("train", config_file, "--plan", "draft={method: dflash}", "ttt_length=7", "block.loss=ce")[1]
    assert "The loss ce compares a slot" in out and "with block.loss=dpace" in out


def test_rates_fall_with_the_width_of_a_draft_and_do_not_rise_where_it_is_narrow():
    for width, said in (
        (
            4096,
            "Good rates usually go with 1 / width, .* 4096 wide, try optim.lr 2.8e-04 with optim.muon_lr 5.6e-04, 1.1e-03",
        ),
        (
            576,
            "Good rates usually go with 1 / width, .* 576 wide, try optim.lr 2.0e-03 with optim.muon_lr 4.0e-03, 8.0e-03",
        ),
        (575, "a narrower draft was not measured, .* 575 wide, try optim.lr 2.0e-03 with optim.muon_lr 4.0e-03, 8.0e-03"),
    ):
        assert re.search(said, rates_to_try(width, 2e-3, 8e-3)), width
    assert "4096 wide, try optim.lr 1.4e-04, 2.8e-04 and 5.6e-04, each" in rates_to_try(4096, 2e-3)  # 2e-3 * 576 / 4096


def test_a_plan_of_many_gpus_says_whose_memory_they_have(fastdraft, config_file, monkeypatch):
    plan = ("train", config_file, "--plan", "--world", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = fastdraft(*plan)[1]
    assert out.startswith("no GPU is here to go by, so they have 80 GiB; --gpu-gib plans for others\n1 GPU of 80 GiB at")
    assert fastdraft(*plan, "--gpu-gib", 24)[1].startswith("1 GPU of 24 GiB at ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    here = SimpleNamespace(total_memory=int(139.8 * GIB), multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: here)
    out = fastdraft(*plan)[1]
    assert out.startswith("the GPUs have this machine's memory; --gpu-gib plans for others\n1 GPU of 139.8 GiB at ")
    assert "fits in 139.8 GiB less 6% that is not counted" in out


def test_plan_for_a_gpu_needs_none(fastdraft, config_file):
    code, out, err = fastdraft("train", config_file, "--plan", "device=cuda")
    assert code == 0 and "predicted for one cuda device and the fused step" in out, err
    assert out.index("Memory of the host") < out.index("copy for writing checkpoints")
    out = fastdraft("train", config_file, "--plan", "device=cpu")[1]
    assert "one cpu device and the fused step" in out
    assert "copy for writing checkpoints" in out and "Memory of the host" not in out
    out = fastdraft("train", config_file, "--plan", "--world", 2)[1]
    assert "host memory of rank 0's process: 0.000 GiB, copy for writing checkpoints, 1/2" in out
    said = refusal(fastdraft("train", config_file, "--plan", "device=cpu", "precision=fp8"))
    assert said.startswith("fastdraft: precision: fp8 needs a GPU")
    assert fastdraft("train", config_file, "--plan", "device=cuda", "precision=fp8")[0] == 0


def test_plan_says_how_unequal_the_processes_packs_are(fastdraft, config_file, make_config, tmp_path):
    """Once the data are prepared, and with nothing prepared by it. Counted by hand from what each process is dealt."""
    cache = tmp_path / "cache"
    plan = ("train", config_file, "--plan", "--world", 4, f"data.cache_dir={cache}", "optim.packs_per_step=4")
    plan += ("dist.sequence=2",)
    code, out, err = fastdraft(*plan)
    assert code == 0 and "is not known before `fastdraft data prepare`" in out, err
    assert not cache.exists()
    assert fastdraft("data", "prepare", config_file, f"data.cache_dir={cache}")[0] == 0
    config = make_config(**{"data.cache_dir": str(cache), "optim.packs_per_step": 4})
    shape, predicted = draft_shape(config), predict(config, torch.device("cuda"))
    token = 2 * predicted.target.used
    row = predicted.flops_per_token - token
    pairs = named_method("eagle3").pair_cost(shape, predicted.target.used, config)
    data = load_data(config, shape).train
    loaders = [Loader(data, config.data.pack_tokens, 4, config.data.seed, rank, 2, pairs) for rank in range(2)]
    work = np.zeros((loaders[0].num_packs // 4, 2))
    for step in work:
        for rank, loader in enumerate(loaders):
            for batch in next(loader):
                masks = zip(batch.loss_mask.split(batch.lengths), batch.lengths, strict=True)
                step[rank] += sum(token * n + row * int(m[2:].sum()) + pairs * (token + row) * n * n for m, n in masks)
    slowest = work.max(axis=1).sum() / work.mean(axis=1).sum()
    assert 1.001 < slowest < 2
    said = fastdraft(*plan)[1]
    assert "the 2 groups of processes that have packs of their own wait for the slowest" in said
    assert f"whose work is {slowest:.3f} times the mean: counted over the {len(work)} whole steps" in said
    assert "training would be refused: optim.packs_per_step 400 is more" in fastdraft(*plan, "optim.packs_per_step=400")[1]
    assert "is predicted for EAGLE-3 drafts" in fastdraft(*plan, "data.streaming=true", "max_steps=3")[1]
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(Path(config.target.path) / "config.json", bare)
    for unreadable, why in ((f"target.path={bare}", "tokenizer"), (f"data.paths=[{bare}/none.jsonl]", "none.jsonl")):
        said = next(line for line in fastdraft(*plan, unreadable)[1].splitlines() if "is not known: " in line)
        assert why in said


def test_a_finished_run_says_so(fastdraft, trained, config_file):
    code, out, _ = fastdraft("train", config_file, "max_steps=2", "checkpoint.every=1")
    assert code == 0 and "all 2 steps are done already" in out


@pytest.mark.slow
def test_the_module_is_the_command_as_torchrun_starts_it(config_file):
    command = [sys.executable, "-m", "fastdraft.cli", "train", str(config_file), "optim.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "did you mean 'lr'?" in done.stderr


def test_ctrl_c_while_the_command_is_imported_is_no_traceback():
    interrupt = (
        "import runpy, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'rich.table':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "runpy.run_module('fastdraft.cli', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", interrupt], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and done.stderr == done.stdout == ""


def test_usage(fastdraft):
    assert fastdraft("trane")[0] == 2
    assert fastdraft("train")[0] == 2
    code, out, _ = fastdraft("--help")
    assert code == 0 and all(name in out for name in ("train", "init", "data", "evaluate", "export", "check"))


def test_a_report_names_the_checkpoint_that_was_read_and_a_damaged_one_is_said_once(fastdraft, trained, tmp_path):
    (trained / "checkpoints" / "best.json").unlink()
    assert json.loads(fastdraft("evaluate", trained)[1])["checkpoint"] == f"{trained} (best: step 2)"
    assert json.loads(fastdraft("evaluate", trained, "--which", 1)[1])["checkpoint"] == f"{trained} (step 1)"
    (tensors,) = (trained / "checkpoints" / "step-00000002").glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-100])
    code, out, err = fastdraft("export", trained, tmp_path / "out")
    assert code == 0 and f"{tmp_path / 'out'}: {trained} (best: step 1), float32; verified for SGLang and vLLM" in out
    said = f"warning: checkpoint {trained}/checkpoints/step-00000002 is unreadable: {tensors.name} is not as it was written"
    assert err.count("step-00000002") == 1 and f"{said}; step-00000001 is used instead\n" in err and ".py" not in err


def test_held_out_conversations_that_are_trained_on_are_counted(fastdraft, config_file, tmp_path):
    chats = write_chats(tmp_path / "mine.jsonl", 12)
    lines = chats.read_text().splitlines(keepends=True)
    (tmp_path / "held.jsonl").write_text("".join(lines[:3]) + write_chats(tmp_path / "new.jsonl", 2, seed=5).read_text())
    changes = (f"data.paths=[{chats}]", f"data.eval_paths=[{tmp_path}/held.jsonl]")
    said = "warning: 3 of the 5 held-out conversations are trained on, too"
    assert said in fastdraft("data", "prepare", config_file, *changes)[1]
    assert said in fastdraft("train", config_file, *changes, "max_steps=1")[1]
    assert "trained on, too" not in fastdraft("data", "prepare", config_file, *changes[:1], "data.eval_fraction=0.3")[1]


def test_numbers_of_other_held_out_documents_than_the_runs_are_said_to_be(fastdraft, config_file, tree, tmp_path):
    chats = write_chats(tmp_path / "mine.jsonl", 40)
    changes = (f"data.paths=[{chats}]", "data.eval_fraction=0.2", "max_steps=1")
    assert fastdraft("train", config_file, *changes)[0] == 0
    assert "held-out documents" not in fastdraft("evaluate", tree["run_dir"])[2]
    chats.write_text("".join(chats.read_text().splitlines(keepends=True)[:20]))
    code, _, err = fastdraft("evaluate", tree["run_dir"])
    assert code == 0 and "warning: the held-out documents are others than while it was trained" in err


# --- init, data ----------------------------------------------------------------------------------------------------------


def test_init_writes_a_draft_config_that_train_takes(fastdraft, target_dir, config_file, tmp_path):
    code, out, _ = fastdraft("init", target_dir)
    assert code == 0 and yaml.safe_load(out)["layers"] == [1, 3, 4]
    file = tmp_path / "draft.yaml"
    assert fastdraft("init", target_dir, file)[0] == 0 and file.read_text() == out
    assert "draft.yaml exists" in refusal(fastdraft("init", target_dir, file))
    file.write_text(out.replace("intermediate_size: 48", "intermediate_size: 16"))
    code, out, _ = fastdraft("train", config_file, "--plan", f"draft.config={file}", "draft.overrides={}")
    assert code == 0 and f"draft {3072 + 4096 + 1024 + 3 * 32 * 16 + 128 + 192 * 32:,} trained" in out
    assert "config.json cannot be read" in refusal(fastdraft("init", tmp_path))


def test_preview_shows_what_is_trained(fastdraft, config_file, tree, tmp_path):
    code, out, err = fastdraft("data", "preview", config_file, "-n", "2")
    assert code == 0, err
    assert out.count(" trained (") == 2 and "<|im_start|>" in out
    words = json.loads(Path(tree["data"]["paths"][0]).read_text().splitlines()[0])["messages"][1]["content"].split()
    assert all(word in out for word in words)
    assert not Path(tree["run_dir"]).exists()
    untrained = tmp_path / "untrained.jsonl"
    untrained.write_text('{"messages": [{"role": "user", "content": "ba"}]}\n')
    code, out, _ = fastdraft("data", "preview", config_file, f"data.paths=[{untrained}]")
    assert code == 0 and "no conversation with a trained token" in out


def test_train_reads_what_prepare_wrote(fastdraft, config_file, tmp_path):
    cache = tmp_path / "cache"
    code, out, err = fastdraft("data", "prepare", config_file, f"data.cache_dir={cache}")
    assert code == 0 and "24 conversations, 24 samples" in out, err
    assert "of all trained" in out and "% full" in out
    report = tmp_path / "report"
    said = refusal(fastdraft("data", "prepare", config_file, "--report", config_file))
    assert f"--report {config_file} is a file; name a folder" in said
    code, out, err = fastdraft("data", "prepare", config_file, f"data.cache_dir={cache}", "--report", report)
    assert code == 0 and out.splitlines()[-1] == str(report / "data.png"), err
    assert [p.name for p in report.iterdir()] == ["data.png"] and imread(report / "data.png")[..., :3].std() > 0.05
    written = sorted(cache.glob("samples-*/samples.arrow"))
    assert len(written) == 1
    before = written[0].stat().st_mtime_ns
    assert fastdraft("train", config_file, f"data.cache_dir={cache}", "max_steps=1")[0] == 0
    assert sorted(cache.glob("samples-*/samples.arrow")) == written and written[0].stat().st_mtime_ns == before


# --- evaluate, export, check ---------------------------------------------------------------------------------------------


def test_evaluate_prints_json_alone(fastdraft, trained, tmp_path):
    code, out, err = fastdraft("evaluate", trained, "--which", "last")
    assert code == 0, err
    report = json.loads(out)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if "eval/tau_sim" in line][-1]
    assert report["decode"] is None
    assert report["held_out"]["overall"]["tau_sim"] == pytest.approx(held_out["eval/tau_sim"], rel=1e-6)
    assert report["held_out"]["by_position"][0]["start"] == 0

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "ba be bi"}\n{"prompt": "ca ce"}\n')
    code, out, err = fastdraft(
        "evaluate",
        trained,
        "--prompts",
        prompts,
        "--max-new-tokens",
        "12",
        "--num-steps",
        "2",
        "--out",
        tmp_path / "r.json",
    )
    assert code == 0, err
    report = json.loads(out)
    assert report == json.loads((tmp_path / "r.json").read_text())
    assert report["decode"]["num_prompts"] == report["decode"]["num_equal"] == 2
    assert 1 <= report["decode"]["accepted_length"] <= 3


def test_evaluate_refusals(fastdraft, trained, tmp_path):
    assert "is none of best, last, 1, 2" in refusal(fastdraft("evaluate", trained, "--which", "7"))
    assert "holds no checkpoint" in refusal(fastdraft("evaluate", tmp_path))
    assert fastdraft("evaluate", trained, "--max-prompts", "0")[0] == 2
    assert fastdraft("evaluate", trained, "--max-new-tokens", "1")[0] == 2
    none = refusal(fastdraft("evaluate", trained, "--prompts", "none.jsonl", "--num-steps", "0"))
    assert "num_steps 0 and eagle_topk 1 must be at least 1" in none
    for temperature in ("nan", "inf", "-1", "1e-45"):  # 1e-45: a traceback of torch.multinomial
        said = refusal(fastdraft("evaluate", trained, "--prompts", "none.jsonl", "--temperature", temperature))
        assert "must be 0 (greedy) or a number from 1e-05 on" in said
    prompts = ("evaluate", trained, "--prompts", "none.jsonl")
    assert "it needs temperature > 0" in refusal(fastdraft(*prompts, "--verify", "block"))
    assert "verify 'all' must be one of token, block" in refusal(fastdraft(*prompts, "--verify", "all"))
    assert "--verify" in refusal(fastdraft("evaluate", trained, "--verify", "block"))
    best = trained / "checkpoints" / "best.json"
    whole = best.read_text()
    best.write_text(whole[:5])
    assert "best.json is damaged" in refusal(fastdraft("evaluate", trained))
    best.write_text(whole)
    assert "none.jsonl: cannot be read" in refusal(fastdraft("evaluate", trained, "--prompts", tmp_path / "none.jsonl"))
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"messages": [{"role": "user", "content": null}]}\n')
    assert "odd.jsonl:1: message 1: content must be a string" in refusal(fastdraft("evaluate", trained, "--prompts", odd))


def test_evaluate_looks_at_prompts_and_out_before_the_long_work(fastdraft, trained, tmp_path, monkeypatch):
    def late(*_):
        raise AssertionError("evaluated first")

    monkeypatch.setattr(finished, "evaluate_held_out", late)
    assert "none.jsonl: cannot be read" in refusal(fastdraft("evaluate", trained, "--prompts", tmp_path / "none.jsonl"))
    assert "is a folder" in refusal(fastdraft("evaluate", trained, "--out", tmp_path))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "ba be"}\n' + json.dumps({"prompt": "ba be bi " * 400}) + "\n")
    assert "fills the target's context of" in refusal(fastdraft("evaluate", trained, "--prompts", prompts))
    prompts.write_text('{"prompt": "ba be"}\n')
    tree = ("--eagle-topk", "120", "--num-draft-tokens", "9")
    assert "is more than the draft vocabulary" in refusal(fastdraft("evaluate", trained, "--prompts", prompts, *tree))
    monkeypatch.undo()


def test_evaluate_makes_the_folder_of_its_report(fastdraft, trained, tmp_path):
    code, out, err = fastdraft("evaluate", trained, "--out", tmp_path / "new" / "report.json")
    assert code == 0, err
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == json.loads(out)


def test_evaluate_uses_the_runs_template_and_needs_no_held_out_data(fastdraft, config_file, tmp_path, monkeypatch):
    template = tmp_path / "chat.jinja"
    run_dir, prompts = tmp_path / "other", tmp_path / "prompts.jsonl"
    settings = [f"data.chat_template={template}", "data.chat_template_kwargs={word: ba}", "data.eval_fraction=0"]
    template.write_text("{{ word }}{% for m in messages %} {{ m['content'] }} <|im_end|>{% endfor %}")
    code, _, err = fastdraft("train", config_file, *settings, f"run_dir={run_dir}", "max_steps=1")
    assert code == 0, err
    seen = []
    decode = finished.evaluate_decode
    monkeypatch.setattr(finished, "evaluate_decode", lambda t, d, ids, *a: seen.append(ids) or decode(t, d, ids, *a))
    prompts.write_text('{"prompt": "be bi"}\n')
    code, out, err = fastdraft("evaluate", run_dir, "--prompts", prompts, "--max-new-tokens", "8")
    assert code == 0 and json.loads(out)["held_out"] is None, err
    assert seen == [[[make_tokenizer().convert_tokens_to_ids(x) for x in ("ba", "be", "bi", "<|im_end|>")]]]
    said = refusal(fastdraft("evaluate", run_dir))
    assert "no held-out data: data.eval_fraction is 0; raise it" in said and "or give --prompts" in said


def test_options_that_would_do_nothing_are_refused(fastdraft, trained, tmp_path):
    for idle in (
        "max-prompts",
        "max-new-tokens",
        "num-steps",
        "eagle-topk",
        "num-draft-tokens",
        "temperature",
        "batch-size",
    ):
        said = refusal(fastdraft("evaluate", trained, f"--{idle}", 2))
        assert f"--{idle} belongs to --prompts, which was not given" in said
    ask = ("data", "regenerate", tmp_path / "none.jsonl", "--out", tmp_path / "out.jsonl")
    served, local = ("--url", "http://localhost:1/v1"), ("--target", tmp_path)
    assert "--batch-size, --device belong to --target" in refusal(
        fastdraft(*ask, *served, "--device", "cpu", "--batch-size", 4)
    )
    for idle in (("--model", "m"), ("--concurrency", 4), ("--timeout", 5), ("--retries", 1), ("--api-key-env", "KEY")):
        assert f"{idle[0]} belongs to --url" in refusal(fastdraft(*ask, *local, *idle))


@pytest.mark.parametrize("content", ["target: {path: x}\n", "words", "", "{}"])
def test_a_vocabulary_map_that_is_none_is_a_sentence(fastdraft, config_file, tmp_path, content):
    file = tmp_path / "map.pt"
    file.write_text(content)
    refused = refusal(fastdraft("train", config_file, f"draft.vocab_map={file}", f"run_dir={tmp_path / 'new'}"))
    assert f"draft.vocab_map: {file} " in refused


def test_export_and_check(fastdraft, trained, target_dir, tmp_path):
    out_dir = tmp_path / "draft"
    code, out, err = fastdraft("export", trained, out_dir)
    assert code == 0 and ", float32; verified for SGLang and vLLM" in out, err
    assert {p.name for p in out_dir.iterdir()} == {"config.json", "model.safetensors"}
    with pytest.MonkeyPatch.context() as patch:  # said before a target is loaded, which can take minutes
        patch.setattr(finished, "open_target", None)
        refused = refusal(fastdraft("export", trained, out_dir))
    assert "exists; choose another directory, or replace it with --overwrite" in refused
    assert fastdraft("export", trained, out_dir, "--overwrite", "--which", "1")[0] == 0

    code, out, _ = fastdraft("check", "--checkpoint", out_dir, "--target", target_dir)
    assert code == 0 and f"{out_dir}: verified for SGLang and vLLM" in out
    tensors = {name: t.clone() for name, t in load_file(out_dir / "model.safetensors").items()}
    del tensors["midlayer.hidden_norm.weight"]
    tensors["lm_head.weight"][3, 4] = torch.nan
    save_file(tensors, out_dir / "model.safetensors")
    config = json.loads((out_dir / "config.json").read_text())
    (out_dir / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    code, out, _ = fastdraft("check", "--checkpoint", out_dir, "--target", target_dir)
    assert code == 1 and f"{out_dir}: 3 errors" in out
    said = [line for line in out.splitlines() if line.startswith("error: ")]
    for part in ("tie_word_embeddings", "missing: midlayer.hidden_norm.weight", "lm_head.weight has 1 NaN"):
        assert sum(part in line for line in said) == 1, part
    assert "--checkpoint needs --target" in refusal(fastdraft("check", "--checkpoint", out_dir))
    assert "--target belongs to --checkpoint" in refusal(fastdraft("check", "--target", target_dir))


def test_files_nested_too_deeply_are_a_sentence(fastdraft, trained, target_dir, config_file, tmp_path):
    """5000 levels are too many for Python's JSON and YAML readers, 600 for transformers."""
    out_dir, mine = tmp_path / "draft", tmp_path / "mine"
    assert fastdraft("export", trained, out_dir)[0] == 0
    shutil.copytree(target_dir, mine)

    def deepen(file: Path, levels: int) -> None:
        file.write_text(file.read_text().rstrip().removesuffix("}") + ', "x": ' + "[" * levels + "]" * levels + "}")

    for levels in (600, 5000):
        shutil.copy(target_dir / "config.json", mine)
        deepen(mine / "config.json", levels)
        for command in (("init", mine), ("check", "--checkpoint", out_dir, "--target", mine)):
            assert f"{mine}/config.json is nested too deeply to be read" in refusal(fastdraft(*command))
        for plan in ([], ["--plan"]):
            said = refusal(fastdraft("train", config_file, f"target.path={mine}", f"run_dir={tmp_path / 'r'}", *plan))
            assert "has no readable config.json: its JSON is nested too deeply" in said
    shutil.copy(target_dir / "config.json", mine)
    deepen(mine / "tokenizer_config.json", 5000)
    said = refusal(fastdraft("train", config_file, f"target.path={mine}", f"run_dir={tmp_path / 'r'}"))
    assert "has no readable tokenizer: its JSON is nested too deeply" in said
    deepen(out_dir / "config.json", 5000)
    code, out, _ = fastdraft("check", "--checkpoint", out_dir, "--target", target_dir)
    assert code == 1 and f"error: {out_dir}/config.json is nested too deeply to be read" in out
    deep = tmp_path / "deep.yaml"
    deep.write_text("a: " + "[" * 3000 + "]" * 3000)
    assert "deep.yaml is nested too deeply" in refusal(fastdraft("train", deep))
    nested = "draft.overrides=" + "[" * 3000 + "]" * 3000
    assert "override 'draft.overrides': the value is nested too deeply" in refusal(fastdraft("train", config_file, nested))


def test_export_has_the_targets_dtype_whatever_training_ran_it_in(fastdraft, target_dir, config_file, tmp_path):
    run_dir, out_dir = tmp_path / "bf16", tmp_path / "draft"
    assert fastdraft("train", config_file, "target.dtype=auto", f"run_dir={run_dir}", "max_steps=1")[0] == 0
    code, out, err = fastdraft("export", run_dir, out_dir)
    assert code == 0 and ", float32; verified for SGLang and vLLM" in out, err
    assert load_file(out_dir / "model.safetensors")["fc.weight"].dtype == torch.float32


def test_export_of_a_run_whose_target_changed(fastdraft, trained, target_dir, config_file, tmp_path, tree):
    moved = tmp_path / "mine"
    shutil.copytree(target_dir, moved)
    run_dir = tmp_path / "run of mine"
    assert fastdraft("train", config_file, f"target.path={moved}", f"run_dir={run_dir}", "max_steps=1")[0] == 0
    save_target(moved, seed=5)
    assert "was trained for another target than" in refusal(fastdraft("export", run_dir, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["reference", "fused"])
def test_check_golden(fastdraft, step):
    code, out, err = fastdraft("check", "--golden", GOLDEN, "--step", step)
    places = 1 if step == "reference" else 4 if torch.cuda.is_available() else 2
    assert code == 0 and out.count(" ok ") == 4 * 5 * places and "WRONG" not in out, err
    assert all(name in out for name in ("gqa_full", "lk_alpha", "norm_output", "padded_t7"))


@pytest.mark.parametrize("method, cases", [("dflash", 4), ("dspark", 2)])
def test_check_golden_of_methods_with_blocks(method, cases, fastdraft, tmp_path):
    """A case says which method replays it; each has losses, live rows, acceptance or hits, and gradients."""
    for file in (GOLDEN.parent / "golden_methods").glob(f"{method}_*.safetensors"):
        shutil.copy(file, tmp_path)
    code, out, err = fastdraft("check", "--golden", tmp_path, "--step", "fused")
    places = 4 if torch.cuda.is_available() else 2
    assert code == 0 and out.count(" ok ") == cases * 4 * places and "WRONG" not in out, err + out
    tensors = load_file(file)
    save_file({"a": tensors["inputs.lengths"]}, tmp_path / "x.safetensors", {"config": '{"method": "pard"}'})
    assert "x.safetensors is a golden case of 'pard'; those of eagle3, dflash" in refusal(
        fastdraft("check", "--golden", tmp_path)
    )


def test_check_golden_fails_above_tolerance(fastdraft, tmp_path):
    file = GOLDEN / "gqa_full.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    tensors["grads.fc.weight"][0, 0] += 1e-3 * tensors["grads.fc.weight"].abs().max()
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        save_file(tensors, tmp_path / "gqa_full.safetensors", opened.metadata())
    shutil.copy(GOLDEN / "lk_alpha.safetensors", tmp_path)
    code, out, _ = fastdraft("check", "--golden", tmp_path)
    assert code == 1 and out.count("WRONG") == 1 and "grad fc.weight" in out
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", {"config": "{}"})
    assert "other.safetensors is not a golden case: it has no 'hidden_size'" in refusal(
        fastdraft("check", "--golden", tmp_path)
    )
    assert "'slow' is not one of" in refusal(fastdraft("check", "--golden", tmp_path, "--step", "slow"))
    assert "--step belongs to --golden" in refusal(fastdraft("check", "--step", "fused"))
    assert "--golden takes --step" in refusal(fastdraft("check", "--golden", GOLDEN, "--engine", "fused"))


def test_check_says_what_is_here(fastdraft):
    code, out, _ = fastdraft("check")
    assert code == 0
    for name in ("python", "torch", "transformers", "triton", "gpu", "Triton kernels", "CUDA kernels"):
        assert name in out
    there = torch.cuda.is_available()
    assert ("kernels │ can run" in " ".join(out.split())) == there
    assert f"fused on {'cuda' if there else 'cpu'}" in out
    assert torch.__version__.split("+")[0] in out
