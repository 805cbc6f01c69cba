"""Several adapters at one site: rounds, verdicts and promotions of one neither wait for those of another nor mix."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from client import site as site_module
from client.data.fresh import FreshData
from client.data.prepare import Prepared
from client.rounds import following
from client.site import Site
from client.tenant import worths_here
from serving.trainer_socket import CoTrainerStatus, EvaluateJob, TrainJob
from tests.toys.cotrainer import PARENT, ToyCoTrainer, order
from tests.toys.deployment import HELD_BASE, SHAPES, adapter, manifest_of, quick, scores, until
from tests.toys.engine import ToyMachine, site_config
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import NotFound
from umbel.messages import JobState

ADAPTERS = ("support", "billing")
LOSS = {"support": 1.0, "billing": 3.0}
"""Loss of the base on the held-out examples of each adapter, which are as many."""
GAIN = {"support": 0.5, "billing": 0.25}
"""How much lower each version's is."""

Story = Callable[[Site], Coroutine[Any, Any, None]]


def prepared_in(folder: Path) -> Prepared:
    """An adapter's data, which nobody reads."""
    return Prepared(folder / "train.npy", folder / "eval.npy", 10, 5, 50, heldout=folder.name)


class CoTrainer(ToyCoTrainer):
    """Every version is better than the base, on the examples of its adapter."""

    async def measure(self) -> None: ...

    def _ended(self, status: CoTrainerStatus, job: TrainJob | EvaluateJob) -> CoTrainerStatus:
        ended = super()._ended(status, job)
        if isinstance(job, EvaluateJob):
            asked = Path(job.data).parent.name
            scores(LOSS[asked] - (GAIN[asked] if job.adapter else 0.0)).write(Path(str(job.output)))
            self.evaluated[-1] = f"{job.id.partition('/')[0]} {asked}"
        return ended


@pytest.fixture
def cotrainer() -> CoTrainer:
    return CoTrainer()


@pytest.fixture
def run(tmp_path: Path, cotrainer: CoTrainer, monkeypatch: pytest.MonkeyPatch) -> Callable[[Story], None]:
    machine = ToyMachine()
    quick(monkeypatch, machine)
    monkeypatch.setattr(following, "POLL_S", 0.002)
    monkeypatch.setattr(site_module, "CoTrainerClient", lambda path: cotrainer)
    monkeypatch.setattr(site_module, "linear_shapes", lambda path, modules: SHAPES)

    async def main(story: Story) -> None:
        config = site_config(tmp_path, adapters=ADAPTERS)
        training = config.training.model_copy(update={"worth": "all"})  # nobody reads the data: nothing can be measured
        config = config.model_copy(update={"training": training})
        fresh = {name: FreshData(config, name, prepared_in(tmp_path / name)) for name in ADAPTERS}
        site = Site(config, HELD_BASE, fresh)
        site.resume()
        work = (site.supervisor.run(), *(tenant.jobs.run() for tenant in site.tenants))
        tasks = [asyncio.create_task(one) for one in work]
        try:
            async with asyncio.timeout(30):
                await site.supervisor.ready()
                await story(site)
        finally:
            for task in tasks:
                task.cancel()
            await site.background.close()
            await asyncio.gather(*tasks, return_exceptions=True)
            await site.supervisor.stop()
            site.journal.close()

    return lambda story: asyncio.run(main(story))


def push(site: Site, name: str, version: int = 1) -> AdapterRef:
    blob = adapter(version)
    sent = manifest_of(version, blob).model_copy(update={"name": name})
    site.tenant(name).deployer.receive(sent, blob)
    return sent.ref


async def judged(site: Site, ref: AdapterRef) -> None:
    await until(lambda: site.journal.get(ref).report.verdict is not None)


