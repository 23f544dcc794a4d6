"""What training needs of a target besides its features, from its files alone: config, embedding, head and final norm.

transformers builds the target without its layers, reads the few weights that are left out of however many files, and runs
what stands behind the last layer. So a target of any size takes the memory of its embedding and head here, and none of
its quantised layers is ever read.

# Ht target hidden, V target vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from fastdraft.batch import Ends
from fastdraft.model.target_config import first_line
from fastdraft.target.hf import Target
from fastdraft.target.identity import checkpoint_fingerprint, local_folder

FILES = "files:"  # begins the fingerprint of a target whose weights were never in this process, before that of its files
PLAIN = ("BF16", "F16", "F32")  # safetensors' names of the dtypes that need no scales
PACKED = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "blocks", "absmax")  # names beside them
COUNTS = ("num_hidden_layers", "num_nextn_predict_layers", "num_kv_shared_layers", "first_k_dense_replace")
BY_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types")


@dataclass(frozen=True)
class FileEnds:
    ends: Ends
    norm: nn.Module  # the final norm as the target's own class computes it, [n, Ht] -> [n, Ht]
    num_layers: int


def load_ends(path: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> FileEnds:
    """Reads a target's ends. ValueError where its files, its class or a quantised head leave any of them in doubt."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # of transformers, or the model type's own class, which may raise anything
        raise ValueError(f"target {path!r} has no readable config.json: {first_line(error)}") from error
    num_layers = config.get_text_config().num_hidden_layers
    shown, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # transformers warns of every weight that finds no layer
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=_without_layers(config),
            dtype=dtype,
            device_map={"": "cpu"},
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # of transformers, safetensors or the model's own class
        raise ValueError(
            f"{config.model_type} cannot be built without its layers, so the embedding and head of {path!r} cannot be read "
            f"alone: {first_line(error)}; train with this target in the process (leave out target.url)"
        ) from error
    finally:
        logging.set_verbosity(shown)
        if bar:
            logging.enable_progress_bar()
    own = [name for name, _ in model.named_parameters()]
    _refuse_quantized(path, own)
    if missing := sorted(set(info["missing_keys"]) & set(own)):
        raise ValueError(f"target {path!r} lacks the weights {', '.join(missing[:3])}; download it again")
    bare = _Bare(model, ())
    norm = _last_norm(bare)
    ends = Ends(
        bare.embedding.to(device),
        bare.head,
        None if bare.final_norm is None else bare.final_norm.to(device),
        FILES + checkpoint_fingerprint(path),
    )
    return FileEnds(_head_on(ends, bare), norm.to(device), num_layers)


def _head_on(ends: Ends, bare: Target) -> Ends:
    """The same with its head on the embedding's device; a tied head is the embedding itself."""
    head, device = bare.head, ends.device
    tied = head.weight.data_ptr() == bare.embedding.data_ptr() and head.weight.shape == bare.embedding.shape
    weight = ends.embedding if tied else head.weight.to(device)
    bias = None if head.bias is None else head.bias.to(device)
    return Ends(ends.embedding, type(head)(weight, bias, head.scale, head.softcap), ends.final_norm, ends.fingerprint)


class _Bare(Target):
    """A target without its layers. Its head is proven as any target's is."""

    def _try_packing(self) -> str:
        return "it has no layers"

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,  # [B, L] int64
    ) -> tuple[Tensor, Tensor]:  # g [B, L, 0], f [B, L, Ht]: the final norm of whatever precedes the first layer
        f = self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state.to(self.dtype)
        return f.new_empty(*f.shape[:2], 0), f


def _without_layers(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the same model with no layer between embedding and final norm, and nothing of it quantised."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in COUNTS:
            if getattr(part, name, None) is not None:
                setattr(part, name, 0)
        for name in BY_LAYER:
            if getattr(part, name, None) is not None and not isinstance(getattr(type(part), name, None), property):
                setattr(part, name, [])
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config


@torch.no_grad()
def _last_norm(target: Target) -> nn.Module:
    """The module that gives the decoder's last hidden state. ValueError where none with a weight for each of Ht does."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _inputs: tuple, output: object) -> None:
        if torch.is_tensor(output):
            outputs[module] = output

    modules = [m for m in target.decoder.modules() if m is not target.decoder and not list(m.children())]
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        ids = torch.arange(8)[None] % target.vocab_size
        last = target.decoder(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    size = target.hidden_size
    found = [
        m
        for m, output in outputs.items()
        if output.shape == last.shape
        and torch.equal(output, last)
        and (any(p.shape == (size,) for p in m.parameters()) or "norm" in type(m).__name__.lower())
    ]
    if len(found) != 1:
        raise ValueError(
            f"{type(target.model).__name__} has {len(found)} modules that could be its final norm, so what its head reads "
            "cannot be made from a server's states; train with this target in the process (leave out target.url)"
        )
    return found[0]


def _refuse_quantized(path: str, own: list[str]) -> None:
    """ValueError where a file keeps one of the weights that are read here in a dtype that stands for no number alone."""
    modules = {".".join(name.split(".")[-2:-1]) for name in own}  # lm_head, embed_tokens, norm
    for file in sorted(local_folder(path).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                *parents, leaf = name.split(".")
                if parents[-1:] == [] or parents[-1] not in modules or "layers" in parents:
                    continue
                kept = opened.get_slice(name).get_dtype()
                if leaf in PACKED or kept not in PLAIN:
                    raise ValueError(
                        f"{file.name} of target {path!r} keeps {name} as {kept}: an embedding, head or final norm that is "
                        "quantised is not read here; take a checkpoint that leaves them in bf16, as most do"
                    )
