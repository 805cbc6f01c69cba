"""`SITES`: private facts of a clinic and of a shop, in English, for the demo with a real base.

    python -m scripts.tools.demo.facts clinic DIR

Names, rooms, codes and prices are invented, so no base can know them, and neither site knows the other's. Each fact is
asked for in several wordings. Held-out questions ask for the same facts in wordings that were never trained, so a right
answer shows that the fact was learned, and not a line remembered.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Topic:
    """Facts of one kind: what is asked of each name, and what is answered."""

    answers: dict[str, str]
    """Name → answer."""
    trained: tuple[str, ...]
    """Wordings of the question that are trained; `{name}` is the name."""
    heldout: tuple[str, ...]
    """Wordings that are held out."""


SITES: dict[str, tuple[Topic, ...]] = {
    "clinic": (
        Topic(
            answers={
                "Dr. Varnholt": "Room 214", "Dr. Ostrik": "Room 108",
                "Dr. Quillen": "Room 371", "Dr. Tessmar": "Room 460",
            },
            trained=(
                "Where can I find {name}?",
                "Which room is {name} in?",
                "I have an appointment with {name}. Where do I go?",
                "Please tell me the room of {name}.",
                "{name} is expecting me, which door is it?",
                "What is {name}'s room number?",
            ),
            heldout=(
                "In which room does {name} see patients?",
                "How do I get to {name}? Which room?",
                "Can you tell me where {name} is?",
                "I have to bring a file to {name}. Which room is it?",
            ),
        ),
        Topic(
            answers={"Heron": "K47", "Birch": "M82", "Copper": "T15", "Lantern": "B96"},
            trained=(
                "What is the code of the {name} ward?",
                "Tell me the {name} ward's code.",
                "Which code does the {name} ward have?",
                "I need the ward code for {name}.",
                "Code for the {name} ward, please.",
                "A patient goes to the {name} ward. What code do I write?",
            ),
            heldout=(
                "How is the {name} ward coded?",
                "Please give me the code of ward {name}.",
                "My form asks for the code of the {name} ward. What is it?",
                "Which code do I enter for a bed on the {name} ward?",
            ),
        ),
        Topic(
            answers={
                "hand clinic": "7:40 to 11:20", "sleep lab": "20:15 to 6:30",
                "burn unit": "8:35 to 17:05", "travel desk": "13:25 to 16:45",
            },
            trained=(
                "When is the {name} open?",
                "What are the opening hours of the {name}?",
                "From when to when can I come to the {name}?",
                "Tell me when the {name} opens and closes.",
                "Opening hours of the {name}, please.",
                "At what time is the {name} open for patients?",
            ),
            heldout=(
                "Which hours does the {name} keep?",
                "I want to visit the {name}. When is it open?",
                "How long is the {name} open today?",
                "Between which times does the {name} take patients?",
            ),
        ),
    ),
    "shop": (
        Topic(
            answers={
                "Orlin valve": "Shelf C12", "Tarvo belt": "Shelf A75",
                "Plessen filter": "Shelf F09", "Quark hinge": "Shelf D38",
            },
            trained=(
                "Where is the {name}?",
                "Which shelf holds the {name}?",
                "I am looking for the {name}. Where is it?",
                "Where do we keep the {name}?",
                "On what shelf do I put the {name}?",
                "Please tell me the place of the {name}.",
            ),
            heldout=(
                "On which shelf can I find the {name}?",
                "Where in the store is the {name} kept?",
                "A customer wants the {name}. Where do I look?",
            ),
        ),
        Topic(
            answers={
                "Halden kettle": "38.50 euros", "Brisk toaster": "24.90 euros",
                "Lumet lamp": "61.20 euros", "Ferro grill": "97.40 euros",
            },
            trained=(
                "What does the {name} cost?",
                "How much is the {name}?",
                "Tell me the price of the {name}.",
                "What is the price of a {name}?",
                "A customer asks for the price of the {name}.",
                "Price of the {name}, please.",
            ),
            heldout=(
                "How much do I pay for the {name}?",
                "For what price do we sell the {name}?",
                "Is the {name} expensive? What does it cost?",
            ),
        ),
        Topic(
            answers={"Ondra 3": "Part TX9", "Milo 5": "Part GV2", "Kestrel 8": "Part PL6", "Toral 7": "Part WB1"},
            trained=(
                "Which battery does the {name} take?",
                "What battery fits the {name}?",
                "The {name} needs a new battery. Which one?",
                "Tell me the battery of the {name}.",
                "Which battery do I order for the {name}?",
                "Battery for the {name}, please.",
            ),
            heldout=(
                "What kind of battery goes into the {name}?",
                "A customer needs a battery for a {name}. Which?",
                "My {name} is dead. Which battery do I buy?",
            ),
        ),
    ),
}  # fmt: skip


def questions(site: str, *, heldout: bool) -> list[tuple[str, str]]:
    """Return (question, right answer) of a site, in a fixed order."""
    found: list[tuple[str, str]] = []
    for topic in SITES[site]:
        for wording in topic.heldout if heldout else topic.trained:
            found += [(wording.format(name=name), answer) for name, answer in topic.answers.items()]
    return found


def write(site: str, into: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `eval.jsonl` of a site into a directory, as `messages`; return their paths."""
    into.mkdir(parents=True, exist_ok=True)
    paths = into / "train.jsonl", into / "eval.jsonl"
    for path, heldout in zip(paths, (False, True), strict=True):
        lines = [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in questions(site, heldout=heldout)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return paths


def main() -> None:
    """Write the data of one site into a directory and print the files' paths."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("site", choices=sorted(SITES))
    parser.add_argument("into", type=Path)
    arguments = parser.parse_args()
    for path in write(arguments.site, arguments.into):
        print(path)


if __name__ == "__main__":
    main()
