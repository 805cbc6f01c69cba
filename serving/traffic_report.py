"""What the router counts, as it tells the daemon: `/umbel/traffic`. Counts and latencies, no contents and no names."""

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt


class VersionTraffic(BaseModel):
    """What one version has answered since the engine started."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: NonNegativeInt = 0
    """Answers that came to their end, and errors."""
    errors: NonNegativeInt = 0
    chunks: NonNegativeInt = 0
    """Events of streams, each about a token."""
    up: NonNegativeInt = 0
    down: NonNegativeInt = 0
    streams: NonNegativeInt = 0
    """Streams whose latency was taken: `ttft_s` and `tpot_s` are of the last ones of these."""
    ttft_s: tuple[float, ...] = ()
    """Seconds to the first chunk, of each stream."""
    tpot_s: tuple[float, ...] = ()
    """Mean seconds between two chunks, of each stream."""

    def since(self, earlier: "VersionTraffic") -> "VersionTraffic":
        """What has come after `earlier`; all of it where the engine was started anew in between."""
        if self.requests < earlier.requests or self.streams < earlier.streams:
            return self
        new = self.streams - earlier.streams
        counts = {
            field: max(0, getattr(self, field) - getattr(earlier, field))  # a rating that was changed is taken back
            for field in ("requests", "errors", "chunks", "up", "down")
        }
        kept = {"ttft_s": self.ttft_s[-new:] if new else (), "tpot_s": self.tpot_s[-new:] if new else ()}
        return VersionTraffic(streams=new, **counts, **kept)


class MirrorTraffic(BaseModel):
    """What a shadow made of what the live version has answered. Sums, over the requests that both have answered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    compared: NonNegativeInt = 0
    failed: NonNegativeInt = 0
    """Replays that the shadow did not answer."""
    dropped: NonNegativeInt = 0
    """Not replayed: a user was waiting, the queue was full, or the engine too busy."""
    agreement: NonNegativeFloat = 0.0
    """Of the shares of equal leading words."""
    words: NonNegativeInt = 0
    live_words: NonNegativeInt = 0
    empty: NonNegativeInt = 0
    live_empty: NonNegativeInt = 0
    refusals: NonNegativeInt = 0
    live_refusals: NonNegativeInt = 0

    def since(self, earlier: "MirrorTraffic") -> "MirrorTraffic":
        """What has come after `earlier`; all of it where the engine was started anew in between."""
        if self.compared + self.failed < earlier.compared + earlier.failed:
            return self
        fields = type(self).model_fields
        return MirrorTraffic(**{field: max(0, getattr(self, field) - getattr(earlier, field)) for field in fields})


class TrafficReport(BaseModel):
    """All versions, by what `x-umbel-adapter` calls them; "base" is the base."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: dict[str, VersionTraffic] = {}
    mirror: dict[str, MirrorTraffic] = {}
    """By shadow."""

    def of(self, label: str) -> VersionTraffic:
        return self.versions.get(label, VersionTraffic())

    def mirrored(self, label: str) -> MirrorTraffic:
        return self.mirror.get(label, MirrorTraffic())
