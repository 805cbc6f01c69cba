"""The pin: a site that does not match it is refused, with the difference."""

from pathlib import Path

import pytest

from tests.toys.registry import PIN, begun
from tests.toys.site import BASE, SHAPES
from umbel.errors import AdapterError, BaseMismatch, ConfigError, Conflict
from umbel.messages import Hello


def hello(**changes: object) -> Hello:
    facts = {
        "site": "b", "adapters": ("support",), "fingerprint": BASE, "shapes": SHAPES, "dtype": "float32",
        "max_lora_rank": 8, "train_examples": 1, "eval_examples": 1, "live": {},
    }  # fmt: skip
    return Hello(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"fingerprint": BASE.model_copy(update={"tokenizer": "other"})}, BaseMismatch, "tokenizer differ"),
        ({"shapes": {**SHAPES, "model.layers.0.mlp.up_proj": (3, 3)}}, AdapterError, "up_proj differs"),
        ({"dtype": "bfloat16"}, AdapterError, r"serves in bfloat16.*\[engine\]\.dtype"),
        ({"adapters": ("suport",)}, ConfigError, "did you mean adapter='suport'"),
    ],
)
def test_a_site_that_does_not_match_the_pin_is_refused(changes: dict, error: type[Exception], reason: str) -> None:
    PIN.require(hello(), "support")
    with pytest.raises(error, match=reason):
        PIN.require(hello(**changes), "support")


def test_a_rule_without_mixed_ranks_needs_sites_that_hold_the_whole_rank() -> None:
    PIN.require_rank(hello())
    PIN.require(hello(max_lora_rank=1), "support")
    with pytest.raises(AdapterError, match=r"max_lora_rank"):
        PIN.require_rank(hello(max_lora_rank=1))


def test_another_pin_is_a_conflict(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    with pytest.raises(Conflict, match="pinned to another base"):
        registry.begin("support", PIN.model_copy(update={"rank": 4}), seed=3)
