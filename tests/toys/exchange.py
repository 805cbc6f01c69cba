"""Two sites, their SuperNodes, and an Exchange that talks to them, without a clock."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from server import dialogues
from server.dialogues import Outcome
from server.exchange import Exchange
from strategies.adapter import Update
from tests.toys.grid import Clock, ToyGrid
from tests.toys.site import BASE, ToySite
from umbel import peft_dir
from umbel.messages import Hello, RoundOrder, RoundReport, Submit, TrainPlan

PLAN = TrainPlan(rank=2, steps=3, seconds=10.0)
PARENT = peft_dir.encode({})
ORDER = RoundOrder(key="l-1-p", base=BASE.digest, parent=peft_dir.digest(PARENT), round=1, plan=PLAN)


class World:
    """Two sites, their SuperNodes 11 and 12, and an exchange that talks to them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.clock = Clock()
        self.a = stack.enter_context(ToySite("a", folder / "a.sock"))
        self.b = stack.enter_context(ToySite("b", folder / "b.sock"))
        self.grid = ToyGrid(self.clock, {11: self.a.socket, 12: self.b.socket})
        self.exchange = Exchange(self.grid, "support", clock=self.clock, sleep=self.clock.sleep)

    def gather(self, count: int = 2) -> None:
        assert self.exchange.gather(lambda sites: len(sites) >= count, self.clock() + 60)

    def train(
        self, seconds: float = 300.0, enough: Callable[[Mapping[str, Update]], bool] = lambda answers: False
    ) -> Outcome[Update]:
        return self.exchange.converse(train, self.clock() + seconds, group="round 1", enough=enough)


def train(site: str, hello: Hello) -> dialogues.Dialogue[RoundReport, Update]:
    """Give a site the round, and fetch its update."""
    yield from dialogues.submit(Submit(adapter="support", order=ORDER), PARENT)
    return (yield from dialogues.collect(site, hello.fingerprint.digest, "support", ORDER))


def trained(site: ToySite) -> bool:
    return ("GET", f"/adapters/support/rounds/{ORDER.key}/update") in site.calls
