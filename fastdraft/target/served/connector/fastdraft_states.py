"""A KV connector for an unmodified vLLM: it hands the states of every prompt token to a trainer, and does nothing else.

vLLM's `extract_hidden_states` keeps the states at chosen layer boundaries in a cache layer of its own, in the same blocks
as keys and values, so that chunked prefill, prefix caching and preemption treat both alike. A prompt's states are complete
in the step that computes its last token. In that step, behind the forward, rank 0 of the tensor-parallel group gathers
them from the cache; threads then write them into the server's folder (`fastdraft_handover`), or send them to a trainer
that has connected from another host (`fastdraft_wire`). No block is held back and the engine waits for nothing but, on a
GPU, a free piece of the ring that the rows leave through.

What a request generates has its states in the same blocks, all but the last token's, which is never run. A request that
wants them too keeps its blocks when it ends, and the next step gathers them, which the engine makes for every request that
has ended. Which tokens those are is in the answer.

A request names its file in `kv_transfer_params: {"states": NAME}`, with `"answer": true` for the states of its answer too,
and the answer says which server gave it; with `{"describe": true}` it says all that a trainer compares. A request with
neither costs nothing.

Imports torch, vllm and the modules beside it. vLLM finds it by `kv_connector_module_path`.

# T tokens of a prompt, S states, Ht hidden; a cache is [blocks, S, block_size, Ht], also for a vLLM that has tokens first
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Queue

import torch
import vllm
from fastdraft_handover import (
    client_of,
    hand_over,
    hand_over_error,
    is_request,
    open_folder,
    remove_dead,
    write_server,
)
from fastdraft_wire import ERROR, LONGEST_ERROR, STATES, Listener
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec
from vllm.v1.request import RequestStatus

RING = 4  # pieces of device memory that rows pass through on their way to the host
PIECE_BYTES = 2**26
WRITERS = 4  # threads: filling shared memory keeps a core busy, which may be slower than a GPU makes states
WHOLE = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)  # and not an answer that was given up


@dataclass
class Extracted:
    name: str
    tokens: int
    blocks: list[int]


@dataclass
class Complete(KVConnectorMetadata):
    prompts: list[Extracted] = field(default_factory=list)  # whose last token is computed in this step
    answers: dict[str, Extracted] = field(default_factory=dict)  # by request: it has ended, its blocks wait for us


class FastdraftStates(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config, role, kv_cache_config=None):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        _refuse_wrong_rope(vllm_config.model_config)
        groups = kv_cache_config.kv_cache_groups
        own = [i for i, group in enumerate(groups) if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)]
        if len(own) != 1 and len(groups) != 1:
            raise ValueError(f"no single group of {len(groups)} in the KV cache holds the hidden states")
        # Where every layer has blocks of one kind, vLLM puts the states into the only group.
        self.group = own[0] if own else 0
        self.block_size = groups[self.group].kv_cache_spec.block_size
        extra = self._kv_transfer_config.kv_connector_extra_config
        self.folder, self.instance, self.identity = extra["folder"], extra["instance"], extra["identity"]
        self.states_host, self.states_port = extra.get("states_host"), extra.get("states_port")
        # Not on the command line, which other users of the host can read.
        self.token = os.environ["FASTDRAFT_STATES_TOKEN"] if self.states_port is not None else None
        self.running: dict[str, Extracted] = {}  # the scheduler's
        self.ended: dict[str, Extracted] = {}  # the scheduler's: answers that the next step gathers
        self.cache: torch.Tensor | None = None  # the writing worker's

    # --- in the scheduler ----------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        return 0, False

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        pass

    def build_connector_meta(self, scheduler_output) -> Complete:
        """Follows the blocks of the prompts that run, and picks those that this step completes."""
        computed: dict[str, int] = {}
        for new in scheduler_output.scheduled_new_reqs:
            extra = (new.sampling_params.extra_args or {}) if new.sampling_params else {}
            asked = extra.get("kv_transfer_params") or {}
            name = asked.get("states")
            if is_request(name) and new.prompt_token_ids and not asked.get("answer"):
                blocks = list(new.block_ids[self.group])
                self.running[new.req_id] = Extracted(name, len(new.prompt_token_ids), blocks)
                computed[new.req_id] = new.num_computed_tokens
        old = scheduler_output.scheduled_cached_reqs
        for req_id, blocks, already in zip(old.req_ids, old.new_block_ids, old.num_computed_tokens, strict=True):
            if prompt := self.running.get(req_id):
                if req_id in old.resumed_req_ids:  # it was preempted, and has other blocks now
                    prompt.blocks.clear()
                prompt.blocks += blocks[self.group] if blocks else []
                computed[req_id] = already
        scheduled = scheduler_output.num_scheduled_tokens
        done = [req_id for req_id, n in computed.items() if n + scheduled[req_id] >= self.running[req_id].tokens]
        answers, self.ended = self.ended, {}
        return Complete([self.running.pop(req_id) for req_id in done], answers)

    def request_finished(self, request, block_ids):
        return self.request_finished_all_groups(request, [block_ids])

    def request_finished_all_groups(self, request, block_ids):
        self.running.pop(request.request_id, None)  # a request that was given up before its last token
        asked = request.kv_transfer_params or {}
        if asked.get("describe"):
            return False, self._about()
        if "states" not in asked:
            return False, None
        waits = bool(asked.get("answer")) and is_request(asked["states"]) and request.status in WHOLE
        if waits:  # the last token has come out of the one before, and was not run
            answer = Extracted(asked["states"], request.num_tokens - 1, list(block_ids[self.group]))
            self.ended[request.request_id] = answer
        return waits, {"instance": self.instance}

    def _about(self) -> dict:
        model = self._vllm_config.model_config
        return self.identity | {
            "instance": self.instance,
            "folder": self.folder,
            "vllm": vllm.__version__,
            "boundaries": self._boundaries(),
            "hidden_size": model.get_hidden_size(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "states_port": self.states_port,
            "token": self.token,
        }

    def _boundaries(self) -> list[int]:
        draft = self._vllm_config.speculative_config.draft_model_config.hf_config
        return sorted(set(draft.eagle_aux_hidden_state_layer_ids))

    # --- in a worker -----------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches):
        layers = list(get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches)))
        if not layers or get_tensor_model_parallel_rank() != 0:
            return  # each rank has all states, and of pipeline stages the last alone
        self.cache = self._by_state(kv_caches[layers[0]])
        open_folder(self.folder)
        remove_dead(self.folder)
        self.listener = None if self.states_port is None else Listener(self.states_host, self.states_port, self.token)
        write_server(self.folder, {"instance": self.instance})
        self.ring = _Ring(self.cache) if self.cache.is_cuda else None
        self.written: Queue[tuple[str, torch.Tensor, torch.cuda.Event | None]] = Queue()
        for _ in range(WRITERS):
            threading.Thread(target=self._write, name="fastdraft-states", daemon=True).start()

    def _by_state(
        self,
        cache: torch.Tensor,  # as this version of vLLM lays it out
    ) -> torch.Tensor:  # [blocks, S, block_size, Ht], a view
        """ValueError where the shape leaves in doubt which axis is the token's."""
        states, axes, size = len(self._boundaries()), tuple(cache.shape[1:3]), self.block_size
        if cache.dim() != 4 or states == size or axes not in ((states, size), (size, states)):
            raise ValueError(
                f"the cache of states is {tuple(cache.shape)}, which does not tell {states} states from {size} tokens"
            )
        return cache if axes == (states, size) else cache.transpose(1, 2)

    def start_load_kv(self, forward_context, **kwargs):
        """Gathers answers that have ended. In a step that runs nothing vLLM 0.26 calls this, and not `wait_for_save`."""
        if self.cache is not None and self.has_connector_metadata():
            for answer in self._get_connector_metadata().answers.values():
                self._hand_over(answer)

    def wait_for_save(self):
        if self.cache is not None and self.has_connector_metadata():
            for prompt in self._get_connector_metadata().prompts:
                self._hand_over(prompt)

    def _hand_over(self, extracted: Extracted) -> None:
        _, states, size, hidden = self.cache.shape
        pinned = self.ring is not None
        host = torch.empty(extracted.tokens, states, hidden, dtype=self.cache.dtype, pin_memory=pinned)
        blocks = torch.tensor(extracted.blocks[: -(-extracted.tokens // size)], pin_memory=pinned)
        if self.ring is None:
            host.copy_(_rows(self.cache, blocks, extracted.tokens))
            self.written.put((extracted.name, host, None))
        else:
            self.written.put((extracted.name, host, self.ring.send(blocks, host)))

    def get_finished(self, finished_req_ids):
        """The answers whose blocks may go: whatever writes into these next runs behind the gathering of this step."""
        return (set(self._get_connector_metadata().answers) or None if self.has_connector_metadata() else None), None

    def _write(self) -> None:
        while True:
            name, host, copied = self.written.get()
            client = client_of(name)
            far = self.listener is not None and self.listener.serves(client)
            try:
                if copied is not None:
                    copied.synchronize()
                rows = memoryview(host.view(torch.uint8).flatten().numpy())
                if far:
                    self.listener.send(name, client, STATES, rows)
                else:
                    hand_over(self.folder, name, rows)
            except Exception as error:  # a full memory, or a folder that is gone, must not end the engine
                logging.getLogger("vllm.fastdraft").warning("states %s were not handed over: %s", name, error)
                with suppress(OSError):
                    if far:
                        self.listener.send(name, client, ERROR, memoryview(str(error).encode()[:LONGEST_ERROR]))
                    else:
                        hand_over_error(self.folder, name, str(error))

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        pass

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config):
        return "NHD" if vllm.__version__.startswith("0.26.") else "LBNHC"  # one layout, whose name has changed


def _refuse_wrong_rope(model) -> None:
    """ValueError where vLLM computes another model than its config says, which nothing else would tell: both ends would
    have the same wrong numbers."""
    rope = getattr(model.hf_text_config, "rope_parameters", None) or {}
    latent = getattr(model.hf_text_config, "kv_lora_rank", None)
    if latent and current_platform.is_cpu() and rope.get("rope_type", "default") == "default":
        raise ValueError(
            "of a model with latent attention (MLA) and plain RoPE, vLLM's build for CPUs rotates the queries wrongly, so "
            "its states are another model's; serve it on a GPU"
        )


def _rows(
    cache: torch.Tensor,  # [blocks, S, block_size, Ht]
    blocks: torch.Tensor,  # [ceil(T / block_size)] int64
    tokens: int,
) -> torch.Tensor:  # [T, S, Ht]
    _, states, _, hidden = cache.shape
    return cache[blocks].transpose(1, 2).reshape(-1, states, hidden)[:tokens]


class _Ring:
    """Rows go to the host through pieces of device memory, gathered on the forward's stream and copied on another.

    Gathering there keeps the order with the next step, which may write into blocks that this one has freed. It takes the
    device's own bandwidth; the slower copy to the host runs beside the next forward. The forward waits only when all
    pieces are under way.
    """

    def __init__(self, cache: torch.Tensor):
        _, states, self.size, hidden = cache.shape
        self.cache = cache
        blocks = max(1, PIECE_BYTES // (self.size * states * hidden * cache.element_size()))
        self.tokens = blocks * self.size  # of a piece
        self.pieces = [cache.new_empty(self.tokens, states, hidden) for _ in range(RING)]
        self.free = [torch.cuda.Event() for _ in range(RING)]
        self.stream = torch.cuda.Stream(cache.device)
        self.next = 0

    def send(
        self,
        blocks: torch.Tensor,  # [ceil(T / block_size)] int64, page-locked
        host: torch.Tensor,  # [T, S, Ht] page-locked
    ) -> torch.cuda.Event:  # reached when `host` has all rows
        forward = torch.cuda.current_stream(self.cache.device)
        blocks = blocks.to(self.cache.device, non_blocking=True)
        for begin in range(0, len(host), self.tokens):
            end = min(begin + self.tokens, len(host))
            piece, free = self.pieces[self.next], self.free[self.next]
            self.next = (self.next + 1) % RING
            forward.wait_event(free)
            piece[: end - begin] = _rows(self.cache, blocks[begin // self.size : -(-end // self.size)], end - begin)
            self.stream.wait_stream(forward)
            with torch.cuda.stream(self.stream):
                host[begin:end].copy_(piece[: end - begin], non_blocking=True)
                free.record()
        copied = torch.cuda.Event()
        copied.record(self.stream)
        return copied
