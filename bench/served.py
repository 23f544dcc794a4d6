"""What features from a server cost: python -m bench.served --engine-python PYTHON [--layers 32] [--parts states train ...]

A random target of an 8B's shape is written to a folder, `fastdraft serve-target` starts it, and rows of
bench/results/served.jsonl say how fast it is. Server and trainer share one GPU; with --server-gpu N the server has that one
alone, and the trainer the one that CUDA_VISIBLE_DEVICES gives this process. Parts:

  states   tokens/s of the server's prefill with plain prompts, and when their states are read into this process's memory
           (on the GPU, where there is one) and nothing is trained; in turns, each prompt sent once, so no prefix is cached
  answers  tokens/s that it generates, without and with the states of the answers, and how far these are from the states of
           the same documents as prompts; beside it how far two runs of these are from each other
  train    `fastdraft train` on the server's states: tokens/s, and the share of the time that the trainer waited for them
  process  the same command with the target in the process, and the bare forward that it makes
  plain    prefill of a vLLM started without our connector and without states in its cache
  links    no engine: a document's states from another process of this host, through shared memory and over TCP, in turns

`--tiny` runs the same code with a tiny target in fp32 on a CPU, to see that it runs; its rows are no measurement and go
where --out says. After --seconds no further part begins.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import httpx
import torch
import yaml
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bench.timing import RESULTS, append
from bench.work import CHATS, SHAPES, random_target, target_config
from fastdraft.batch import Batch, Features
from fastdraft.config import Config, parse_config
from fastdraft.metrics import read_metrics
from fastdraft.model.target_config import default_layers
from fastdraft.run.inputs import open_served, open_target
from fastdraft.target.served import links
from fastdraft.target.served.connector.fastdraft_handover import client_of, hand_over
from fastdraft.target.served.connector.fastdraft_wire import STATES, Listener
from fastdraft.target.served.source import ServedSource
from fastdraft.target.source import InProcess, Source

DOCUMENT_BYTES = 2048 * 4 * 4096 * 2  # of 2048 tokens of an 8B target, its four states in bf16
START_S = 300  # a server's start
IN_FLIGHT = 64  # plain prompts at a time, as many as the source has
ANSWERS, PROMPT_TOKENS = 64, 128
PARTS = ("states", "answers", "train", "process", "plain", "links")


class Sizes(NamedTuple):
    shape: str  # of bench.work.SHAPES
    packs: int  # of one round
    pack_tokens: int
    max_length: int
    rounds: int
    steps: int  # of a training run
    answer_tokens: int
    dtype: str
    device: str
    flags: list[str]  # vLLM's


FULL = Sizes(
    *("llama-3.1-8b", 12, 8192, 4096, 3, 60, 128, "bf16", "cuda"),
    ["--max-num-batched-tokens", "8192", "--gpu-memory-utilization", "0.5", "--dtype", "bfloat16"],
)
TINY = Sizes(
    *("tiny", 2, 256, 128, 2, 6, 16, "fp32", "cpu"),
    ["--gpu-memory-utilization", "0.1", "--max-num-batched-tokens", "256", "--dtype", "float32"],
)


# --- a target and documents ----------------------------------------------------------------------------------------------


def write_target(folder: Path, sizes: Sizes, layers: int) -> None:
    """A random Llama, with a tokenizer that knows hardly a word: prompts and documents are ids."""
    more = {"max_position_embeddings": 8192, "bos_token_id": None, "eos_token_id": 0}
    if sizes.shape == TINY.shape:  # vLLM's attention on a CPU wants heads of 32
        more |= {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = target_config(SHAPES[sizes.shape], layers, **more)
    model = random_target(config, torch.bfloat16 if sizes.dtype == "bf16" else torch.float32, sizes.device)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"end": 0, "word": 1}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", unk_token="word").save_pretrained(folder)


def documents(sizes: Sizes, vocabulary: int, num_tokens: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Random ids and loss masks with the lengths and turns of conversations, so many tokens and a little more."""
    draw = random.Random(seed)
    chats = [json.loads(line) for line in CHATS.open()]
    while num_tokens > 0:
        mask = [int(role == "a") for role, size in draw.choice(chats) for _ in range(size)][: sizes.max_length]
        num_tokens -= len(mask)
        yield [draw.randrange(1, vocabulary) for _ in mask], mask


