"""What composes with a strategy: weights, clipping, robust rules, momentum; each is a key of the run configuration."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic import Field as Bounded

from umbel.errors import ConfigError

Robust = Literal["none", "geometric_median", "multi_krum", "fltrust"]


class Options(BaseModel):
    """The options of a strategy, in Python's spelling; a strategy refuses those that make no sense with it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_examples: PositiveInt = 1 << 24
    """The most examples a site may claim to have trained on in one round."""
    weight_cap: NonNegativeInt = 0
    """Loss tokens that one site weighs at most; 0: no cap."""
    norm_clip: PositiveFloat = 2.0
    """A change longer than this times the median site's is shortened to it."""
    robust: Robust = "none"
    byzantine: NonNegativeInt = 0
    """Hostile sites that multi_krum is to withstand."""
    trusted_site: str = ""
    """Whose update fltrust measures the others by."""
    server_momentum: float = Bounded(0.0, ge=0.0, lt=1.0)
    """β of the step G' = G + mean change + β (G − G_before), taken on the weight updates themselves."""
    stack_rank: NonNegativeInt = 0
    """The rank up to which flora stacks."""
    personal_rank: NonNegativeInt = 0
    """The rank of the adapter that dual leaves at each site."""
    buffered: bool = False
    """Whether an update that comes too late counts in the next round."""
    device: str = "cpu"
    """Where torch computes the mean: cpu, cuda, cuda:1 …"""

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Self:
        """Parse options; raise ConfigError with one line per mistake."""
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, one['loc'])) or 'options'}: {one['msg']}" for one in error.errors()]
            raise ConfigError("strategy: " + "; ".join(line.replace("Value error, ", "") for line in lines)) from error

    @model_validator(mode="after")
    def _require_sense(self) -> Self:
        if (self.robust == "fltrust") != bool(self.trusted_site):
            raise ValueError("robust = 'fltrust' and trusted-site go together: name the site whose data you trust")
        if (self.robust == "multi_krum") != bool(self.byzantine):
            raise ValueError("robust = 'multi_krum' and byzantine go together: say how many hostile sites to withstand")
        if self.robust != "none" and self.weight_cap:
            raise ValueError(
                f"weight-cap with robust = {self.robust!r}: a robust rule does not weigh by tokens, which are a site's "
                "own claim; leave weight-cap out"
            )
        return self
