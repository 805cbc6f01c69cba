"""The personal part of an adapter is joined, split and kept, and begun again where the stored part does not fit."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from client.rounds.personal import PersonalPart, first, join, served, split
from umbel import peft_dir
from umbel.adapter import AdapterManifest, Personal
from umbel.errors import AdapterError
from umbel.peft_dir import Tensors
from umbel.site.config import SiteConfig

SHAPES = {"model.layers.0.self_attn.q_proj": (6, 5), "model.layers.0.self_attn.v_proj": (4, 5)}
RANK = 2
B, OWN = Personal(part="B"), Personal(part="adapter", rank=3)
BOTH = pytest.mark.parametrize("personal", [B, OWN], ids=["fedsa", "dual"])


def site(state_dir: Path, name: str = "clinic-a", max_lora_rank: int = 8, dtype: str = "float32") -> SiteConfig:
    return SiteConfig(
        site={"name": name, "state_dir": state_dir},
        model={"path": state_dir / "base"},
        adapter=[{"name": "support"}],
        engine={"port": 30000, "dtype": dtype, "max_lora_rank": max_lora_rank},
        training={"data": state_dir / "train.jsonl"},
    )


def tensors(
    seed: int, rank: int = RANK, dtype: npt.DTypeLike = np.float32, shapes: dict[str, tuple[int, int]] = SHAPES
) -> Tensors:
    generator = np.random.default_rng(seed)
    made: Tensors = {}
    for module, (out, inner) in shapes.items():
        made[peft_dir.key(module, "A")] = generator.standard_normal((rank, inner)).astype(dtype)
        made[peft_dir.key(module, "B")] = generator.standard_normal((out, rank)).astype(dtype)
    return made


def part_of(personal: Personal, seed: int, dtype: npt.DTypeLike = np.float32) -> Tensors:
    """Return a site's own part after some rounds."""
    whole = tensors(seed, personal.rank or RANK, dtype)
    return whole if personal.part == "adapter" else {name: array for name, array in whole.items() if "lora_B" in name}


def stepped(start: Tensors, step: float = 0.5) -> Tensors:
    """Return the tensors as training would change them: every number moves."""
    return {name: (array + array.dtype.type(step)).astype(array.dtype) for name, array in start.items()}


def products(adapter: Tensors) -> dict[str, npt.NDArray[np.float64]]:
    pairs = peft_dir.factors(adapter).items()
    return {module: b.astype(np.float64) @ a.astype(np.float64) for module, (a, b) in pairs}


def same(one: Tensors, other: Tensors) -> bool:
    return peft_dir.encode(one) == peft_dir.encode(other)


def manifest(blob: bytes, **changes: Any) -> AdapterManifest:
    fields: dict[str, Any] = {
        "name": "support", "version": 3, "digest": peft_dir.digest(blob), "base": "b" * 64, "lineage": "mine",
        "round": 3, "rank": RANK, "target_modules": ("q_proj", "v_proj"),
    }  # fmt: skip
    return AdapterManifest(**{**fields, **changes})


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_join_comes_apart_into_what_it_was_made_of_to_the_bit(personal: Personal, dtype: npt.DTypeLike) -> None:
    received, own = tensors(1, dtype=dtype), part_of(personal, 2, dtype)
    joined = join(received, own, personal)
    peft_dir.validate(joined, SHAPES, rank=RANK + personal.rank, max_rank=8)
    assert {array.dtype for array in joined.values()} == {np.dtype(dtype)}
    sent, kept = split(joined, received, personal)
    assert same(sent, received)
    assert same(kept, own)


def test_dual_adapters_side_by_side_are_their_sum() -> None:
    received, own = tensors(1), part_of(OWN, 2)
    for module, joined in products(join(received, own, OWN)).items():
        assert np.allclose(joined, products(received)[module] + products(own)[module], atol=1e-6)


def test_fedsa_serves_its_own_b_on_the_shared_a() -> None:
    received, own = tensors(1), part_of(B, 2)
    for module, joined in products(join(received, own, B)).items():
        a = received[peft_dir.key(module, "A")].astype(np.float64)
        assert np.allclose(joined, own[peft_dir.key(module, "B")].astype(np.float64) @ a)


