"""Hostile adapters and messages against the code that reads them, and the page that lists all hostile inputs."""

import re

import pytest

from tests.toys.hostile import catalogue, table
from tests.toys.hostile.catalogue import ADAPTERS, MESSAGES, RANK, SHAPES, Hostile
from umbel import errors, peft_dir, wire
from umbel.messages import RoundReport


def read(blob: bytes) -> None:
    peft_dir.validate(peft_dir.decode(blob), SHAPES, rank=RANK, max_rank=4)


@pytest.mark.parametrize("one", ADAPTERS, ids=lambda one: one.what)
def test_a_hostile_adapter_is_refused(one: Hostile) -> None:
    with pytest.raises(getattr(errors, one.answer), match=one.says) as error:
        read(one.make(catalogue.good()))
    assert len(str(error.value)) < 1000
    read(peft_dir.encode(catalogue.good()))


@pytest.mark.parametrize("one", MESSAGES, ids=lambda one: one.what)
def test_a_hostile_message_is_refused(one: Hostile) -> None:
    with pytest.raises(getattr(errors, one.answer), match=one.says) as error:
        wire.unpack_model(one.make(), RoundReport)
    assert len(str(error.value)) < 1000
    assert wire.unpack_model(catalogue.message(), RoundReport).key == "k"


def test_the_page_lists_the_catalogue() -> None:
    assert table.render() in table.PAGE.read_text(), "run python -m tests.toys.hostile"
    assert sum(map(len, table.surfaces().values())) >= 40


def test_each_input_is_named_once_where_it_comes_in() -> None:
    for found in table.surfaces().values():
        names = [one.what for one in found]
        assert len(set(names)) == len(names)
        assert all(re.compile(one.says) for one in found)
