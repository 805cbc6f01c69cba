"""Hostile adapters and messages against what reads them, in both environments; and the page that lists them all."""

import re

import pytest

from tests.toys import hostile
from tests.toys.hostile import ADAPTERS, MESSAGES, RANK, SHAPES, Hostile
from umbel import errors, peft_dir, wire
from umbel.messages import RoundReport


def read(blob: bytes) -> None:
    peft_dir.validate(peft_dir.decode(blob), SHAPES, rank=RANK, max_rank=4)


@pytest.mark.parametrize("one", ADAPTERS, ids=lambda one: one.what)
def test_a_hostile_adapter_is_refused(one: Hostile) -> None:
    with pytest.raises(getattr(errors, one.answer), match=one.says) as error:
        read(one.make(hostile.good()))
    assert len(str(error.value)) < 1000
    read(peft_dir.encode(hostile.good()))


@pytest.mark.parametrize("one", MESSAGES, ids=lambda one: one.what)
def test_a_hostile_message_is_refused(one: Hostile) -> None:
    with pytest.raises(getattr(errors, one.answer), match=one.says) as error:
        wire.unpack_model(one.make(), RoundReport)
    assert len(str(error.value)) < 1000
    assert wire.unpack_model(hostile.message(), RoundReport).key == "k"


def test_the_page_lists_the_catalogue() -> None:
    assert hostile.render() in hostile.PAGE.read_text(), "run python -m tests.hostile"
    assert sum(map(len, hostile.surfaces().values())) >= 40


def test_each_input_is_named_once_where_it_comes_in() -> None:
    for found in hostile.surfaces().values():
        names = [one.what for one in found]
        assert len(set(names)) == len(names)
        assert all(re.compile(one.says) for one in found)
