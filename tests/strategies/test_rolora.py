"""`RoLoRA`: rounds take turns; test_ffa.py holds the tests of a single round."""

from strategies.rolora import RoLoRA
from umbel.messages import TrainPlan

PLAN = TrainPlan(rank=8, steps=1, seconds=1.0)


def test_rolora_trains_b_first_and_then_takes_turns() -> None:
    """B is zero at first, and A would have no gradient."""
    rule = RoLoRA()
    assert [rule.plan(PLAN, number, 32).factors for number in (1, 2, 3, 4)] == ["B", "A", "B", "A"]
