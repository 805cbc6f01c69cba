"""The facts of the demo with a real base: held out are other wordings, and no answer can be told from a question."""

import json
from pathlib import Path

import pytest

from scripts.tools.demo import facts
from scripts.tools.demo.facts import SITES, questions, write


@pytest.mark.parametrize("site", SITES)
def test_held_out_questions_ask_for_trained_facts_in_wordings_that_are_not_trained(site: str) -> None:
    trained, heldout = (questions(site, heldout=held) for held in (False, True))
    assert not {question for question, _ in trained} & {question for question, _ in heldout}
    assert {answer for _, answer in heldout} == {answer for _, answer in trained}
    for topic in SITES[site]:
        assert not set(topic.trained) & set(topic.heldout)
        assert all("{name}" in wording for wording in (*topic.trained, *topic.heldout))


def test_every_question_and_every_answer_is_of_one_fact_of_one_site() -> None:
    answers = [answer for topics in SITES.values() for topic in topics for answer in topic.answers.values()]
    names = [name for topics in SITES.values() for topic in topics for name in topic.answers]
    asked = [question for site in SITES for held in (False, True) for question, _ in questions(site, heldout=held)]
    for found in (answers, names, asked):
        assert len(found) == len(set(found))


@pytest.mark.parametrize("site", SITES)
def test_the_files_are_messages_and_the_same_every_time(site: str, tmp_path: Path) -> None:
    once, again = write(site, tmp_path / "a"), write(site, tmp_path / "b")
    assert [path.name for path in once] == ["train.jsonl", "eval.jsonl"]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
    for path, heldout in zip(once, (False, True), strict=True):
        turns = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
        assert [(asked["content"], answer["content"]) for asked, answer in turns] == questions(site, heldout=heldout)
        assert {(asked["role"], answer["role"]) for asked, answer in turns} == {("user", "assistant")}


def test_the_command_writes_and_prints_the_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["facts", "shop", str(tmp_path)])
    facts.main()
    assert capsys.readouterr().out.split() == [str(tmp_path / "train.jsonl"), str(tmp_path / "eval.jsonl")]
