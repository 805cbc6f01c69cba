"""The benchmark of several adapters: who asks for what, and the tables of figures that are made up."""

from collections import Counter

import pytest

from scripts.tools.bench.adapters import FULL, QUICK, Load, dealt
from scripts.tools.bench.adapters_figures import SYSTEMS, Block, Row, Trained, show
from serving.bench.load import Outcome
from serving.bench.trace import Arrival
from serving.trainer_socket import CoTrainerStatus, QuantumStats


@pytest.mark.parametrize("load", [FULL, QUICK])
def test_a_block_is_the_same_in_every_run_and_begins_with_one_request_more(load: Load) -> None:
    assert load.block(3) == load.block(3) != load.block(4)
    times = [arrival.at for arrival in load.block(3)]
    assert len(times) == 1 + load.rate * load.seconds
    assert times == sorted(times)
    assert times[0] == 0 < times[1]


@pytest.mark.parametrize("count", [1, 2, 16])
def test_all_adapters_are_asked_alike(count: int) -> None:
    asked: Counter[int] = Counter()
    for number in range(count):
        parts = dealt(FULL.block(number), count, number)
        assert sorted(arrival.at for part in parts for arrival in part) == [a.at for a in FULL.block(number)]
        asked.update({place: len(part) for place, part in enumerate(parts)})
    assert len(asked) == count
    assert len(set(asked.values())) == 1


def test_the_request_that_wakes_the_engine_up_does_not_count() -> None:
    outcomes = [Outcome(Arrival(at, 64, 3), first=at + 0.2, last=at + 0.4, tokens=3) for at in (0.0, 1.0, 2.0)]
    block = Block.of(outcomes)
    assert block.ttft == [pytest.approx(0.2)] * 2
    assert block.tpot == [pytest.approx(0.1)] * 2


def job(tokens: int, swap_s: float, **changes: object) -> CoTrainerStatus:
    quanta = {
        "forward": QuantumStats(seconds=10 * swap_s),
        **({"swap": QuantumStats(seconds=swap_s)} if swap_s else {}),
    }
    return CoTrainerStatus(loss_tokens=tokens, steps=tokens // 10, turns=tokens // 100, quanta=quanta).model_copy(
        update=changes
    )


def test_the_tokens_of_all_jobs_are_summed_and_the_engines_figures_are_not() -> None:
    open_jobs = {"a/1": 2.0, "b/1": 1.0, "c/1": 3.0, "d/1": 0.0}
    before, after = [job(100, 0.0), job(200, 0.0)], [job(400, 1.0), job(900, 1.0, open_jobs=open_jobs, parked_bytes=84)]
    done = Trained.between(before, after, 10.0)
    assert (done.steps, done.loss_tokens, done.turns) == (100, 1000, 7)
    assert (done.quanta_s, done.swap_s) == (11.0, 1.0)
    assert done.tokens_per_s == 100
    assert done.parked_bytes == 42, "two wait: one has the buffers, and one has had no turn yet"
    assert Trained.between(before[:1], after[:1], 10.0).parked_bytes is None


def row(adapters: int, factor: float) -> Row:
    block = Block(ttft=[0.02, 0.03, 0.04], tpot=[0.007, 0.008, 0.009])
    slower = Block(ttft=[factor * one for one in block.ttft], tpot=[factor * one for one in block.tpot])
    trained = Trained(
        seconds=40, steps=9, loss_tokens=4000 // adapters, turns=8, quanta_s=20, swap_s=0.1,
        parked_bytes=None if adapters == 1 else 64_000,
    )  # fmt: skip
    return Row(
        adapters=adapters, slots=5, slot_bytes=86_000, trained=trained,
        blocks={"stock": [block] * 4, "umbel": [slower] * 4, "training": [slower] * 4},
        private_bytes=dict.fromkeys(SYSTEMS, 1_000_000_000), idle={"stock": 0.004, "umbel": 0.012},
    )  # fmt: skip


@pytest.mark.parametrize(("factor", "verdict"), [(1.01, "met"), (1.05, "missed")])
def test_the_tables_have_each_number_of_adapters_beside_stock(factor: float, verdict: str) -> None:
    out = show([row(1, factor), row(4, factor)])
    assert "| 4 | stock | 12 | 30.0 | 40.0 | 8.0 | 9.0 |" in out
    ratio = f"{factor:.2f} ({factor:.2f}–{factor:.2f})"
    assert f"| 4 | training | 12 | {30 * factor:.1f}, {ratio} |" in out
    assert "| 4 | 40 | 9 | 25 | 0.25 | 8 | 0.50% |" in out
    assert "| 1 | 5 | 86 | – | 1000 | 1000 | 1000 |" in out
    assert "| 4 | 5 | 86 | 64 | 1000 | 1000 | 1000 |" in out
    assert out.count(f"at most 1.02: {verdict}\n") == 4
    assert out.endswith("of a core: stock 0.4%, umbel 1.2%")


def test_the_figures_come_back_from_json() -> None:
    assert Row.model_validate_json(row(2, 1.0).model_dump_json()) == row(2, 1.0)
