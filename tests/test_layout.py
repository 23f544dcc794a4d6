"""Who may import whom in fastdraft/, where ranks are known, and which names mean one thing; read from the syntax trees."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fastdraft"

# From low to high. A room is a folder of fastdraft/ or a module beside them; a method's folder and the list of methods are
# rooms of their own. A room may import itself and rooms of the lines above its own; rooms of one line do not know each
# other. A module that is not in the middle of the way stands as low as its imports allow.
ORDER = (
    ("files", "batch"),
    ("kernels", "data", "features", "metrics"),
    ("config",),
    ("model",),
    ("model.eagle3", "model.dflash", "optim"),
    ("model.dflash2", "model.dspark"),  # the backbone is DFlash's
    ("model.methods",),
    ("cost",),
    ("dist",),
    ("target", "checkpoint"),
    ("decode", "answers"),
    ("evaluate", "serving"),
    ("run",),
    ("train", "check"),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

# What the launcher of several processes tells each of them.
LAUNCHER = {"RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

# Uses of torch.distributed and of the launcher's variables outside dist/mesh.py that join, ask and divide no processes.
OUTSIDE_MESH = {
    ("checkpoint.py", "torch.distributed.checkpoint"),  # the format of checkpoints
    ("checkpoint.py", "torch.distributed.tensor.DTensor"),  # a tensor of which each process holds a slice
    ("target/sharded.py", "torch.distributed.fsdp.fully_shard"),  # the storage of a target's layers
}

# Modules of fastdraft/ beside __init__.py.
MOST_MODULES = 13

# Public names that several files define, and why that confuses nobody who reads one of the files.
SAME_NAME = {
    # A command of the command line has the name of the function that it calls, and its file defines nothing else of it.
    "prepare": {"cli.py", "data/prepare.py"},
    "regenerate": {"cli.py", "answers/regenerate.py"},
    "train": {"cli.py", "train.py"},
    # Programs: each has a main of its own, and each engine's child serves in its engine's way.
    "main": {"cli.py", "serving/sglang_child.py", "serving/vllm_child.py"},
    "serve": {"cli.py", "serving/sglang_child.py", "serving/vllm_child.py"},
    # A server that answers prompts, and one that is measured; both rooms connect to theirs and never see the other's.
    "Server": {"answers/server.py", "serving/client.py"},
    "connect": {"answers/servers.py", "serving/client.py"},
    # The command line's, which checks a machine, and a kernel's, which checks an argument.
    "check": {"cli.py", "kernels/check.py"},
    # A method's, and what finds the method of a checkpoint and calls it.
    "load_draft": {"model/dflash/serving.py", "model/eagle3/serving.py", "serving/export.py"},
    "verify": {"model/dflash/serving.py", "model/eagle3/serving.py", "serving/export.py"},
    # Our drafter's, and the one of vLLM that its child listens to.
    "propose": {"model/eagle3/propose.py", "serving/vllm_child.py"},
    # Features read from a store in float8, and a product's operands.
    "dequantize": {"features/fp8.py", "kernels/fp8.py"},
}

# What each method fills a `Method` with, or its fused step is made of, has one name in one file of each method's folder.
OF_A_METHOD = {
    "__init__.py": ("build_step", "check_config", "recipe", "settled", "step_weights"),
    "cost.py": ("pair_cost", "step_cost"),
    "memory.py": ("chunk_buffers", "pack_buffers"),
    "serving.py": ("serving_shapes", "serving_tensors"),
    "start.py": ("fit",),
}
SAME_NAME |= {
    name: {f"model/{method}/{file}" for method in ("dflash", "eagle3")}
    | ({f"model/{method}/{file}" for method in ("dflash2", "dspark")} if file == "__init__.py" else set())
    for file, names in OF_A_METHOD.items()
    for name in names
}


def files(package: Path) -> dict[str, ast.Module]:
    """The syntax tree of every file, by its path in the package."""
    paths = sorted(package.rglob("*.py"))
    return {p.relative_to(package).as_posix(): ast.parse(p.read_text(), filename=str(p)) for p in paths}


def module_of(file: str) -> str:
    """model/eagle3/ref.py is the module model.eagle3.ref; a folder's __init__.py is the folder."""
    return file.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")


