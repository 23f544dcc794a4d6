"""Which source a benchmark row depends on, and its hash: a row is fresh while the hash is today's.

An op depends on its own file in fastdraft/kernels (and csrc), on what it computes with from there (`jit.py` computes
nothing), and `step` and `block_step`, the whole steps of an EAGLE-3 draft and of a draft of blocks, on the engine,
everything it computes with, and the optimizer.
`gpu_tests` is what only a GPU can test: the same and the target's forward.

The hash is of what runs, not of how it reads. Python counts as the set of its top-level statements, as syntax trees:
comments, docstrings, layout, the order and the files of statements, and imports from fastdraft itself change nothing.
CUDA C++ counts without comments and white space. So prose may be mended, and code moved, without a GPU.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CUDA = ["fastdraft/kernels/cuda.py", "csrc/stable.h"]
KERNELS = "fastdraft/kernels/*.py"
ENGINE = [
    "csrc/*",
    *(
        f"fastdraft/model/eagle3/{name}.py"
        for name in ("attention", "chunks", "draft", "engine", "graph_engine", "memory", "shard")
    ),
    "fastdraft/model/buffers.py",
    "fastdraft/model/draws.py",
    "fastdraft/model/graph.py",
    "fastdraft/model/layers.py",
    "fastdraft/model/rope.py",
    "fastdraft/optim.py",
]
BLOCK_KERNELS = (
    *("adamw", "block_attention", "block_conv", "ce_l1", "chain_qkv", "dense_attention", "fp8", "head_norm", "linear_ce"),
    *("linear_kl", "matmul", "rms_norm", "selector", "swiglu", "teacher", "ttt_attention"),
)
BLOCK_ENGINE = [  # the step of every method of blocks
    *(f"fastdraft/kernels/{name}.py" for name in BLOCK_KERNELS),
    *(
        f"fastdraft/model/dflash/{name}.py"
        for name in ("blocks", "draft", "engine", "graph_engine", "head", "loss", "memory", "mixer")
    ),
    *(f"fastdraft/model/dspark/{name}.py" for name in ("draft", "head", "loss")),
    *(f"fastdraft/model/dflash2/{name}.py" for name in ("draft", "head", "loss", "mixer")),
    "fastdraft/model/buffers.py",
    "fastdraft/model/graph.py",
    "fastdraft/model/layers.py",
    "fastdraft/model/rope.py",
    "fastdraft/optim.py",
]
ALSO = {  # beside fastdraft/kernels/OP.py and csrc/OP*; "!" takes a file out again
    "block_attention": ["fastdraft/kernels/ttt_attention.py"],
    "block_step": BLOCK_ENGINE,
    "head_norm": ["fastdraft/kernels/chain_qkv.py", "fastdraft/kernels/rms_norm.py"],
    "linear_ce": ["fastdraft/kernels/teacher.py", "fastdraft/kernels/matmul.py", "fastdraft/kernels/fp8.py"],
    "linear_kl": ["fastdraft/kernels/teacher.py", "fastdraft/kernels/matmul.py", "fastdraft/kernels/fp8.py", *CUDA],
    "split_kl": [f"fastdraft/kernels/{name}.py" for name in ("linear_kl", "teacher", "matmul", "fp8")],
    "data": ["fastdraft/data/*.py", "fastdraft/answers/*.py"],
    "features": ["fastdraft/features/*.py", "fastdraft/target/*.py"],
    "engines": ["fastdraft/serving/*.py", "fastdraft/decode.py", "fastdraft/evaluate.py"],
    "served": ["fastdraft/target/served/*.py", "fastdraft/target/served/connector/*.py"],
    "step": [
        KERNELS,
        *(
            f"!fastdraft/kernels/{name}.py"
            for name in ("block_attention", "block_conv", "ce_l1", "head_norm", "linear_ce", "selector")
        ),
        *ENGINE,
    ],
    "fleet": [f"fastdraft/{name}.py" for name in ("dist/mesh", "dist/shard", "target/packed", "target/sharded")],
    "quality": ["fastdraft/train.py", "fastdraft/optim.py", "fastdraft/decode.py", "fastdraft/model/eagle3/*.py"],
    "gpu_tests": [KERNELS, *ENGINE, *BLOCK_ENGINE, "fastdraft/target/hf.py", "fastdraft/target/packed.py"],
}


def files(op: str, root: Path = ROOT) -> list[Path]:
    """The files of an op (`ttt_attention`, or `ttt_attention/fwd`). Raises ValueError when there is none."""
    op = op.split("/")[0]
    patterns = [f"fastdraft/kernels/{op}.py", f"csrc/{op}*", *ALSO.get(op, [])]
    left_out = {root / pattern[1:] for pattern in patterns if pattern.startswith("!")}
    found = sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()} - left_out)
    if not found:
        raise ValueError(f"no source file for op {op!r}: none of {', '.join(patterns)} exists in {root}")
    return found


def source(op: str, root: Path = ROOT) -> str:
    """Sixteen hexadecimal digits over what the op's files do."""
    parts = {part for path in files(op, root) for part in _parts(path)}
    return hashlib.blake2b("\n".join(sorted(parts)).encode(), digest_size=8).hexdigest()


def _parts(path: Path) -> Iterator[str]:
    """What a file consists of, without what changes nothing that runs."""
    text = path.read_text()
    if path.suffix != ".py":
        yield _without_comments(text)
        return
    for statement in ast.parse(text, str(path)).body:
        moved = isinstance(statement, ast.ImportFrom) and (statement.module or "").split(".")[0] in (
            "fastdraft",
            "__future__",
        )
        renamed = moved and any(name.asname for name in statement.names)
        if not _is_text(statement) and (renamed or not moved):
            yield repr(_tree(statement))


def _tree(node: object) -> object:
    """A syntax tree as nested tuples, the same in every version of Python: what a node lacks is not mentioned."""
    if isinstance(node, list):
        return tuple(_tree(item) for item in node)
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and _is_text(node.body[0]):
        fields["body"] = node.body[1:]
    return type(node).__name__, *((name, _tree(value)) for name, value in fields.items() if value not in (None, []))


def _is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a string alone, as docstrings are."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _without_comments(text: str) -> str:
    """C++ without comments, one space for each run of white space; strings keep what looks like a comment in them."""
    pattern = r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/'
    bare = re.sub(pattern, lambda match: match[1] or " ", text, flags=re.DOTALL)
    return " ".join(bare.split())