def packs(sizes: Sizes, vocabulary: int, seed: int) -> list[Batch]:
    """A round's packs, filled in the order of the documents."""
    made, ids, lengths = [], [], []
    for document, _ in documents(sizes, vocabulary, (sizes.packs + 2) * sizes.pack_tokens, seed):
        if len(ids) + len(document) > sizes.pack_tokens:
            made.append(Batch(torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool), tuple(lengths)))
            ids, lengths = [], []
        ids, lengths = ids + document, [*lengths, len(document)]
    return made[: sizes.packs]


def run_config(folder: Path, sizes: Sizes, target: Path, name: str, url: str | None) -> Config:
    """The run that is trained. Its documents are those of its name's first letter, so no two runs share one."""
    shape, data = SHAPES[sizes.shape], folder / f"{name}.jsonl"
    if not data.exists():
        with data.open("w") as file:
            for ids, mask in documents(sizes, shape.vocab_size, (sizes.steps + 2) * sizes.pack_tokens, ord(name[0])):
                if sum(mask) > 1:
                    file.write(json.dumps({"input_ids": ids, "loss_mask": mask}) + "\n")
    tree = {
        "target": {"path": str(target), "dtype": sizes.dtype, "url": [url] if url else []},
        "draft": {"overrides": {"draft_vocab_size": shape.draft_vocab_size}},
        "data": {"paths": [str(data)], "eval_fraction": 0.0, "max_length": sizes.max_length, "num_workers": 0}
        | {"pack_tokens": sizes.pack_tokens, "cache_dir": str(folder / "cache")},
        "optim": {"optimizer": "adamw", "lr": 1e-4, "packs_per_step": 1},
        "checkpoint": {"every": 100_000},
        "metrics": {"log_every": max(1, sizes.steps // 12), "tensorboard": False},
        "run_dir": str(folder / f"run-{name}"),
        "max_steps": sizes.steps,
        "precision": sizes.dtype,
        "device": sizes.device,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return parse_config(tree, Config)


# --- a server ------------------------------------------------------------------------------------------------------------


@contextmanager
def server(command: list[str], environment: dict[str, str], port: int, log: Path) -> Iterator[str]:
    """The url of a server that is ready, until the block ends. RuntimeError with its last words if it ends first."""
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{' '.join(command[:6])} did not start: {log.read_text()[-3000:]}")
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.5)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def prefill_rate(url: str, model: str, batches: list[Batch]) -> float:
    """Tokens/s of plain prompts, one document each and one token generated, `IN_FLIGHT` at a time."""

    async def send_all() -> float:
        room = asyncio.Semaphore(IN_FLIGHT)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=IN_FLIGHT)) as client:

            async def send(ids: list[int]) -> None:
                async with room:
                    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "detokenize": False}
                    (await client.post("/v1/completions", json=body)).raise_for_status()

            prompts = [ids.tolist() for batch in batches for ids in batch.input_ids.split(batch.lengths)]
            start = time.perf_counter()
            await asyncio.gather(*map(send, prompts))
            return time.perf_counter() - start

    return sum(batch.num_tokens for batch in batches) / asyncio.run(send_all())


async def answer_all(
    source: ServedSource, url: str, model: str, prompts: list[list[int]], tokens: int, states: bool
) -> tuple[float, list[tuple[list[int], Tensor]]]:
    """Tokens/s of so many generated for each prompt, all at once, and of each what ran with its states [T, B, Ht]."""
    body = {"model": model, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "detokenize": False}
    ran = []
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=len(prompts))) as client:

        async def ask(ids: list[int]) -> None:
            asked = await source.ask_answer(url) if states else None
            more = {"prompt": ids} | (asked.fields if asked else {})
            answer = (await client.post(f"{url}/v1/completions", json=body | more)).raise_for_status().json()
            if asked:
                rows = await source.take_answer(asked, answer)
                ran.append(([*ids, *answer["choices"][0]["token_ids"]][:-1], rows))

        start = time.perf_counter()
        await asyncio.gather(*map(ask, prompts))
        return len(prompts) * tokens / (time.perf_counter() - start), ran


