"""`Options`: weights, clipping, robust rules, momentum of a strategy; each is a key of the run configuration."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic import Field as Bounded

from umbel.errors import ConfigError

Robust = Literal["none", "geometric_median", "multi_krum", "fltrust"]
Weights = Literal["data", "tokens", "equal"]


class StrategyConfig(BaseModel):
    """The part of the run configuration that goes to the strategy. A test holds its defaults to pyproject.toml's.

    `Options` and `server.config.RunConfig` extend it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weights: Weights = "data"
    """What a site is weighed by: the distinct examples it holds, their loss tokens, or 1."""
    weight_cap: NonNegativeInt = 0
    """Upper bound on the examples or loss tokens, as `weights`, that a site is weighed by; 0: no bound."""
    norm_clip: PositiveFloat = 2.0
    """A change longer (‖Δ‖_F per optimizer step) than this times the median one is shortened to it."""
    robust: Robust = "none"
    """Rule that weighs sites by their changes alone (`strategies.robust`)."""
    byzantine: NonNegativeInt = 0
    """Number of hostile sites that multi_krum has to withstand."""
    trusted_site: str = ""
    """The site by whose update fltrust measures the others."""
    server_momentum: float = Bounded(0.0, ge=0.0, lt=1.0)
    """β of the step G' = G + mean change + β (G − G_before), taken on the weight updates themselves."""
    stack_rank: NonNegativeInt = 0
    """Largest rank of flora's stack; 0 for any other strategy."""
    personal_rank: NonNegativeInt = 0
    """Rank of the adapter that dual leaves at each site; 0 for any other strategy."""
    buffered: bool = False
    """True if an update that comes too late counts in the next round."""
    device: str = "cpu"
    """Device on which torch computes the mean: cpu, cuda, cuda:1 …"""

    @model_validator(mode="after")
    def _require_sense(self) -> Self:
        if (self.robust == "fltrust") != bool(self.trusted_site):
            raise ValueError("robust = 'fltrust' and trusted-site go together: name the site whose data you trust")
        if (self.robust == "multi_krum") != bool(self.byzantine):
            raise ValueError("robust = 'multi_krum' and byzantine go together: say how many hostile sites to withstand")
        if self.robust != "none" and (self.weight_cap or self.weights == "tokens"):
            key = "weight-cap" if self.weight_cap else "weights = 'tokens'"
            raise ValueError(
                f"{key} with robust = {self.robust!r}: a robust rule does not weigh by data, which is a site's own "
                f"claim; leave {key} out"
            )
        if self.weights == "equal" and self.weight_cap:
            raise ValueError("weight-cap with weights = 'equal': every site weighs 1 already; leave weight-cap out")
        return self


class Options(StrategyConfig):
    """The options of a strategy, in Python's spelling; a strategy refuses those that make no sense with it."""

    max_examples: PositiveInt = 1 << 24
    """The most examples a site may claim to have trained on in one round."""
    max_steps: PositiveInt = 1 << 24
    """The most optimizer steps a site may claim to have done in one round."""

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Self:
        """Parse options; raise ConfigError with one line per mistake."""
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, one['loc'])) or 'options'}: {one['msg']}" for one in error.errors()]
            raise ConfigError("strategy: " + "; ".join(line.replace("Value error, ", "") for line in lines)) from error
