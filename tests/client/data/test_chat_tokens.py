"""Loss is on the answers and only there, whatever the chat template."""

import shutil
from pathlib import Path

import pytest

from client.data.chat_tokens import ChatTokenizer
from tests.toys.sites.training_data import SECRET
from umbel.errors import ConfigError, DataError
from umbel.token_file import NO_LOSS

CHATML = (  # like Qwen's: no generation spans, a line break after the end of a turn
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKED_WITHOUT_END = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
THINKS_LAST = (  # like Qwen3's: only the last answer gets a thought
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ 'hm. ' }}{% endif %}{{ m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
REFUSES = "{{ raise_exception('roles must alternate') }}"
QUOTES = "{{ raise_exception('bad: ' + messages[0]['content']) }}"
TWO_TURNS = [("user", "one"), ("assistant", " first "), ("user", "two"), ("assistant", "second\n\nlines é😀")]


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base's tokenizer, to change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


def with_template(model: Path, template: str | None) -> ChatTokenizer:
    file = model / "chat_template.jinja"
    file.unlink()
    if template is not None:
        file.write_text(template)
    return ChatTokenizer.load(model)


def learned(tokenizer: ChatTokenizer, turns: list[tuple[str, str]]) -> list[str]:
    """The stretches of text that carry a loss."""
    ids, labels = tokenizer.encode(turns, "x:1")
    assert all(label in (NO_LOSS, token) for token, label in zip(ids, labels, strict=True))
    stretches: list[list[int]] = [[]]
    for label in labels:
        if label == NO_LOSS:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [tokenizer.tokenizer.decode(stretch) for stretch in stretches if stretch]


@pytest.mark.parametrize("template", ["as built", CHATML, MARKED_WITHOUT_END])
def test_loss_is_on_answers_and_their_end_only(model: Path, template: str) -> None:
    tokenizer = ChatTokenizer.load(model) if template == "as built" else with_template(model, template)
    assert learned(tokenizer, TWO_TURNS) == [" first <|end|>", "second\n\nlines é😀<|end|>"]


def test_marked_and_unmarked_templates_agree_with_transformers(model: Path) -> None:
    tokenizer = ChatTokenizer.load(model)
    turns = [("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second")]
    theirs = tokenizer.tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    ids, labels = tokenizer.encode(turns, "x:1")
    assert ids == theirs["input_ids"]
    assert [int(label != NO_LOSS) for label in labels] == theirs["assistant_masks"]


def test_template_that_writes_earlier_answers_differently(model: Path) -> None:
    tokenizer = with_template(model, THINKS_LAST)
    assert learned(tokenizer, TWO_TURNS[:2]) == ["hm.  first <|end|>"]
    with pytest.raises(DataError, match=r"f:7: messages\[1\].*one line per answer"):
        tokenizer.encode(TWO_TURNS, "f:7")


def test_base_without_template(model: Path) -> None:
    tokenizer = with_template(model, None)
    assert learned(tokenizer, [("user", "1 + 1 ="), ("assistant", " 2")]) == [" 2<|end|>"]
    with pytest.raises(DataError, match=r"f:7: .*no chat template"):
        tokenizer.encode(TWO_TURNS, "f:7")


def test_template_refusals_never_quote_an_example(model: Path) -> None:
    with pytest.raises(DataError, match=r"f:7: .*roles must alternate"):
        with_template(model, REFUSES).encode(TWO_TURNS, "f:7")
    with pytest.raises(DataError, match="f:7") as caught:
        with_template(model, QUOTES).encode([("user", SECRET), ("assistant", "x")], "f:7")
    assert SECRET not in str(caught.value)


def test_base_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        ChatTokenizer.load(tmp_path)
