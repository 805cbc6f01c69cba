"""`Own`: the mean of a site that is alone, its own update to the last bit."""

from strategies.adapter import Adapter, Errors, Factors


class Own:
    """The `strategies.fold.Mean` over one site."""

    def __init__(self) -> None:
        self._update: Factors = {}

    def add(self, update: Factors, received: Adapter, amount: float) -> None:
        """Keep the update as it is, whatever it weighs."""
        self._update = update

    def finish(self, total: float) -> tuple[Factors, dict[str, Errors]]:
        """Return it, without any error."""
        return self._update, dict.fromkeys(self._update, Errors(0.0, 0.0))
