"""A site over a base in 4 bits: the reference's tokens, its training, and versions that answer users.

The tests of tokens are those of `test_served_tokens`: the reference is transformers with bitsandbytes, and peft.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.tools.trial_site import random_adapter
from tests.e2e.test_served_tokens import (
    ask,
    test_an_adapter_changes_the_answer,
    test_greedy_tokens_equal_the_reference,
    text_of,
)
from tests.e2e.test_site import test_the_trainer_has_no_base_of_its_own
from tests.toys.sites.site_process import SiteProcess, first_in_each_python

pytestmark = pytest.mark.e2e

__all__ = (
    "test_an_adapter_changes_the_answer",
    "test_greedy_tokens_equal_the_reference",
    "test_the_trainer_has_no_base_of_its_own",
)

NOTES_LOOKUPS = """
import socket
original = socket.getaddrinfo
def noted(host, *args, **more):
    if host not in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::", socket.gethostname()):
        with open({file!r}, "a") as file:
            print(host, file=file)
    return original(host, *args, **more)
socket.getaddrinfo = noted
"""
"""What each Python of the site runs first."""


@pytest.fixture(scope="module")
def lookups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file in which each process of the site notes the names of other machines that it looks up."""
    folder = tmp_path_factory.mktemp("lookups")
    with first_in_each_python(folder, NOTES_LOOKUPS.format(file=str(folder / "found"))):
        yield folder / "found"


@pytest.fixture(scope="module")
def site(packed_llama: Path, lookups: Path) -> Iterator[SiteProcess]:
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder, SiteProcess(Path(folder), packed_llama) as site:
        site.deploy(1, random_adapter(packed_llama, seed=1))
        yield site


def test_what_was_trained_here_is_judged_promoted_and_answers_users(site: SiteProcess) -> None:
    parent = random_adapter(site.model, seed=7, b_std=0.0)
    assert site.submit("train-1", parent, steps=12, learning_rate=0.02).status_code == 200
    report = site.wait_round("train-1")
    assert (report["state"], report["steps"]) == ("done", 12), report
    update = site.control.get("/adapters/support/rounds/train-1/update").content
    before = text_of("completions", ask(site.users, "completions", "support", "ward"))
    ref = site.deploy(2, update)
    reply = ask(site.users, "completions", "support", "ward")
    assert reply.headers["x-umbel-adapter"] == str(ref) == "support@v2"
    assert text_of("completions", reply) != before
    assert site.status()["training"]["most_quanta_while_waiting"] <= 1


def test_no_process_of_the_site_asked_the_network_for_a_name(site: SiteProcess, lookups: Path) -> None:
    assert not lookups.exists(), lookups.read_text()