def test_a_dual_round_sends_the_global_adapter_and_keeps_the_other() -> None:
    received = tensors(1)
    trained = stepped(join(received, part_of(OWN, 2), OWN))
    sent, kept = split(trained, received, OWN)
    assert same(sent, stepped(received))
    assert same(kept, stepped(part_of(OWN, 2)))


def test_a_fedsa_round_sends_a_and_the_b_that_came_and_keeps_its_own() -> None:
    received = tensors(1)
    trained = stepped(join(received, part_of(B, 2), B))
    sent, kept = split(trained, received, B)
    for module in SHAPES:
        name_a, name_b = peft_dir.key(module, "A"), peft_dir.key(module, "B")
        assert np.array_equal(sent[name_a], stepped(received)[name_a])
        assert np.array_equal(sent[name_b], received[name_b]), "nothing of a site's own leaves it"
    assert same(kept, stepped(part_of(B, 2)))


def test_a_first_adapter_changes_nothing_and_is_drawn_as_peft_does_for_each_site_anew() -> None:
    received = tensors(1)
    own = first(received, OWN, "0 clinic-a")
    for module, joined in products(join(received, own, OWN)).items():
        assert np.allclose(joined, products(received)[module], atol=1e-12)
        a = own[peft_dir.key(module, "A")]
        assert 0.5 / np.sqrt(5) < np.abs(a).max() <= 1 / np.sqrt(5), "Kaiming-uniform, a = √5"
    assert same(own, first(received, OWN, "0 clinic-a"))
    assert not same(own, first(received, OWN, "0 clinic-b"))
    assert not same(own, first(received, OWN, "1 clinic-a"))


def test_the_first_b_is_the_one_that_was_received() -> None:
    received = tensors(1)
    assert same(join(received, first(received, B, "any"), B), received)


@BOTH
def test_a_site_begins_once_and_goes_on_from_what_it_kept_also_after_a_restart(
    tmp_path: Path, personal: Personal
) -> None:
    received, own = tensors(1), part_of(personal, 2)
    part = PersonalPart(site(tmp_path), "support", "mine", personal)
    assert part.read(received) is None
    assert same(part.begin(received, 7), join(received, first(received, personal, "7 clinic-a"), personal))
    assert part.read(received) is None, "to begin a round keeps nothing"
    part.keep(received, peft_dir.encode(own))
    after = PersonalPart(site(tmp_path), "support", "mine", personal)
    later = tensors(9)
    assert same(after.begin(later, 7), join(later, own, personal)), "another version, the same part"
    part.keep(received, peft_dir.encode(stepped(own)))
    assert same(after.begin(later, 7), join(later, stepped(own), personal))
    (file,) = (tmp_path / "personal" / "support").iterdir()
    assert file.suffix == ".safetensors"


@BOTH
def test_another_registry_kind_rank_layers_or_dtype_begins_anew_and_the_old_part_is_found_again(
    tmp_path: Path, personal: Personal
) -> None:
    received, own = tensors(1), part_of(personal, 2)
    PersonalPart(site(tmp_path), "support", "mine", personal).keep(received, peft_dir.encode(own))
    other = OWN if personal is B else B
    strangers: list[tuple[str, str, Personal, Tensors]] = [
        ("support", "another", personal, received),
        ("support", "mine", other, received),
        ("support", "mine", personal, tensors(1, shapes={"model.layers.0.self_attn.q_proj": (6, 5)})),
    ]
    if personal is B:
        strangers.append(("support", "mine", personal, tensors(1, rank=3)))
    else:
        strangers.append(("support", "mine", Personal(part="adapter", rank=2), received))
    for adapter, lineage, kind, base in strangers:
        assert PersonalPart(site(tmp_path), adapter, lineage, kind).read(base) is None
    in_16_bits = site(tmp_path, dtype="bfloat16")
    assert PersonalPart(in_16_bits, "support", "mine", personal).read(received) is None
    found = PersonalPart(site(tmp_path), "support", "mine", personal).read(received)
    assert found is not None
    assert same(found, own)


