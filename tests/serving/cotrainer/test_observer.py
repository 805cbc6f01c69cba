"""The observer reports arrivals, first tokens, iterations, and the latencies of each answered request."""

from types import SimpleNamespace
from typing import Any

import pytest

from serving.cotrainer.governor import Finished, Load, Stream, Waiting
from serving.cotrainer.observer import Iteration, Observer
from serving.cotrainer.predictor import Batch
from serving.priorities import Priority
from tests.toys.scheduler import request


def scheduler(running: tuple[Any, ...] = (), last: tuple[Any, ...] = (), waiting: tuple[Any, ...] = ()) -> Any:
    return SimpleNamespace(
        running_batch=SimpleNamespace(reqs=list(running)) if running else None,
        last_batch=SimpleNamespace(reqs=list(last)) if last else None,
        waiting_queue=list(waiting),
        chunked_req=None,
    )


def extend(*reqs: Any, cached: int = 0) -> Any:
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: True),
        reqs=list(reqs),
        extend_lens=[len(req.origin_input_ids) - cached for req in reqs],
        prefix_lens=[cached for _ in reqs],
    )


def decode(*reqs: Any) -> Any:
    return SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: False), reqs=list(reqs))


def trains(observer: Observer, seconds: float) -> None:
    """Have a quantum run, from its launch to its end."""
    observer.launched()
    observer.ended(seconds)


def runs(observer: Observer, batch: Any, now: float) -> None:
    """Have a batch run, whose result has been processed at `now`."""
    observer.starts(batch)
    observer.processed(now)


def test_a_request_is_followed_from_its_arrival_to_its_last_token() -> None:
    observer, req = Observer(), request("a", prompt=10)
    observer.nothing_came(now=9.0)
    load, iterations, finished = observer.look(scheduler(waiting=(req,)), now=10.0)
    assert load == Load(waiting=(Waiting(arrival=9.0, prompt_tokens=10),))
    assert (iterations, finished) == ([], [])

    trains(observer, 0.5)  # before its prefill
    runs(observer, extend(req, cached=4), now=11.9)
    req.output_ids = [1]
    load, (iteration,), _ = observer.look(scheduler(last=(req,)), now=12.0)
    assert load == Load(streams=(Stream(first_token=12.0, tokens=0, context=11),))
    prefill = Batch("prefill", 1, new_tokens=6, attended=6 * (3 + 4), cached_tokens=4)
    assert iteration == Iteration(prefill, 2.0, 0.5, clean=False, settled=True)

    trains(observer, 0.25)
    runs(observer, decode(req), now=12.9)
    req.output_ids = [1, 1]
    load, (iteration,), _ = observer.look(scheduler(running=(req,)), now=13.0)
    assert load == Load(streams=(Stream(first_token=12.0, tokens=1, context=12),))
    assert iteration == Iteration(Batch("decode", 1, cached_tokens=11), 1.0, 0.25, clean=False, settled=True)

    req.output_ids, req.finished_reason = [1, 1, 1], SimpleNamespace()
    load, _, finished = observer.look(scheduler(running=(req,)), now=15.0)
    assert load.idle
    assert finished == [
        Finished(3.0, 1.5, tokens=2, asked_tokens=10, trained_before_first=0.5, trained_after_first=0.25)
    ]
    assert observer.look(scheduler(running=(req,)), now=16.0)[2] == [], "SGLang keeps it a little longer"
    assert observer.arrivals == 1


def test_arrival_is_the_last_moment_at_which_it_was_surely_not_there() -> None:
    observer = Observer()
    observer.look(scheduler(), now=5.0)
    assert observer.look(scheduler(waiting=(request("a"),)), now=7.0)[0].waiting[0].arrival == 5.0
    observer.nothing_came(now=7.5)
    trains(observer, 0.2)  # the quantum in whose course it came is one that it waited for
    assert [req.arrival for req in observer.look(scheduler(waiting=(request("b"),)), now=8.0)[0].waiting] == [7.5]


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    observer, req = Observer(), request("a")
    observer.look(scheduler(waiting=(req,)), now=1.0)
    req.output_ids, req.finished_reason = [1], SimpleNamespace()
    (finished,) = observer.look(scheduler(last=(req,)), now=3.0)[2]
    assert (finished.ttft, finished.tpot, finished.tokens) == (3.0, None, 0)


