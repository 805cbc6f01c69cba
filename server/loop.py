"""`run`: the rounds of a federation, or of a site alone: train, publish, judge, promote or discard."""

from server.federation import Federation


def run(federation: Federation) -> None:
    """Run all rounds; every round ends for a recorded reason."""
    for number in federation.rounds():
        run_round(federation, number)


def run_round(federation: Federation, number: int) -> None:
    """Train, publish, shadow, and let a quorum of sites decide."""
    version = federation.version_of(number) or federation.train(number)
    if version is None:
        return
    judgement = federation.judge(number, version)
    if judgement.accepted:
        federation.promote(number, version, judgement)
    else:
        federation.discard(number, version, judgement)
