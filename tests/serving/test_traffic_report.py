"""The router's counts, as the daemon reads them: differences between two reports, and versions without any."""

import pytest
from pydantic import ValidationError

from serving.traffic_report import MirrorTraffic, TrafficReport, VersionTraffic


def test_what_came_since_is_a_difference_and_after_a_new_start_all_of_it() -> None:
    earlier = VersionTraffic(requests=5, errors=1, chunks=9, up=2, down=1, streams=2, ttft_s=(1, 2), tpot_s=(1, 2))
    later = VersionTraffic(
        requests=9, errors=1, chunks=20, up=1, down=2, streams=4, ttft_s=(1, 2, 3, 4), tpot_s=(1, 2, 3, 4)
    )
    assert later.since(earlier) == VersionTraffic(
        requests=4, errors=0, chunks=11, up=0, down=1, streams=2, ttft_s=(3, 4), tpot_s=(3, 4)
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
    report = TrafficReport(versions={"base": VersionTraffic(requests=1, streams=1, ttft_s=(0.5,), tpot_s=(0.1,))})
    assert TrafficReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(ValidationError, match="Extra inputs"):
        TrafficReport.model_validate({"versions": {"base": {"requests": 1, "text": "secret"}}})
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        VersionTraffic(requests=-1)
