"""The demo's clock: what it cuts, that a training ends in time, and that the table says so."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console
from tiny import make_tokenizer, random_draft
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM

from fastdraft.checkpoint import list_checkpoints
from fastdraft.run.draft import draft_shape
from fastdraft.run.inputs import load_data, open_target
from fastdraft.train import train

FILE = Path(__file__).parents[1] / "examples" / "demo" / "run.py"


@pytest.fixture
def demo(monkeypatch) -> ModuleType:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = importlib.util.spec_from_file_location("demo", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "console", Console(file=io.StringIO(), width=200))
    return module


@pytest.fixture
def target(make_config):
    config = make_config()
    return open_target(config, draft_shape(config).layers, torch.device("cpu"))


def clock_at(demo: ModuleType, seconds: float):
    clock = demo.Clock()
    clock.seconds = lambda: seconds
    return clock


def test_the_steps_are_those_that_the_clock_has_room_for(demo, make_config, target, monkeypatch):
    """A second for the target's forward, which the first epoch alone pays, and two for the draft's step."""
    monkeypatch.setattr(demo, "pack_seconds", lambda *_: (1.0, 2.0))
    config = make_config(max_steps=300, **{"data.eval_fraction": 0.0})
    data = load_data(config, draft_shape(config)).train
    packs = demo.Loader(data, config.data.pack_tokens, 1, config.data.seed).num_packs
    assert packs > 5
    taken = []
    for left, expected in ((1e5, 300), (100.0, None), (3.0 * packs / 2, demo.MIN_STEPS), (-50.0, demo.MIN_STEPS)):
        clock = clock_at(demo, demo.TRAIN_END - left)
        steps = demo.with_affordable_steps(config, target, clock).max_steps
        seconds = 2 * steps + min(steps, packs)
        assert steps == expected or (expected is None and 0.8 * left < seconds <= 0.9 * left), (left, steps, packs)
        assert clock.cuts == ([f"{steps} of 300 training steps"] if steps < 300 else [])
        taken.append(steps)
    assert taken[0] > taken[1] > taken[2] == taken[3]


def test_what_a_pack_costs_is_measured(demo, make_config, target):
    config = make_config()
    data = load_data(config, draft_shape(config))
    assert all(seconds > 0 for seconds in demo.pack_seconds(config, target, data))


@pytest.mark.slow
def test_a_training_that_is_too_slow_ends_with_its_checkpoint(demo, make_config):
    before = signal.getsignal(signal.SIGTERM)
    config = make_config(max_steps=10**6, **{"checkpoint.every": 10**6, "eval.every": 10**6})
    with demo.sigterm_after(4.0):
        result = train(config)
    assert result.stopped_by == signal.SIGTERM and 0 < result.steps < 10**6
    assert list_checkpoints(Path(config.run_dir))
    assert signal.getsignal(signal.SIGTERM) is before
    with demo.sigterm_after(0.0):  # before the training listens, or after it: nobody dies
        os.kill(os.getpid(), signal.SIGTERM)


def test_answers_end_with_the_time(demo, target):
    tokenizer, prompts = make_tokenizer(), [[1, 4, 9, 12], [1, 4, 9]]
    assert list(demo.answer_rows(target, tokenizer, prompts, 100, max_seconds=0.0)) == []
    target.eos_ids = frozenset({target.vocab_size - 1})
    (whole,) = demo.answer_rows(target, tokenizer, prompts, 100)
    (cut,) = demo.answer_rows(target, tokenizer, prompts, 100, max_seconds=0.01)
    for row, part in zip(whole, cut, strict=True):
        assert 0 < sum(part["loss_mask"]) < sum(row["loss_mask"])
        assert row["input_ids"][: len(part["input_ids"])] == part["input_ids"]  # the target's own words, fewer of them


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_second_answer_is_drawn_for_prompts_that_are_not_held_out(demo, tmp_path, monkeypatch, device, apart):
    """Forty prompts, known by their first tokens, the longest first; what a batch holds is the device's."""
    prompts = [[place] + [1] * (100 - place) for place in range(40)]
    asked = []

    def said(target, batch, max_new_tokens, max_time, **sampling):
        asked.append((len(batch), sampling["do_sample"]))
        return [[int(sampling["do_sample"])]] * len(batch)

    monkeypatch.setattr(demo, "load_tokenizer", lambda _: make_tokenizer())
    monkeypatch.setattr(demo, "prompt_ids", lambda *_: prompts)
    monkeypatch.setattr(demo, "answer_batch", said)
    monkeypatch.setattr(demo, "ANSWER_BATCH", 32)
    target = SimpleNamespace(device=torch.device(device), model=SimpleNamespace(name_or_path=""))
    answers, held_out, clock = tmp_path / "answers.jsonl", tmp_path / "held_out.jsonl" if apart else None, demo.Clock()
    demo.answer(target, answers, held_out, clock)
    read = lambda file: [json.loads(line) for line in file.read_text().splitlines()]  # noqa: E731
    by_length = list(range(39, -1, -1))
    greedy = [place for place in by_length if not apart or place not in (39, 23, 7)]
    trained = read(answers)
    assert [row["input_ids"][0] for row in trained] == greedy + (greedy if apart else [])
    assert [row["input_ids"][-1] for row in trained] == [0] * len(greedy) + [1] * (len(greedy) if apart else 0)
    if apart:
        kept = read(held_out)
        assert [(row["input_ids"][0], row["input_ids"][-1]) for row in kept] == [(39, 0), (23, 0), (7, 0)]
    assert all(row["loss_mask"] == [0] * (len(row["input_ids"]) - 1) + [1] for row in trained)
    batches = {"cpu": [(32, False), (8, False), (32, True), (5, True)], "cuda": [(40, False), (37, True)]}
    assert asked == [batch for batch in batches[device] if apart or not batch[1]]
    assert clock.cuts == []
    monkeypatch.setattr(demo, "ANSWER_SECONDS", 0)
    demo.answer(target, answers, held_out, clock)
    assert clock.cuts == [f"0 of {77 if apart else 40} answers"] and read(answers) == []


