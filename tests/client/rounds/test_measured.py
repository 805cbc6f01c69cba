"""Rounds on a real tiny model, trained by the real co-trainer: what pays is trained, and what brings nothing is not."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client.rounds.folder import COURSE
from client.worth.bursts import REPLAY, TRIAL
from client.worth.decision import MOST_UNADOPTED, STALE_S
from client.worth.row_keys import RowKeys
from client.worth.worth_set import LEAST, MOST
from serving.trainer_socket import CoTrainerStatus, EvaluateJob, TrainJob
from tests.toys.scheduler import schedulers
from tests.toys.serving.paying import MODEST, Paying
from umbel.errors import EngineGone
from umbel.messages import JobState
from umbel.token_file import TokenFile

WARDS, PAINTS = ("the north ward", "the south ward"), ("blue paint", "red paint", "grey paint")
DONE, SKIPPED = JobState.DONE, JobState.SKIPPED


@pytest.fixture
def site(sockets: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Paying]:
    monkeypatch.setattr("serving.cotrainer.cotrainer.HOUSEKEEPING_S", 60.0)
    with schedulers(sockets, tiny_llama) as make:
        yield Paying(sockets, make(**MODEST))


def until_it_rests(site: Paying, most: int = 9) -> int:
    """Train rounds until one is skipped that trained nothing; return how many sent something."""
    sent = 0
    for _ in range(most):
        trained = site.round()
        if trained.state is SKIPPED and not trained.counts:
            return sent
        sent += trained.state is DONE
    pytest.fail("it never stops")


def evaluations(site: Paying) -> int:
    return sum(isinstance(job, EvaluateJob) for job in site.jobs)


def test_a_site_learns_its_data_and_then_trains_nothing_until_they_change(site: Paying) -> None:
    site.write("bed", WARDS)
    assert 1 <= until_it_rests(site) <= 5
    tokens, jobs = site.tokens, len(site.jobs)
    for _ in range(9):
        trained = site.round()
        assert (trained.state, trained.counts) == (SKIPPED, {})
        assert trained.error.startswith("nothing worth training: ")
    assert (site.tokens, len(site.jobs)) == (tokens, jobs), "neither trained nor evaluated: nothing has changed"

    site.write("bed", WARDS, 60, first=320)
    assert site.round().state is SKIPPED
    assert (site.tokens, len(site.jobs)) == (tokens, jobs + 1), "more of the same costs one evaluation"

    site.write("order", PAINTS)
    trained = site.round()
    assert trained.state is DONE
    assert trained.memory is not None
    assert 1 <= until_it_rests(site) <= 6
    site.now += STALE_S
    tried = site.round()
    assert (tried.state, tried.counts["steps"]) == (SKIPPED, TRIAL), "a few steps, after a long time"


def test_the_loss_falls_as_far_as_with_all_steps_and_most_of_the_tokens_are_saved(site: Paying) -> None:
    site.write("bed", WARDS)
    for _ in range(12):
        site.round()
    measured, tokens = loss(site), site.tokens
    site.head.write_bytes(b"")
    everything = Paying(site.folder, site.scheduler)
    everything.anew(everything=True)
    everything.write("bed", WARDS)
    for _ in range(12):
        assert everything.round().state is DONE
    assert measured <= 1.08 * loss(everything)
    assert tokens <= 0.4 * everything.tokens


def loss(site: Paying) -> float:
    """The loss per token of the site's head on examples like its own that it never had."""
    other = site.folder / "other.jsonl"
    mine, site.file = site.file, other
    other.write_text("")
    site.write("bed", WARDS, 60, first=9000)
    data = site.data()
    site.file = mine
    job = EvaluateJob(id=f"loss-{len(site.jobs)}-{site.tokens}", adapter=str(site.head), data=str(data.train))
    site.scheduler.tell(job)
    evaluation = site.scheduler.finish().evaluation
    assert evaluation is not None
    return evaluation.loss_sum / evaluation.loss_tokens


def test_a_domain_that_brings_nothing_more_is_left_out_but_for_a_few_of_its_rows(site: Paying) -> None:
    site.write("bed", WARDS, domain="wards")
    until_it_rests(site)
    site.write("order", PAINTS, domain="paints")
    site.jobs.clear()
    assert site.round().state is DONE
    bursts = [job for job in site.jobs if isinstance(job, TrainJob)]
    assert [job.until for job in bursts] == [10, 20, 30, 40]
    domains = RowKeys.read(site.data().keys).domain
    rows = np.load(str(bursts[-1].rows))
    new = int(np.sum(domains[rows] == domains[-1]))
    assert 0 < len(rows) - new <= REPLAY * len(rows)
    measured = TokenFile.open(Path(site.jobs[-1].data))
    assert LEAST <= len(measured) <= MOST, "only the new domain is measured"