@BOTH
def test_a_part_in_16_bits_goes_on_when_versions_come_in_float32(tmp_path: Path, personal: Personal) -> None:
    """As in a registry whose first versions are in bfloat16."""
    config = site(tmp_path, dtype="bfloat16")
    part, own = PersonalPart(config, "support", "mine", personal), part_of(personal, 2, ml_dtypes.bfloat16)
    part.keep(tensors(1, dtype=ml_dtypes.bfloat16), peft_dir.encode(own))
    whole = peft_dir.rounded(own, "float32")
    assert same(part.begin(tensors(1), 0), join(tensors(1), whole, personal))
    trained = stepped(join(tensors(1), whole, personal))
    sent, kept = split(trained, tensors(1), personal)
    part.keep(tensors(1), peft_dir.encode(kept))
    assert len(list((tmp_path / "personal" / "support").iterdir())) == 1
    assert {str(array.dtype) for array in (*sent.values(), *kept.values())} == {"float32"}


def test_an_adapter_of_its_own_fits_beside_a_global_one_of_any_rank(tmp_path: Path) -> None:
    part = PersonalPart(site(tmp_path), "support", "mine", OWN)
    part.keep(tensors(1), peft_dir.encode(part_of(OWN, 2)))
    smaller = tensors(1, rank=1)
    assert same(part.begin(smaller, 0), join(smaller, part_of(OWN, 2), OWN))


def test_what_the_engine_cannot_hold_is_refused(tmp_path: Path) -> None:
    received = tensors(1)
    part = PersonalPart(site(tmp_path, max_lora_rank=4), "support", "mine", OWN)
    refusal = "rank 2 and this site's own part of rank 3 are joined to one of rank 5, over .*max_lora_rank = 4"
    with pytest.raises(AdapterError, match=refusal):
        part.begin(received, 0)
    blob = peft_dir.encode(received)
    with pytest.raises(AdapterError, match=refusal):
        served(site(tmp_path, max_lora_rank=4), manifest(blob, personal=OWN), blob)
    assert PersonalPart(site(tmp_path, max_lora_rank=5), "support", "mine", OWN).begin(received, 0)


def test_a_damaged_part_is_named_and_not_replaced(tmp_path: Path) -> None:
    received = tensors(1)
    part = PersonalPart(site(tmp_path), "support", "mine", B)
    part.keep(received, b"half a file")
    (file,) = (tmp_path / "personal" / "support").iterdir()
    with pytest.raises(AdapterError, match=rf"{file.name}.*is damaged .*restore it from your backup, or remove it"):
        part.begin(received, 0)
    assert file.read_bytes() == b"half a file"


@BOTH
def test_a_version_is_served_joined_with_a_manifest_of_what_is_served(tmp_path: Path, personal: Personal) -> None:
    received, own = tensors(1), part_of(personal, 2)
    blob = peft_dir.encode(received)
    PersonalPart(site(tmp_path), "support", "mine", personal).keep(received, peft_dir.encode(own))
    came = manifest(blob, personal=personal)
    told, weights = served(site(tmp_path), came, blob)
    assert weights == peft_dir.encode(join(received, own, personal))
    assert (told.digest, told.rank, told.personal) == (peft_dir.digest(weights), RANK + personal.rank, None)
    assert told.model_copy(update={"digest": came.digest, "rank": RANK, "personal": personal}) == came
    peft_dir.write(tmp_path / "v3", weights, told, base="base")
    assert peft_dir.read(tmp_path / "v3") == (weights, told)


def test_a_version_is_served_as_it_came_where_nothing_is_to_be_joined(tmp_path: Path) -> None:
    blob = peft_dir.encode(tensors(1))
    for personal in (None, B, OWN):
        came = manifest(blob, personal=personal)
        assert served(site(tmp_path), came, blob) == (came, blob), "there is none, or none yet"


@pytest.mark.parametrize(("part", "rank"), [("B", 2), ("adapter", 0), ("A", 0), ("adapter", -1)])
def test_a_part_that_makes_no_sense_cannot_be_asked_for(part: Any, rank: int) -> None:
    with pytest.raises(ValidationError):
        Personal(part=part, rank=rank)
