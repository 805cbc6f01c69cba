"""Figures about whole files and sites: counted as preparation counts them, with the mistakes of every file."""

import json
from pathlib import Path

import pytest

from client.data.chat_tokens import ChatTokenizer
from client.data.prepare import Preparation, prepare
from client.data.summary import DATA, EVAL_DATA, HELD_OUT
from client.data.survey import survey, survey_adapter
from tests.toys.bases.chat_templates import MARKED, with_template
from tests.toys.sites.site_file import GUARD, load
from tests.toys.sites.training_data import write_lines

SHORT, LONG_ANSWER, LONG_PROMPT = ("hi", "yes"), ("hi", "long " * 40), ("long " * 40, "no")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_llama)


def test_every_figure_counts_what_its_name_says(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [SHORT, SHORT, LONG_ANSWER, LONG_PROMPT])
    greets = [{"role": "assistant", "content": "Hello."}, *({"role": r, "content": "x"} for r in ("user", "assistant"))]
    with data.open("a") as file:
        file.write('{"prompt": "a"}\nno JSON\n' + json.dumps({"messages": greets}) + "\n")
    found = survey(data, tokenizer, 16)
    summary = found.summary
    assert (summary.examples, summary.refused, summary.usable) == (7, 2, 4)
    assert (summary.cut, summary.dropped, summary.repeated, summary.untold) == (2, 1, 1, 1)
    assert summary.unending == 0
    lengths = sorted(len(ids) for example in found.examples for ids, _ in example.whole)
    assert summary.longest >= lengths[-1] > 16
    assert summary.median < 16 < summary.p95 == summary.longest
    rows = [row for example in found.examples for row in example.rows]
    assert summary.padding == pytest.approx(1 - sum(len(ids) for ids, _ in rows) / (16 * len(rows)))
    assert summary.loss_tokens == sum(example.loss_tokens for example in found.examples)
    assert [str(error).partition(": ")[0] for error in found.mistakes()] == [f"{data}:5", f"{data}:6"]


def test_the_figures_are_those_of_the_token_files(tokenizer: ChatTokenizer, tiny_llama: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [*((f"q {n}", "a") for n in range(20)), LONG_ANSWER, LONG_PROMPT])
    held_out = write_lines(tmp_path / "eval.jsonl", [("well", "yes")])
    done = prepare(Preparation(data, held_out, 0.1, tiny_llama, 16, tmp_path / "tokens"))
    assert done.files == {
        name: survey(path, tokenizer, 16).summary for name, path in ((DATA, data), (EVAL_DATA, held_out))
    }
    assert (done.train_examples, done.cut, done.dropped) == (21, 2, 1)
    assert done.train_loss_tokens == done.files[DATA].loss_tokens


def test_an_answer_without_a_token_at_which_the_engine_stops_is_counted(tiny_llama: Path, tmp_path: Path) -> None:
    model = with_template(tiny_llama, MARKED.replace("<MARK>", "{{ m['content'] + '<|user|>' }}"), tmp_path / "model")
    summary = survey(write_lines(tmp_path / "data.jsonl", [SHORT]), ChatTokenizer.load(model), 64).summary
    assert summary.unending == 1


def test_a_file_of_which_nothing_is_left_is_a_mistake(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    empty = survey(write_lines(tmp_path / "empty.jsonl", []), tokenizer, 16)
    assert "holds no example" in str(*empty.mistakes())
    long = survey(write_lines(tmp_path / "long.jsonl", [LONG_PROMPT] * 2), tokenizer, 16)
    assert "no trainable token in any of 2 examples" in str(*long.mistakes())
    assert "raise [training].seq_len" in str(*long.mistakes())


def test_of_many_refused_examples_the_first_are_named_and_all_are_counted(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("no JSON\n" * 9 + '{"prompt": "a", "completion": "b"}\n')
    found = survey(data, tokenizer, 16)
    assert [str(error).partition(": ")[0] for error in found.mistakes()] == [f"{data}:{n}" for n in (1, 2, 3)]
    assert (found.summary.refused, found.summary.usable) == (9, 1)


def test_a_site_is_split_as_preparation_splits_it_and_mistakes_of_all_files_are_told(
    tokenizer: ChatTokenizer, tiny_llama: Path, tmp_path: Path
) -> None:
    for folder in ("private", "guards"):
        (tmp_path / folder).mkdir()
    data = write_lines(tmp_path / "private" / "train.jsonl", [(f"q {n}", "a") for n in range(60)])
    (tmp_path / "guards" / "triage.jsonl").write_bytes(b"PAR1")
    config = load(tmp_path, training="eval_fraction = 0.2", more=GUARD)
    found = survey_adapter(config, "support", tokenizer)
    done = prepare(Preparation(data, None, 0.2, tiny_llama, 512, tmp_path / "tokens"))
    assert (len(found.sides.train), found.sides.asked) == (done.train_examples, done.asked)
    assert found.sides.asked[HELD_OUT].examples == done.eval_examples > 0
    assert list(found.mistakes) == ["guard triage"]
    assert "Parquet" in str(*found.mistakes["guard triage"])
    (tmp_path / "eval.jsonl").write_text("no JSON\n")
    config = load(tmp_path, training='eval_data = "eval.jsonl"', more=GUARD)
    found = survey_adapter(config, "support", tokenizer)
    assert (len(found.sides.train), found.sides.asked[HELD_OUT].examples) == (60, 0)
    assert list(found.mistakes) == [EVAL_DATA, "guard triage"]
