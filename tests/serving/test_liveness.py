"""What is taken for a hung engine and what is not, over looks at given times; and how the supervisor looks."""

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving import engine_state, liveness
from serving.engine_state import EngineState
from serving.liveness import CHECK, COMPUTING, Liveness, Look
from serving.priorities import Priority
from umbel.errors import NoAnswer

TIMEOUT_S, EVERY_S = 60.0, 5.0
SILENT = Look(http=True)


def looks(*found: Look, every_s: float = EVERY_S) -> tuple[int, str]:
    """Take looks into account; return the number of the first at which the engine hangs, from 1, and why. 0: none."""
    judged = Liveness(TIMEOUT_S, longest_s=3 * EVERY_S, now=100.0)
    for number, look in enumerate(found, start=1):
        if why := judged.hangs(look, 100.0 + number * every_s):
            return number, why
    return 0, ""


def test_an_idle_engine_that_answers_checks_lives() -> None:
    assert looks(*[Look(http=True, token=number % 2 == 0) for number in range(200)]) == (0, "")


def test_an_engine_of_which_nothing_comes_hangs_after_the_time_and_not_before() -> None:
    assert looks(*[SILENT] * 12) == (0, "")
    assert looks(*[SILENT] * 13) == (13, "it has computed nothing for 65 s, though asked for a token")


def test_silence_begins_anew_with_every_sign() -> None:
    for sign in (Look(http=True, token=True), Look(http=True, outputs=1), Look(http=True, batches=1)):
        after = Look(http=True, outputs=sign.outputs, batches=sign.batches)
        assert looks(*[SILENT] * 12, sign, *[after] * 12) == (0, "")
        assert looks(*[SILENT] * 12, sign, *[after] * 13)[0] == 26


def test_a_check_that_waits_behind_a_full_batch_of_users_is_no_hang() -> None:
    assert looks(*[Look(http=True, outputs=number, batches=number) for number in range(1000)]) == (0, "")


def test_a_long_prompt_computed_in_chunks_is_no_hang_until_it_takes_ten_times_as_long() -> None:
    chunks = [Look(http=True, batches=number) for number in range(1000)]
    number, why = looks(*chunks)
    assert number == COMPUTING * TIMEOUT_S // EVERY_S + 1
    assert why == "it computes, and no token has come out for 605 s"


def test_a_load_may_take_the_time_twice_and_no_longer() -> None:
    loading = Look(http=True, loading=True)
    assert looks(*[loading] * 24) == (0, "")
    assert looks(*[loading] * 25)[0] == 25
    assert looks(*[loading] * 6, *[SILENT] * 12) == (0, "")
    assert looks(*[loading] * 6, *[SILENT] * 13)[0] == 19


def test_a_http_server_that_does_not_answer_hangs_whatever_the_scheduler_does() -> None:
    busy = [Look(http=False, outputs=number, batches=number) for number in range(13)]
    assert looks(*busy) == (13, "its HTTP server has not answered for 65 s")
    assert looks(*busy[:12], Look(http=True, outputs=12, batches=12), *busy[:12]) == (0, "")


def test_the_time_in_which_nobody_looked_is_not_the_engines() -> None:
    """A daemon that was stopped for an hour, or a machine that was asleep."""
    assert looks(*[SILENT] * 4, every_s=3600.0) == (0, "")
    assert looks(*[SILENT] * 5, every_s=3600.0)[0] == 5, "each counts for three looks' time"


class Client:
    """An engine's client; what is in `deaf` is never answered."""

    def __init__(self, state: EngineState, *deaf: str) -> None:
        self.state, self.deaf, self.asked, self.loading = state, deaf, Counter[str](), 0
        self.bodies: list[Any] = []

    async def ask(self, method: str, path: str, seconds: float, **content: Any) -> Any:
        self.asked[path] += 1
        if path in self.deaf:
            await asyncio.sleep(seconds)
            raise NoAnswer(path)
        if path == "/generate":
            self.bodies.append(content["json"])
            self.state.count_output()
        return SimpleNamespace(status_code=200)


@pytest.fixture
def state(tmp_path: Path) -> EngineState:
    return EngineState.create(tmp_path / engine_state.FILE)


def watched(client: Client, seconds: float, timeout_s: float = 0.3) -> str:
    async def main() -> str:
        try:
            async with asyncio.timeout(seconds):
                return await liveness.watch(client, client.state, timeout_s)  # type: ignore[arg-type]
        except TimeoutError:
            return ""

    return asyncio.run(main())


def test_a_look_asks_the_http_server_and_for_a_token_below_every_class(state: EngineState) -> None:
    client = Client(state)
    assert watched(client, seconds=2.0) == ""
    assert client.asked["/generate"] >= 2
    assert client.asked["/umbel/inflight"] > client.asked["/generate"]
    assert all(body == CHECK for body in client.bodies)
    assert CHECK["sampling_params"] == {"max_new_tokens": 1}
    assert CHECK["priority"] == min(Priority)


def test_an_engine_that_answers_nobody_is_found_out_by_what_is_silent(state: EngineState) -> None:
    assert "computed nothing" in watched(Client(state, "/generate"), seconds=30.0)
    assert "HTTP server" in watched(Client(state, "/umbel/inflight"), seconds=30.0)


def test_no_token_is_asked_for_while_users_get_theirs(state: EngineState) -> None:
    class Busy(Client):
        async def ask(self, method: str, path: str, seconds: float, **content: Any) -> Any:
            self.state.count_output()  # a user's
            return await super().ask(method, path, seconds, **content)

    client = Busy(state)
    assert watched(client, seconds=1.0) == ""
    assert client.asked["/umbel/inflight"] >= 2
    assert client.asked["/generate"] == 0