def test_the_prompts_and_tokens_are_those_that_the_clock_has_room_for(demo, make_config, target, monkeypatch):
    """A plain decoding of 4 s and one with the draft of 6 s: 16 s for each prompt, 9 s more for each of up to three by the
    untrained draft, 6 s for the one that is shown, and 3 s for the trials where there is more than one. Where eight have
    room so, all 24 are tried together, which take 2 s each alone and 3 s each with a draft: 192 s and the other 36."""
    share = demo.DECODE_TOKENS // 4
    seconds = lambda n: SimpleNamespace(seconds=n * share / demo.DECODE_TOKENS)  # noqa: E731
    monkeypatch.setattr(demo, "generate", lambda target, draft, *_: seconds(6.0 if draft else 4.0))
    each = lambda draft: SimpleNamespace(seconds=(3.0 if draft else 2.0) * 6 / 52)  # noqa: E731
    monkeypatch.setattr(demo, "generate_batch", lambda target, draft, *_: [each(draft)] * 24)
    draft = random_draft(draft_shape(make_config()), target.embedding)
    cases = (
        (1000.0, 24, 52),
        (228.5, 24, 52),
        (227.5, 8, 52),
        (36 + 16 * 8.5, 8, 52),
        (36 + 16 * 5.5, 5, 52),
        (31.5, 1, 52),
        (15.5, 1, 26),
        (0.0, 1, 8),
        (-100.0, 1, 8),
    )
    for left, number, tokens in cases:
        clock = clock_at(demo, demo.DECODE_END - left)
        assert demo.affordable_decoding(target, draft, [[1, 2, 3]] * 24, clock) == (number, tokens)
        cut = [f"{number} of 24 held-out prompts decoded"] if number < 24 else []
        assert clock.cuts == cut + ([f"{tokens} of 52 tokens of each decoded"] if tokens < 52 else [])


def test_one_thread_where_others_are_busy(demo, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(demo, "THREADS", 2)
    try:
        for costs, expected in (({1: 2.0, 2: 1.0}, 2), ({1: 2.0, 2: 8.0}, 1)):
            monkeypatch.setattr(demo, "wall_seconds", lambda *_, costs=costs, **__: costs[torch.get_num_threads()])
            demo.use_fastest_threads()
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_files_weights_are_those_that_transformers_reads(demo, tmp_path, tied):
    """Bit for bit, with several quantisations, fewer key heads than query heads, and the head tied or not."""
    gguf = pytest.importorskip("gguf")
    small = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(small)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, small.num_hidden_layers)
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(small.hidden_size)
    writer.add_block_count(small.num_hidden_layers)
    writer.add_feed_forward_length(small.intermediate_size)
    writer.add_head_count(small.num_attention_heads)
    writer.add_head_count_kv(small.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(small.vocab_size)
    kinds = itertools.cycle(gguf.GGMLQuantizationType[name] for name in ("Q4_1", "Q8_0", "Q5_1", "Q4_0"))
    for name, weight in model.named_parameters():
        if name == "lm_head.weight" and tied:
            continue
        kind = next(kinds) if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(torch.randn(weight.shape).numpy(), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = demo.llama_from_gguf(str(tmp_path), "small.gguf")
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="small.gguf", dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    assert ours.config.tie_word_embeddings is tied and ours.config.to_dict() == plain.config.to_dict()
    mine, theirs = ours.state_dict(), plain.state_dict()
    assert mine.keys() == theirs.keys() and "lm_head.weight" in mine
    for name, weight in theirs.items():
        assert mine[name].dtype == weight.dtype == torch.bfloat16 and torch.equal(mine[name], weight), name


@pytest.mark.slow
def test_libraries_are_silent(tree, tmp_path):
    """No warning and no progress bar of a library on the screen of answering, training, evaluating and exporting."""
    run_dir, prompts = tmp_path / "run", tmp_path / "prompts.jsonl"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree | {"run_dir": str(run_dir), "precision": "auto"}))
    prompts.write_text('{"prompt": "ba be"}\n')
    answering = ["--out", tmp_path / "out.jsonl", "--target", tree["target"]["path"], "--device", "cpu"]
    commands = [
        ["data", "regenerate", prompts, *answering, "--max-new-tokens", 4],
        ["train", tmp_path / "run.yaml", "metrics.tensorboard=true"],
        ["evaluate", run_dir, "--prompts", prompts, "--max-new-tokens", 4, "--eagle-topk", 2, "--num-draft-tokens", 4],
        ["export", run_dir, tmp_path / "export"],
    ]
    script = (
        "import json, sys\nfrom fastdraft import cli\n"
        "for command in json.loads(sys.argv[1]):\n    cli.app(command, standalone_mode=False)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands, default=str)],
        capture_output=True,
        text=True,
        cwd=FILE.parents[2],
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == "" and "Warning" not in run.stdout
