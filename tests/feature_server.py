"""A server of states as `fastdraft serve-target` starts one, without vLLM: transformers runs the target, and the protocol
is the connector's own."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fake_http import FakeHTTP, reply

from fastdraft.model.target_config import default_layers
from fastdraft.target.hf import load_target, load_tokenizer
from fastdraft.target.identity import expected_meta
from fastdraft.target.served.connector.fastdraft_handover import (
    client_of,
    hand_over,
    hand_over_error,
    open_folder,
    remove_dead,
    write_server,
)
from fastdraft.target.served.connector.fastdraft_wire import ERROR, STATES, Listener


class FeatureServer(FakeHTTP):
    """`act(server, handler, body)` is called before each request for states or an answer; True: it has answered itself."""

    def __init__(
        self, target_dir: Path, folder: Path, layers: tuple[int, ...] | None = None, far: bool = False, **changes: Any
    ) -> None:
        model = json.loads((target_dir / "config.json").read_text())
        n = model["num_hidden_layers"]
        layers = default_layers(n) if layers is None else layers
        boundaries = sorted({layer + 1 for layer in layers} | {n})
        meta = expected_meta(str(target_dir), False, layers, "fp32")
        self.about = {
            "instance": "first",
            "folder": str(folder),
            "vllm": "0.32.0",
            "weights": meta.weights,
            "config": meta.config,
            "boundaries": boundaries,
            "hidden_size": model["hidden_size"],
            "dtype": "float32",
            "max_model_len": 512,
            "states_port": None,
            "token": None,
        } | changes
        self.target = load_target(str(target_dir), torch.float32, "cpu", tuple(b - 1 for b in boundaries))
        self.model_lock = threading.Lock()
        self.tokenizer = load_tokenizer(str(target_dir))
        self.requests: list[dict] = []  # those for states of documents
        self.chats: list[dict] = []  # those for answers
        self.act: Callable[[FeatureServer, Any, dict], bool | None] = lambda *_: False
        self.listener: Listener | None = None
        self.far = far  # it takes trainers for those of another host
        self.start(**{})
        super().__init__()

    def start(self, **changes: Any) -> None:
        """What a process does at its start, a restarted one too."""
        self.about |= changes
        if self.far:
            self.listen()
            return
        open_folder(self.about["folder"])
        remove_dead(self.about["folder"])
        write_server(self.about["folder"], {"instance": self.about["instance"]})

    def listen(self) -> None:
        if self.listener is not None:
            self.listener.close()
        token = secrets.token_hex(16)
        self.listener = Listener("127.0.0.1", 0, token)
        self.about |= {"states_port": self.listener.port, "token": token}

    def get(self, handler) -> None:
        reply(handler, 200, json.dumps({"data": [{"id": "target"}]}))

    def post(self, handler, body: dict) -> None:
        asked = body.get("kv_transfer_params") or {}
        if handler.path == "/v1/chat/completions":
            self.chat(handler, body, asked)
            return
        if asked.get("describe"):
            reply(handler, 200, self.answer(body, self.about))
            return
        with self.lock:
            self.requests.append(body)
        if not self.act(self, handler, body):
            ids = body["prompt"]
            if asked.get("answer"):
                body["generated"] = self.generate(ids, body["max_tokens"], frozenset())
                ids = [*ids, *body["generated"]][:-1]
            self.states(asked["states"], ids)
            reply(handler, 200, self.answer(body, {"instance": self.about["instance"]}))

    def chat(self, handler, body: dict, asked: dict) -> None:
        """The target's greedy answer and, if asked for, the states of all that was run for it."""
        with self.lock:
            self.chats.append(body)
        if self.act(self, handler, body):
            return
        prompt = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        ids = [*prompt, *self.generate(prompt, body["max_tokens"], self.target.eos_ids)]
        if asked.get("answer"):
            self.states(asked["states"], ids[:-1])
        said = {"role": "assistant", "content": self.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)}
        reason = "stop" if ids[-1] in self.target.eos_ids else "length"
        choice = {"message": said, "finish_reason": reason, "token_ids": ids[len(prompt) :]}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids) - len(prompt)}
        params = {"instance": self.about["instance"]} if "states" in asked else None
        answer = {"choices": [choice], "usage": usage, "prompt_token_ids": list(prompt), "kv_transfer_params": params}
        reply(handler, 200, json.dumps(answer))

    def generate(self, prompt: list[int], max_tokens: int, ends: frozenset[int]) -> list[int]:
        """The target's greedy answer."""
        new: list[int] = []
        while len(new) < max_tokens and (not new or new[-1] not in ends):
            new.append(int(self.target.head.logits(self.run([*prompt, *new])[1][-1:]).argmax()))
        return new

    def answer(self, body: dict, params: dict | None) -> str:
        choice: dict[str, Any] = {"text": "", "token_ids": body.get("generated")}
        if "logprobs" in body:
            _, f = self.run(body["prompt"])
            top = self.target.head.logits(f[-1:])[0].log_softmax(-1).topk(body["logprobs"])
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            choice["logprobs"] = {"top_logprobs": [{f"token_id:{token}": value for token, value in pairs}]}
        usage = {"prompt_tokens": len(body["prompt"])}
        return json.dumps({"choices": [choice], "usage": usage, "kv_transfer_params": params})

    def states(self, name: str, ids: list[int]) -> None:
        rows, _ = self.run(ids)
        content = memoryview(rows.contiguous().view(torch.uint8).flatten().numpy())
        if self.far:
            self.listener.send(name, client_of(name), STATES, content)
        else:
            hand_over(self.about["folder"], name, content)

    def full(self, name: str) -> None:
        sentence = "[Errno 28] No space left on device"
        if self.far:
            self.listener.send(name, client_of(name), ERROR, memoryview(sentence.encode()))
        else:
            hand_over_error(self.about["folder"], name, sentence)

    def run(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:  # [T, S * Ht], [T, Ht]
        with self.model_lock:
            g, f = self.target.forward(torch.tensor([ids]))
        return g[0], f[0]
