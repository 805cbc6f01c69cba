"""`Ratings`: users' ratings of answers (`POST /v1/feedback`), by id and version. No contents are kept."""

from collections import OrderedDict
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from umbel.errors import NotFound

MAX_RATED_ANSWERS = 10_000
"""Number of latest answers that can still be rated."""
MAX_BODY_BYTES = 16 << 10

Rating = Literal["up", "down"]


class Feedback(BaseModel):
    """The body of `POST /v1/feedback`."""

    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, Field(min_length=1, max_length=256)]
    """The `id` in the answer that is rated."""
    rating: Rating


class Ratings:
    """Remembers which version gave each of the latest answers, and its user's latest rating."""

    def __init__(self, most: int = MAX_RATED_ANSWERS) -> None:
        self._most = most
        self._answers: OrderedDict[str, tuple[str, Rating | None]] = OrderedDict()

    def remember(self, answer: str, label: str) -> None:
        """Note that version `label` begins an answer; forget the oldest answers beyond the limit."""
        self._answers[answer] = (label, None)
        self._answers.move_to_end(answer)
        while len(self._answers) > self._most:
            self._answers.popitem(last=False)

    def rate(self, answer: str, rating: Rating) -> tuple[str, Rating | None]:
        """Note a rating; return the version that gave the answer, and the rating before.

        Raises NotFound for an answer that is unknown or forgotten.
        """
        if answer not in self._answers:
            raise NotFound(f"There is no answer {answer!r} that can be rated; only the latest ones can.")
        label, before = self._answers[answer]
        self._answers[answer] = (label, rating)
        return label, before