def test_what_a_user_gave_up_teaches_nothing() -> None:
    class FINISH_ABORT:  # SGLang's name
        pass

    observer, req = Observer(), request("a", answered=2)
    observer.look(scheduler(running=(req,)), now=1.0)
    req.finished_reason = FINISH_ABORT()
    assert observer.look(scheduler(running=(req,)), now=2.0)[2] == []


def test_a_prompt_that_is_computed_in_chunks_still_waits_for_its_first_token() -> None:
    observer, req = Observer(), request("a", prompt=100)
    state = scheduler(waiting=(req,))
    observer.look(state, now=1.0)
    state = scheduler()
    state.chunked_req = req
    load, _, _ = observer.look(state, now=2.0)
    assert load == Load(waiting=(Waiting(arrival=0.0, prompt_tokens=100),))


def test_a_request_that_was_taken_back_into_the_queue_is_no_new_one() -> None:
    observer, req = Observer(), request("a", answered=3)
    observer.look(scheduler(running=(req,)), now=1.0)
    load, _, _ = observer.look(scheduler(waiting=(req,)), now=2.0)
    assert load.idle
    req.output_ids, req.finished_reason = [1] * 5, SimpleNamespace()
    _, _, (finished,) = observer.look(scheduler(last=(req,)), now=9.0)
    assert (finished.tpot, observer.arrivals) == (2.0, 1), "eight seconds for four tokens, the wait among them"


@pytest.mark.parametrize(
    ("priority", "interactive"),
    [(None, True), *((one, one is Priority.INTERACTIVE) for one in Priority if one is not Priority.CHECK)],
)
def test_only_the_interactive_class_is_waited_for(priority: int | None, interactive: bool) -> None:
    observer = Observer()
    waiting, streaming = request("a", priority=priority), request("b", answered=1, priority=priority)
    load, _, _ = observer.look(scheduler(running=(streaming,), waiting=(waiting,)), now=1.0)
    assert {load.waiting[0].interactive, load.streams[0].interactive} == {interactive}


def test_a_check_is_no_request_and_teaches_nothing() -> None:
    observer, check = Observer(), request("check", priority=Priority.CHECK)
    load, _, _ = observer.look(scheduler(waiting=(check,)), now=1.0)
    assert load.idle
    runs(observer, extend(check), now=2.0)
    check.output_ids, check.finished_reason = [1], SimpleNamespace()
    assert observer.look(scheduler(last=(check,)), now=2.0) == (Load(), [], [])
    assert observer.arrivals == 0


def test_a_batch_of_a_user_and_a_check_is_the_users_iteration() -> None:
    observer, user, check = Observer(), request("a"), request("check", priority=Priority.CHECK)
    load, _, _ = observer.look(scheduler(waiting=(user, check)), now=1.0)
    assert len(load.waiting) == 1
    runs(observer, extend(user, check), now=2.0)
    _, (iteration,), _ = observer.look(scheduler(), now=2.0)
    assert iteration.batch.requests == 2


def test_the_time_that_an_idle_engine_slept_is_no_iteration() -> None:
    observer, req = Observer(), request("a")
    observer.look(scheduler(), now=1.0)
    assert observer.look(scheduler(waiting=(req,)), now=60.0)[1] == []


def test_the_quantum_in_whose_course_a_request_came_is_counted_as_one_it_waited_for() -> None:
    observer, req = Observer(), request("a")
    observer.nothing_came(now=1.0)
    trains(observer, 0.5)
    observer.look(scheduler(waiting=(req,)), now=1.6)
    req.output_ids, req.finished_reason = [1], SimpleNamespace()
    (finished,) = observer.look(scheduler(last=(req,)), now=2.0)[2]
    assert finished.trained_before_first == 0.5
