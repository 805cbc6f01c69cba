"""Training's memory by arithmetic, on the numbers of Llama-3.1-8B."""

from dataclasses import replace
from typing import Any

import pytest

from umbel.base.shapes import LINEARS
from umbel.site.memory import (
    SHARE,
    Rung,
    Training,
    choose_rung,
    kept_per_token,
    kv_bytes_per_token,
    ladder,
    lora_elements,
    parked_bytes,
    rungs,
    training_bytes,
)

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
DEFAULTS = Training(rank=16, target_modules=LINEARS, itemsize=2, micro_batch=4, seq_len=512)


def test_sizes_that_are_published_come_out() -> None:
    assert kv_bytes_per_token(LLAMA_8B, 2) == 131_072
    assert lora_elements(LLAMA_8B, 16, LINEARS) == 41_943_040, "peft counts as many"


def test_what_a_layer_keeps_of_a_token_is_its_tensors_one_by_one() -> None:
    attention, mlp = kept_per_token(LLAMA_8B, DEFAULTS)
    norm = 2 * 4096 + 4 * 4096 + 4  # input, copy in fp32, scale
    assert attention == norm + 2 * 4096 + 2 * (4096 + 1024 + 1024 + 4096) + 4 * 32 + 4 * 16 * 4
    assert mlp == norm + 2 * 4096 + 3 * 2 * 14336 + 2 * 14336 + 3 * 16 * 4


def test_what_is_not_adapted_keeps_no_input() -> None:
    """Without gate, up and down, the MLP's gradient still goes through, by what it has of its own."""
    attention, mlp = kept_per_token(LLAMA_8B, replace(DEFAULTS, target_modules=("q_proj", "v_proj")))
    whole_attention, whole_mlp = kept_per_token(LLAMA_8B, DEFAULTS)
    assert whole_attention - attention == 2 * 4 * 16, "A's output of k and o"
    assert whole_mlp - mlp == 2 * 4096 + 2 * 14336 + 3 * 4 * 16


def test_recomputing_and_fewer_rows_take_less() -> None:
    every = [training_bytes(LLAMA_8B, DEFAULTS, rows, again) for again in (False, True) for rows in (4, 2, 1)]
    assert every == sorted(every, reverse=True)
    assert every[0] == pytest.approx(14.6e9, rel=0.01)
    assert every[3] == pytest.approx(2.74e9, rel=0.01), "of a card with 24 GB, 8 GB are left beside the base"


@pytest.mark.parametrize("recompute", [True, False])
def test_each_other_adapter_takes_what_its_job_keeps_while_it_waits(recompute: bool) -> None:
    """Factors, two moments and FedProx's parent, in fp32; neither gradients nor activations."""
    one, three = (replace(DEFAULTS, adapters=adapters) for adapters in (1, 3))
    assert (parked_bytes(LLAMA_8B, one), parked_bytes(LLAMA_8B, three)) == (0, 2 * 4 * 4 * 41_943_040)
    more = training_bytes(LLAMA_8B, three, 4, recompute) - training_bytes(LLAMA_8B, one, 4, recompute)
    assert more == parked_bytes(LLAMA_8B, three)


def test_on_a_cpu_the_copy_of_a_checkpoint_is_in_the_memory_that_is_shared() -> None:
    """Factors and two moments, in fp32, whatever the number of adapters; FedProx's parent has a file of its own."""
    for adapters in (1, 3):
        gpu = replace(DEFAULTS, adapters=adapters)
        more = [
            training_bytes(LLAMA_8B, replace(gpu, on_cpu=True), 4, again) - training_bytes(LLAMA_8B, gpu, 4, again)
            for again in (True, False)
        ]
        assert more == 2 * [3 * 4 * 41_943_040]


def test_an_evaluation_has_room_beside_the_job_that_it_interrupts() -> None:
    """One row of few tokens, computed again, keeps less than that job's factors and moments are."""
    short = replace(DEFAULTS, seq_len=64)
    head = 64 * 128_256 * (3 * 4 + 2)
    inputs = 64 * 2 * 2 * 2 * 4096
    assert training_bytes(LLAMA_8B, short, 1, True) == (5 + 3) * 4 * 41_943_040 + inputs + head


@pytest.mark.parametrize(("micro_batch", "rows"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (7, [1, 2, 4, 7])])
def test_the_ladder_ends_with_the_micro_batch(micro_batch: int, rows: list[int]) -> None:
    assert ladder(micro_batch) == rows


def test_kept_activations_and_many_rows_are_preferred() -> None:
    found = [(rung.rows, rung.recompute) for rung in rungs(LLAMA_8B, DEFAULTS)]
    assert found == [(4, False), (2, False), (1, False), (4, True), (2, True), (1, True)]


@pytest.mark.parametrize("number", range(6))
def test_the_first_rung_is_chosen_that_leaves_the_kv_cache_its_share(number: int) -> None:
    wanted = rungs(LLAMA_8B, DEFAULTS)[number]
    room = int(wanted.bytes / SHARE) + 1
    assert choose_rung(LLAMA_8B, DEFAULTS, room) == wanted
    below = choose_rung(LLAMA_8B, DEFAULTS, room - 10)
    assert below == [*rungs(LLAMA_8B, DEFAULTS), None][number + 1]
    assert below is None or isinstance(below, Rung)
