"""Which version gave an answer that a user rates: `POST /v1/feedback`. Ids and versions, never what was said."""

from collections import OrderedDict
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from umbel.errors import NotFound

REMEMBERED = 10_000
"""Answers that can be rated: the last ones."""
MAX_BODY_BYTES = 16 << 10

Rating = Literal["up", "down"]


class Feedback(BaseModel):
    """What a user sends."""

    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, Field(min_length=1, max_length=256)]
    """Of the answer, as the answer itself says it."""
    rating: Rating


class Ratings:
    """Answer → the version that gave it, and what its user thinks of it."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most
        self._answers: OrderedDict[str, tuple[str, Rating | None]] = OrderedDict()

    def remember(self, answer: str, label: str) -> None:
        """An answer begins; the oldest one is forgotten for it."""
        self._answers[answer] = (label, None)
        self._answers.move_to_end(answer)
        while len(self._answers) > self._most:
            self._answers.popitem(last=False)

    def rate(self, answer: str, rating: Rating) -> tuple[str, Rating | None]:
        """Note a rating; the version that gave the answer, and the rating before. Raises NotFound."""
        if answer not in self._answers:
            raise NotFound(f"There is no answer {answer!r} that can be rated; only the latest ones can.")
        label, before = self._answers[answer]
        self._answers[answer] = (label, rating)
        return label, before
