"""`PageHinkley`: tells from the losses of fresh examples, one after the other, whether the data have changed.

Page, Biometrika 41, 1954; Hinkley, Biometrika 58, 1971. The losses come standardised by those of examples from before,
so the two constants hold for every base and every task.
"""

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

SLACK = 0.25
"""Standard deviations by which fresh losses may be higher for ever without an alarm."""
ALARM = 12.0
"""Sum of what is above the slack at which the data count as changed. Of 64 unchanged examples with normal losses it is
reached in about one of a hundred series; losses that are one standard deviation higher reach it after 16 examples."""
CUT = 4.0
"""Standard deviations that one example counts for at most, so that a single odd one raises no alarm."""


class PageHinkley(BaseModel):
    """The state of the test; begins anew after each alarm that training has answered."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    total: float = 0.0
    lowest: float = 0.0
    """The smallest `total` so far."""

    def after(self, losses: Iterable[float]) -> "PageHinkley":
        """Return the state after more losses, in standard deviations above the mean of those from before."""
        total, lowest = self.total, self.lowest
        for loss in losses:
            total += min(CUT, max(-CUT, loss)) - SLACK
            lowest = min(lowest, total)
        return PageHinkley(total=total, lowest=lowest)

    @property
    def drift(self) -> float:
        """How far the test has come to its alarm, which is 1."""
        return (self.total - self.lowest) / ALARM