def room_of(module: str) -> str:
    """The room that a module, named within the package, belongs to."""
    for part in ("model.eagle3", "model.dflash", "model.dflash2", "model.dspark", "model.methods"):
        if f"{module}.".startswith(f"{part}."):
            return part
    return module.split(".")[0]


def dotted(node: ast.expr) -> str:
    """`torch.distributed.barrier` as it is written, or nothing for what is not a chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{parent}.{node.attr}" if (parent := dotted(node.value)) else ""
    return ""


def imports(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, full name) of every import anywhere in a file, inside functions and `if TYPE_CHECKING` too."""
    package = ["fastdraft", *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def imported_rooms(trees: dict[str, ast.Module]) -> Iterator[tuple[str, int, str]]:
    """(file, line, room) of every import of a part of the package."""
    modules = {module_of(file) for file in trees}
    for file, tree in trees.items():
        for line, name in imports(file, tree):
            head, _, rest = name.partition(".")
            if head != "fastdraft":
                continue
            # `from fastdraft.batch import Batch` names a thing in a module, `from fastdraft import checkpoint` a module.
            module = rest if rest in modules else rest.rpartition(".")[0]
            if module:  # `import fastdraft` alone brings only the version
                yield file, line, room_of(module)


def wrong_imports(trees: dict[str, ast.Module]) -> list[str]:
    """A sentence for each import that does not go downwards, and for each room without a place in the order."""
    faults = []
    for room in sorted({room_of(module_of(file)) for file in trees} - {""} - LEVEL.keys()):
        faults.append(f"fastdraft/{room} has no place in ORDER: give it one, as low as its imports allow")
    for file, line, room in imported_rooms(trees):
        own = room_of(module_of(file))
        if own == room or own not in LEVEL or room not in LEVEL:
            continue
        if LEVEL[room] >= LEVEL[own]:
            below = ", ".join(name for rooms in ORDER[: LEVEL[own]] for name in rooms) or "nothing"
            faults.append(f"fastdraft/{file}:{line} imports {room}; {own} may import only {below}")
    return faults


def ranks_outside_mesh(trees: dict[str, ast.Module], allowed: set[tuple[str, str]]) -> list[str]:
    """A sentence for each use of torch.distributed or of a launcher's variable outside dist/mesh.py."""
    faults = []
    for file, tree in trees.items():
        if file == "dist/mesh.py":
            continue
        uses = [(line, name) for line, name in imports(file, tree) if f"{name}.".startswith("torch.distributed.")]
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and id(node) not in inner:
                name = dotted(node)
                uses += [(node.lineno, name)] if f"{name}.".startswith("torch.distributed.") else []
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in LAUNCHER:
                uses.append((node.lineno, node.value))
        may = [name for of, name in allowed if of == file]
        for line, name in uses:
            if not any(f"{name}.".startswith(f"{one}.") for one in may):
                faults.append(f"fastdraft/{file}:{line} uses {name}; only dist/mesh.py knows of ranks and their groups")
    return faults


def shared_names(trees: dict[str, ast.Module], allowed: dict[str, set[str]]) -> list[str]:
    """A sentence for each public function or class whose name several files define."""
    homes = defaultdict(dict)
    for file, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name][file] = node.lineno
    return [
        f"{name} is defined in {', '.join(f'fastdraft/{file}:{line}' for file, line in where.items())}: "
        "rename one, or say in SAME_NAME why both may have it"
        for name, where in homes.items()
        if len(where) > 1 and not where.keys() <= allowed.get(name, set())
    ]


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return files(PACKAGE)


def test_rooms_import_only_lower_rooms(trees):
    faults = wrong_imports(trees)
    assert not faults, "\n".join(faults)


def test_only_the_mesh_knows_of_ranks(trees):
    faults = ranks_outside_mesh(trees, OUTSIDE_MESH)
    assert not faults, "\n".join(faults)


