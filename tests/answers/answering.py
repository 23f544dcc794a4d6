"""A fake OpenAI-compatible server: the answer is a function of the request; faults are injected by the test."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable

from fake_http import FakeHTTP, reply


def answer_to(body: dict) -> dict:
    """The choice that an undisturbed server gives, the same for the same messages and seed."""
    said = json.dumps([body["messages"], body.get("seed")], sort_keys=True)
    return {
        "message": {"role": "assistant", "content": hashlib.sha256(said.encode()).hexdigest()[:12]},
        "finish_reason": "stop",
    }


class FakeServer(FakeHTTP):
    """`fault(number, body)` says what happens to a request instead of an answer: None, or (status, headers, bytes), or a
    number of seconds to hang, or "disconnect". `choice(body)` makes the answer."""

    def __init__(self, fault: Callable = lambda number, body: None, choice: Callable = answer_to, delay_s: float = 0.0):
        self.fault, self.choice, self.delay_s = fault, choice, delay_s
        self.models: tuple[int, dict, bytes] = (200, {}, json.dumps({"data": [{"id": "tiny"}]}).encode())
        self.requests: list[dict] = []
        self.keys: set[str | None] = set()
        self.busy = self.most_busy = 0
        super().__init__()
        self.url += "/v1"

    def get(self, handler) -> None:
        status, headers, content = self.models if handler.path == "/v1/models" else (404, {}, b"not here")
        reply(handler, status, content, headers)

    def post(self, handler, body: dict) -> None:
        with self.lock:
            number = len(self.requests)
            self.requests.append(body)
            self.keys.add(handler.headers["Authorization"])
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        time.sleep(self.delay_s)
        fault = self.fault(number, body)
        if isinstance(fault, float):
            time.sleep(fault)
            fault = None
        if fault is None:
            usage = {"completion_tokens": 5}
            fault = 200, {}, json.dumps({"choices": [self.choice(body)], "usage": usage}).encode()
        with self.lock:
            self.busy -= 1
        if fault == "disconnect":
            handler.close_connection = True
            handler.connection.close()
        else:
            status, headers, content = fault
            reply(handler, status, content, headers)
