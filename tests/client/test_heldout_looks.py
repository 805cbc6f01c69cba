"""When held-out examples are due for others; what a look may err is tested where verdicts are."""

import pytest

from client.heldout_looks import MANY, Look

ALPHA = 0.025


@pytest.mark.parametrize(
    ("number", "since", "due"),
    [
        (1, 1, False),
        (MANY, MANY, False),
        (MANY + 1, MANY + 1, True),
        (MANY + 1, 1, False),
        (39, 1, False),
        (40, 1, True),
    ],
)
def test_others_are_due_after_many_verdicts_of_which_none_promoted_and_after_very_many(
    number: int, since: int, due: bool
) -> None:
    assert Look(number, since).due(ALPHA) is due