def distance(a: Features, b: Features) -> float:
    """Of f from f, by row and as a share of its size, in the mean."""
    return round(float(((a.f.float() - b.f.float()).norm(dim=-1) / b.f.float().norm(dim=-1)).mean()), 6)


def capture_rate(source: Source, batches: list[Batch]) -> float:
    """Tokens/s of a source that is read and not trained on."""
    start = time.perf_counter()
    source.expect(batches)
    for batch in batches:
        source.capture(batch)
    if source.ends.device.type == "cuda":
        torch.cuda.synchronize()
    return sum(batch.num_tokens for batch in batches) / (time.perf_counter() - start)


# --- parts ---------------------------------------------------------------------------------------------------------------


class Bench(NamedTuple):
    folder: Path
    target: Path
    sizes: Sizes
    layers: int
    commit: str | None
    out: Path
    flags: list[str]
    gpus: int  # 2 where the server has one alone

    def write(self, op: str, row: dict) -> None:
        shape = {"shape": self.sizes.shape, "target_layers": self.layers, "dtype": self.sizes.dtype}
        shape |= {
            "gpus": self.gpus,
            "engine_flags": self.flags,
            "max_length": self.sizes.max_length,
            "pack_tokens": self.sizes.pack_tokens,
        }
        append(f"served/{op}", shape | row, self.commit, self.out)
        print(op, row, flush=True)

    def states(self, url: str, version: str) -> None:
        config = run_config(self.folder, self.sizes, self.target, "train", url)
        layers = default_layers(self.layers)
        vocabulary = SHAPES[self.sizes.shape].vocab_size
        source = open_served(config, layers, torch.device(self.sizes.device))
        try:
            seeds = iter(range(1000, 9000))
            for warm in (lambda b: prefill_rate(url, str(self.target), b), lambda b: capture_rate(source, b)):
                warm(packs(self.sizes, vocabulary, next(seeds)))
            plain, read = [], []
            for _ in range(self.sizes.rounds):
                plain.append(prefill_rate(url, str(self.target), packs(self.sizes, vocabulary, next(seeds))))
                read.append(capture_rate(source, packs(self.sizes, vocabulary, next(seeds))))
            token_bytes = len(source.servers[0].about.boundaries) * source.wanted.hidden_size * source._state_dtype.itemsize
        finally:
            source.close()
        row = {"vllm": version, "prefill_tokens_per_s": _median(plain), "states_tokens_per_s": _median(read)}
        row |= {"share": round(statistics.median(read) / statistics.median(plain), 3), "token_bytes": token_bytes}
        row |= {"bytes_per_s": round(statistics.median(read) * token_bytes), "all_prefill": list(map(round, plain))}
        self.write("states", row | {"all_states": list(map(round, read))})

    def answers(self, url: str, version: str) -> None:
        config = run_config(self.folder, self.sizes, self.target, "train", url)
        source = open_served(config, default_layers(self.layers), torch.device(self.sizes.device))
        draw, tokens, vocabulary = random.Random(7), self.sizes.answer_tokens, SHAPES[self.sizes.shape].vocab_size
        length = min(PROMPT_TOKENS, self.sizes.max_length - tokens)
        try:
            rates: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(1 + self.sizes.rounds):
                for states in (False, True):
                    prompts = [[draw.randrange(1, vocabulary) for _ in range(length)] for _ in range(ANSWERS)]
                    asking = answer_all(source, url, str(self.target), prompts, tokens, states)
                    rate, ran = asyncio.run(asking)
                    rates[states].append(rate)
            ids = torch.tensor([token for document, _ in ran for token in document])
            batch = Batch(ids, torch.ones(len(ids), dtype=torch.bool), tuple(len(document) for document, _ in ran))
            answered = source.features(torch.cat([rows for _, rows in ran]))
            prompted, again = (source.capture(batch)[1] for _ in range(2))
        finally:
            source.close()
        plain, with_states = (_median(values[1:]) for values in rates.values())
        row = {"vllm": version, "answers": ANSWERS, "prompt_tokens": length, "answer_tokens": tokens}
        row |= {"tokens_per_s": plain, "states_tokens_per_s": with_states, "share": round(with_states / plain, 3)}
        row |= {"off": distance(answered, prompted), "prompts_off": distance(again, prompted)}
        self.write("answers", row)

    def train(self, name: str, url: str | None, version: str | None) -> None:
        run_config(self.folder, self.sizes, self.target, name, url)
        command = [sys.executable, "-m", "fastdraft.cli", "train", str(self.folder / f"{name}.yaml")]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stdout[-1500:]}{done.stderr[-1500:]}")
        logs = [line for line in read_metrics(self.folder / f"run-{name}") if "tokens_per_s" in line][3:]
        row = {"tokens_per_s": _median([line["tokens_per_s"] for line in logs]), "logs": len(logs)}
        row |= {"waited": round(statistics.median(line["data_wait"] for line in logs), 4)} if url else {}
        row |= {"vllm": version, "seconds": round(time.perf_counter() - start, 1)}
        self.write(name, row)

    def forward(self) -> None:
        """Of the target in this process."""
        config = run_config(self.folder, self.sizes, self.target, "process", None)
        source = InProcess(open_target(config, default_layers(self.layers), torch.device(self.sizes.device)))
        vocabulary = SHAPES[self.sizes.shape].vocab_size
        rates = [capture_rate(source, packs(self.sizes, vocabulary, 500 + i)) for i in range(1 + self.sizes.rounds)][1:]
        self.write("forward", {"tokens_per_s": _median(rates), "all": list(map(round, rates))})

    def plain(self, url: str, version: str) -> None:
        vocabulary = SHAPES[self.sizes.shape].vocab_size
        batches = [packs(self.sizes, vocabulary, 50 + i) for i in range(1 + self.sizes.rounds)]
        rates = [prefill_rate(url, str(self.target), of_round) for of_round in batches][1:]
        self.write("plain", {"vllm": version, "tokens_per_s": _median(rates), "all": list(map(round, rates))})

    def links(self) -> None:
        """Bytes/s of a document at a time, from the moment that its rows lie in the other process's memory."""
        parent, child = multiprocessing.Pipe()
        folder, token = tempfile.mkdtemp(dir="/dev/shm"), "0" * 32
        peer = multiprocessing.get_context("spawn").Process(target=_hand_over_when_asked, args=(child, folder, token))
        peer.start()
        try:
            times = asyncio.run(_take_in_turns(parent, folder, token, 10 * self.sizes.rounds))
        finally:
            parent.send(None)
            peer.join()
            shutil.rmtree(folder)
        for name, seconds in times.items():
            median = statistics.median(seconds)
            row = {"link": name, "document_bytes": DOCUMENT_BYTES, "us": round(median * 1e6)}
            low, *_, high = statistics.quantiles(seconds, n=5)
            row |= {"bytes_per_s": round(DOCUMENT_BYTES / median), "p20": round(low * 1e6), "p80": round(high * 1e6)}
            self.write("links", row)


