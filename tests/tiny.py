"""A tiny random target and chats in its language. Not in conftest.py: there are several, and only one can be imported."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdraft.cost import TargetSizes
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.eagle3.draft import Draft

WORDS = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "el", "ir", "om", "us")]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant", "\n"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


TINY = dict(  # of a target; weights large enough that its choices are not near-ties
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=192,
    max_position_embeddings=512,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=2,
)
LLAMA_8B = {  # Llama-3.1-8B's config.json as published
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; the pad token is the end-of-turn token, as SmolLM2's is."""
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    pieces = pre_tokenizers.Split(r" ", "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.Split("\n", "isolated")])
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>"]})
    return made


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """8 layers of 32, vocabulary 192, fp32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TINY | changes)).eval()


def save_target(path: Path, seed: int = 0, **changes) -> Path:
    tiny_llama(seed, **changes).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def save_answering(path: Path, **changes) -> Path:
    """A target that ends most answers soon, and whose tokenizer puts spaces between words, so that an answer's text is the
    ids that it came from again."""
    model = tiny_llama(**changes)
    with torch.no_grad():
        model.lm_head.weight[2] *= 3
    model.save_pretrained(path)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.save_pretrained(path)
    return path


def target_of(count: int) -> TargetSizes:
    """A target of so many, of which nothing else is known."""
    return TargetSizes(0, 0, 0, count, count, hidden_size=0, kv_width=0, attention_width=0, mlp_width=0)


def draft_shape(**changes) -> DraftConfig:
    """12 wide, 2 heads of 6, vocabulary 31 of which the draft has 14."""
    fields = dict(
        hidden_size=12,
        target_hidden_size=12,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=6,
        vocab_size=31,
        draft_vocab_size=14,
        num_target_layers=8,
        layers=(1, 3, 4),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        max_position_embeddings=64,
    )
    return DraftConfig(**fields | changes)


def random_draft(config: DraftConfig, embedding: torch.Tensor, std: float = 0.2, seed: int = 1) -> Draft:
    """In the embedding's dtype, with a random vocabulary map."""
    generator = torch.Generator().manual_seed(seed)
    draft = Draft(config).to(embedding.dtype)
    draft.init_weights(std, generator)
    draft.set_vocab(torch.randperm(config.vocab_size, generator=generator)[: config.draft_vocab_size].sort().values)
    draft.set_embedding(embedding)
    return draft


def noisy_draft(config: DraftConfig, std: float = 0.3) -> Draft:
    """In float64, every weight random, those of norms around 1, and the vocabulary map too; its embedding is its own."""
    draft, generator = Draft(config).double(), torch.Generator().manual_seed(1)
    for p in draft.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * std + (p.ndim == 1)
    every = torch.randperm(config.vocab_size, generator=generator)
    draft.set_vocab(every[: config.draft_vocab_size].sort().values)
    return draft


def write_chats(path: Path, count: int, seed: int = 0, turns: int = 2) -> Path:
    """JSONL of conversations of `turns` messages, 4 to 20 words each."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            messages = [
                {"role": ("user", "assistant")[i % 2], "content": " ".join(rng.choices(WORDS, k=rng.randint(4, 20)))}
                for i in range(turns)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def refusal(called: tuple[int, str, str]) -> str:
    """The one red line of a command that failed with exit code 1."""
    code, _, err = called
    lines = [line for line in err.splitlines() if line.startswith("fastdraft: ")]
    assert code == 1 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]
