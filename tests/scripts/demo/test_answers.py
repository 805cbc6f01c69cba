"""Answers before and after: questions spread over the held-out ones, both models asked, a failure counted."""

import json
from pathlib import Path

from scripts.tools.demo.answers import no_better, questions, side_by_side
from scripts.tools.demo.users import Users


def heldout(folder: Path, count: int) -> Path:
    path = folder / "eval.jsonl"
    turns = [
        [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]
        for i in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    return path


def test_questions_are_spread_from_the_first_to_the_last(tmp_path: Path) -> None:
    asked = questions(heldout(tmp_path, 36), 6)
    assert asked == [(f"question {i}", f"answer {i}") for i in (0, 7, 14, 21, 28, 35)]
    assert len(questions(heldout(tmp_path, 4), 6)) == 4
    assert questions(heldout(tmp_path, 4), 1) == [("question 0", "answer 0")]


def test_both_are_asked_and_a_failure_counts_among_the_users(tmp_path: Path) -> None:
    class Asked(Users):
        def ask_once(self, model: str, question: str) -> tuple[str, str]:
            return f"{model} on {question}", "support@v2" if model == self.model else "base"

    users = Asked("http://nobody", "support", [], lambda: False, seed=0)
    assert side_by_side(users, "smollm2", [("why?", "so")]) == [
        {"question": "why?", "right": "so", "base": "smollm2 on why?", "adapter": "support on why?",
         "version": "support@v2"},
    ]  # fmt: skip
    silent = Users("http://127.0.0.1:1", "support", [], lambda: False, seed=0)
    (row,) = side_by_side(silent, "smollm2", [("why?", "so")])
    assert (row["base"], row["adapter"], row["version"]) == ("", "", "nobody")
    assert (silent.summary()["requests"], silent.summary()["failed"]) == (2, 2)


def test_an_adapter_that_answers_no_more_questions_than_its_base_is_told() -> None:
    better = [{"right": "a", "base": "b", "adapter": "a"}, {"right": "a", "base": "b", "adapter": "c"}]
    as_good = [{"right": "a", "base": "a", "adapter": "b"}, {"right": "a", "base": "b", "adapter": "a"}]
    assert no_better({}) == []
    assert no_better({"clinic-a": better, "shop-a": as_good}) == [
        "shop-a: the adapter answers 1 of 2 questions rightly, the base 1"
    ]
