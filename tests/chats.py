"""A small real tokenizer and chats for the data tests."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIALS += ["<|eot_id|>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>", "<|return|>"]
CORPUS = [
    "Hello there, how are you today?",
    "The capital of France is Paris.",
    "I think that two and two make four.\n\n",
] * 20

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3's and gpt-oss's: the day on which it is rendered is part of the prompt.
DATED = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML


@functools.cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # As Llama's: a post-processor that adds a BOS and trims white space from offsets. Neither may reach the samples.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", SPECIALS.index("<|begin_of_text|>"))]
            ),
        ]
    )
    return tokenizer.to_str()


def make_tokenizer(template=CHATML, **kwargs):
    """A byte-level BPE tokenizer whose pad token is its end-of-turn token, as SmolLM2's is."""
    from transformers import PreTrainedTokenizerFast  # here: it imports torch, and worker processes import this module

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        bos_token="<|begin_of_text|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=template,
        **kwargs,
    )


def chat(*turns):
    """user, assistant, user, ... from their texts."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
