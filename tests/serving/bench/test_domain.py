"""The benchmark's world: two grammars that differ in half of their symbols, and files that are made once."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serving.bench import domain
from serving.bench.domain import TRAIN_ROWS, Recipe, build, successors, walk
from serving.bench.world import FIRST_SYMBOL, HELDOUT_ROWS, RANK, SEQ_LEN, World
from umbel import peft_dir
from umbel.base.shapes import LINEARS, linear_shapes
from umbel.token_file import TokenFile

SMALL = Recipe(hidden=16, layers=1, heads=2, kv_heads=1, inner=24, symbols=20, positions=128, steps=2, batch=2)


@pytest.mark.parametrize("changed", [False, True])
def test_each_step_of_a_walk_follows_its_grammar(changed: bool) -> None:
    table = successors(SMALL, changed)
    symbols = walk(table, 50, 30, np.random.default_rng(0)) - FIRST_SYMBOL
    assert symbols.shape == (50, 30)
    for before, after in zip(symbols[:, :-1].ravel(), symbols[:, 1:].ravel(), strict=True):
        assert after in table[before]


def test_every_second_symbol_has_other_successors_in_the_grammar_to_adapt_to() -> None:
    recipe = replace(SMALL, symbols=200)
    same = (successors(recipe, changed=False) == successors(recipe, changed=True)).all(axis=1)
    assert same[::2].all()
    assert not same[1::2].any()


def test_a_world_is_whole_and_made_once(tmp_path: Path) -> None:
    said: list[str] = []
    world = build(tmp_path, SMALL, said.append)
    assert [len(TokenFile.open(file)) for file in (world.train, world.heldout)] == [TRAIN_ROWS, HELDOUT_ROWS]
    ids = TokenFile.open(world.heldout).ids
    assert ids.shape[1] == SEQ_LEN
    assert FIRST_SYMBOL <= ids.min() <= ids.max() < FIRST_SYMBOL + SMALL.symbols
    assert json.loads((world.model / "config.json").read_text())["vocab_size"] == FIRST_SYMBOL + SMALL.symbols
    assert said
    said.clear()
    assert build(tmp_path, SMALL, said.append) == world
    assert said == []


def test_the_initial_adapter_answers_as_the_base_does(tmp_path: Path) -> None:
    world = build(tmp_path, SMALL, lambda text: None)
    tensors = peft_dir.decode((world.initial / peft_dir.WEIGHTS).read_bytes())
    peft_dir.validate(tensors, linear_shapes(world.model, LINEARS), rank=RANK, max_rank=RANK)
    assert not any(b.any() for _, b in peft_dir.factors(tensors).values())
    assert all(a.any() for a, _ in peft_dir.factors(tensors).values())


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(recipe: Recipe, world: World) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(domain, "_make_data", fail)
    with pytest.raises(OSError, match="disk full"):
        build(tmp_path, SMALL, lambda text: None)
    assert list(tmp_path.iterdir()) == []


def test_another_recipe_is_another_world() -> None:
    assert Recipe().digest == Recipe().digest != replace(Recipe(), seed=1).digest
