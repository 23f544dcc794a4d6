"""The benchmark gate over a small repository of its own: fine, missing, stale, slower, failed, explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.gate import problems
from bench.sources import files, source

ROW = {"date": "2026-01-01", "commit": "abc", "gpu": "G", "dtype": "bf16", "shape": {"n": 1}, "provider": "fastdraft"}


@pytest.fixture
def repo(tmp_path) -> Path:
    for name, text in {
        "fastdraft/kernels/norm.py": "tl.program_id(0)",
        "fastdraft/kernels/plan.py": "no kernel here",
        "fastdraft/model/ttt.py": "engine",
        "fastdraft/optim.py": "optimizer",
        "bench/kernels/bench_norm.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write(tmp_path, op="norm/fwd", us=10.0)
    write(tmp_path, op="norm/bwd", us=20.0)
    write(tmp_path, op="step", us_per_token=30.0)
    return tmp_path


def write(repo: Path, **row) -> None:
    op = row["op"].split("/")[0]
    path = repo / f"bench/results/{op}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(ROW | {"source": source(op, repo)} | row) + "\n")


def the_problem(repo: Path) -> str:
    found = problems(repo)
    assert len(found) == 1, found
    return found[0]


def test_fine(repo):
    write(repo, op="norm/fwd", us=10.4)
    write(repo, op="step", us_per_token=29.0)
    assert problems(repo) == []


@pytest.mark.parametrize("changed", ["fastdraft/model/ttt.py", "fastdraft/kernels/plan.py", "fastdraft/optim.py"])
def test_the_engine_changed(repo, changed):
    (repo / changed).write_text("changed")
    assert the_problem(repo).startswith("step: the source changed since fastdraft's newest row (2026-01-01, abc)")
    write(repo, op="step", us_per_token=30.0)
    assert problems(repo) == []


def test_a_kernel_changed(repo):
    """Both of its ops need a new row, and the step that uses it."""
    (repo / "fastdraft/kernels/norm.py").write_text("tl.program_id(1)")
    assert [p.split(":")[0] for p in problems(repo)] == ["norm/fwd", "norm/bwd", "step"]
    write(repo, op="norm/fwd", us=10.0)
    write(repo, op="step", us_per_token=30.0)
    assert the_problem(repo).startswith("norm/bwd")


def test_rows_are_missing(repo):
    (repo / "bench/results/norm.jsonl").unlink()
    assert the_problem(repo).startswith("norm: no row of fastdraft")
    write(repo, op="norm/fwd", us=1.0, provider="torch")
    assert the_problem(repo).startswith("norm: no row of fastdraft")


def test_a_kernel_in_csrc_is_judged_beside_tritons(repo):
    (repo / "csrc").mkdir()
    (repo / "csrc/norm.cu").write_text("__global__")
    for op in ("norm/fwd", "norm/bwd"):
        write(repo, op=op, us=10.0)
    write(repo, op="step", us_per_token=30.0)
    assert the_problem(repo).startswith("norm: no row of cuda in bench/results/norm.jsonl")
    write(repo, op="norm/fwd", us=8.0, provider="cuda")
    assert problems(repo) == []
    write(repo, op="norm/fwd", us=8.0, provider="cuda", source="another")
    assert the_problem(repo).startswith("norm/fwd: the source changed since cuda's newest row")
    write(repo, op="norm/fwd", us=9.0, provider="cuda")
    assert the_problem(repo).startswith('norm/fwd {"n": 1}, cuda, on G: 9 us, was 8')


def test_rows_of_a_kernel_that_left_csrc_are_judged_no_more(repo):
    write(repo, op="norm/fwd", us=8.0, provider="cuda")
    write(repo, op="norm/fwd", us=9.0, provider="cuda", source="another")
    assert problems(repo) == []


def test_a_kernel_without_a_benchmark(repo):
    (repo / "bench/kernels/bench_norm.py").unlink()
    assert the_problem(repo) == "norm: no benchmark; add bench/kernels/bench_norm.py"


def test_slower(repo):
    write(repo, op="norm/bwd", us=21.2)
    assert the_problem(repo).startswith('norm/bwd {"n": 1}, fastdraft, on G: 21.2 us, was 20 (2026-01-01, abc)')
    write(repo, op="norm/bwd", us=21.5)  # is compared with the row before it
    assert problems(repo) == []


@pytest.mark.parametrize("other", [{"gpu": "H"}, {"shape": {"n": 2}}, {"provider": "torch"}, {"dtype": "fp32"}])
def test_only_like_is_compared_with_like(repo, other):
    write(repo, op="norm/bwd", us=99.0, **other)
    assert problems(repo) == []


def test_a_note_explains(repo):
    write(repo, op="step", us_per_token=40.0, note="checks added")
    assert problems(repo) == []


def test_a_failed_run(repo):
    write(repo, op="step", failed="out of memory", shape={"n": 9})
    assert "out of memory" in the_problem(repo)


def test_a_broken_line_is_named(repo):
    (repo / "bench/results/step.jsonl").write_text("{}x\n")
    with pytest.raises(ValueError, match=r"step\.jsonl:1 is not JSON"):
        problems(repo)


def test_every_op_of_this_repository_has_source_files():
    for path in Path("bench/kernels").glob("bench_*.py"):
        op = path.stem.removeprefix("bench_")
        assert Path(f"fastdraft/kernels/{op}.py").resolve() in files(op)
    assert {Path("fastdraft/model/ttt.py").resolve(), Path("fastdraft/optim.py").resolve()} <= set(files("step"))
    with pytest.raises(ValueError, match="no source file for op 'nothing'"):
        source("nothing")
