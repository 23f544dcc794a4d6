"""bench.served with a tiny target: each part runs to its row. The rates of a CPU measure nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

from cases import engine_place

PARTS = ("states", "answers", "train", "process", "links")


def test_every_part_writes_its_row(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bench.served", "--tiny", "--parts", *PARTS, "--rounds", "1", "--steps", "4"]
    command += ["--engine-python", engine_place("vllm", os.environ).python, "--shared", str(tmp_path / "shared")]
    command += ["--port", str(port), "--out", str(tmp_path / "rows")]
    machine = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, env=os.environ | machine, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    lines = [line for file in (tmp_path / "rows").iterdir() for line in file.read_text().splitlines()]
    rows = {row["op"]: row for row in map(json.loads, lines)}
    assert set(rows) == {f"served/{op}" for op in ("states", "answers", "train", "process", "forward", "links")}
    states, answers, trained = (rows[f"served/{op}"] for op in ("states", "answers", "train"))
    assert states["states_tokens_per_s"] > 0 and states["token_bytes"] == 4 * 64 * 4
    assert answers["share"] > 0 and answers["off"] < 1e-4 and answers["prompts_off"] < 1e-4
    assert 0 <= trained["waited"] <= 1 and trained["tokens_per_s"] > 0
