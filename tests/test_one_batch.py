"""The files that a batch passes, counted by a profiler, and docs/one-batch.md, which is to name each of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import fastdraft
from fastdraft.model.eagle3.engine import TTTEngine
from fastdraft.train import train

PACKAGE = Path(fastdraft.__file__).parent
# Outside kernels/, where each file is one op. A change that needs more files for a batch is one that is harder to read.
MOST_FILES = 16


def test_a_batch_passes_the_files_that_the_page_names(make_config, monkeypatch):
    """Of one optimizer step of two packs on a CPU, between two looks at its numbers, in the loop's own thread."""
    passed: set[str] = set()

    def note(frame, event, argument) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            passed.add(path.relative_to(PACKAGE).as_posix())

    begin = TTTEngine.begin

    def profile_the_third(engine: TTTEngine, number: int) -> None:
        sys.setprofile(note if number == 3 else None)
        begin(engine, number)

    monkeypatch.setattr(TTTEngine, "begin", profile_the_third)
    try:
        train(make_config(**{"max_steps": 4, "metrics.log_every": 4, "checkpoint.every": 4, "eval.every": 4}))
    finally:
        sys.setprofile(None)
    beside_kernels = {file for file in passed if not file.startswith("kernels/")}
    assert {"train.py", "target/hf.py", "model/eagle3/engine.py", "optim.py"} <= beside_kernels
    assert len(beside_kernels) <= MOST_FILES, sorted(beside_kernels)
    page = (PACKAGE.parent / "docs" / "one-batch.md").read_text()
    every_step = page[page.index("## Every step") : page.index("## Now and then")]
    said = re.search(r"enters (\d+) files beside `kernels/`", every_step)
    assert said and int(said[1]) == len(beside_kernels), sorted(beside_kernels)
    unnamed = beside_kernels - set(re.findall(r"`([\w/]+\.py)`", every_step))
    assert not unnamed, f"docs/one-batch.md does not say what a batch does in {', '.join(sorted(unnamed))}"
