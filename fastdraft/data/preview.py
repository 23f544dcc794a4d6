"""Print conversations as the draft is trained on them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby, islice

from rich.console import Console
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from fastdraft.data.prompts import special_ids
from fastdraft.data.samples import Sample


def preview(
    samples: Iterable[Sample], tokenizer: PreTrainedTokenizerBase, n: int = 3, console: Console | None = None
) -> None:
    """The first n samples: trained tokens green, the rest dim, special tokens in reverse video."""
    console = console or Console()
    special = special_ids(tokenizer)
    number = 0
    for number, sample in enumerate(islice(samples, n), 1):
        ids, trained = [int(i) for i in sample.input_ids], [bool(m) for m in sample.loss_mask]
        title = f"sample {number}: {len(ids)} tokens, {sum(trained)} trained ({sum(trained) / len(ids):.0%})"
        console.print(Rule(Text(title)))
        text = Text()
        tokens = zip(ids, trained, (i in special for i in ids), strict=True)
        for (is_trained, is_special), run in groupby(tokens, key=lambda token: token[1:]):
            # Runs and not single tokens, because a character can be several tokens long.
            piece = tokenizer.decode([token[0] for token in run], clean_up_tokenization_spaces=False)
            text.append(piece, style=("green" if is_trained else "dim") + (" reverse" if is_special else ""))
        console.print(text, soft_wrap=True)
    if not number:
        console.print("no conversation with a trained token: is there an assistant turn, and does the template show it?")
    console.print(
        Text.assemble("trained: ", ("green", "green"), "; not trained: ", ("dim", "dim"), "; special: reverse video")
    )
