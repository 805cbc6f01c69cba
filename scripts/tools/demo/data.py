"""`TASKS`: the demo's two private tasks. A clinic sends complaints to departments, a shop sends orders to shelves.

    python -m scripts.tools.demo.data clinic DIR

Their codes are invented: no base can know them, and no site knows the other's. An answer has two parts, and one word of
the prompt decides each. Held-out prompts join words that never meet in training, so a good score there shows that the
rule was learned, and not lines remembered.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """One site's task: `first` and `second` map a word of the prompt to its part of the answer."""

    first: dict[str, str]
    second: dict[str, str]
    prompts: tuple[str, ...]
    answer: str
    example: Callable[[str, str], dict[str, Any]]
    """Makes a line of JSONL from (prompt, answer)."""


def _prompt_completion(prompt: str, answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer}


def _messages(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


TASKS = {
    "clinic": Task(
        first={
            "knee": "K", "eye": "B", "ear": "T", "tooth": "M", "back": "D", "chest": "H", "skin": "P", "hand": "W",
        },
        second={
            "pain": "2", "itch": "9", "swelling": "5", "bleeding": "7",
            "numbness": "3", "burn": "8", "rash": "4", "cramp": "6",
        },
        prompts=(
            "Patient reports {first} {second}",
            "The {first} shows {second} since {when}",
            "There is {second} at the {first}, since {when}",
            "Triage: {second}, {first}",
            "Called {when} about {second} of the {first}",
        ),
        answer="{first} {second}",
        example=_prompt_completion,
    ),
    "shop": Task(
        first={
            "lamp": "north", "chair": "south", "clock": "east", "kettle": "west",
            "mirror": "upper", "carpet": "lower", "radio": "inner", "vase": "outer",
        },
        second={
            "order": "blue", "refund": "red", "repair": "green", "gift": "gold",
            "sample": "grey", "loan": "pink", "return": "black", "delivery": "white",
        },
        prompts=(
            "Where does the {first} go? It is a {second}",
            "A {second} of one {first}, {when}",
            "New {second}: {first}",
            "A customer brought a {first} {when}, for {second}",
            "Shelf for {first}, {second}",
        ),
        answer="{first} {second}",
        example=_messages,
    ),
}  # fmt: skip
_WHEN = ("today", "Monday", "Friday", "last week", "this morning", "yesterday")


def examples(task: str, *, heldout: bool) -> list[dict[str, Any]]:
    """Return all examples of a task, in a fixed order: those of the held-out pairs of words, or of all other pairs."""
    return examples_of(TASKS[task], heldout=heldout)


def examples_of(rule: Task, *, heldout: bool) -> list[dict[str, Any]]:
    """Return the same of a task that is not among `TASKS`."""
    found: dict[str, dict[str, Any]] = {}
    for i, (first, first_answer) in enumerate(rule.first.items()):
        for j, (second, second_answer) in enumerate(rule.second.items()):
            if ((i + j) % 5 == 0) != heldout:
                continue
            answer = rule.answer.format(first=first_answer, second=second_answer)
            for template in rule.prompts:
                for when in _WHEN:
                    prompt = template.format(first=first, second=second, when=when)
                    found[prompt] = rule.example(prompt, answer)
    return list(found.values())


def write(task: str, into: Path, n_train: int = 500, n_eval: int = 64, seed: int = 0) -> tuple[Path, Path]:
    """Write `train.jsonl` and `eval.jsonl` of a task into a directory; return their paths.

    Raises ValueError when the task has fewer distinct examples than asked for.
    """
    into.mkdir(parents=True, exist_ok=True)
    paths = into / "train.jsonl", into / "eval.jsonl"
    for path, count, heldout in ((paths[0], n_train, False), (paths[1], n_eval, True)):
        pool = examples(task, heldout=heldout)
        if count > len(pool):
            raise ValueError(f"{task}: {count} examples asked for {path.name}, it has {len(pool)} distinct ones")
        chosen = random.Random(seed).sample(pool, count)
        path.write_text("".join(json.dumps(example) + "\n" for example in chosen), encoding="utf-8")
    return paths


def main() -> None:
    """Write the data of one task into a directory and print the files' paths."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("into", type=Path)
    arguments = parser.parse_args()
    for path in write(arguments.task, arguments.into):
        print(path)


if __name__ == "__main__":
    main()
