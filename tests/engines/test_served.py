"""A real vLLM as the target: its states, handed over by `fastdraft serve-target`, are those of transformers to rounding and
in the same order, through chunked prefill, a shared prefix cache and preemption, and a draft has the same losses."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from cases import engine_place
from hosts import Hosts
from safetensors.torch import load_file, save_file
from small_runs import documents, losses, same_documents
from test_target_families import build
from tiny import WORDS, make_tokenizer, refusal, save_answering, save_target, write_chats

from fastdraft.batch import Batch
from fastdraft.config import Config, parse_config
from fastdraft.run.draft import draft_shape
from fastdraft.run.inputs import open_source
from fastdraft.target.hf import load_target
from fastdraft.target.served.links import NotYet
from fastdraft.train import train

CPU = torch.device("cpu")
START_S = 400
RUNNING = "vllm:num_requests_running"
MACHINE = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # vLLM's CPU attention
# Granite scales attention's scores by 1 unless told otherwise. With weights as large as the others have, its attention is
# then so sharp that rounding grows from layer to layer.
GRANITE = {"attention_multiplier": 32**-0.5, "logits_scaling": 8.0, "initializer_range": 0.1}

# Sinks, windows, and experts whose width is a multiple of 32, as vLLM's CPU build wants it. The weights are smaller than
# others' for Granite's reason.
GPT_OSS = {"sliding_window": 16, "intermediate_size": 64, "initializer_range": 0.1}
# Gemma 2's shape: caps on attention's scores and on the logits, and windows. vLLM has no model of its own for it, and runs
# transformers' modules with its own attention.
VAULTGEMMA = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.5, "query_pre_attn_scalar": 32}
VAULTGEMMA |= {"sliding_window": 16, "initializer_range": 0.1}

# As published ones: YaRN, and latent states 512 wide.
MLA = {"hidden_size": 64, "num_attention_heads": 4, "kv_lora_rank": 512, "q_lora_rank": 32, "qk_rope_head_dim": 64}
MLA |= {"qk_nope_head_dim": 128, "v_head_dim": 128, "initializer_range": 0.1}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0}
YARN |= {"mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}

# name: how the target is made, and vLLM's further flags
TARGETS = {
    "dense": (lambda folder: save_target(folder, **WIDE), []),
    "tied": (lambda folder: save_target(folder, **WIDE, tie_word_embeddings=True), []),
    "tensor parallel": (lambda folder: save_target(folder, **WIDE | {"num_key_value_heads": 2}), ["-tp", "2"]),
    "experts": (lambda folder: save_family(folder, "qwen3_moe", **WIDE), []),
    "sliding windows": (lambda folder: save_family(folder, "mistral", **WIDE, sliding_window=16), []),
    "logit scale": (lambda folder: save_family(folder, "granite", **WIDE | GRANITE), []),
    "sinks": (lambda folder: save_family(folder, "gpt_oss", **WIDE | GPT_OSS), []),
    # On CPUs vLLM takes its prompts whole, and caches none.
    "latent attention": (
        lambda folder: save_family(folder, "deepseek_v2", **MLA, rope_parameters=YARN),
        ["--max-num-batched-tokens", "257"],
    ),
    "soft caps": (lambda folder: save_family(folder, "vaultgemma", **WIDE | VAULTGEMMA), []),
}


@dataclass(frozen=True)
class Rounding:
    """One scale for each row of a weight, and for each token one of its input, by compressed-tensors' names."""

    format: str
    kind: str
    dtype: torch.dtype
    largest_weight: int
    largest_input: int

    def __call__(self, x: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of `dtype`, and their scales: one for each row."""
        scale = x.abs().amax(-1, keepdim=True) / largest
        scaled = x / scale
        return (scaled if self.dtype.is_floating_point else scaled.round()).to(self.dtype), scale

    def config(self) -> dict:
        number = {"num_bits": 8, "type": self.kind, "symmetric": True}
        group = {"targets": ["Linear"], "weights": number | {"strategy": "channel", "dynamic": False}}
        group["input_activations"] = number | {"strategy": "token", "dynamic": True}
        return {"quant_method": "compressed-tensors", "format": self.format, "quantization_status": "compressed"} | {
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        }


# The int8 weights are 64 at most: on a CPU without VNNI oneDNN adds two products in 16 bits, and larger ones end at its
# limits.
INT8 = Rounding("int-quantized", "int", torch.int8, 64, 127)
FP8 = Rounding("float-quantized", "float", torch.float8_e4m3fn, 448, 448)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
AWQ |= {"modules_to_not_convert": ["lm_head"]}


def save_family(folder: Path, kind: str, **changes) -> Path:
    sizes = {"vocab_size": 192, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 2}
    build(kind, **sizes | changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_quantised(folder: Path, plain: Path, rounding: Rounding) -> Path:
    """A target whose layers are quantised; what these stand for replaces the plain ones."""
    shutil.copytree(plain, folder)
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    for name in [name for name in tensors if "proj" in name]:
        stored[name], scale = rounding(tensors[name], rounding.largest_weight)
        stored[f"{name}_scale"] = scale
        tensors[name] = stored[name].float() * scale
    return write_quantised(folder, plain, stored, tensors, rounding.config())


def save_awq(folder: Path, plain: Path) -> Path:
    """The same with AWQ's 4 bits: for each output one scale and one zero for all inputs, eight numbers in an int32."""
    shutil.copytree(plain, folder)
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    for name in [name for name in tensors if "proj" in name]:
        weight, base = stored.pop(name).T, name.removesuffix(".weight")
        groups = weight.unflatten(0, (-1, AWQ["group_size"]))  # [inputs / group, group, outputs]
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        scale = ((high - low) / 15).half()
        zero = (-low / scale.float()).round().clamp(0, 15)
        number = (groups / scale.float() + zero).round().clamp(0, 15)
        stored[f"{base}.qweight"], stored[f"{base}.qzeros"] = packed(number.flatten(0, 1)), packed(zero[:, 0])
        stored[f"{base}.scales"] = scale[:, 0].contiguous()
        tensors[name] = ((number - zero) * scale.float()).flatten(0, 1).T.contiguous()
    return write_quantised(folder, plain, stored, tensors, AWQ)


def packed(numbers: torch.Tensor) -> torch.Tensor:
    """[rows, columns] below 16 as int32 [rows, columns / 8], in AWQ's order."""
    eights = numbers.long().unflatten(1, (-1, 8))
    whole = sum(eights[..., column] << 4 * place for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    return torch.where(whole >= 2**31, whole - 2**32, whole).int().contiguous()


def write_quantised(folder: Path, plain: Path, stored: dict, tensors: dict, quantised: dict) -> Path:
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    return folder


@dataclass
class Running:
    url: str
    process: subprocess.Popen

    def metric(self, name: str) -> float:
        found = re.search(rf"^{name}{{[^}}]*}} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.M)
        return float(found[1])

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start(target: Path, folder: Path, flags: list[str], port: int | None = None) -> Running:
    """A server, when it is ready."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    python = engine_place("vllm", os.environ).python
    own = ["--engine-python", python, "--folder", str(folder / "shared")]
    usual = ["--port", str(port), "--enforce-eager", "--dtype", "float32", "--max-model-len", "257"]
    command = [sys.executable, "-m", "fastdraft.cli", "serve-target", str(target), *own, *usual, *flags]
    log = folder / "server.log"
    with log.open("a") as file:
        process = subprocess.Popen(
            command, env=os.environ | MACHINE, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    running = Running(f"http://127.0.0.1:{port}", process)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{running.url}/health").status_code == 200:
                return running
        time.sleep(0.5)
    running.kill()
    pytest.fail(log.read_text()[-3000:])


@contextmanager
def served(target: Path, folder: Path, flags: list[str]):
    before = set(os.listdir("/dev/shm"))
    running = start(target, folder, flags)
    try:
        yield running
    finally:
        running.kill()
        for name in set(os.listdir("/dev/shm")) - before:  # what vLLM leaves when it is killed
            if name.startswith(("psm_", "sem.mp-", "vllm_dist_")) and not _is_open(name):
                with suppress(FileNotFoundError):  # its maker has taken it away meanwhile
                    os.unlink(f"/dev/shm/{name}")
        shutil.rmtree(folder / "shared", ignore_errors=True)


def _is_open(name: str) -> bool:
    """Whether any process has a file of shared memory mapped: it may be another vLLM's. A semaphore is made under another
    name, by which its maker's map knows it, so the file's number is looked for."""
    with suppress(FileNotFoundError):
        number = str(os.stat(f"/dev/shm/{name}").st_ino)
        for file in Path("/proc").glob("[0-9]*/maps"):
            with suppress(OSError):
                fields = (line.split(maxsplit=5) for line in file.read_text().splitlines())
                if any(f[4] == number and f[-1].startswith("/dev/shm/") for f in fields):
                    return True
    return False


def config_of(target: Path, tmp_path: Path, **changes) -> Config:
    write_chats(tmp_path / "chats.jsonl", 40)
    tree = {
        "target": {"path": str(target), "dtype": "fp32", "timeout_s": START_S},
        "draft": {"overrides": {"draft_vocab_size": 64}},
        "data": {"paths": [str(tmp_path / "chats.jsonl")], "eval_fraction": 0.2, "max_length": 256, "pack_tokens": 512}
        | {"cache_dir": str(tmp_path / "cache"), "num_workers": 0},
        "optim": {"lr": 1e-2, "packs_per_step": 1},
        "eval": {"every": 4},
        "metrics": {"log_every": 1, "tensorboard": False},
        "run_dir": str(tmp_path / "run"),
        "ttt_length": 3,
        "max_steps": 4,
        "precision": "fp32",
        "device": "cpu",
    }
    for key, value in changes.items():
        section, _, leaf = key.rpartition(".")
        (tree[section] if section else tree)[leaf] = value
    return parse_config(tree, Config)


def packs() -> list[Batch]:
    """Documents of 1 to 256 tokens. Those of the second pack begin as the longest of the first, so that their beginnings
    are in the prefix cache; the third are the first again, of which all is."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 192, (256,), generator=g)
    first = [ids, *(torch.randint(3, 192, (n,), generator=g) for n in (1, 2, 15, 16, 17, 63, 64, 65, 200))]
    second = [torch.cat([ids[:n], torch.tensor([5, 9])]) for n in (1, 31, 32, 33, 100, 250)]
    return [pack(first), pack(second), pack(first)]


def pack(documents: list[torch.Tensor]) -> Batch:
    ids = torch.cat(documents)
    return Batch(ids, torch.ones(len(ids), dtype=torch.bool), tuple(map(len, documents)))


def assert_same_states(source, target_source, batches: list[Batch]) -> None:
    """Each row within 1e-3 of its own size, and the mean far below: random weights amplify the rounding of single rows, and
    another row or layer would be off by 1."""
    source.expect(batches)
    for batch in batches:
        _, theirs = source.capture(batch)
        _, ours = target_source.capture(batch)
        for a, b in ((theirs.g, ours.g), (theirs.f, ours.f)):
            off = (a - b).norm(dim=-1) / b.norm(dim=-1)
            assert off.max() < 1e-3 and off.mean() < 2e-5, (off.max(), off.mean(), off.argmax())


@contextmanager
def generating(server: Running, answers: int):
    """So many long answers at a time, for others than the trainer, until the block is left."""
    done = threading.Event()
    body = {"prompt": [5, 6, 7], "max_tokens": 180, "ignore_eos": True, "temperature": 1.0}

    def ask() -> None:
        while not done.is_set():
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).raise_for_status()

    threads = [threading.Thread(target=ask) for _ in range(answers)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_what_another_process_uses_is_left():
    """A semaphore that only its maker has open, as while a vLLM starts, and a block of shared memory until it is closed."""
    before = set(os.listdir("/dev/shm"))
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    block = SharedMemory(create=True, size=16)
    name = f"sem.{semaphore._semlock.name.removeprefix('/')}"
    assert {name, block.name} <= set(os.listdir("/dev/shm")) - before
    assert _is_open(name) and _is_open(block.name)
    block.close()
    assert not _is_open(block.name)
    block.unlink()


@pytest.mark.parametrize("name", TARGETS)
def test_states_and_losses_are_those_of_transformers(name, tmp_path):
    make, flags = TARGETS[name]
    target = make(tmp_path / "target")
    with served(target, tmp_path, ["--max-num-batched-tokens", "64", *flags]) as server:
        # Gemma's norms multiply by 1 + weight, which no draft's final norm can start from.
        more = {"draft.init": "random"} if name == "soft caps" else {}
        config = config_of(target, tmp_path, **{"target.url": server.url, "run_dir": str(tmp_path / "served")} | more)
        layers = draft_shape(config).layers
        here = config_of(target, tmp_path, **{"run_dir": str(tmp_path / "here")} | more)
        source = open_source(config, layers, CPU, [])
        assert_same_states(source, open_source(here, layers, CPU, []), packs())
        assert (server.metric("vllm:prefix_cache_hits_total") > 256) == (name != "latent attention")
        source.close()
        train(config)
        train(here)
    assert os.listdir(tmp_path).count("shared") == 0
    for a, b in zip(losses(tmp_path / "served"), losses(tmp_path / "here"), strict=True):
        assert a == pytest.approx(b, rel=2e-4)


def test_a_rope_that_vllms_build_for_cpus_computes_wrongly_is_refused(tmp_path):
    target = save_family(tmp_path / "target", "deepseek_v2", **MLA)
    with pytest.raises(pytest.fail.Exception):
        start(target, tmp_path, [])
    assert "rotates the queries wrongly" in (tmp_path / "server.log").read_text()


@pytest.mark.parametrize("rounding", [INT8, FP8], ids=["int8", "fp8"])
def test_a_quantised_target(tmp_path, rounding):
    """Layers in 8 bits, which transformers here cannot read: the states are those of the weights they stand for, with
    inputs rounded as vLLM rounds them, and a draft learns from them by the usual command."""

    def round_inputs(_module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        numbers, scale = rounding(inputs[0], rounding.largest_input)
        return numbers.float() * scale

    plain = save_target(tmp_path / "plain", **WIDE)
    target = save_quantised(tmp_path / "target", plain, rounding)
    with served(target, tmp_path, ["--max-num-batched-tokens", "64"]) as server:
        config = config_of(target, tmp_path, **{"target.url": server.url, "run_dir": str(tmp_path / "served")})
        here = config_of(plain, tmp_path, **{"run_dir": str(tmp_path / "here")})
        layers = draft_shape(config).layers
        source = open_source(config, layers, CPU, [])
        source.expect(packs())
        dequantised, rounded = (load_target(str(plain), torch.float32, "cpu", layers) for _ in range(2))
        for name, module in rounded.model.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(round_inputs)
        for batch in packs():
            theirs, ours, unrounded = source.capture(batch)[1], rounded.capture(batch), dequantised.capture(batch)
            for state in ("g", "f"):
                a, b, c = (getattr(features, state) for features in (theirs, ours, unrounded))
                off, without = ((a - x).norm(dim=-1) / x.norm(dim=-1) for x in (b, c))
                assert (
                    off.mean() < without.mean() / 4
                )  # an input near the middle of two int8 goes to one here, to the other there
            first = (theirs.g - ours.g)[:, :64].norm(dim=-1) / ours.g[:, :64].norm(
                dim=-1
            )  # of the first layer that is read
            assert first.median() < 1e-5
        source.close()
        train(config)
        train(here)
    for a, b in zip(losses(tmp_path / "served"), losses(tmp_path / "here"), strict=True):
        name = "loss" if "loss" in a else "eval/loss"
        assert a[name] == pytest.approx(b[name], rel=0.02 if rounding is INT8 else 0.1)


def test_awq(tmp_path):
    """4 bits, for which vLLM wants bf16: no further from the weights that these stand for, in fp32, than these in bf16."""
    sizes = WIDE | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    plain = save_target(tmp_path / "plain", **sizes)
    target = save_awq(tmp_path / "target", plain)
    with served(target, tmp_path, ["--max-num-batched-tokens", "64", "--dtype", "bfloat16"]) as server:
        config = config_of(target, tmp_path, **{"target.url": server.url, "target.dtype": "bf16"})
        layers = draft_shape(config).layers
        source = open_source(config, layers, CPU, [])
        source.expect(packs())
        exact, rounded = (load_target(str(plain), dtype, "cpu", layers) for dtype in (torch.float32, torch.bfloat16))
        for batch in packs():
            theirs, ours, truth = source.capture(batch)[1], rounded.capture(batch), exact.capture(batch)
            for state in ("g", "f"):
                a, b, c = (getattr(features, state).float() for features in (theirs, ours, truth))
                off, usual = ((x - c).norm(dim=-1).mean() / c.norm(dim=-1).mean() for x in (a, b))
                assert off < 1.2 * usual
        source.close()


def test_answers_and_features_in_one_pass(tmp_path):
    """Answers decoded side by side in a cache that is too small for them, so that some are preempted: the store is what a
    capture of the same answers makes, and most of it came with the answers."""
    target = save_answering(tmp_path / "target", **WIDE)
    questions = [" ".join(WORDS[7 * i : 7 * i + 1 + i % 20]) for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    tree = config_of(target, tmp_path, **{"data.paths": [str(tmp_path / "out.jsonl")]}).model_dump()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    flags = ["--max-num-batched-tokens", "64", "--num-gpu-blocks-override", "13", "--block-size", "32"]
    with served(target, tmp_path, flags) as server:
        command = [sys.executable, "-m", "fastdraft.cli"]
        more = ["--url", server.url, "--capture", "store", "--config", "run.yaml"]
        more += ["--max-new-tokens", "120", "--extra-body", '{"min_tokens": 100}']
        regenerate = [*command, "data", "regenerate", "prompts.jsonl", "--out", str(tmp_path / "out.jsonl"), *more]
        done = subprocess.run(regenerate, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        came = int(re.search(r"store: (\d+) documents came with", done.stdout)[1])
        assert came > 3 and "without their states" not in done.stdout, done.stdout
        assert server.metric("vllm:num_preemptions_total") > 0
        capture = [*command, "features", "capture", "run.yaml", "captured", "--url", server.url]
        subprocess.run(capture, cwd=tmp_path, check=True)
        assert os.listdir(tmp_path / "shared") == ["server.json"]
    same_documents(tmp_path / "store", tmp_path / "captured")
    assert len(documents(tmp_path / "store")) == len(questions)


def test_however_an_answer_ends(tmp_path):
    """By its length, at an eos or another id, at a string, or by a client that hangs up: the states come for all that was
    run, or the reason why not is said at once; nothing stays behind, and the server's blocks are free again."""
    target = save_answering(tmp_path / "target", **WIDE)
    with served(target, tmp_path, ["--max-num-batched-tokens", "64"]) as server:
        config = config_of(target, tmp_path, **{"target.url": server.url})
        layers = draft_shape(config).layers
        source = open_source(config, layers, CPU, [])
        here = load_target(str(target), torch.float32, "cpu", layers)

        async def end(hangs_up: bool = False, **body) -> tuple[dict | None, torch.Tensor | str]:
            """The answer's choice, and its states or the sentence about them. A client that hangs up does so while the
            server answers, and has no choice."""
            asked = await source.ask_answer(server.url)
            body |= {"model": source.servers[0].model, "messages": [{"role": "user", "content": "ba be"}], **asked.fields}
            answer = None
            async with httpx.AsyncClient(timeout=START_S) as client:
                request = asyncio.create_task(client.post(f"{server.url}/v1/chat/completions", json=body))
                while hangs_up and not request.done() and not await asyncio.to_thread(server.metric, RUNNING):
                    await asyncio.sleep(0.01)
                if hangs_up:
                    request.cancel()
                    with suppress(asyncio.CancelledError):
                        await request
                else:
                    answer = (await request).json()
            choice, begin = answer and answer["choices"][0], time.monotonic()
            try:
                rows = await source.take_answer(asked, answer)
            except NotYet as error:
                assert time.monotonic() - begin < 5, "told only after a wait"
                return choice, str(error)
            ids = [*answer["prompt_token_ids"], *choice["token_ids"]][:-1]
            theirs, ours = source.features(rows), here.forward(torch.tensor([ids]))
            torch.testing.assert_close(theirs.g, ours[0][0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(theirs.f, ours[1][0], rtol=1e-3, atol=1e-4)
            return choice, rows

        def whole(reason: str, **body) -> int | None:
            """The id at which it ended, if it is not the eos."""
            choice, rows = asyncio.run(end(**body))
            assert choice["finish_reason"] == reason and isinstance(rows, torch.Tensor), (choice, rows)
            return choice["stop_reason"]

        whole("length", max_tokens=9, min_tokens=9)
        whole("length", max_tokens=1, min_tokens=1)
        assert whole("stop", max_tokens=200) is None
        others = [*range(3, 192)]
        assert whole("stop", max_tokens=200, min_tokens=3, ignore_eos=True, stop_token_ids=others) in others
        choice, said = asyncio.run(end(max_tokens=200, min_tokens=20, ignore_eos=True, stop=["a", "e", "o", "u"]))
        assert choice["stop_reason"] in ("a", "e", "o", "u")
        assert f"ended an answer at the string {choice['stop_reason']!r}, where vLLM drops the states" in said
        assert source.servers[0].about is not None, "a server that answers so was not restarted"
        choice, said = asyncio.run(end(hangs_up=True, max_tokens=400, min_tokens=400))
        assert choice is None and said.endswith("gave no answer")
        whole("length", max_tokens=9, min_tokens=9)
        deadline = time.monotonic() + 30
        while server.metric(RUNNING) or server.metric("vllm:kv_cache_usage_perc"):
            assert time.monotonic() < deadline, "blocks of an answer that ended are held"
            time.sleep(0.1)
        source.close()
        assert os.listdir(tmp_path / "shared") == ["server.json"]


def test_answers_and_features_from_several_processes_over_tcp(tmp_path, monkeypatch, fastdraft):
    """A server of two tensor-parallel processes, and a client on another host. When they draw, the two processes of vLLM's
    build for CPUs go on with different tokens while states are kept, and that is seen before the first question."""
    target = save_answering(tmp_path / "target", **WIDE | {"num_key_value_heads": 2})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{w} ba"}) + "\n" for w in WORDS[:12]))
    tree = config_of(target, tmp_path, **{"data.paths": [str(tmp_path / "out.jsonl")]}).model_dump()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    flags = ["--max-num-batched-tokens", "64", "-tp", "2", "--states-port", str(port)]
    with served(target, tmp_path, flags) as server:
        monkeypatch.setattr("fastdraft.target.served.source.read_server", lambda folder: {})
        more = ["--url", server.url, "--capture", tmp_path / "store", "--config", tmp_path / "run.yaml"]
        more += ["--out", tmp_path / "out.jsonl", "--max-new-tokens", "60"]
        more += ["--extra-body", '{"min_tokens": 3}']
        drawn = fastdraft("data", "regenerate", tmp_path / "prompts.jsonl", *more, "--temperature", "1")
        assert "away from those of the same ids as a document" in refusal(drawn)
        code, printed, err = fastdraft("data", "regenerate", tmp_path / "prompts.jsonl", *more, "--temperature", "0")
        assert code == 0, err
        assert f"states over TCP from 127.0.0.1:{port}" in printed and "without their states" not in printed
        assert int(re.search(r"store: (\d+) documents came with", printed)[1]) > 3
        assert os.listdir(tmp_path / "shared") == ["server.json"]
    code, _, err = fastdraft("features", "capture", tmp_path / "run.yaml", tmp_path / "captured")
    assert code == 0, err
    same_documents(tmp_path / "store", tmp_path / "captured")
    assert len(documents(tmp_path / "store")) == 12


def test_states_over_tcp(tmp_path, monkeypatch):
    """As a trainer on another host has them: it does not see the server's folder."""
    target = save_target(tmp_path / "target", **WIDE)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    with served(target, tmp_path, ["--max-num-batched-tokens", "64", "--states-port", str(port)]) as server:
        config = config_of(target, tmp_path, **{"target.url": server.url})
        layers = draft_shape(config).layers
        monkeypatch.setattr("fastdraft.target.served.source.read_server", lambda folder: {})
        source = open_source(config, layers, CPU, [])
        assert f"states over TCP from 127.0.0.1:{port}" in source.notes[0]
        assert_same_states(source, open_source(config_of(target, tmp_path), layers, CPU, []), packs())
        source.close()
        assert os.listdir(tmp_path / "shared") == ["server.json"]


def test_a_server_on_another_host(tmp_path, monkeypatch):
    """Shared memory of its own, and a network between, which is away for a while: the losses are those of a target in the
    process."""
    target = save_target(tmp_path / "target", **WIDE)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config_of(target, tmp_path, max_steps=30).model_dump(mode="json")))
    command = [sys.executable, "-m", "fastdraft.cli"]
    subprocess.run([*command, "train", file, f"run_dir={tmp_path / 'here'}"], check=True, capture_output=True)
    for name, value in MACHINE.items():
        monkeypatch.setenv(name, value)
    python = engine_place("vllm", os.environ).python
    usual = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "257", "--states-port", "8100"]
    with Hosts(tmp_path) as hosts:
        hosts.start("a", *command, "serve-target", str(target), "--engine-python", python, *usual)
        hosts.wait_until("a", "Application startup complete", START_S)
        there = ["target.url=http://a:8000", f"run_dir={tmp_path / 'there'}"]
        training = hosts.start("b", *command, "train", str(file), *there)
        hosts.wait_until("b", "step 3/")
        hosts.wire("down")
        time.sleep(3)
        assert "step 30/" not in hosts.said_by("b"), "the run had ended before the network went"
        hosts.wire("up")
        assert training.wait(timeout=START_S) == 0, hosts.said_by("b")[-3000:]
        assert "states over TCP from a:8100" in hosts.said_by("b")
    for ours, theirs in zip(losses(tmp_path / "here"), losses(tmp_path / "there"), strict=True):
        for name in {"loss", "eval/loss"} & ours.keys():
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3), ours["step"]


def test_preempted_prompts_and_a_server_that_is_killed(tmp_path):
    """A cache too small for the documents and for the answers that the server generates beside them, which take blocks from
    half-read documents; then the server is killed under them, and comes back."""
    target = save_target(tmp_path / "target", **WIDE)
    flags = ["--max-num-batched-tokens", "64", "--num-gpu-blocks-override", "13", "--block-size", "32"]
    with served(target, tmp_path, flags) as server:
        config = config_of(target, tmp_path, **{"target.url": server.url})
        layers = draft_shape(config).layers
        source = open_source(config, layers, CPU, [])
        here = open_source(config_of(target, tmp_path), layers, CPU, [])
        g = torch.Generator().manual_seed(1)
        many = [pack([torch.randint(3, 192, (n,), generator=g) for n in (200, 180, 150, 220, 90, 256)]) for _ in range(6)]
        with generating(server, 3):
            for _ in range(10):  # whether an answer meets a half-read document is the machine's to say
                assert_same_states(source, here, many)
                if server.metric("vllm:num_preemptions_total") > 0:
                    break
        assert server.metric("vllm:num_preemptions_total") > 0

        source.expect(many)
        server.kill()
        server.process = start(target, tmp_path, flags, int(server.url.rsplit(":", 1)[1])).process
        for batch in many:
            _, theirs = source.capture(batch)
            _, ours = here.capture(batch)
            torch.testing.assert_close(theirs.f, ours.f, rtol=1e-3, atol=1e-4)
        assert source.counts()["requests_repeated"] > 0
        source.close()
        assert os.listdir(tmp_path / "shared") == ["server.json"]
