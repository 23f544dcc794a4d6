"""Runs in SGLang's Python: its own code reads checkpoints on a CPU, and what it made of them is written down.

    python sglang_loader.py JOB.json

JOB.json is a list of {"target": DIR, "checkpoint": DIR, "out": FILE, "algorithm": NAME}, and for a draft of blocks
"inputs": FILE and "steps": N. FILE gets the draft's parameters under SGLang's names after loading, each filled with NaN
before; the RoPE table; and the target layers captured. An EAGLE-3 draft also gives the target ids of its draft tokens, and
which of fc_norm, norm_before_fc and norm_output it runs. A draft of blocks also drafts one from the inputs
(`sglang_block.py`). A checkpoint that SGLang refuses gives FILE.refused, the sentence, instead.
SGLang has no CPU build of its kernels: sgl_kernel is stubbed, and torchvision and torchaudio, which break a CPU PyTorch.
"""

import importlib.machinery
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
import types

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # what SGLang compiles for a GPU runs as it is written
os.environ["SGLANG_RAGGED_VERIFY_MODE"] = "cap-accept"  # SGLang's default leaves a DSpark draft's confidence head out

STUBS = {"sgl_kernel": "0.4.7", "torchvision": "0.28.0", "torchaudio": "2.11.0"}


class Stub(types.ModuleType):
    """Any attribute is there; a call gives back the function it decorates, or the stub."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, Stub(f"{self.__name__}.{name}"))
        return getattr(self, name)

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in STUBS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = Stub(spec.name)
        module.__path__, module.__version__ = [], STUBS[spec.name.split(".")[0]]
        return module

    def exec_module(self, module):
        pass


real_version = importlib.metadata.version
importlib.metadata.version = lambda name: STUBS.get(name.replace("-", "_")) or real_version(name)
sys.meta_path.insert(0, Finder())

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from sglang.srt.arg_groups import speculative_hook  # noqa: E402
from sglang.srt.configs.device_config import DeviceConfig  # noqa: E402
from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.distributed.parallel_state import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
)
from sglang.srt.model_executor.model_runner_components.spec_aux_hidden_state import (  # noqa: E402
    resolve_spec_aux_hidden_state_config,
)
from sglang.srt.model_loader import get_model  # noqa: E402
from sglang.srt.model_loader.loader import DefaultModelLoader  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, publish  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm  # noqa: E402
from sglang_block import draft_block  # noqa: E402

# These two refuse a server on a CPU, and derive settings of a server's that nothing here reads.
speculative_hook._handle_dflash = speculative_hook._handle_dspark = lambda server_args: None

own_load = DefaultModelLoader.load_weights_only


def load_weights_only(model, weights, target_device):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    own_load(model, weights, target_device)


DefaultModelLoader.load_weights_only = staticmethod(load_weights_only)


def load(config):
    return get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))


def main(job: str) -> None:
    ready = False
    for work in json.loads(pathlib.Path(job).read_text()):
        name = work["algorithm"]
        args = ServerArgs(
            model_path=work["target"],
            device="cpu",
            dtype="float32",
            skip_tokenizer_init=True,
            attention_backend="torch_native",
            speculative_algorithm=name,
            speculative_draft_model_path=work["checkpoint"],
            speculative_num_steps=3,
            speculative_eagle_topk=1,
            speculative_num_draft_tokens=4,
        )
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0))
        if not ready:
            init_distributed_environment(1, 0, "file://" + tempfile.mktemp(), 0, "gloo")
            initialize_model_parallel()
            ready = True
        target_config = ModelConfig(work["target"], dtype="float32")
        target = load(target_config)
        config = ModelConfig(work["checkpoint"], is_draft_model=True, dtype="float32", speculative_algorithm=name)
        try:
            draft = load(config)
        except ValueError as error:
            pathlib.Path(work["out"] + ".refused").write_text(str(error))
            continue
        spec = resolve_spec_aux_hidden_state_config(
            server_args=args,
            model_config=target_config,
            spec_algorithm=SpeculativeAlgorithm[name],
            is_draft_worker=False,
        )
        found = {f"parameter.{name}": p.data.contiguous() for name, p in draft.named_parameters()}
        if name == "EAGLE3":
            assert spec.eagle_use_aux_hidden_state
            target.set_eagle3_layers_to_capture(spec.eagle_aux_hidden_state_layer_ids)
            found |= eagle3(draft)
        else:
            assert spec.dflash_use_aux_hidden_state
            target.set_dflash_layers_to_capture(spec.dflash_target_layer_ids)
            found["rope"] = draft.layers[0].self_attn.rotary_emb.cos_sin_cache.contiguous()
            if "inputs" in work:
                found |= draft_block(draft, target, load_file(work["inputs"]), work["steps"])
        found["captured"] = torch.tensor(target.model.layers_to_capture)
        save_file(found, work["out"])


def eagle3(draft):
    model = draft.model
    found = {
        "rope": model.layers[0].self_attn.rotary_emb.cos_sin_cache.contiguous(),
        "norms": torch.tensor([model.fc_norm is not None, model.input_norm is not None, model.norm_output]),
    }
    if draft.hot_token_id is not None:
        found["draft_ids"] = draft.hot_token_id.contiguous()
    return found


if __name__ == "__main__":
    main(sys.argv[1])