def test_what_is_sent_counts_what_led_to_it_and_nothing_of_a_round_is_left(site: Paying) -> None:
    site.write("bed", WARDS)
    trained = site.round()
    assert (trained.counts["steps"], trained.counts["num_examples"]) == (40, 320)
    folder = Path(site.jobs[-1].data).parent
    assert (folder / COURSE).exists(), "it is removed once the journal has the round"
    rows = {path.name for path in folder.iterdir()}
    assert "update.safetensors" in rows


def test_a_round_that_is_cut_off_goes_on_with_its_bursts_to_the_same_bytes(site: Paying) -> None:
    site.write("bed", WARDS)
    site.adopts = False
    whole = site.round(seed=1)
    wanted = (site.folder / "0123456789abcdef-1-parent" / "update.safetensors").read_bytes()
    assert whole.state is DONE

    follow, count = site.follow, [0]

    async def dying(job: TrainJob | EvaluateJob, note: object) -> CoTrainerStatus:
        count[0] += 1
        if count[0] in (4, 7):
            raise EngineGone("the engine died")
        return await follow(job, note)  # type: ignore[arg-type]

    site.follow = dying  # type: ignore[method-assign]
    (site.folder / "worth" / "worth.json").unlink()
    for _ in range(2):
        with pytest.raises(EngineGone):
            site.round(seed=1)
        site.number -= 1
    site.jobs.clear()
    assert site.round(seed=1).counts == pytest.approx(whole.counts, rel=1.0)
    assert (site.folder / "0123456789abcdef-2-parent" / "update.safetensors").read_bytes() == wanted
    assert [job.until for job in site.jobs if isinstance(job, TrainJob)] == [30, 40], "what was trained is not again"


def test_an_update_that_is_never_adopted_is_made_three_times(site: Paying) -> None:
    site.write("bed", WARDS)
    site.adopts = False
    states = [site.round().state for _ in range(MOST_UNADOPTED + 2)]
    assert states == [DONE] * MOST_UNADOPTED + [SKIPPED] * 2
    site.anew(judged=lambda lineage, round_: False)
    assert site.round().state is DONE, "no version of it was ever judged: a round that failed at the centre"


def test_a_version_that_is_worse_than_what_was_reached_is_trained_again(site: Paying) -> None:
    site.write("bed", WARDS)
    before = site.head.read_bytes()
    until_it_rests(site)
    site.head.write_bytes(before)
    assert site.round().state is DONE


def test_of_few_examples_all_are_trained_for_all_steps_and_it_is_said(
    site: Paying, caplog: pytest.LogCaptureFixture
) -> None:
    site.write("bed", WARDS, 40)
    with caplog.at_level("INFO"):
        assert [site.round(steps=3).counts["steps"] for _ in range(3)] == [3, 3, 3]
    assert (len(site.jobs), evaluations(site)) == (3, 0)
    assert "fewer than 16 could be set aside" in site.measured.told
    assert caplog.text.count("worth.unknown") == 1
    assert not (site.folder / "worth").exists()


def test_nothing_that_is_remembered_or_told_holds_a_text(site: Paying, caplog: pytest.LogCaptureFixture) -> None:
    site.write("Zyxwv", ("Zyxwv",), domain="Zyxwv")
    with caplog.at_level("INFO"):
        told = [site.round().told, site.measured.told]
    assert "zyxwv" not in " ".join([*told, caplog.text]).lower()
    remembered = (site.folder / "worth" / "worth.json").read_text()
    assert "zyxwv" not in remembered.lower()
    assert json.loads(remembered)["looks"] == 1


def test_a_stopped_round_begins_no_further_job(site: Paying) -> None:
    site.write("bed", WARDS)
    follow = site.follow

    async def stopping(job: TrainJob | EvaluateJob, note: object) -> CoTrainerStatus:
        status = await follow(job, note)  # type: ignore[arg-type]
        if isinstance(job, TrainJob):
            assert site.measured.stop("support/0123456789abcdef-1-parent") == job.id, "the burst is what is cancelled"
        return status

    site.follow = stopping  # type: ignore[method-assign]
    with pytest.raises(Exception, match="cancelled"):
        site.round()
    assert [isinstance(job, TrainJob) for job in site.jobs] == [False, True]
