"""On a device that runs behind its host a site trains, serves the reference's tokens, and its jobs end.

The tests are those of `test_site` and `test_served_tokens`, on the co-trainer's asynchronous lane: see
`serving.cotrainer.lanes.lagging`.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.tools.trial_site import random_adapter
from serving.cotrainer.lanes import lagging
from tests.e2e.test_served_tokens import test_an_adapter_changes_the_answer, test_greedy_tokens_equal_the_reference
from tests.e2e.test_site import (
    test_the_trainer_has_no_base_of_its_own,
    test_training_while_serving_runs_one_quantum_at_a_time,
)
from tests.toys.sites.site_process import SiteProcess

pytestmark = pytest.mark.e2e

__all__ = (
    "test_an_adapter_changes_the_answer",
    "test_greedy_tokens_equal_the_reference",
    "test_the_trainer_has_no_base_of_its_own",
    "test_training_while_serving_runs_one_quantum_at_a_time",
)


@pytest.fixture(scope="module")
def site(tiny_llama: Path) -> Iterator[SiteProcess]:
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder, pytest.MonkeyPatch.context() as environment:
        environment.setenv(lagging.VARIABLE, "1.5")
        with SiteProcess(Path(folder), tiny_llama) as site:
            site.deploy(1, random_adapter(tiny_llama, seed=1))
            parent = random_adapter(tiny_llama, seed=7, b_std=0.0)
            assert site.submit("train-0", parent, steps=150).status_code == 200, "beside the tokens below"
            yield site


def test_jobs_end_on_an_idle_engine_too_and_every_quantum_was_launched(site: SiteProcess) -> None:
    parent = random_adapter(site.model, seed=7, b_std=0.0)
    assert site.submit("train-idle", parent, steps=20).status_code == 200
    report = site.wait_round("train-idle")
    assert (report["state"], report["steps"]) == ("done", 20), report
    training = site.status()["training"]
    assert training["most_quanta_while_waiting"] <= 1
    quanta = training["quanta"]
    assert {"attention", "mlp", "head", "optimizer", "read_back"} <= quanta.keys()
    assert all(0 < stats["launch_s"] < stats["seconds"] for stats in quanta.values())
