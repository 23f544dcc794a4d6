"""Runs in SGLang's Python: its own layers and heads draft one block on a CPU.

SGLang's workers, which would batch, schedule and verify, are not run. The draft model's code is, with SGLang's PyTorch
attention over a cache that holds one sequence: the context's keys and values as its workers write them, then the block.

# n context tokens, K captured layers, H hidden, B rows of a block, m drafted tokens
"""

from types import SimpleNamespace

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.speculative.dspark_components.dspark_draft import DraftNoise, draft_markov_block


class Cache:
    """Keys and values of one sequence, at the places that are its positions."""

    def __init__(self, layers, size):
        self.keys = [torch.full((size, a.num_kv_heads, a.head_dim), torch.nan) for a in layers]
        self.values = [torch.full((size, a.num_kv_heads, a.head_dim), torch.nan) for a in layers]

    def get_key_buffer(self, layer):
        return self.keys[layer]

    def get_value_buffer(self, layer):
        return self.values[layer]

    def set_kv_buffer(self, layer, where, k, v):
        place = where.loc
        self.keys[layer.layer_id][place] = k.view(len(place), *self.keys[layer.layer_id].shape[1:])
        self.values[layer.layer_id][place] = v.view(len(place), *self.values[layer.layer_id].shape[1:])


def draft_block(draft, target, inputs, steps):
    """What the draft says after `g` [n, K*H], the target's states, and `block_ids` [B], the last token and the masks.

    `states` [B, H] after the final norm, and `tokens` [m], drafted greedily. DSpark also gives `confidence` [m], DFlash2
    `scores` [m, candidates before, candidates] and the `candidates`.
    """
    g, ids = inputs["g"], inputs["block_ids"]
    size, n = len(ids), len(g)
    layers = [layer.self_attn for layer in draft.layers]
    backend = SimpleNamespace(
        token_to_kv_pool=Cache(layers, n + size),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.arange(n + size)[None]),
        swa_out_cache_loc=None,
        _make_sliding_window_mask=TorchNativeAttnBackend._make_sliding_window_mask,
    )
    backend._run_sdpa_forward_extend = TorchNativeAttnBackend._run_sdpa_forward_extend.__get__(backend)
    batch = SimpleNamespace(
        req_pool_indices=torch.zeros(1, dtype=torch.int64),
        seq_lens=torch.tensor([n + size]),
        extend_prefix_lens=torch.tensor([n]),
        extend_seq_lens=torch.tensor([size]),
        encoder_lens=None,
        out_cache_loc=torch.arange(n, n + size),
    )
    with torch.no_grad():
        context, places = draft.project_target_hidden(g), torch.arange(n)
        for layer in draft.layers:
            k, v = layer.self_attn.kv_proj_only(draft.prepare_context_hidden_for_kv(layer, context))
            k = layer.self_attn.apply_k_rope(places, layer.self_attn.apply_k_norm(k))
            backend.token_to_kv_pool.set_kv_buffer(layer.self_attn.attn, SimpleNamespace(loc=places), k, v)
            layer.self_attn.attn.forward = attend(backend, layer.self_attn.attn)
        draft.set_block_size(size)
        embeddings = target.model.embed_tokens(ids)
        states = draft.forward(ids, torch.arange(n, n + size), batch, embeddings).hidden_states
        root = ids[:1]
        if hasattr(draft, "markov_head"):
            return {"states": states} | through_markov_head(draft, target, states[None, :steps], root)
        states_read = states[1 : steps + 1]
        if draft.candidate_selector is not None:
            return {"states": states} | through_selector(draft, target, states_read, root)
        logits = (states_read @ target.lm_head.weight.T)[:, : target.config.vocab_size]  # its rows are padded
        return {"states": states, "tokens": logits.argmax(-1)}


def attend(backend, layer):
    def forward(q, k, v, batch):
        return TorchNativeAttnBackend.forward_extend(backend, q, k, v, layer, batch)

    return forward


def through_markov_head(draft, target, states, root):
    draft.attach_shared_modules(embed_tokens=target.model.embed_tokens, lm_head=target.lm_head)
    logits, _ = draft.compute_base_logits(states)
    tokens, _ = draft_markov_block(
        markov_head=draft.markov_head,
        base_logits=logits,
        anchor_tokens=root,
        draft_hidden=states,
        step_temperatures=torch.zeros(1),
        noise=DraftNoise(key=0, offset=torch.zeros(1, dtype=torch.int64)),
        tp_sync=SimpleNamespace(sync=lambda site, tokens: tokens),
        greedy_draft=True,
    )
    before = torch.cat([root[None], tokens[:, :-1]], 1)
    confidence = draft.confidence_head(states, draft.markov_head.get_prev_embeddings(before))
    return {"tokens": tokens[0], "confidence": confidence[0].contiguous()}


def through_selector(draft, target, states, root):
    draft.lm_head = target.lm_head
    ids, logits = draft.compute_candidates(states)
    selector = draft.candidate_selector
    scores = selector.build_lattice(
        candidate_ids=ids[None], unary_logits=logits[None], hidden_states=states[None], anchor_token_ids=root
    )
    tokens, _ = selector.sample_path(
        candidate_ids=ids[None],
        scores=scores,
        uniforms=torch.full((1, len(ids)), 0.5),
        temperatures=torch.ones(1),
        greedy_mask=torch.ones(1, dtype=torch.bool),
    )
    return {"tokens": tokens[0], "candidates": ids, "scores": scores[0].contiguous()}
