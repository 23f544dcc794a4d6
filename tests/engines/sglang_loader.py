"""Runs in SGLang's Python: its own code reads checkpoints on a CPU, and what it made of them is written down.

    python sglang_loader.py JOB.json

JOB.json is a list of {"target": DIR, "checkpoint": DIR, "out": FILE}. FILE gets the draft's parameters under SGLang's names
after loading, each filled with NaN before; the RoPE table; the target ids of draft tokens; the target layers captured; and
which of fc_norm, norm_before_fc and norm_output it runs.
SGLang has no CPU build of its kernels: sgl_kernel is stubbed, and torchvision and torchaudio, which break a CPU PyTorch.
"""

import importlib.machinery
import importlib.metadata
import json
import pathlib
import sys
import tempfile
import types

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
from safetensors.torch import save_file  # noqa: E402
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
from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, publish  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm  # noqa: E402

own_load_weights = LlamaForCausalLMEagle3.load_weights


def load_weights(self, weights):
    with torch.no_grad():
        for parameter in self.parameters():
            parameter.fill_(torch.nan)
    own_load_weights(self, weights)


LlamaForCausalLMEagle3.load_weights = load_weights


def load(config):
    return get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))


def main(job: str) -> None:
    ready = False
    for work in json.loads(pathlib.Path(job).read_text()):
        args = ServerArgs(
            model_path=work["target"],
            device="cpu",
            dtype="float32",
            skip_tokenizer_init=True,
            attention_backend="torch_native",
            speculative_algorithm="EAGLE3",
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
        spec = resolve_spec_aux_hidden_state_config(
            server_args=args,
            model_config=target_config,
            spec_algorithm=SpeculativeAlgorithm.EAGLE3,
            is_draft_worker=False,
        )
        assert spec.eagle_use_aux_hidden_state
        target.set_eagle3_layers_to_capture(spec.eagle_aux_hidden_state_layer_ids)
        config = ModelConfig(work["checkpoint"], is_draft_model=True, dtype="float32", speculative_algorithm="EAGLE3")
        draft = load(config)
        found = {f"parameter.{name}": p.data.contiguous() for name, p in draft.named_parameters()}
        found["rope"] = draft.model.layers[0].self_attn.rotary_emb.cos_sin_cache.contiguous()
        found["captured"] = torch.tensor(target.model.layers_to_capture)
        model = draft.model
        found["norms"] = torch.tensor([model.fc_norm is not None, model.input_norm is not None, model.norm_output])
        if draft.hot_token_id is not None:
            found["draft_ids"] = draft.hot_token_id.contiguous()
        save_file(found, work["out"])


if __name__ == "__main__":
    main(sys.argv[1])
