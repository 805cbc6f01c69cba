"""`TrafficReport`: the router's counts and latencies of each version, as the daemon reads them (GET /umbel/traffic)."""

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt


class VersionTraffic(BaseModel):
    """Counts of one version's answers since the engine started."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: NonNegativeInt = 0
    """Answers that ended well, and errors."""
    errors: NonNegativeInt = 0
    """Answers that failed by the site's fault (see `serving.router.traffic`)."""
    chunks: NonNegativeInt = 0
    """Events of streams, each of about one token."""
    up: NonNegativeInt = 0
    """Answers that users rate good."""
    down: NonNegativeInt = 0
    """Answers that users rate bad."""
    streams: NonNegativeInt = 0
    """Streams whose latency was measured; `ttft_s` and `tpot_s` hold the latest of them."""
    ttft_s: tuple[float, ...] = ()
    """Seconds to the first chunk, for each stream."""
    tpot_s: tuple[float, ...] = ()
    """Mean seconds between two chunks, for each stream."""

    def since(self, earlier: "VersionTraffic") -> "VersionTraffic":
        """Return the counts since the report `earlier`; all of them if the engine was restarted in between."""
        if self.requests < earlier.requests or self.streams < earlier.streams:
            return self
        new = self.streams - earlier.streams
        counts = {
            field: max(0, getattr(self, field) - getattr(earlier, field))  # a changed rating lowers a count
            for field in ("requests", "errors", "chunks", "up", "down")
        }
        kept = {"ttft_s": self.ttft_s[-new:] if new else (), "tpot_s": self.tpot_s[-new:] if new else ()}
        return VersionTraffic(streams=new, **counts, **kept)


class MirrorTraffic(BaseModel):
    """Comparison of a shadow's answers with the live version's: sums over the requests that both answered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    compared: NonNegativeInt = 0
    """Requests that both answered."""
    failed: NonNegativeInt = 0
    """Replays that the shadow did not answer."""
    dropped: NonNegativeInt = 0
    """Requests that were not replayed: a user was waiting, the queue was full, or the engine too busy."""
    agreement: NonNegativeFloat = 0.0
    """Sum of the shares (0..1) of equal leading words."""
    words: NonNegativeInt = 0
    live_words: NonNegativeInt = 0
    empty: NonNegativeInt = 0
    live_empty: NonNegativeInt = 0
    refusals: NonNegativeInt = 0
    live_refusals: NonNegativeInt = 0

    def since(self, earlier: "MirrorTraffic") -> "MirrorTraffic":
        """Return the counts since the report `earlier`; all of them if the engine was restarted in between."""
        if self.compared + self.failed < earlier.compared + earlier.failed:
            return self
        fields = type(self).model_fields
        return MirrorTraffic(**{field: max(0, getattr(self, field) - getattr(earlier, field)) for field in fields})


class TrafficReport(BaseModel):
    """The counts of all versions, by their name in `x-umbel-adapter`; "base" is the base."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: dict[str, VersionTraffic] = {}
    mirror: dict[str, MirrorTraffic] = {}
    """Shadow → its comparison with the live version."""

    def of(self, label: str) -> VersionTraffic:
        """Return a version's counts, all 0 if there are none."""
        return self.versions.get(label, VersionTraffic())

    def mirrored(self, label: str) -> MirrorTraffic:
        """Return a shadow's comparison, all 0 if there is none."""
        return self.mirror.get(label, MirrorTraffic())
