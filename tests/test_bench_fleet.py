"""The benchmark of several GPUs runs, tiny, on two processes, and writes a row for every part as it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_part_writes_its_rows(tmp_path):
    command = [sys.executable, "-m", "bench.fleet", "--tiny", "--out", str(tmp_path), "--worlds", "1", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "fleet.jsonl").read_text().splitlines()]
    parts = ["data", "target", "capture", "sequence", "tensor"]
    assert [(row["gpus"], row["part"]) for row in rows] == [(n, part) for n in (1, 2) for part in parts]
    rates = {(row["part"], row["gpus"]): row["tokens_per_s"] for row in rows}
    for row in rows[len(parts) :]:
        share = 2 if row["part"] == "target" else 1
        ratio = rates[row["part"], 2] / rates[row["part"], 1] / share
        assert abs(row["ratio_to_one"] - ratio) < 0.01 * ratio + 1e-3