def test_two_rounds_under_the_same_key_are_trained_side_by_side(
    run: Callable[[Story], None], cotrainer: CoTrainer, tmp_path: Path
) -> None:
    async def story(site: Site) -> None:
        cotrainer.hold = asyncio.Event()
        for name in ADAPTERS:
            site.tenant(name).jobs.submit(order("r1"), PARENT)
        await until(lambda: cotrainer.started == ["r1", "r1"])
        status = await site.status()
        assert status["running_rounds"].keys() == set(ADAPTERS)
        assert sorted(status["open_rounds"]) == ["billing/r1", "support/r1"]
        await site.tenant("billing").jobs.cancel("r1")
        cotrainer.hold.set()
        support = site.tenant("support").jobs
        await until(lambda: support.report("r1").state.final)
        assert (support.report("r1").state, len(support.update("r1"))) == (JobState.DONE, len(PARENT))
        assert site.tenant("billing").jobs.report("r1").state is JobState.CANCELLED
        assert {str(path.relative_to(tmp_path)) for path in (tmp_path / "rounds").glob("*/*")} == {
            "rounds/support/r1", "rounds/billing/r1",
        }  # fmt: skip

    run(story)


def test_a_verdict_and_a_promotion_wait_for_no_round_of_another(
    run: Callable[[Story], None], cotrainer: CoTrainer
) -> None:
    async def story(site: Site) -> None:
        cotrainer.polls = 10**9
        site.tenant("support").jobs.submit(order("r1"), PARENT)
        await until(lambda: cotrainer.started == ["r1"])
        cotrainer.polls = 2
        ref = push(site, "billing")
        await judged(site, ref)
        assert (await site.tenant("billing").deployer.promote(ref)).state is Lifecycle.LIVE
        assert site.tenant("support").jobs.report("r1").state is JobState.RUNNING
        table = site.served.table(site.supervisor.loaded)
        assert {name: aliases["live"] for name, aliases in table.adapters.items()} == {
            "support": None, "billing": "billing@v1",
        }  # fmt: skip

    run(story)


def test_the_bases_scores_are_of_this_adapters_examples(run: Callable[[Story], None], cotrainer: CoTrainer) -> None:
    async def story(site: Site) -> None:
        for name in ADAPTERS:
            ref = push(site, name)
            await judged(site, ref)
            probe = site.journal.get(ref).report.probe
            assert (probe["base"].loss, probe["shadow"].loss) == (LOSS[name], LOSS[name] - GAIN[name])
        assert cotrainer.evaluated == [f"{name} {name}" for name in ADAPTERS for _ in ("base", "shadow")]

    run(story)


def test_a_promotion_that_waits_for_the_engine_does_not_hold_up_another_adapters_roll_back(
    run: Callable[[Story], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(site: Site) -> None:
        for name in ADAPTERS:
            await judged(site, push(site, name))
        await site.tenant("support").deployer.promote(AdapterRef("support", 1))
        waits, reached = asyncio.Event(), asyncio.Event()

        async def slow(*_: object) -> None:
            reached.set()
            await waits.wait()

        with monkeypatch.context() as patch:
            patch.setattr(site.loading, "prefill", slow)
            promotion = asyncio.create_task(site.tenant("billing").deployer.promote(AdapterRef("billing", 1)))
            await reached.wait()
            assert await site.tenant("support").deployer.roll_back() is None
        assert not promotion.done()
        waits.set()
        assert (await promotion).state is Lifecycle.LIVE

    run(story)


def test_an_adapter_that_is_not_trained_here_is_told_nothing_of_the_others(run: Callable[[Story], None]) -> None:
    async def story(site: Site) -> None:
        with pytest.raises(NotFound) as told:
            site.tenant("triage")
        assert not any(name in str(told.value) for name in ADAPTERS)

    run(story)


def test_who_brings_more_gets_more_of_the_training(run: Callable[[Story], None], cotrainer: CoTrainer) -> None:
    async def story(site: Site) -> None:
        assert worths_here(site.config, site.journal) == dict.fromkeys(ADAPTERS, 1.0)
        for tenant in site.tenants:
            tenant.jobs.submit(order("test-1-p"), PARENT)
            await until(lambda tenant=tenant: tenant.jobs.report("test-1-p").state.final)  # type: ignore[misc]
            await judged(site, push(site, tenant.name))
        mean = sum(GAIN.values()) / len(GAIN)
        worth = worths_here(site.config, site.journal)
        assert worth == {name: pytest.approx(gain / mean) for name, gain in GAIN.items()}
        site.tenant("billing").jobs.submit(order("test-2-p", round=2), PARENT)
        await until(lambda: len(cotrainer.shares) == 3)
        assert cotrainer.shares == [1.0, 1.0, worth["billing"]], "they were equal until the first verdicts"

    run(story)
