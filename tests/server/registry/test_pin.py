"""The pin: a site that does not match it is refused, with the difference."""

import hashlib
import json
from pathlib import Path

import pytest

from server.registry.pin import Pin
from tests.toys.registry import PIN, begun
from tests.toys.site import BASE, SHAPES
from umbel.errors import AdapterError, BaseMismatch, ConfigError, Conflict
from umbel.messages import Hello


def hello(**changes: object) -> Hello:
    facts = {
        "site": "b", "adapter": "support", "fingerprint": BASE, "shapes": SHAPES, "dtype": "float32",
        "max_lora_rank": 8, "train_examples": 1, "eval_examples": 1,
    }  # fmt: skip
    return Hello(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"fingerprint": BASE.model_copy(update={"tokenizer": "other"})}, BaseMismatch, "tokenizer differ"),
        ({"shapes": {**SHAPES, "model.layers.0.mlp.up_proj": (3, 3)}}, AdapterError, "up_proj differs"),
        ({"dtype": "bfloat16"}, AdapterError, r"serves in bfloat16.*\[engine\]\.dtype"),
        ({"adapter": None}, ConfigError, "site b does not train an adapter 'support'"),
        ({"adapter": "billing"}, ConfigError, "site b does not train an adapter 'support'"),
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


KIN = "1" * 64
PACKED = BASE.model_copy(update={"weights": "packed", "quantization": "nf4"})
DENSE_SITE = hello(site="dense", kin=KIN)
PACKED_SITE = hello(site="packed", fingerprint=PACKED, kin=KIN, packing="nf4")


@pytest.mark.parametrize(("first", "second"), [(DENSE_SITE, PACKED_SITE), (PACKED_SITE, DENSE_SITE)])
def test_kin_are_refused_with_what_differs_and_what_to_do_unless_the_run_mixes_bases(
    first: Hello, second: Hello
) -> None:
    pin = Pin.of(first, 2)
    assert (pin.fingerprint, pin.kin) == (first.fingerprint, KIN)
    pin.require(second, "support", mixed_bases=True)
    with pytest.raises(BaseMismatch) as refused:
        pin.require(second, "support")
    assert str(refused.value) == (
        f"site {second.site} holds another base than this registry: weights, quantization differ; they are kin: run "
        "with mixed-bases=true to train them together, at the price that docs/how-to/choose-a-base.md gives"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kin": "2" * 64}, "weights, quantization differ; copy the same model directory to both"),
        ({"kin": ""}, "it is packed, and says no origin that is trusted there: copy origin.json"),
        ({"dtype": "bfloat16"}, "serves in bfloat16"),
    ],
)
def test_a_run_that_mixes_bases_takes_in_kin_only_and_those_that_agree_in_the_rest(changes: dict, reason: str) -> None:
    with pytest.raises((BaseMismatch, AdapterError), match=reason):
        Pin.of(DENSE_SITE, 2).require(PACKED_SITE.model_copy(update=changes), "support", mixed_bases=True)


def test_kin_does_not_matter_between_equal_bases() -> None:
    for mixed in (True, False):
        Pin.of(DENSE_SITE, 2).require(hello(), "support", mixed_bases=mixed)
        PIN.require(DENSE_SITE, "support", mixed_bases=mixed)


def test_a_pin_of_an_earlier_release_is_read_and_a_dense_base_in_it_has_kin_all_the_same() -> None:
    assert "kin" not in json.loads(PIN.model_dump_json()), "an earlier release could not read it"
    assert Pin.model_validate_json(PIN.model_dump_json()) == PIN
    assert (PIN.kin, PIN.shared) == ("", "")
    unquantised = hashlib.sha256(b"null").hexdigest()
    base = BASE.model_copy(update={"quantization": unquantised})
    old = PIN.model_copy(update={"fingerprint": base})
    assert (old.kin, old.shared) == ("", base.kin)
    old.require(PACKED_SITE.model_copy(update={"kin": base.kin}), "support", mixed_bases=True)


def test_a_dense_base_has_its_kin_by_its_fingerprint_whatever_its_site_says() -> None:
    honest = BASE.model_copy(update={"quantization": hashlib.sha256(b"null").hexdigest()})
    assert honest.dense
    pin = Pin.of(hello(fingerprint=honest, kin="2" * 64), 2)
    assert (pin.kin, pin.shared) == ("", honest.kin)
    other = hello(site="other", fingerprint=honest.model_copy(update={"weights": "other"}), kin=honest.kin)
    with pytest.raises(BaseMismatch, match="weights differ"):
        pin.require(other, "support", mixed_bases=True)
