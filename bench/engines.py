"""Does a real engine accept what fastdraft says it will? python -m bench.engines --target DIR --draft EXPORT_DIR

The engine serves the target with an exported draft, greedily, on a prompt file; `fastdraft.evaluate` decodes the same
prompts with the same settings in this process; a row of each setting goes to bench/results/engines.jsonl and the program
fails where the lengths differ by more than --goal:

chain    of as many steps as the draft is served with: 3, top-1, 4 draft tokens (the root included), or a block's
tree     3 steps, top-4, 16 draft tokens; SGLang and drafts of EAGLE-3 only

What is compared is tokens / verifying forwards over all prompts. In bf16 outputs part at near-ties, so the rounds that
fastdraft needs for the engine's own outputs are counted too (`followed_num_rounds`): only the draft's near-ties are left.
`spec_accept_length` counts all completion tokens, as SGLang does; `accepted_length` leaves out the first, which the prefill
gives. The engine's own number is in `engine_says`.

Both halves need not run on one machine: --served DIR keeps the engine's answers, or takes those that are there, and
--serve-only is the engine's half alone. A row says where each ran.

The engine has a Python of its own: --engine-python, and --engine-pythonpath for packages that go before it. With SGLang
in a folder (unpacked wheels, or pip install --target):

    python -m bench.engines --target smollm2 --draft runs/demo/export --engine-pythonpath site
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from pydantic import BaseModel, TypeAdapter
from torch import nn

from bench.timing import RESULTS, append
from fastdraft.data.prompts import prompt_ids, read_prompts
from fastdraft.decode import DecodeResult, generate
from fastdraft.evaluate import evaluate_decode
from fastdraft.files import file_checksum, json_checksum
from fastdraft.model.method import Method
from fastdraft.model.methods import method_of
from fastdraft.model.precision import dtype_name
from fastdraft.model.proposal import DecodeSettings
from fastdraft.serving.engines import ENGINES, EnginePlace, Run, Served, refuse_old_engine, run_engine
from fastdraft.serving.export import load_draft, verify
from fastdraft.target.hf import Target, load_target, load_tokenizer

PROMPTS = Path(__file__).parents[1] / "examples" / "demo" / "heldout_prompts.jsonl"
SETTINGS = {
    "chain": DecodeSettings(num_steps=3, eagle_topk=1, num_draft_tokens=4),
    "tree": DecodeSettings(num_steps=3, eagle_topk=4, num_draft_tokens=16),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # SGLang 0.5.17 has no fp32 norms


def answers(place: EnginePlace, run: Run, timeout_s: float, file: Path | None) -> tuple[Served, str | None]:  # engine's GPU
    """Those that `file` keeps, else the engine's, which it then keeps. ValueError where it keeps those of another run or of
    another draft's weights; only paths may differ, the halves may run on two machines."""
    if file is not None and file.exists():
        kept = json.loads(file.read_text())
        if kept.get("draft") != weights_hash(run.checkpoint):
            raise ValueError(
                f"{file} has answers with another draft than {run.checkpoint}, or does not say with which; give --served "
                "another folder"
            )
        if other := [k for k, x in asdict(run).items() if k not in ("target", "checkpoint") and kept["run"][k] != x]:
            raise ValueError(f"{file} answers other {', '.join(other)}; give --served another folder")
        return TypeAdapter(Served).validate_python(kept["served"]), kept["gpu"]
    print(f"{place.name} {refuse_old_engine(place)}", flush=True)
    (served,) = run_engine(place, [run], timeout_s)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps({"run": asdict(run), "draft": weights_hash(run.checkpoint), "gpu": gpu, "served": asdict(served)})
        )
    return served, gpu


def weights_hash(draft: str) -> str:
    """Of an export's weights, wherever it lies."""
    return json_checksum([file_checksum(path) for path in sorted(Path(draft).glob("*.safetensors"))])


def served_lengths(served: Served) -> dict[str, float]:
    """Both lengths from the engine's tokens and verifying rounds. Raises ValueError when it did not count rounds."""
    if not served.num_rounds:
        raise ValueError(f"{served.engine} {served.version} reported no verifying forwards; was the draft used at all?")
    tokens = sum(len(o.tokens) for o in served.outputs)
    return {
        "spec_accept_length": tokens / served.num_rounds,
        "accepted_length": (tokens - len(served.outputs)) / served.num_rounds,
    }


def compare(
    target: Target,
    draft: nn.Module,
    prompts: list[list[int]],
    plain: list[DecodeResult],
    served: Served,
    settings: DecodeSettings,
    max_new_tokens: int,
) -> dict[str, object]:
    """What a row says of one setting; `relative_difference` is that of spec_accept_length."""
    report = evaluate_decode(target, draft, prompts, settings, max_new_tokens, plain)
    theirs = served_lengths(served)
    follow = [o.tokens for o in served.outputs]
    followed = [
        generate(target, draft, prompt, 0, settings, tokens) for prompt, tokens in zip(prompts, follow, strict=True)
    ]
    rounds = sum(r.num_rounds for r in followed)
    ours = {"spec_accept_length": report.spec_accept_length, "accepted_length": report.accepted_length}
    same = sum(o.tokens == p.tokens for o, p in zip(served.outputs, plain, strict=True))
    return {
        **theirs,
        "engine_says": served.accepted_length,
        **{f"fastdraft_{name}": length for name, length in ours.items()},
        "relative_difference": theirs["spec_accept_length"] / report.spec_accept_length - 1,
        "num_rounds": served.num_rounds,
        "followed_num_rounds": rounds,
        "followed_relative_difference": rounds / served.num_rounds - 1,
        "fastdraft_num_rounds": report.num_rounds,
        "num_prompts": len(prompts),
        "num_equal_to_plain": same,  # outputs of the engine that are the target's own in PyTorch, token for token
        "fastdraft_num_equal_to_plain": report.num_equal,
    }


