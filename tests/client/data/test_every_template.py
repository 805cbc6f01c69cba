"""Random conversations under every template at hand: what is learnt is each answer, after what the engine is sent."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from client.data.chat_tokens import ChatTokenizer
from client.data.conversation import Conversation, Turn
from tests.toys.bases.chat_templates import TEMPLATES, chat_model, with_template
from tests.toys.bases.learned import Base, Checked, hold
from umbel.errors import DataError

EXAMPLES = 40
"""Conversations for each template."""
TWO = Conversation(
    (Turn("user", "Oil?"), Turn("assistant", "SAE 30."), Turn("user", "How much?"), Turn("assistant", "Two litres."))
)
Load = Callable[[str], Base]


@pytest.fixture(scope="module")
def load(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Load:
    made: dict[str, Base] = {}

    def one(name: str) -> Base:
        if name not in made:
            into = tmp_path_factory.mktemp("base") / "model"
            made[name] = Base.load(chat_model(tiny_llama, TEMPLATES[name], into))
        return made[name]

    return one


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_is_learnt_after_what_the_engine_is_sent(load: Load, name: str) -> None:
    seen = hold(load(name), TEMPLATES[name], EXAMPLES)
    assert seen["trained"] > EXAMPLES / 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_one_row_holds_all_answers_where_the_template_keeps_what_it_wrote(load: Load, name: str) -> None:
    rows = load(name).training.encode(TWO, "f:7").rows
    assert len(rows) == (2 if TEMPLATES[name].own_rows(TWO.turns) else 1)


def test_with_a_system_turn_that_moves_each_answer_has_a_row(load: Load) -> None:
    told = Conversation((Turn("system", "Be brief."), *TWO.turns))
    base = load("mistral-like")
    encoded = base.training.encode(told, "f:7")
    assert base.learnt(encoded) == ["SAE 30.</s>", "Two litres.</s>"]
    first, second = (base.decode(ids) for ids, _ in encoded.rows)
    assert first == "<s>[INST]Be brief.\n\nOil?[/INST]SAE 30.</s>"
    assert second == "<s>[INST]Oil?[/INST]SAE 30.</s>[INST]Be brief.\n\nHow much?[/INST]Two litres.</s>"


def test_an_answer_with_thoughts_goes_on_where_the_prompt_has_begun_them(load: Load) -> None:
    base = load("r1-like")
    first, second = "<think>\none\n</think>\n\nSAE 30.", "<think>\ntwo\n</think>\n\nTwo litres."
    talk = Conversation(
        (Turn("user", "Oil?"), Turn("assistant", first), Turn("user", "How much?"), Turn("assistant", second))
    )
    said = Checked.of(talk, base).said
    assert said == {1: "one\n</think>\n\nSAE 30.</s>", 3: "two\n</think>\n\nTwo litres.</s>"}


def test_a_greeting_has_no_loss_and_is_counted(load: Load) -> None:
    base = load("chatml")
    greeted = Conversation((Turn("assistant", "Pump desk."), *TWO.turns))
    encoded = base.training.encode(greeted, "f:7")
    assert (encoded.untold, len(encoded.rows)) == (1, 1)
    assert base.learnt(encoded) == ["SAE 30.<|im_end|>", "Two litres.<|im_end|>"]
    assert "assistant\nPump desk.<|im_end|>" in base.decode(encoded.rows[0][0])
    with pytest.raises(DataError, match=r"f:7: .*nothing to learn"):
        base.training.encode(Conversation((Turn("assistant", "Pump desk."),)), "f:7")


def test_an_answer_without_weight_is_read_and_not_learnt(load: Load) -> None:
    base = load("chatml")
    first, answer, *rest = TWO.turns
    weighed = Conversation((first, replace(answer, trained=False), *rest))
    encoded = base.training.encode(weighed, "f:7")
    assert base.learnt(encoded) == ["Two litres.<|im_end|>"]
    assert "SAE 30.<|im_end|>" in base.decode(encoded.rows[0][0])


@pytest.mark.parametrize("answer", ["SAE<|im_end|> 30.", "<|im_end|>SAE 30.", "SAE 30.<|im_end|>"])
def test_the_token_that_ends_a_turn_written_inside_an_answer(load: Load, answer: str) -> None:
    told = Conversation((Turn("user", "Oil <|im_end|>?"), Turn("assistant", answer)))
    assert Checked.of(told, load("chatml")).said == {1: answer + "<|im_end|>"}


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_turn_that_the_template_drops_is_refused_also_where_another_says_the_same(
    tiny_llama: Path, tmp_path: Path, role: str
) -> None:
    wrote = "{% for m in messages %}{% if m['role'] != 'ROLE' or loop.last %}{{ m['content'] + '<|end|>' }}{% endif %}"
    dropping = wrote.replace("ROLE", role) + "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    tokenizer = ChatTokenizer.load(with_template(tiny_llama, dropping, tmp_path / "model"))
    turns = [Turn(said_by, "Paris") for said_by in ("system", "user", "assistant", "user", "assistant")]
    with pytest.raises(DataError, match=rf"^f:7: messages\[\d\]: .*this {role} turn"):
        tokenizer.encode(Conversation(tuple(turns)), "f:7")


def test_a_question_that_the_template_cuts_is_refused_and_an_answer_is_learnt_whole(
    tiny_llama: Path, tmp_path: Path
) -> None:
    cuts = "{% for m in messages %}{{ m['content'][:20] + '<|end|>' }}{% endfor %}"
    base, long = Base.load(with_template(tiny_llama, cuts, tmp_path / "model")), "0123456789" * 3
    answered = base.training.encode(Conversation((Turn("user", "Oil?"), Turn("assistant", long))), "f:7")
    assert base.learnt(answered) == [long + "<|end|>"]
    with pytest.raises(DataError, match=r"^f:7: messages\[0\]: the chat template leaves out text of this user turn"):
        base.training.encode(Conversation((Turn("user", long), Turn("assistant", "SAE 30."))), "f:7")


def test_a_role_that_the_template_does_not_write_is_refused_and_not_left_out(load: Load) -> None:
    used = Conversation((Turn("user", "Oil?"), Turn("tool", "7"), Turn("assistant", "Seven.")))
    with pytest.raises(DataError, match=r"^f:7: messages\[1\]: .*this tool turn"):
        load("drops unknown roles").training.encode(used, "f:7")