def _hand_over_when_asked(asked: Connection, folder: str, token: str) -> None:
    """The other process: what the connector's thread does with each name that it is sent."""
    rows, listener = memoryview(bytearray(os.urandom(1 << 20)) * (DOCUMENT_BYTES >> 20)), Listener("127.0.0.1", 0, token)
    asked.send(listener.port)
    while (name := asked.recv()) is not None:
        client = client_of(name)
        if listener.serves(client):
            listener.send(name, client, STATES, rows)
        else:
            hand_over(folder, name, rows)


async def _take_in_turns(asked: Connection, folder: str, token: str, rounds: int) -> dict[str, list[float]]:
    tcp = await links.Connection("http://127.0.0.1", asked.recv(), token).open()
    ways = {"shared memory": links.SharedMemory("", folder), "tcp": tcp}
    into, times = torch.empty(DOCUMENT_BYTES, dtype=torch.uint8), {name: [] for name in ways}
    for i in range(rounds + 2):
        for way, link in ways.items():
            name = f"{link.client}-{i}"
            link.expect(name, links.Place(into))
            start = time.perf_counter()
            asked.send(name)
            await link.take(name, 60)
            times[way].append(time.perf_counter() - start)
            link.forget(name)
    for link in ways.values():
        link.close()
    return {way: seconds[2:] for way, seconds in times.items()}


