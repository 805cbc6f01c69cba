"""Settings of a site in environment variables: which setting each one means, so that a mistake names the variable."""

import difflib
import os
from collections.abc import Collection

PREFIX = "UMBEL_SITE__"
Setting = tuple[str, ...]
"""Where a setting is: ("engine", "port"); a whole table is ("engine",)."""


def variables() -> dict[Setting, str]:
    """Setting → the variable that is to set it, whether there is such a setting or not."""
    return {
        tuple(name[len(PREFIX) :].lower().split("__")): name for name in os.environ if name.upper().startswith(PREFIX)
    }


def unknown(settings: Collection[Setting]) -> dict[str, str]:
    """Variable → what is wrong with it, for each that sets none of `settings`."""
    known = {"__".join(setting).upper() for setting in settings}
    found: dict[str, str] = {}
    for setting, name in variables().items():
        if setting in settings or setting[:2] == ("engine", "extra_args"):
            continue
        if setting[:2] == ("engine", "env"):  # a variable's name loses its case here, and would set another one
            found[name] = f'write it into [engine.env], or set {PREFIX}ENGINE__ENV to JSON such as {{"NAME": "value"}}'
            continue
        near = difflib.get_close_matches(name[len(PREFIX) :].upper(), known, n=1, cutoff=0.6)
        found[name] = "is no setting of a site; " + (f"did you mean {PREFIX}{near[0]}?" if near else "unset it")
    return found


def blamed(location: Collection[int | str]) -> str | None:
    """The variable that set what is at `location`, if one did."""
    where = tuple(map(str, location))
    setting = max((one for one in variables() if where[: len(one)] == one), key=len, default=None)
    return None if setting is None else variables()[setting]


def of_table(table: str) -> list[str]:
    """The variables that set something in a table."""
    return sorted(name for setting, name in variables().items() if setting[0] == table)
