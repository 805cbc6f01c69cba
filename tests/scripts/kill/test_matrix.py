"""The kill matrix's plan: every fault point of the site dies once per process, and each when its turn comes."""

from pathlib import Path

import pytest

from scripts.tools.kill.matrix import ENGINE, SITE, STARTS_ONLY, Case, Matrix, Stories
from scripts.tools.kill.site import Site, User
from scripts.tools.processes import Processes
from umbel.faults import Point


@pytest.fixture
def matrix(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Matrix:
    """A matrix over a site that is never started."""
    monkeypatch.setattr(User, "_keep_asking", lambda self: None)
    processes = Processes(tmp_path / "logs")
    return Matrix(Site(tmp_path / "site", tiny_llama, processes), processes, [case.point for case in SITE])


def test_every_point_of_a_site_dies_once_and_the_engine_at_the_same_ones() -> None:
    points = [case.point for case in SITE]
    assert len(points) == len(set(points))
    assert {case.point for case in ENGINE} == {*points}
    assert len(ENGINE) == len(points)
    assert not {*STARTS_ONLY} & {*points}


def test_the_engines_deaths_are_planned_by_how_often_their_story_was_told(matrix: Matrix) -> None:
    plan = list(matrix._plan())
    assert [point for point, _ in plan] == [case.point for case in ENGINE]
    assert plan[0] == (Point.LOAD_BEGUN, 1)
    assert plan[1] == (Point.LOAD_DONE, 2), "the second version that is deployed"
    for story in (Stories.deploy, Stories.roll_back, Stories.train, Stories.reject):
        times = [time for (_, time), case in zip(plan, ENGINE, strict=True) if case.story is story]
        assert times == list(range(1, len(times) + 1))


@pytest.mark.parametrize(
    ("case", "following", "leaves"),
    [
        (Case(Point.LOAD_BEGUN, Stories.deploy), Case(Point.LOAD_DONE, Stories.deploy), True),
        (Case(Point.LOAD_BEGUN, Stories.deploy), Case(Point.REJECT_BEGUN, Stories.reject), True),
        (Case(Point.LOAD_BEGUN, Stories.deploy), Case(Point.ROUND_DONE, Stories.train), False),
        (Case(Point.PROMOTE_TOLD, Stories.deploy, True), Case(Point.LOAD_BEGUN, Stories.deploy), False),
    ],
)
def test_a_death_leaves_work_that_would_meet_the_same_way_again(case: Case, following: Case, leaves: bool) -> None:
    assert case.leaves_work_for(following) is leaves


def test_chosen_points_are_the_only_ones(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(User, "_keep_asking", lambda self: None)
    processes = Processes(tmp_path / "logs")
    chosen = Matrix(Site(tmp_path / "site", tiny_llama, processes), processes, [Point.LOAD_DONE])
    assert [point for point, _ in chosen._plan()] == [Point.LOAD_DONE]