def test_few_modules_lie_beside_the_rooms(trees):
    modules = sorted(file for file in trees if "/" not in file and file != "__init__.py")
    assert len(modules) <= MOST_MODULES, f"{len(modules)} modules lie in fastdraft/ itself: {', '.join(modules)}"


def test_a_public_name_means_one_thing(trees):
    faults = shared_names(trees, SAME_NAME)
    assert not faults, "\n".join(faults)


# --- the readers find what they look for ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, source, fault",
    [
        ("kernels/new.py", "from fastdraft.model.rope import Rope", "kernels/new.py:2 imports model; kernels may import"),
        ("data/new.py", "from ..target import hf", "data/new.py:2 imports target"),
        ("model/new.py", "import fastdraft.model.eagle3.ref as ref", "model/new.py:2 imports model.eagle3"),
        ("features/new.py", "from fastdraft import cost", "features/new.py:2 imports cost"),
        ("run/new.py", "def late():\n    from fastdraft.cli import main", "run/new.py:3 imports cli"),
        ("decode.py", "import fastdraft.answers.job", "decode.py:2 imports answers"),  # of the same line
        ("attic/new.py", "", "fastdraft/attic has no place in ORDER"),
    ],
)
def test_a_wrong_import_is_named_with_its_line(trees, file, source, fault):
    planted = trees | {file: ast.parse(f"'''A new file.'''\n{source}")}
    faults = [sentence for sentence in wrong_imports(planted) if sentence not in wrong_imports(trees)]
    assert len(faults) == 1 and fault in faults[0], faults


@pytest.mark.parametrize(
    "source",
    [
        "from fastdraft.target.hf import Target",  # the line below
        "import fastdraft\nfrom fastdraft import decode",  # the version; its own room
        "from fastdraft.files import publish",
        "from fastdraftlike.cli import main",  # another package
    ],
)
def test_a_right_import_is_passed(trees, source):
    assert not [fault for fault in wrong_imports(trees | {"decode.py": ast.parse(source)}) if "/decode.py" in fault]


@pytest.mark.parametrize(
    "source, fault",
    [
        ("import os\nrank = int(os.environ['RANK'])", "evaluate.py:2 uses RANK"),
        ("import os\nsize = os.getenv('WORLD_SIZE', '1')", "evaluate.py:2 uses WORLD_SIZE"),
        ("import torch.distributed as dist", "evaluate.py:1 uses torch.distributed"),
        ("from torch import distributed", "evaluate.py:1 uses torch.distributed"),
        ("from torch.distributed import get_rank", "evaluate.py:1 uses torch.distributed.get_rank"),
        ("import torch\ntorch.distributed.barrier()", "evaluate.py:2 uses torch.distributed.barrier"),
        ("import torch.distributed.checkpoint as dcp", "evaluate.py:1 uses torch.distributed.checkpoint"),
    ],
)
def test_a_rank_outside_the_mesh_is_named_with_its_line(source, fault):
    faults = ranks_outside_mesh({"evaluate.py": ast.parse(source), "dist/mesh.py": ast.parse(source)}, OUTSIDE_MESH)
    assert len(faults) == 1 and fault in faults[0], faults


def test_a_name_used_twice_is_shown_with_both_homes():
    kernel = ast.parse("\n\ndef dequantize(): ...")
    for source in ("def dequantize(): ...", "class dequantize: ...", "async def dequantize(): ..."):
        homes = {"kernels/fp8.py": kernel, "data/new.py": ast.parse(source)}
        (fault,) = shared_names(homes, SAME_NAME)
        assert "dequantize is defined in fastdraft/kernels/fp8.py:3, fastdraft/data/new.py:1: " in fault
    assert not shared_names({"kernels/fp8.py": kernel, "features/fp8.py": kernel}, SAME_NAME)  # listed
    private = ast.parse("def _rows(): ...")
    assert not shared_names({"kernels/fp8.py": private, "features/fp8.py": private}, SAME_NAME)
