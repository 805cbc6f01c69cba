"""`NoEngine`: an engine that is not there. It loads nothing, and no user asks it."""

from pathlib import Path

from serving.traffic_report import TrafficReport
from umbel.adapter import AdapterRef


class NoEngine:
    """Stands in for `serving.engine.Engine` and its client."""

    url = ""

    @property
    def client(self) -> "NoEngine":
        return self

    async def load(self, ref: AdapterRef, folder: Path) -> None: ...
    async def warm(self, ref: AdapterRef) -> None: ...
    async def unload(self, ref: AdapterRef) -> None: ...
    async def reload_aliases(self) -> None: ...
    async def in_flight(self) -> dict[str, int]:
        return {}

    async def traffic(self) -> TrafficReport:
        return TrafficReport()

    async def prefill(self, ref: AdapterRef, most: int) -> int:
        return 0
