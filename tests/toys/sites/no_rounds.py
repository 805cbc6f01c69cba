"""Jobs of a site that was given no round."""

from umbel.errors import NotFound


class NoRounds:
    """Jobs of a site that was given none."""

    def report(self, key: str) -> None:
        raise NotFound(f"round {key} is not known at this site; submit it again")

    update = report

    async def cancel(self, key: str) -> None:
        self.report(key)