def parse() -> argparse.Namespace:
    """ValueError for options that do not go together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True, help="a directory that `fastdraft export` wrote")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help='JSONL with "prompt" or "messages"')
    parser.add_argument("--max-prompts", type=int, default=80)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--engine", choices=ENGINES, default="sglang")
    parser.add_argument("--engine-python", default=sys.executable)
    parser.add_argument("--engine-pythonpath")
    parser.add_argument("--settings", default="chain,tree")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--goal", type=float, default=0.03, help="largest relative difference")
    parser.add_argument("--served", type=Path, help="folder of the engine's answers: kept there, or read if they are there")
    parser.add_argument("--serve-only", action="store_true", help="keep the engine's answers and stop")
    parser.add_argument("--timeout", type=float, default=1500, help="seconds for one setting in the engine")
    parser.add_argument("--commit", help="for machines without git")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()

    args.settings = args.settings.split(",")
    if unknown := [name for name in args.settings if name not in SETTINGS]:
        raise ValueError(f"--settings {', '.join(unknown)}: choose among {', '.join(SETTINGS)}")
    if args.engine == "vllm" and "tree" in args.settings:
        raise ValueError("vLLM verifies chains only; give --settings chain")
    if args.serve_only and args.served is None:
        raise ValueError("--serve-only keeps nothing without --served DIR")
    return args


def settings_of(names: list[str], method: Method, shape: BaseModel) -> dict[str, DecodeSettings]:
    """What a draft is decoded with. ValueError for a tree of a block."""
    steps = method.served_steps(shape, None)
    found = SETTINGS | {"chain": replace(SETTINGS["chain"], num_steps=steps, num_draft_tokens=steps + 1)}
    for name in names:
        method.refuse_settings(shape, found[name])
    return {name: found[name] for name in names}


def serve(
    args: argparse.Namespace,
    prompts: list[list[int]],
    stop_ids: list[int],
    settings: dict[str, DecodeSettings],
    algorithm: str,
) -> dict[str, tuple[Served, str | None]]:  # by setting the engine's answers, and its GPU
    place = EnginePlace(args.engine, args.engine_python, args.engine_pythonpath)
    served = {}
    for name, s in settings.items():
        run = Run(
            str(Path(args.target).resolve()),
            str(Path(args.draft).resolve()),
            prompts,
            args.max_new_tokens,
            stop_ids,
            dtype_name(DTYPES[args.dtype]),
            s.num_steps,
            s.eagle_topk,
            s.num_draft_tokens,
            algorithm=algorithm,
        )
        file = args.served and args.served / f"{args.engine}-{args.dtype}-{name}.json"
        served[name] = answers(place, run, args.timeout, file)
        print(f"{name}: {served_lengths(served[name][0])}", flush=True)
    return served


def main() -> None:
    args = parse()
    if errors := verify(args.draft, args.target).errors:
        raise ValueError(f"{args.draft} does not verify: " + " ".join(errors))
    dtype = DTYPES[args.dtype]
    prompts = prompt_ids(read_prompts(args.prompts)[: args.max_prompts], load_tokenizer(args.target))
    target = load_target(args.target, dtype, "cpu")
    draft = load_draft(args.draft, target.config)
    method = method_of(draft)
    settings = settings_of(args.settings, method, draft.config)
    # before the target takes its memory
    served = serve(args, prompts, sorted(target.eos_ids), settings, method.engine_names[args.engine])
    if args.serve_only:
        return

    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = Target(target.model.to(device), draft.config.layers)
    draft = draft.to(device, dtype)
    draft.take_from_target(target.embedding)
    plain = [generate(target, None, prompt, args.max_new_tokens) for prompt in prompts]
    far = []
    for name, (theirs, gpu) in served.items():
        found = compare(target, draft, prompts, plain, theirs, settings[name], args.max_new_tokens)
        about = {
            "engine": args.engine,
            "engine_version": theirs.version,
            "engine_gpu": gpu,
            "algorithm": method.engine_names[args.engine],
            "setting": name,
            "num_steps": settings[name].num_steps,
            "dtype": args.dtype,
            "target": Path(args.target).resolve().name,
            "prompts": args.prompts.name,
            "max_new_tokens": args.max_new_tokens,
        }
        command = shlex.join(["python", "-m", "bench.engines", *sys.argv[1:]])
        append("engines", about | found | {"command": command}, args.commit, args.results)
        print(
            f"{name:6s} {args.dtype}  {args.engine} {found['spec_accept_length']:.4f}  "
            f"fastdraft {found['fastdraft_spec_accept_length']:.4f}  difference {found['relative_difference']:+.2%}  "
            f"on the engine's outputs {found['followed_relative_difference']:+.2%}",
            flush=True,
        )
        if abs(found["relative_difference"]) > args.goal:
            far.append(name)
    if far:
        sys.exit(f"more than {args.goal:.0%} apart: {', '.join(far)}")


if __name__ == "__main__":
    main()
