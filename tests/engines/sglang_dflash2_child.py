"""Runs in SGLang's Python: its own code loads a DFlash2 checkpoint on a CPU, convolves rows and scores candidates.

    python sglang_dflash2_child.py JOB.json

JOB.json is {"target": DIR, "checkpoint": DIR, "inputs": FILE, "out": FILE}. `out` gets the draft's parameters after
loading, each filled with NaN before, what its first layer's convolution makes of rows on either side, and the selector's
scores.
"""

import json
import pathlib
import sys
import tempfile

import sglang_loader  # isort: skip  (it stubs what SGLang has no CPU build of, before anything imports that)
import torch
from safetensors.torch import load_file, save_file


def main(job: dict) -> None:
    args = sglang_loader.ServerArgs(
        model_path=job["target"], device="cpu", dtype="float32", skip_tokenizer_init=True, attention_backend="torch_native"
    )
    sglang_loader.publish(args, role="scheduler", ranks=sglang_loader.SpawnRanks(world_rank=0))
    sglang_loader.init_distributed_environment(1, 0, "file://" + tempfile.mktemp(), 0, "gloo")
    sglang_loader.initialize_model_parallel()
    draft = sglang_loader.load(
        sglang_loader.ModelConfig(job["checkpoint"], is_draft_model=True, dtype="float32", speculative_algorithm="DFLASH")
    )
    found = {f"parameter.{name}": p.data.contiguous() for name, p in draft.named_parameters()}
    inputs = load_file(job["inputs"])
    with torch.no_grad():
        rows = inputs.pop("rows")
        convolution = draft.layers[0].attention_conv
        found["conv_in"], coefficients = convolution.prepare(rows)
        found["conv_out"] = convolution.finish(rows, coefficients)
        found["scores"] = draft.candidate_selector.build_lattice(**inputs)
    save_file({name: x.contiguous() for name, x in found.items()}, job["out"])


if __name__ == "__main__":
    main(json.loads(pathlib.Path(sys.argv[1]).read_text()))
