"""Which source files a benchmark row depends on, and their hash: a row is fresh while the hash is today's.

An op depends on its own file in fastdraft/kernels (and csrc), on what it computes with from there (`jit.py` computes
nothing), and `step`, the whole draft step, on the engine, everything it computes with, and the optimizer. Comments count:
the hash is of the bytes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CUDA = ["fastdraft/kernels/cuda.py", "csrc/stable.h"]
ALSO = {  # beside fastdraft/kernels/OP.py and csrc/OP*
    "linear_kl": ["fastdraft/kernels/teacher.py", "fastdraft/kernels/matmul.py", "fastdraft/kernels/fp8.py", *CUDA],
    "data": ["fastdraft/data/*.py"],
    "features": ["fastdraft/features/*.py", "fastdraft/target/*.py"],
    "engines": ["fastdraft/engines/*.py", "fastdraft/decode.py", "fastdraft/evaluate.py", "fastdraft/export.py"],
    "step": [
        "fastdraft/kernels/*.py",
        "csrc/*",
        "fastdraft/model/chunks.py",
        "fastdraft/model/ttt.py",
        "fastdraft/model/graph.py",
        "fastdraft/model/draft.py",
        "fastdraft/model/rope.py",
        "fastdraft/optim.py",
    ],
}


def files(op: str, root: Path = ROOT) -> list[Path]:
    """The files of an op (`ttt_attention`, or `ttt_attention/fwd`). Raises ValueError when there is none."""
    op = op.split("/")[0]
    patterns = [f"fastdraft/kernels/{op}.py", f"csrc/{op}*", *ALSO.get(op, [])]
    found = sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})
    if not found:
        raise ValueError(f"no source file for op {op!r}: none of {', '.join(patterns)} exists in {root}")
    return found


def source(op: str, root: Path = ROOT) -> str:
    """Sixteen hexadecimal digits over names and contents of the op's files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in files(op, root):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()
