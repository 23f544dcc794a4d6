"""Runs SpecForge's own scripts/prepare_hidden_states.py on a CPU: CHECKOUT, then the script's arguments.

Everything is the script's own (templates, masks, vocabulary map, captured layers, files) but three things: transformers
runs the target instead of SGLang, gloo joins the one process instead of NCCL, and what it asks of "cuda" is the CPU's.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM


class OnTheCPU(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Target:
    """Of layer k SGLang gives what it puts out (`set_eagle3_layers_to_capture` adds 1 and takes what that layer reads)."""

    def __init__(self, path: str, layers: list[int]):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.layers = layers

    @torch.no_grad()
    def capture(self, input_ids, attention_mask, loss_mask):
        found = self.model.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        states = torch.cat([found.hidden_states[k + 1] for k in self.layers], -1)
        return SimpleNamespace(hidden_states=list(states), last_hidden_states=list(found.last_hidden_state))


def main() -> None:
    checkout, *arguments = sys.argv[1:]
    path = Path(checkout) / "scripts" / "prepare_hidden_states.py"
    sys.path.insert(0, checkout)
    spec = importlib.util.spec_from_file_location("prepare_hidden_states", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    import specforge.distributed as groups

    def join(**_settings) -> None:
        groups._TP_GROUP = groups._DP_GROUP = dist.group.WORLD

    with tempfile.TemporaryDirectory() as folder:
        script.__file__ = str(Path(folder) / "scripts" / path.name)  # its cache lies beside it: not in the checkout
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        script.init_distributed, script.destroy_distributed = join, dist.destroy_process_group
        script.build_target_model = lambda args, _config, capture_layers, **_: Target(
            args.target_model_path, capture_layers
        )
        sys.argv = [str(path), *arguments]
        with OnTheCPU():
            script.main()


if __name__ == "__main__":
    main()
