"""On a CPU a quantum has run when `run` returns."""

from serving.cotrainer.lanes.lane import CpuLane


def test_on_a_cpu_quanta_run_at_once() -> None:
    ticks = iter([1.0, 3.5, 4.0, 4.25])
    lane = CpuLane(clock=lambda: next(ticks))
    assert [lane.run(lambda: "a"), lane.run(lambda: "b")] == ["a", "b"]
    assert lane.ready()
    lane.wait(1000.0)
    assert [took.seconds for took in lane.ended()] == [2.5, 0.25]
    assert lane.ended() == []
