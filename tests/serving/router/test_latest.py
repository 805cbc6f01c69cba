"""The latest answers, bounded over all adapters, at the cost of those that have the most."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serving.router.latest import Latest


@given(st.lists(st.sampled_from([None, "support", "triage"]), max_size=60), st.integers(1, 12))
def test_each_adapter_keeps_its_latest_up_to_its_part_and_all_of_them_together_are_bounded(
    asked: list[str | None], most: int
) -> None:
    latest: Latest[int] = Latest(most)
    for number, adapter in enumerate(asked):
        latest.remember(str(number), adapter, number)
    kept = {number: adapter for number, adapter in enumerate(asked) if latest.get(str(number)) == number}
    assert len(kept) == min(most, len(asked))
    counts, had = Counter(kept.values()), Counter(asked)
    for adapter, count in counts.items():
        own = [number for number, of in enumerate(asked) if of == adapter]
        assert sorted(number for number, of in kept.items() if of == adapter) == own[-count:], "the latest ones"
    for adapter in had:
        assert counts[adapter] >= min(had[adapter], most // len(had)), "none is pushed below its part"


def test_an_answer_is_there_once_and_gone_once_it_is_forgotten() -> None:
    latest: Latest[str] = Latest(2)
    for kept in ("first", "second"):
        latest.remember("a", "support", kept)
    latest.remember("b", None, "of the base")
    assert (latest.get("a"), latest.get("b"), latest.get("c")) == ("second", "of the base", None)
    assert dict(latest.oldest()) == {"a": "second", "b": "of the base"}
    latest.forget("a")
    latest.forget("a")
    assert (latest.get("a"), dict(latest.oldest())) == (None, {"b": "of the base"})
