"""The tiny base's text: the same every time, and tasks whose answers follow from what is asked."""

import random

from scripts.tools.tiny_base_text import CODES, KEYS, WORDS, Practice, docstrings


def test_the_docstrings_are_the_standard_librarys() -> None:
    found = docstrings()
    assert len(found) > 1000
    assert ("asyncio/tasks", "Support for tasks, coroutines and the scheduler.") in found
    assert all(text.isascii() and text for _, text in found)


def test_no_word_is_in_two_lists() -> None:
    lists = [words.split() for words in (KEYS, CODES, WORDS)]
    every = [word for words in lists for word in words]
    assert len(every) == len(set(every))


def test_the_two_tables_and_the_filling_words_are_apart() -> None:
    practice = Practice.of(random.Random(0))
    assert practice == Practice.of(random.Random(0)) != Practice.of(random.Random(1))
    assert sorted([*practice.first, *practice.second, *practice.fill]) == sorted(KEYS.split())


def test_each_task_has_the_answer_that_its_question_asks_for() -> None:
    rng = random.Random(0)
    practice = Practice.of(rng)
    kinds = set()
    for _ in range(300):
        question, answer = practice.task(rng)
        kind, _, rest = question.partition(": ")
        words = rest.split()
        if kind in ("Repeat", "First", "Last"):
            kinds.add(kind)
            assert answer == {"Repeat": rest, "First": words[0], "Last": words[-1]}[kind]
        else:
            kinds.add("look up")
            asked = [word.strip(",:") for word in question.split()]
            (first,) = [practice.first[word] for word in asked if word in practice.first]
            (second,) = [practice.second[word] for word in asked if word in practice.second]
            assert answer == f"{first} {second}"
    assert kinds == {"Repeat", "First", "Last", "look up"}


def test_prose_is_a_turn_about_a_docstring() -> None:
    rng = random.Random(0)
    practice = Practice.of(rng)
    turns = [practice.prose(rng) for _ in range(50)]
    assert {question.split()[0].strip(":") for question, _ in turns} == {"Explain", "Continue"}
    assert all(len(answer.split()) <= 24 for _, answer in turns)
