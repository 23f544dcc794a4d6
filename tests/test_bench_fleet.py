"""The benchmark of several GPUs runs, tiny, on two processes, and writes a row for every part as it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.peers import torch_flash
from bench.trace import Kernel, shares

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


@pytest.mark.slow
def test_calls_that_share_notes_compare_with_one_another(tmp_path):
    """One call of one process, another of two with larger chunks, which the row names."""
    command = [sys.executable, "-m", "bench.fleet", "--tiny", "--parts", "tensor", "--rounds", "1", "--out", str(tmp_path)]
    for more in (["--worlds", "1"], ["--worlds", "2", "--chunk-rows", "16"]):
        call = [*command, "--notes", str(tmp_path / "notes"), *more]
        done = subprocess.run(call, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads(line) for line in (tmp_path / "fleet.jsonl").read_text().splitlines())
    assert "chunk_rows" not in one and two["chunk_rows"] == 16
    ratio = two["tokens_per_s"] / one["tokens_per_s"]
    assert abs(two["ratio_to_one"] - ratio) < 0.01 * ratio + 1e-3


def test_time_counts_once_and_is_exposed_where_only_nccl_runs():
    kernels = [
        Kernel("gemm", 0.0, 4.0),
        Kernel("ncclDevKernel_AllGather_RING_LL(args)", 3.0, 6.0),  # one second under the product, two alone
        Kernel("norm", 5.5, 7.0),  # half of a second of it under the sum
        Kernel("gemm", 6.5, 8.0),  # another stream
        Kernel("ncclDevKernel_AllReduce_Sum_f32(args)", 9.0, 10.0),  # a second of nothing, then alone
        Kernel("ncclDevKernel_AllReduce_Sum_f32(args)", 9.5, 9.75),  # another group, at the same time
    ]
    found = shares(reversed(kernels))
    assert (found.span, found.compute, found.nccl) == (10.0, 6.5, 4.0)
    assert (found.exposed, found.idle, found.launches) == (2.5, 1.0, 6)
    assert found.collectives == {
        "ncclDevKernel_AllGather_RING_LL": (1, 3.0, 1.5),
        "ncclDevKernel_AllReduce_Sum_f32": (2, 1.25, 1.25),
    }
    assert found.kernels == {"gemm": (2, 5.5), "norm": (1, 1.5)}
    assert found.rounded()["kernels"]["gemm"] == [2, 5500.0]


def test_a_trace_without_kernels_is_refused():
    with pytest.raises(ValueError, match="has no kernel of a GPU"):
        shares([])


@pytest.mark.skipif("AUTOMODEL_DIR" not in os.environ, reason="AUTOMODEL_DIR does not name a checkout of NeMo Automodel")
def test_automodel_agrees(tmp_path):
    """Both trainers' first losses in fp32, of packs with two documents and with masks."""
    command = [sys.executable, "-m", "bench.peers.automodel", "--checkout", os.environ["AUTOMODEL_DIR"], "--tiny"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--rounds", "1", "--out", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, peer = (json.loads(line) for line in (tmp_path / "fleet.jsonl").read_text().splitlines())
    assert (ours["provider"], peer["provider"]) == ("ours", "automodel")
    assert ours["first_losses"] == pytest.approx(peer["first_losses"], abs=2e-6)
    assert len(set(ours["first_losses"])) == 2


@pytest.mark.skipif("AUTOMODEL_DIR" not in os.environ, reason="AUTOMODEL_DIR does not name a checkout of NeMo Automodel")
def test_automodel_agrees_where_processes_share_a_pack(tmp_path):
    """Our dist.sequence and both of its rings, on two processes in fp32."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "bench.peers.automodel", "--checkout", os.environ["AUTOMODEL_DIR"], "--tiny"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command += ["--rounds", "1", "--packs", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "fleet.jsonl").read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["ours", "automodel", "automodel-zigzag"]
    for row in rows[1:]:
        assert row["first_losses"] == pytest.approx(rows[0]["first_losses"], abs=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_what_stands_in_for_flash_attn_attends_as_a_softmax_does(causal):
    """Forward, and the backward of a row's part of its keys, for which it is given the softmax over all."""
    queries, keys = 5, 5 if causal else 7
    generator = torch.Generator().manual_seed(0)
    size = {"q": queries, "k": keys, "v": keys, "dout": queries, "k2": 3, "v2": 3}
    x = {name: torch.randn(n, 2, 8, dtype=torch.float64, generator=generator) for name, n in size.items()}
    q, k, v = (x[name].clone().requires_grad_() for name in "qkv")
    args, scale = (0.0, 0.3, causal, -1, -1, 0.0, None), 0.3
    cu, most = [torch.tensor([0, n]) for n in (queries, keys)], (queries, keys)

    def scores(k):
        return torch.einsum("shd,lhd->hsl", q, k) * scale

    first = scores(k).masked_fill(torch.ones(queries, keys).triu(1).bool() if causal else torch.tensor(False), -torch.inf)
    out, lse, *_ = torch_flash._flash_attn_varlen_forward(x["q"], x["k"], x["v"], *cu, *most, *args, False)
    assert torch.allclose(lse.double(), first.logsumexp(-1), rtol=1e-6)
    assert torch.allclose(out, torch.einsum("hsl,lhd->shd", first.softmax(-1), v), rtol=1e-6)

    both = torch.cat([first, scores(x["k2"])], -1)
    merged = torch.einsum("hsl,lhd->shd", both.softmax(-1), torch.cat([v, x["v2"]]))
    dq_of_others = torch.autograd.grad(
        torch.einsum("hsl,lhd->shd", torch.cat([first.detach(), scores(x["k2"])], -1).softmax(-1), torch.cat([v, x["v2"]])),
        q,
        x["dout"],
    )[0]
    expected = torch.autograd.grad(merged, (q, k, v), x["dout"])
    found = [torch.empty_like(x[name]) for name in "qkv"]
    joint = x["dout"], x["q"], x["k"], x["v"], merged.detach(), both.logsumexp(-1).detach()
    torch_flash._flash_attn_varlen_backward(*joint, *found, *cu, *most, *args, False, None, False)
    for got, right in zip(found, (expected[0] - dq_of_others, *expected[1:]), strict=True):
        assert torch.allclose(got, right, rtol=1e-5, atol=1e-8)


def test_a_folder_without_automodel_is_refused(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench.peers.automodel",
        "--checkout",
        str(tmp_path),
        "--tiny",
        "--providers",
        "automodel",
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1 and "has no folder nemo_automodel; --checkout needs" in done.stderr
