"""The benchmark gate over a small repository of its own: fine, missing, stale, slower, failed, explained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench import gate
from bench.gate import problems, waiting
from bench.sources import files, source

ROW = {"date": "2026-01-01", "commit": "abc", "gpu": "G", "dtype": "bf16", "shape": {"n": 1}, "provider": "fastdraft"}


@pytest.fixture
def repo(tmp_path) -> Path:
    for name, text in {
        "fastdraft/kernels/norm.py": "tl.program_id(0)",
        "fastdraft/kernels/plan.py": "no_kernel = 'here'",
        "fastdraft/model/eagle3/engine.py": "engine",
        "fastdraft/optim.py": "optimizer",
        "bench/kernels/bench_norm.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write(tmp_path, op="norm/fwd", us=10.0)
    write(tmp_path, op="norm/bwd", us=20.0)
    write(tmp_path, op="step", us_per_token=30.0)
    write(tmp_path, op="gpu_tests", passed=9, failed=0, skipped=1)
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


def test_what_waits_is_said_and_ends_with_the_next_change(repo, monkeypatch, capsys):
    (repo / "fastdraft/kernels/norm.py").write_text("tl.program_id(1)")
    line = {"op": "norm", "source": source("norm", repo), "why": "the machine was gone"}
    (repo / "bench/results/waiting.jsonl").write_text(json.dumps(line) + "\n")
    assert waiting(repo) == {"norm": "the machine was gone"}
    for judge in (problems, waiting):
        monkeypatch.setattr(gate, judge.__name__, lambda root=repo, judge=judge: judge(root))
    with pytest.raises(SystemExit) as exit:
        gate.main()
    said = capsys.readouterr().out
    assert exit.value.code == 1 and "norm waits for a GPU: the machine was gone" in said
    assert "norm/fwd" not in said and "step: the source changed" in said and "gpu_tests" in said
    (repo / "fastdraft/kernels/norm.py").write_text("tl.program_id(2)")
    assert waiting(repo) == {}


def test_fine(repo):
    write(repo, op="norm/fwd", us=10.4)
    write(repo, op="step", us_per_token=29.0)
    assert problems(repo) == []


@pytest.mark.parametrize("changed", ["fastdraft/model/eagle3/engine.py", "fastdraft/kernels/plan.py", "fastdraft/optim.py"])
def test_the_engine_changed(repo, changed):
    (repo / changed).write_text("changed")
    step, tests = problems(repo)
    assert step.startswith("step: the source changed since fastdraft's newest row (2026-01-01, abc)")
    assert tests.startswith("gpu_tests: the source changed since their newest row (2026-01-01, abc)")
    write(repo, op="step", us_per_token=30.0)
    write(repo, op="gpu_tests", passed=10, failed=0, skipped=0)
    assert problems(repo) == []


def test_what_only_a_gpu_tests(repo):
    write(repo, op="gpu_tests", passed=8, failed=2, skipped=0)
    assert the_problem(repo).startswith("gpu_tests: 2 failed in their newest row")
    (repo / "bench/results/gpu_tests.jsonl").unlink()
    assert the_problem(repo).startswith("gpu_tests: no row")


NORM = """
'''What norm computes.'''

from fastdraft.kernels.jit import tl

EPS = 1e-6


def norm(x):
    '''A docstring.'''
    return x * EPS


def twice(x):
    return 2 * norm(x)