def _median(values: list[float]) -> int:
    return round(statistics.median(values))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", default=sys.executable)
    parser.add_argument("--engine-pythonpath", default="")
    parser.add_argument("--engine-flags", nargs="*", default=[], help="vLLM's, such as attention-backend=TRITON_ATTN")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--folder", help="where the target and the runs lie; default: a temporary folder")
    parser.add_argument("--server-gpu", help="its number or UUID, as CUDA_VISIBLE_DEVICES takes it; default: the trainer's")
    parser.add_argument("--shared", help="serve-target's --folder; default: its own, in /dev/shm")
    for name in ("packs", "rounds", "steps"):
        parser.add_argument(f"--{name}", type=int, help=f"default: {getattr(FULL, name)}")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--commit")
    parser.add_argument("--out", default=str(RESULTS))
    args = parser.parse_args()
    if args.tiny and args.out == str(RESULTS):
        raise SystemExit("--tiny measures nothing: name a folder with --out")
    return args


@contextmanager
def serve_target(args: argparse.Namespace, bench: Bench, usual: list[str], environment: dict[str, str]) -> Iterator[str]:
    """The url of a server whose states a trainer can have."""
    own = ["--engine-python", args.engine_python]
    own += ["--engine-pythonpath", args.engine_pythonpath] if args.engine_pythonpath else []
    own += ["--folder", args.shared] if args.shared else []
    command = [sys.executable, "-m", "fastdraft.cli", "serve-target", str(bench.target), *own]
    command += ["--port", str(args.port), *usual]
    with server(command, environment, args.port, bench.folder / "server.log") as url:
        yield url


@contextmanager
def plain_server(args: argparse.Namespace, bench: Bench, usual: list[str], environment: dict[str, str]) -> Iterator[str]:
    """The url of a vLLM that keeps no states."""
    command = [args.engine_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(bench.target), *usual]
    command += ["--port", str(args.port + 1)]
    environment = environment | {"PYTHONPATH": args.engine_pythonpath}
    with server(command, environment, args.port + 1, bench.folder / "plain.log") as url:
        yield url


def main() -> None:
    args = parse()
    until, sizes = time.monotonic() + args.seconds, TINY if args.tiny else FULL
    sizes = sizes._replace(**{name: value for name in ("packs", "rounds", "steps") if (value := getattr(args, name))})
    layers = 8 if args.tiny else args.layers
    asked = lambda part: part in args.parts and time.monotonic() < until  # noqa: E731
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        target = folder / "target"
        if {*args.parts} - {"links"}:
            write_target(target, sizes, layers)
            print("target written", flush=True)
        gpus = 1 if args.server_gpu is None else 2
        bench = Bench(folder, target, sizes, layers, args.commit, Path(args.out), args.engine_flags, gpus)
        environment = os.environ | ({} if args.server_gpu is None else {"CUDA_VISIBLE_DEVICES": args.server_gpu})
        usual = ["--enforce-eager", "--max-model-len", str(sizes.max_length + 1), *sizes.flags]
        usual += [f"--{flag}" for flag in args.engine_flags]
        if {"states", "answers", "train"} & set(args.parts):
            with serve_target(args, bench, usual, environment) as url:
                version = httpx.get(f"{url}/version").json()["version"]
                if "states" in args.parts:
                    bench.states(url, version)
                if asked("answers"):
                    bench.answers(url, version)
                if asked("train"):
                    bench.train("train", url, version)
        if asked("links"):
            bench.links()
        if asked("process"):
            bench.train("process", None, None)
            bench.forward()
        if asked("plain"):
            with plain_server(args, bench, usual, environment) as url:
                bench.plain(url, httpx.get(f"{url}/version").json()["version"])


if __name__ == "__main__":
    main()
