"""`TrafficReport`: the router's counts and latencies of each version, as the daemon reads them (GET /umbel/traffic)."""

from typing import Self

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt


class UserTraffic(BaseModel):
    """Counts of the answers that one user got of one version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: NonNegativeInt = 0
    errors: NonNegativeInt = 0
    up: NonNegativeInt = 0
    down: NonNegativeInt = 0
    streams: NonNegativeInt = 0
    log_ttft: float = 0.0
    """Sum over these streams: natural logarithm of the seconds to the first chunk."""
    paced: NonNegativeInt = 0
    """Streams of at least two chunks."""
    log_tpot: float = 0.0
    """Sum over these streams: natural logarithm of the mean seconds between two chunks."""

    def since(self, earlier: Self) -> Self:
        """Return what was counted since `earlier`."""
        return type(self)(
            requests=self.requests - earlier.requests,
            errors=self.errors - earlier.errors,
            up=max(0, self.up - earlier.up),  # a changed rating lowers a count
            down=max(0, self.down - earlier.down),
            streams=self.streams - earlier.streams,
            log_ttft=self.log_ttft - earlier.log_ttft,
            paced=self.paced - earlier.paced,
            log_tpot=self.log_tpot - earlier.log_tpot,
        )


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
    """Streams whose latency was measured."""
    users: NonNegativeInt = 0
    """Distinct users who asked for the adapter by its plain name; an estimate where there are too many to count."""
    by_user: dict[int, UserTraffic] = {}
    """A code that only this run of the engine knows the meaning of → that user's counts. Not all users are in it."""

    def since(self, earlier: "VersionTraffic") -> "VersionTraffic":
        """Return the counts since the report `earlier`; all of them if the engine was restarted in between."""
        if self.requests < earlier.requests or self.streams < earlier.streams:
            return self
        counts = {
            field: max(0, getattr(self, field) - getattr(earlier, field))  # a changed rating lowers a count
            for field in ("requests", "errors", "chunks", "up", "down", "streams")
        }
        nothing = UserTraffic()
        new = {code: user.since(earlier.by_user.get(code, nothing)) for code, user in self.by_user.items()}
        by_user = {code: user for code, user in new.items() if user.requests or user.up or user.down}
        return VersionTraffic(users=len(by_user), by_user=by_user, **counts)


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
