"""`Waves`: a promotion in waves; a few sites first, watched for a while, then more."""

import hashlib
import itertools
import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from umbel.adapter import AdapterRef
from umbel.messages import Hello

_SHARE = re.compile(r"\d*\.?\d+")


@dataclass(frozen=True)
class Waves:
    """The waves in which a version goes to the sites in favour of it."""

    shares: tuple[float, ...] = (1.0,)
    """Share of those sites that have the version after each wave; rising, the last one is 1."""
    pause_s: float = 0.0
    """Seconds that a wave is watched before the next one."""
    failures: float = 0.0
    """Share of the sites so far that may roll themselves back without stopping the promotion."""

    @staticmethod
    def parse(shares: str) -> tuple[float, ...]:
        """Read `0.1,0.5,1`; raise ValueError for anything but rising shares that end with 1."""
        numbers = tuple(float(share) if _SHARE.fullmatch(share.strip()) else math.nan for share in shares.split(","))
        if numbers[-1] != 1.0 or not all(low < high for low, high in itertools.pairwise((0.0, *numbers))):
            raise ValueError(f"{shares!r} are no waves; write rising shares of the sites that end with 1: '0.1,0.5,1'")
        return numbers

    @property
    def watched(self) -> bool:
        """True when sites are asked between waves; a promotion of all at once, without a pause, asks nothing."""
        return len(self.shares) > 1 or self.pause_s > 0

    def of(self, sites: Collection[str], ref: AdapterRef) -> list[list[str]]:
        """Return the sites of each wave; no wave is empty.

        The order is the same after a restart and differs between versions, so that no site is always first.
        """
        ordered = sorted(sites, key=lambda site: hashlib.sha256(f"{ref} {site}".encode()).digest())
        ends = [math.ceil(round(share * len(ordered), 9)) for share in self.shares]
        return [ordered[start:end] for start, end in itertools.pairwise((0, *ends)) if end > start]

    def too_many(self, failed: int, sites: int) -> bool:
        """Tell whether `failed` of the sites so far are more than may roll themselves back."""
        return failed > self.failures * sites


def went_back(hello: Hello, ref: AdapterRef, *, promoted: bool) -> str:
    """Say how a site rolled itself back from a version that it had been given; empty where it did not."""
    if str(ref) in hello.refused or (promoted and hello.live != str(ref)):
        return f"went back from {ref} by itself, to {hello.live or 'the base'}"
    return ""