"""
SAME = {
    "a comment": NORM.replace("EPS = 1e-6", "EPS = 1e-6  # of float32"),
    "another docstring": NORM.replace("A docstring.", "Another one.").replace("What norm", "What this file"),
    "no docstring": NORM.replace("    '''A docstring.'''\n", ""),
    "layout": NORM.replace("x * EPS", "(\n        x\n        * EPS\n    )"),
    "an import from elsewhere": NORM.replace("fastdraft.kernels.jit", "fastdraft.other"),
    "another order": NORM[: NORM.index("def norm")]
    + NORM[NORM.index("def twice") :]
    + NORM[NORM.index("def norm") :].split("def twice")[0],
}
OTHER = {
    "a number": NORM.replace("1e-6", "1e-5"),
    "a string": NORM.replace("x * EPS", "x * EPS if x != 'a' else x"),
    "an operator": NORM.replace("x * EPS", "x + EPS"),
    "a default": NORM.replace("def twice(x)", "def twice(x=1)"),
    "an alias": NORM.replace("import tl", "import tr as tl"),
    "a function less": NORM[: NORM.index("def twice")],
}


@pytest.fixture
def norm_source(tmp_path):
    def of(text: str, name: str = "fastdraft/kernels/norm.py") -> str:
        shutil.rmtree(tmp_path / "alone", ignore_errors=True)
        path = tmp_path / "alone" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        return source("norm", tmp_path / "alone")

    return of


@pytest.mark.parametrize("change", SAME)
def test_prose_and_places_keep_rows_fresh(norm_source, change):
    assert SAME[change] != NORM and norm_source(SAME[change]) == norm_source(NORM)


@pytest.mark.parametrize("change", OTHER)
def test_what_runs_makes_rows_stale(norm_source, change):
    assert norm_source(OTHER[change]) != norm_source(NORM)


def test_a_file_that_is_split_or_moved_stays_fresh(tmp_path):
    before, after = tmp_path / "before/fastdraft/kernels", tmp_path / "after/fastdraft/kernels"
    for folder in (before, after):
        folder.mkdir(parents=True)
    (before / "a.py").write_text(NORM)
    (after / "b.py").write_text(NORM[: NORM.index("def twice")])
    (after / "c.py").write_text("from fastdraft.kernels.b import norm\n" + NORM[NORM.index("def twice") :])
    assert source("step", tmp_path / "before") == source("step", tmp_path / "after")


def test_cuda_counts_without_its_comments(norm_source):
    code = 'int f() { return 1; } // one\nconst char* s = "// no comment";\n'
    same = '/* of\ntwo lines */ int f() {\n  return 1;\n}\nconst char* s = "// no comment";'
    of = {text: norm_source(text, "csrc/norm.cu") for text in (code, same)}
    assert of[code] == of[same]
    for old, new in (("return 1", "return 2"), ('// no comment"', '// a comment"')):
        assert old in code and norm_source(code.replace(old, new), "csrc/norm.cu") != of[code]


def test_a_kernel_changed(repo):
    """Both of its ops need a new row, and the step that uses it."""
    (repo / "fastdraft/kernels/norm.py").write_text("tl.program_id(1)")
    assert [p.split(":")[0] for p in problems(repo)] == ["norm/fwd", "norm/bwd", "step", "gpu_tests"]
    write(repo, op="gpu_tests", passed=10, failed=0, skipped=0)
    write(repo, op="norm/fwd", us=10.0)
    write(repo, op="step", us_per_token=30.0)
    assert the_problem(repo).startswith("norm/bwd")


def test_rows_are_missing(repo):
    (repo / "bench/results/norm.jsonl").unlink()
    assert the_problem(repo).startswith("norm: no row of fastdraft")
    write(repo, op="norm/fwd", us=1.0, provider="torch")
    assert the_problem(repo).startswith("norm: no row of fastdraft")


def test_a_new_kernel_may_wait_for_its_first_row(repo):
    (repo / "fastdraft/kernels/attention.py").write_text("tl.program_id(0)")
    (repo / "bench/kernels/bench_attention.py").write_text("")
    write(repo, op="step", us_per_token=30.0)
    write(repo, op="gpu_tests", passed=9, failed=0, skipped=1)
    assert the_problem(repo).startswith("attention: no row of fastdraft")
    line = {"op": "attention", "source": source("attention", repo), "why": "there was no GPU"}
    (repo / "bench/results/waiting.jsonl").write_text(json.dumps(line) + "\n")
    assert problems(repo) == []
    (repo / "fastdraft/kernels/attention.py").write_text("tl.program_id(1)")
    assert "attention: no row of fastdraft" in problems(repo)[0]


@pytest.mark.parametrize("kernel", ["block_attention", "block_conv", "ce_l1", "head_norm", "linear_ce", "selector"])
def test_the_kernel_of_another_method_leaves_the_step_fresh(repo, kernel):
    (repo / f"fastdraft/kernels/{kernel}.py").write_text("blocks = 'here'")
    assert the_problem(repo).startswith("gpu_tests: the source changed")
    (repo / "fastdraft/kernels/ttt_attention.py").write_text("chains = 'here'")
    assert problems(repo)[0].startswith("step: the source changed")


def test_the_step_of_another_method_is_judged_where_there_is_one(repo):
    (repo / "fastdraft/model/dflash").mkdir()
    (repo / "fastdraft/model/dflash/engine.py").write_text("blocks")
    assert problems(repo)[1].startswith("gpu_tests: the source changed")
    write(repo, op="gpu_tests", passed=9, failed=0, skipped=1)
    assert the_problem(repo).startswith("block_step: no row of fastdraft in bench/results/block_step.jsonl")
    write(repo, op="block_step", us_per_row=15.0)
    assert problems(repo) == []
    write(repo, op="block_step", us_per_row=16.0)
    assert the_problem(repo).startswith('block_step {"n": 1}, fastdraft, on G: 16 us, was 15')
    (repo / "fastdraft/model/dflash/engine.py").write_text("others")
    assert problems(repo)[0].startswith("block_step: the source changed")


def test_a_kernel_in_csrc_is_judged_beside_tritons(repo):
    (repo / "csrc").mkdir()
    (repo / "csrc/norm.cu").write_text("__global__")
    for op in ("norm/fwd", "norm/bwd"):
        write(repo, op=op, us=10.0)
    write(repo, op="step", us_per_token=30.0)
    write(repo, op="gpu_tests", passed=10, failed=0, skipped=0)
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
    assert {Path("fastdraft/model/eagle3/engine.py").resolve(), Path("fastdraft/optim.py").resolve()} <= set(files("step"))
    assert {path.stem for path in files("block_step") if path.parent.name == "dflash"} >= {"engine", "blocks", "memory"}
    with pytest.raises(ValueError, match="no source file for op 'nothing'"):
        source("nothing")
