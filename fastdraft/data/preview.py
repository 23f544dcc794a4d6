"""Print conversations as the draft is trained on them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby, islice

from rich.console import Console
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from fastdraft.data.prepare import Stats
from fastdraft.data.prompts import special_ids
from fastdraft.data.samples import Sample


def preview(
    samples: Iterable[Sample],
    tokenizer: PreTrainedTokenizerBase,
    n: int = 3,
    console: Console | None = None,
    stats: Stats | None = None,  # of what the samples were made of; grows as they are read
) -> None:
    """The first n samples: trained tokens green, the rest dim, special tokens in reverse video. Where there are no colours,
    as in a file or a pipe, trained tokens are in double brackets. Below them, what is not trained and why."""
    console = console or Console()
    brackets = ("", "") if console.is_terminal and console.color_system else ("[[", "]]")
    special = special_ids(tokenizer)
    number = 0
    for number, sample in enumerate(islice(samples, n), 1):
        ids, trained = [int(i) for i in sample.input_ids], [bool(m) for m in sample.loss_mask]
        title = f"sample {number}: {len(ids)} tokens, {sum(trained)} trained ({sum(trained) / len(ids):.0%})"
        console.print(Rule(Text(title)))
        text = Text()
        tokens = zip(ids, trained, (i in special for i in ids), strict=True)
        for is_trained, run in groupby(tokens, key=lambda token: token[1]):
            text.append(brackets[0] if is_trained else "")
            # Runs and not single tokens, because a character can be several tokens long.
            for is_special, alike in groupby(run, key=lambda token: token[2]):
                piece = tokenizer.decode([token[0] for token in alike], clean_up_tokenization_spaces=False)
                text.append(piece, style=("green" if is_trained else "dim") + (" reverse" if is_special else ""))
            text.append(brackets[1] if is_trained else "")
        console.print(text, soft_wrap=True)
    if not number:
        console.print("no conversation with a trained token: is there an assistant turn, and does the template show it?")
    for remark in stats.remarks() if stats else []:
        console.print(Text(f"of the conversations read: {remark}"), soft_wrap=True)
    if brackets[0]:
        console.print(Text("trained: [[in double brackets]]"))
    else:
        console.print(
            Text.assemble("trained: ", ("green", "green"), "; not trained: ", ("dim", "dim"), "; special: reverse video")
        )
