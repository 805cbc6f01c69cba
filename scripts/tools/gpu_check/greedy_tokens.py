"""`compare`: an engine's greedy tokens beside the choices of `transformers`, in a format in which two can tie.

bfloat16 keeps 8 bits of a number, so two implementations may choose differently where two tokens are almost equally
likely. The reference reads what the engine wrote, and must have chosen the same wherever its own choice is clear.
"""

from collections.abc import Sequence
from typing import Any

import torch


def compare(
    model: Any, answers: Sequence[tuple[list[int], list[int]]], lead_over: float
) -> tuple[int, list[tuple[int, int, float]]]:
    """Return at how many positions the reference's choice is clear, and (answer, position, lead) where it is another.

    `answers` are pairs of the ids of a prompt and of the engine's answer to it. A choice is clear where it leads the
    second by over `lead_over`, in logits: some times the distance of bfloat16 numbers of the logits' size.
    """
    clear, wrong = 0, []
    for number, (prompt, answer) in enumerate(answers):
        with torch.no_grad():
            logits_tv = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        (best, second), choice = logits_tv.topk(2).values.unbind(-1), logits_tv.argmax(-1)
        for place, token in enumerate(answer):
            lead = float(best[place] - second[place])
            clear += lead > lead_over
            if lead > lead_over and token != int(choice[place]):
                wrong.append((number, place, lead))
    return clear, wrong
