"""What a daemon asks of a running engine, where there is none: nothing to load into, nobody who asks."""

from pathlib import Path

from serving.traffic_report import TrafficReport
from umbel.adapter import AdapterRef


class NoEngine:
    """In the place of `serving.engine.Engine` and its client."""

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
