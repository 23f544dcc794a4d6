"""The performance page: what its numbers come from, what it leaves out, and that the committed one is that of the rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bench.performance import Steps, page, plots, read

GPU = "NVIDIA H100 80GB HBM3"
GIB = 2**30


def step(tokens: int, us: float, provider: str = "fastdraft", pattern: str = "live", **more) -> dict:
    memory = {"weights_optimizer": 10, "inputs": 1, "per_token": 1, "transient": 3, "transient_model": 2, "peak": 15}
    row = {
        "op": "step",
        "gpu": GPU,
        "dtype": "bf16",
        "provider": provider,
        "shape": {"model": "llama-3.1-8b", "tokens": tokens, "pattern": pattern, "T": 7},
        "us_per_token": us,
        "p20": us - 0.1,
        "p80": us + 0.2,
        "model_us_per_token": us - 1,
        "mfu": 0.5,
        "pct_of_gemm": 60.0,
        "pct_of_sustained_gemm": 80.0,
        "tokens_per_s": round(1e6 / us),
        "useful_tokens_per_s": round(0.7e6 / us),
        "memory": {name: size * GIB for name, size in memory.items()},
        "first_step_s": 12.5,
        "first_step": "cold",
        "kernels": 400,
        "syncs": 2,
    }
    return row | more


def block_step(us: float, provider: str = "fastdraft", **more) -> dict:
    row = step(8192, us, provider)
    row |= {"op": "block_step", "shape": {"model": "qwen3-8b", "tokens": 8192, "pattern": "live", "B": 16, "anchors": 512}}
    row |= {"us_per_row": us, "model_us_per_row": us - 1, "model_us_per_trained_token": us + 0.5}
    return row | more


def kernel(us: float, provider: str = "fastdraft") -> dict:
    return {
        "op": "teacher",
        "gpu": GPU,
        "dtype": "bf16",
        "provider": provider,
        "shape": {"n": 4096},
        "us": us,
        "bytes": 10**9,
        "flops": 10**12,
        "pct_of_roof": 80.0,
    }


def cells(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_newest_rows_beside_the_peer_of_the_same_run():
    rows = [step(2048, 40.0), step(2048, 32.0), step(2048, 48.0, "specforge"), step(2048, 30.0)]
    steps = Steps(rows, GPU)
    line = cells(steps.live(), "Llama-3.1-8B | 2k")
    assert line == ["Llama-3.1-8B", "2k", "30.0 (29.9-30.2)", "29.0", "50.0", "60.0", "80.0", "48.0", "1.50"]  # 48 / 32
    assert cells(steps.goals(), "1.7 times SpecForge at 2k")[1] == "1.52"  # 47 / 31
    mfu = cells(steps.goals(), "65 % MFU")[1]
    assert mfu == "50.0 % at 2k; 8192^3 products reach 62 % in their second second"  # 50 / 0.8
    assert cells(steps.memory(), "Llama")[2:] == ["10.0", "1.0", "1.0", "3.0", "15.0", "3.0", "15.0"]
    assert cells(steps.launches(), "Llama")[2:] == ["12.5 (cold)", "400", "2", "12.5", "400", "2"]


def test_the_peers_best_batching_counts():
    rows = [
        step(8192, 30.0, pattern="chats"),
        step(8192, 90.0, "specforge, 1 a batch", "chats"),
        step(8192, 75.0, "specforge, 4 a batch", "chats"),
    ]
    assert cells(Steps(rows, GPU).chats(), "Llama")[2:] == ["23,333", "33,333", "50.0", "9,333", "4 a batch", "2.50"]


def test_a_peer_out_of_memory():
    peer = {k: v for k, v in step(32768, 1.0, "specforge").items() if "us" not in k and k != "memory"}
    text = page([step(32768, 30.0), peer | {"failed": "out of memory: 80 GiB"}])
    assert cells(text, "Llama-3.1-8B | 32k | 30.0")[-2:] == ["out of memory", ""]


def test_what_has_no_rows_is_left_out():
    assert page([]).count("#") == 1
    assert "Kernels" not in page([step(2048, 30.0)]) and "### Real chats" not in page([step(2048, 30.0)])
    text = page([kernel(1000.0), kernel(2500.0, "torch")])
    assert "draft step" not in text
    assert cells(text, "teacher")[2:] == ["1,000", "1,000", "1.00", "80", "torch 2,500"]


def test_other_hardware_and_settings_are_no_part_of_a_table():
    rows = [step(2048, 30.0), step(2048, 1.0, gpu="Other"), step(2048, 1.0, dtype="fp32"), step(2048, 1.0, gpu=None)]
    rows[0]["shape"] = rows[0]["shape"] | {"chunk_rows": 7}
    assert Steps(rows, GPU).ours == {}


def test_blocks_stand_beside_each_peer_of_the_same_run():
    rows = [
        block_step(20.0),
        block_step(30.0, "specforge"),
        block_step(16.0),
        block_step(48.0, "speculators", failed="out of memory: 80 GiB"),
        block_step(15.0),
        block_step(1.0, dtype="fp32"),
        block_step(1.0, "reference"),
    ]
    text = page(rows)
    assert text.index("## The step of block drafts") < text.index("### Blocks: time")
    line = cells(text, "DFlash of Qwen3-8B, B 16 | 8k live")
    assert line[2:7] == ["15.0 (14.9-15.2)", "14.0", "15.5", "50.0", "80.0"]
    assert line[7:] == ["30.0", "1.50 / 1.53", "out of memory", ""]  # 30 / 20, 29 / 19
    memory = text[text.index("### Blocks: memory") :]
    assert cells(memory, "DFlash of Qwen3-8B")[2:] == [
        *("10.0", "1.0", "3.0", "15.0", "12.5 (cold)", "400", "2"),
        *("3.0", "12.5, 400, 2", "out of memory", "out of memory"),
    ]


def test_a_method_of_blocks_has_lines_of_its_own():
    spark = block_step(16.0)
    spark["shape"] = spark["shape"] | {"method": "dspark"}
    theirs = block_step(33.0, "specforge", shape=spark["shape"])
    text = page([spark, block_step(15.0), block_step(30.0, "specforge"), theirs])
    assert text.index("| DFlash of Qwen3-8B, B 16 |") < text.index("| DSpark of Qwen3-8B, B 16 |")
    assert cells(text, "DFlash of Qwen3-8B")[8] == "2.00 / 2.07" and cells(text, "DSpark of Qwen3-8B")[8] == "2.06 / 2.13"


def test_plots_are_small_and_the_same_twice(tmp_path):
    rows = [step(2048, 40.0), step(8192, 30.0), step(2048, 48.0, "specforge"), kernel(1000.0)]
    plots(rows, tmp_path / "a")
    plots(rows, tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["roofline-h100.svg", "step-memory-h100.svg", "step-time-h100.svg"]
    for name in names:
        data = (tmp_path / "a" / name).read_bytes()
        assert data == (tmp_path / "b" / name).read_bytes() and len(data) < 60_000
    for target in re.findall(r"\]\(img/(.*?)\)", page(rows)):
        assert target in names


def test_rows_of_a_kernel_that_left_csrc_are_shown_no_more(tmp_path):
    """csrc has a kernel of linear_kl and none of swiglu."""
    for op in ("linear_kl/kl", "swiglu/fwd"):
        lines = [json.dumps(kernel(us, provider) | {"op": op}) for us, provider in ((1000.0, "fastdraft"), (900.0, "cuda"))]
        (tmp_path / f"{op.split('/')[0]}.jsonl").write_text("\n".join(lines))
    text = page(read(tmp_path))
    assert cells(text, "linear_kl/kl")[-1] == "cuda 900" and cells(text, "swiglu/fwd")[-1] == ""


def test_the_committed_page_has_the_numbers_of_the_rows():
    """If this fails: python -m bench.performance, and commit what it writes."""
    numbers = lambda text: re.findall(r"\d[\d,.]*", text)  # noqa: E731
    committed = Path("docs/performance.md").read_text()
    assert numbers(committed) == numbers(page(read(Path("bench/results"))))
    assert all(Path("docs", target).exists() for target in re.findall(r"\]\((img/.*?)\)", committed))
