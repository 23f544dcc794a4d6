"""A fake OpenAI-compatible server: the answer is a function of the request; faults are injected by the test."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer_to(body: dict) -> dict:
    """The choice that an undisturbed server gives, the same for the same messages and seed."""
    said = json.dumps([body["messages"], body.get("seed")], sort_keys=True)
    return {
        "message": {"role": "assistant", "content": hashlib.sha256(said.encode()).hexdigest()[:12]},
        "finish_reason": "stop",
    }


class FakeServer:
    """`fault(number, body)` says what happens to a request instead of an answer: None, or (status, headers, bytes), or a
    number of seconds to hang, or "disconnect". `choice(body)` makes the answer."""

    def __init__(self, fault: Callable = lambda number, body: None, choice: Callable = answer_to, delay_s: float = 0.0):
        self.fault, self.choice, self.delay_s = fault, choice, delay_s
        self.models: tuple[int, dict, bytes] = (200, {}, json.dumps({"data": [{"id": "tiny"}]}).encode())
        self.requests: list[dict] = []
        self.keys: set[str | None] = set()
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer waits 40 ms for the client to acknowledge its headers

            def do_GET(self):
                self.reply(*(outer.models if self.path == "/v1/models" else (404, {}, b"not here")))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.keys.add(self.headers["Authorization"])
                    outer.busy += 1
                    outer.most_busy = max(outer.most_busy, outer.busy)
                time.sleep(outer.delay_s)
                fault = outer.fault(number, body)
                if isinstance(fault, float):
                    time.sleep(fault)
                    fault = None
                if fault is None:
                    usage = {"completion_tokens": 5}
                    fault = 200, {}, json.dumps({"choices": [outer.choice(body)], "usage": usage}).encode()
                with outer.lock:
                    outer.busy -= 1
                if fault == "disconnect":
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.reply(*fault)

            def reply(self, status, headers, content):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_):  # the client went away
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
