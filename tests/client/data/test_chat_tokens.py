"""Loss is on the answers and only there; a base whose files do not fit is refused, and its own file is blamed."""

import json
import shutil
from pathlib import Path

import pytest

from client.data.chat_tokens import ChatTokenizer
from client.data.conversation import Conversation, Turn
from tests.toys.bases.chat_templates import with_template
from tests.toys.sites.training_data import SECRET
from umbel.errors import ConfigError, DataError
from umbel.token_file import NO_LOSS

REFUSES = "{% if messages | length > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}"
QUOTES = "{% if messages | length > 2 %}{{ raise_exception('bad: ' + messages[0]['content']) }}{% endif %}"
WRITES = "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
TWO = (Turn("user", "one"), Turn("assistant", "first"), Turn("user", "two"), Turn("assistant", "second"))


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base's tokenizer, to change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


def test_a_template_with_marks_is_learnt_as_transformers_masks_it(tiny_llama: Path) -> None:
    tokenizer = ChatTokenizer.load(tiny_llama)
    theirs = tokenizer.tokenizer.apply_chat_template(
        [turn.message() for turn in TWO], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ((ids, labels),) = tokenizer.encode(Conversation(TWO), "f:7").rows
    assert ids == theirs["input_ids"]
    assert [int(label != NO_LOSS) for label in labels] == theirs["assistant_masks"]


def test_a_base_without_a_template_knows_only_a_prompt_and_its_completion(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(with_template(tiny_llama, None, tmp_path / "model"))
    told = Conversation((Turn("user", "1 + 1 ="), Turn("assistant", " 2")))
    ((ids, labels),) = tokenizer.encode(told, "f:7").rows
    assert tokenizer.tokenizer.decode([label for label in labels if label != NO_LOSS]) == " 2<|end|>"
    assert tokenizer.tokenizer.decode(ids) == "1 + 1 = 2<|end|>"
    for turns in (TWO, (Turn("system", "Be brief."), *TWO[:2]), TWO[1:]):
        with pytest.raises(DataError, match=r"f:7: the base has no chat template.*add a chat_template\.jinja"):
            tokenizer.encode(Conversation(turns), "f:7")
    with pytest.raises(DataError, match=r"f:7: the prompt is empty"):
        tokenizer.encode(Conversation((Turn("user", ""), Turn("assistant", "x"))), "f:7")


def test_template_refusals_never_quote_an_example(tiny_llama: Path, tmp_path: Path) -> None:
    said = []
    for name, refuses in (("refuses", REFUSES), ("quotes", QUOTES)):
        tokenizer = ChatTokenizer.load(with_template(tiny_llama, refuses + WRITES, tmp_path / name))
        with pytest.raises(DataError, match="f:7: the chat template refuses the turns") as caught:
            tokenizer.encode(Conversation((Turn("user", SECRET), *TWO[1:])), "f:7")
        said.append(str(caught.value))
    assert "roles must alternate" in said[0]
    assert SECRET not in said[1]


def test_a_base_without_a_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        ChatTokenizer.load(tmp_path / "nowhere")
    (model / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json; copy the whole model directory"):
        ChatTokenizer.load(model)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ['{"version": ', "[]", "version https://git-lfs.github.com/spec/v1\noid x\n"])
def test_a_broken_file_is_blamed_and_not_the_data(model: Path, file: str, content: str) -> None:
    (model / file).write_text(content)
    with pytest.raises(ConfigError, match=file.replace(".", r"\.")):
        ChatTokenizer.load(model)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}", "{{ messages[0]['text'].upper() }}", "{{ nothing() }}"]
)
def test_a_template_that_cannot_render_is_blamed_and_not_the_data(
    tiny_llama: Path, tmp_path: Path, template: str
) -> None:
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: cannot render"):
        ChatTokenizer.load(with_template(tiny_llama, template, tmp_path / "model"))


def test_tokens_that_the_embedding_has_no_row_for_are_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 1}))
    with pytest.raises(ConfigError, match=r"ids up to 511, the base 511 rows"):
        ChatTokenizer.load(model)


def test_a_tokenizer_that_loses_letters_or_the_space_between_words_is_refused(model: Path) -> None:
    file = model / "tokenizer.json"
    whole = json.loads(file.read_text())
    lost = {"type": "Replace", "pattern": {"Regex": "[a-z ]"}, "content": ""}
    for normalizer in (lost, lost | {"pattern": {"String": " "}}):
        file.write_text(json.dumps(whole | {"normalizer": normalizer}))
        with pytest.raises(ConfigError, match=r"tokenizer\.json: a text does not come back whole"):
            ChatTokenizer.load(model)
