"""`Ratings`: users' ratings of answers (`POST /v1/feedback`), by id, version and user's code. No contents are kept."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.router.api_keys import ALL, Access
from serving.router.latest import Latest
from umbel.errors import NotFound

MAX_RATED_ANSWERS = 10_000
"""Number of latest answers, of all adapters, that can still be rated."""
MAX_BODY_BYTES = 16 << 10

Rating = Literal["up", "down"]


class Feedback(BaseModel):
    """The body of `POST /v1/feedback`."""

    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, Field(min_length=1, max_length=256)]
    """The `id` in the answer that is rated."""
    rating: Rating


@dataclass
class _Rated:
    """One of the latest answers."""

    label: str
    adapter: str | None
    user: int | None
    rating: Rating | None = None


class Ratings:
    """Remembers which version gave each of the latest answers to whom, and the latest rating."""

    def __init__(self, most: int = MAX_RATED_ANSWERS) -> None:
        self._answers: Latest[_Rated] = Latest(most)

    def remember(self, answer: str, label: str, adapter: str | None = None, user: int | None = None) -> None:
        """Note that version `label` begins an answer.

        `adapter` was asked for, None is the base. `user` is the code of its user (see `serving.router.user_counts`),
        None for nobody in particular.
        """
        self._answers.remember(answer, adapter, _Rated(label, adapter, user))

    def rate(self, answer: str, rating: Rating, access: Access = ALL) -> tuple[str, int | None, Rating | None]:
        """Note a rating; return the version that gave the answer, its user's code, and the rating before.

        Raises NotFound for an answer that is unknown or forgotten, or if the rater does not see its adapter.
        """
        rated = self._answers.get(answer)
        if rated is None or not access.sees(rated.adapter):
            raise NotFound(f"There is no answer {answer!r} that can be rated; only the latest ones can.")
        before, rated.rating = rated.rating, rating
        return rated.label, rated.user, before
