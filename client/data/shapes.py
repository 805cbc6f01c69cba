"""`conversation_of`: the conversation in one JSON object of a data file, whichever of the known shapes it has.

Nothing that was written vanishes: each field is used, is known to have no part in training, or is refused by name. No
message of this module holds text of an example.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from client.data.conversation import Conversation, Turn
from client.data.message_fields import Labelled, kind_of, near, refuse_unknown, text_of, turns_of
from client.data.tool_fields import tools_of
from umbel.errors import DataError

EXPECTED = (
    'expected a JSON object with "messages" (a list of {"role", "content"}), with "conversations" (a list of {"from", '
    '"value"}), with "prompt" and "completion", with "instruction", "output" and perhaps "input", or, for a pair of '
    'answers, with "prompt", "chosen" and "rejected"'
)
SHAPES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("messages",): ("system", "tools"),
    ("conversations",): ("system", "tools"),
    ("prompt", "completion"): ("system", "history"),
    ("instruction", "output"): ("input", "system", "history"),
    ("prompt", "chosen", "rejected"): ("system", "tools"),
    ("messages", "chosen", "rejected"): ("system", "tools"),
    ("conversations", "chosen", "rejected"): ("system", "tools"),
    ("chosen", "rejected"): ("system", "tools"),
    ("input", "preferred_output", "non_preferred_output"): (),
}
"""Fields that make a shape → the further fields that it may have. Those of pairs end with the worse answer."""
WORSE = ("rejected", "non_preferred_output")
GROUP = "group"
"""Field of any shape that names what the example is about; see `client.data.conversation.group_of`."""


def conversation_of(example: Mapping[str, Any], where: str) -> Conversation:
    """Return the conversation of an example; raise DataError, naming `where` and the field, for anything unclear.

    >>> conversation_of({"prompt": "1 + 1 =", "completion": "2"}, "train.jsonl:1")
    Conversation(turns=(Turn(role='user', ...), Turn(role='assistant', ...)), tools=(), group=None)
    """
    shape = _shape_of(example, where)
    known = (*shape, *SHAPES[shape], GROUP)
    given: Mapping[str, Any] = {field: value for field, value in example.items() if value is not None or field in shape}
    refuse_unknown(given, known, where)
    rejected: list[Labelled] = []
    if shape[-1] in WORSE:
        given, turns, rejected = _pair_of_answers(given, shape, where)
    elif shape in (("messages",), ("conversations",)):
        turns = turns_of(given[shape[0]], shape[0], where)
    else:
        turns = [*_history(given.get("history"), where), *_pair(given, shape, where)]
    turns = [*_system(given.get("system"), turns, where), *turns]
    for label, turn in (*turns, *rejected):
        _require_written(turn, f"{where}: {label}")
    _require_order(turns, where)
    tools, group = tools_of(given.get("tools"), where), _group(given.get(GROUP), where)
    worse = next((turn for _, turn in rejected), None)
    return Conversation(tuple(turn for _, turn in turns), tools, group, worse)


def _shape_of(example: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = [shape for shape in SHAPES if all(field in example for field in shape)]
    largest = [shape for shape in found if not any({*shape} < {*other} for other in found)]
    if len(largest) == 1:
        return largest[0]
    if found:
        raise DataError(f"{where}: more than one kind of example; {EXPECTED}")
    fields = {field for shape in SHAPES for field in shape}
    hints = [f'did you mean "{meant}" by "{name}"?' for name in example if (meant := near(name, fields - {*example}))]
    raise DataError(f"{where}: no kind of example; {' '.join((*hints, ''))}{EXPECTED}")


def _group(group: object, where: str) -> str | None:
    """Return the name of an example's group: a text or a whole number; an empty one is none."""
    if group in (None, ""):
        return None
    if isinstance(group, float) and group.is_integer():  # a table with gaps writes whole numbers so
        group = int(group)
    if isinstance(group, bool) or not isinstance(group, str | int):
        kind = "a number with a fraction" if isinstance(group, float) else kind_of(group)
        raise DataError(f'{where}: "{GROUP}" is {kind}; name the group by a text or a whole number')
    return str(group)


def _pair(given: Mapping[str, Any], shape: tuple[str, ...], where: str) -> list[Labelled]:
    question, answer = (text_of(given, field, where) for field in shape)
    if "input" in given:
        question = "\n\n".join(filter(None, (question, text_of(given, "input", where))))
    return [(shape[0], Turn("user", question)), (shape[1], Turn("assistant", answer))]


