"""The router's counts, as the daemon reads them: differences between two reports, and versions without any."""

import pytest
from pydantic import ValidationError

from serving.traffic_report import MirrorTraffic, TrafficReport, UserTraffic, VersionTraffic


def test_what_came_since_is_a_difference_and_after_a_new_start_all_of_it() -> None:
    idle, busy = UserTraffic(requests=1), UserTraffic(requests=4, errors=1, up=2, streams=2, log_ttft=1.0, paced=1)
    since = UserTraffic(requests=2, down=1, streams=2, log_ttft=-2.0, paced=2, log_tpot=-6.0)
    busier = UserTraffic(requests=6, errors=1, up=1, down=1, streams=4, log_ttft=-1.0, paced=3, log_tpot=-6.0)
    new = UserTraffic(requests=2)
    earlier = VersionTraffic(
        requests=5, errors=1, chunks=9, up=2, down=1, streams=2, users=2, by_user={1: idle, 2: busy}
    )
    later = VersionTraffic(
        requests=9, errors=1, chunks=20, up=1, down=2, streams=4, users=3, by_user={1: idle, 2: busier, 3: new}
    )
    assert later.since(earlier) == VersionTraffic(
        requests=4, errors=0, chunks=11, up=0, down=1, streams=2, users=2, by_user={2: since, 3: new}
    )
    assert later.since(later) == VersionTraffic()
    assert later.since(VersionTraffic()) == later
    assert earlier.since(later) == earlier, "a router that was started anew counts from nothing"
    assert MirrorTraffic(compared=5, agreement=4.5).since(MirrorTraffic(compared=2, agreement=2.0)) == MirrorTraffic(
        compared=3, agreement=2.5
    )


def test_a_version_without_answers_has_counted_nothing() -> None:
    report = TrafficReport(
        versions={"base": VersionTraffic(requests=2)}, mirror={"support@v2": MirrorTraffic(failed=1)}
    )
    assert (report.of("base").requests, report.of("support@v2")) == (2, VersionTraffic())
    assert (report.mirrored("support@v2").failed, report.mirrored("base")) == (1, MirrorTraffic())


def test_a_report_is_read_as_it_was_told_and_no_contents_fit_in() -> None:
    report = TrafficReport(
        versions={"base": VersionTraffic(requests=1, users=1, by_user={2**53 - 1: UserTraffic(requests=1)})}
    )
    assert TrafficReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(ValidationError, match="Extra inputs"):
        TrafficReport.model_validate({"versions": {"base": {"requests": 1, "text": "secret"}}})
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        VersionTraffic(requests=-1)