def _pair_of_answers(
    given: Mapping[str, Any], shape: tuple[str, ...], where: str
) -> tuple[Mapping[str, Any], list[Labelled], list[Labelled]]:
    """Return the fields beside a pair, the turns of its prompt with the chosen answer, and the rejected answer.

    Only the two answers carry a loss.
    """
    *prompt, better, worse = shape
    if shape[0] == "input":  # OpenAI's shape: what is beside the messages is in here, too
        given = _input(given, where)
    if prompt:
        field = "messages" if shape[0] == "input" else prompt[0]
        asked = given[field]
        before = [(field, Turn("user", asked))] if isinstance(asked, str) else turns_of(asked, field, where)
        chosen, rejected = (_answer(given[field], field, where) for field in (better, worse))
    else:  # each side is a whole conversation
        (*before, chosen), (*others, rejected) = (turns_of(given[field], field, where) for field in (better, worse))
        if [turn for _, turn in before] != [turn for _, turn in others]:
            raise DataError(
                f'{where}: "{better}" and "{worse}" differ before their last turns; a pair has two answers to one '
                'prompt, best written as "prompt"'
            )
        _require_answer(chosen, where), _require_answer(rejected, where)
    read = [(label, replace(turn, trained=turn.role != "assistant" and turn.trained)) for label, turn in before]
    return given, [*read, chosen], [rejected]


def _input(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    asked = given["input"]
    if not isinstance(asked, dict) or "messages" not in asked:
        raise DataError(f'{where}: "input" is {kind_of(asked)}; expected {{"messages": […]}}')
    refuse_unknown(asked, ("messages", "tools", "parallel_tool_calls"), f"{where}: input")
    return {**given, "messages": asked["messages"], "tools": asked.get("tools")}


def _answer(answer: object, field: str, where: str) -> Labelled:
    """Return one answer of a pair: a text, a message, or a list with one message."""
    if isinstance(answer, str):
        return field, Turn("assistant", answer)
    turns = turns_of([answer] if isinstance(answer, dict) else answer, field, where)
    if len(turns) > 1:
        raise DataError(f'{where}: "{field}" has {len(turns)} turns; write what is before the answer as the prompt')
    return _require_answer(turns[0], where)


def _require_answer(labelled: Labelled, where: str) -> Labelled:
    label, turn = labelled
    if turn.role != "assistant" or not turn.trained:
        what = f'has the role "{turn.role}"' if turn.role != "assistant" else 'has "weight": 0'
        raise DataError(f"{where}: {label} {what}; both sides of a pair end with an answer that is learnt from")
    return labelled


def _history(history: object, where: str) -> list[Labelled]:
    """Return the earlier turns of Alpaca's `history`: a list of [question, answer]."""
    if history in (None, [], ""):
        return []
    pairs = history if isinstance(history, list) else [history]
    turns = []
    for index, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f'{where}: history[{index}] is no pair; expected [["question", "answer"], …]')
        turns += [(f"history[{index}]", Turn("user", pair[0])), (f"history[{index}]", Turn("assistant", pair[1]))]
    return turns


def _system(system: object, turns: list[Labelled], where: str) -> list[Labelled]:
    if system in (None, ""):
        return []
    if not isinstance(system, str):
        raise DataError(f'{where}: "system" is {kind_of(system)}; expected a string')
    if turns and turns[0][1].role == "system":
        raise DataError(f'{where}: "system" stands beside a system turn in {turns[0][0]}; keep one of them')
    return [("system", Turn("system", system))]


def _require_written(turn: Turn, where: str) -> None:
    if turn.role == "assistant" and not turn.content.strip() and not turn.tool_calls:
        raise DataError(f"{where}: the answer is empty; write one or remove the line")


def _require_order(turns: list[Labelled], where: str) -> None:
    """Raise DataError for turns that no request could have, or that would teach nothing."""
    answers = [turn for _, turn in turns if turn.role == "assistant"]
    if not answers:
        raise DataError(f'{where}: no message has the role "assistant", so there is no answer to learn')
    for (_, before), (label, turn) in itertools.pairwise(turns):
        if before.role == turn.role == "assistant":
            raise DataError(f"{where}: {label}: an answer follows an answer; join them, or write the turn between them")
    label, last = turns[-1]
    if last.role != "assistant":
        raise DataError(f"{where}: {label}: the last turn has no answer; add the answer or remove the turn")
    if not any(turn.trained for turn in answers):
        raise DataError(f'{where}: every answer has "weight": 0, so there is nothing to learn; remove the line')
