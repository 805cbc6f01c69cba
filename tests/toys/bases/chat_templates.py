"""`ChatTemplate`: chat templates that each have one property of those in use, and what they do to a conversation.

    chat_model(tiny_llama, TEMPLATES["qwen3-like"], tmp_path / "model")

They are written over the tiny base's tokenizer, which gets the tokens that each of them needs.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.data.conversation import Turn

CHATML_TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
ASKS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
ALTERNATING = (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = none %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}<MARK>"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)


def _any(turns: Sequence[Turn]) -> bool:
    return False


def _has_system(turns: Sequence[Turn]) -> bool:
    return any(turn.role == "system" for turn in turns)


def breaks_alternation(turns: Sequence[Turn]) -> bool:
    """Return whether the turns after a system turn do not begin with the user's."""
    return next(turn.role for turn in turns if turn.role != "system") != "user"


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and what is right for a conversation that it writes."""

    jinja: str
    end: str
    """Text behind an answer, up to and with the token that ends it."""
    tokens: tuple[str, ...] = ()
    """Tokens that the tokenizer gets; its own file alone calls them special."""
    eos: str | None = None
    """End-of-sequence token; None: the tiny base's `<|end|>`."""
    forms: tuple[tuple[str, Callable[[str], str]], ...] = (("", str),)
    """Ways in which an answer is written behind the engine's prompt: text before it, and how its content is changed."""
    refuses: Callable[[Sequence[Turn]], bool] = _any
    """Whether a conversation cannot be trained with it."""
    own_rows: Callable[[Sequence[Turn]], bool] = _any
    """Whether an earlier answer is written in another way than the last one."""
    tools: bool = False
    """Whether it writes tools and their calls."""


TEMPLATES = {
    "as built": ChatTemplate(
        MARKED.replace("<MARK>", "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}") + ASKS, "<|end|>"
    ),
    "marks without the end": ChatTemplate(
        MARKED.replace("<MARK>", "{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>") + ASKS, "<|end|>"
    ),
    "marks that begin before the generation prompt ends": ChatTemplate(
        MARKED.replace("<MARK>", "{% generation %}{{ '\\n' + m['content'] + '<|end|>' }}{% endgeneration %}")
        + "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
        "<|end|>",
    ),
    "chatml": ChatTemplate(
        "{% for m in messages %}" + CHATML_TURN + "{% endfor %}" + CHATML_PROMPT,
        "<|im_end|>",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "default system turn": ChatTemplate(
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}" + CHATML_TURN + "{% endfor %}" + CHATML_PROMPT,
        "<|im_end|>",
        tokens=("<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
    ),
    "llama-2-like": ChatTemplate(
        ALTERNATING + "{% for m in rest %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
        "{% if loop.first and first is not none %}{{ '<<SYS>>\\n' + first + '\\n<</SYS>>\\n\\n' }}{% endif %}"
        "{{ m['content'] | trim + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}"
        "{% endfor %}",
        " </s>",
        tokens=("<s>", "</s>"),
        eos="</s>",
        forms=((" ", str.strip),),
        refuses=breaks_alternation,
    ),
    "mistral-like": ChatTemplate(
        ALTERNATING + "{{ bos_token }}{% set asked = rest | selectattr('role', 'equalto', 'user') | list | length %}"
        "{% set n = namespace(user=0) %}{% for m in rest %}{% if m['role'] == 'user' %}{% set n.user = n.user + 1 %}"
        "{{ '[INST]' }}{% if n.user == asked and first is not none %}{{ first + '\\n\\n' }}{% endif %}"
        "{{ m['content'] + '[/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        tokens=("<s>", "</s>", "[INST]", "[/INST]"),
        eos="</s>",
        refuses=breaks_alternation,
        own_rows=_has_system,
    ),
    "qwen3-like": ChatTemplate(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
        "{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{{ m['content'].split('</think>')[-1] + '<|im_end|>\\n' }}"
        "{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}" + CHATML_PROMPT,
        "<|im_end|>",
        tokens=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        eos="<|im_end|>",
        forms=(("<think>\n\n</think>\n\n", str),),
        own_rows=lambda turns: True,
    ),
    "r1-like": ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% elif m['role'] == 'user' %}"
        "{{ '<|user|>' + m['content'] }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}",
        "</s>",
        tokens=("<s>", "</s>", "<think>", "</think>"),
        eos="</s>",
        own_rows=lambda turns: True,
    ),
    "gemma-like": ChatTemplate(
        "{{ bos_token }}" + ALTERNATING + "{% for m in rest %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n' }}"
        "{% if loop.first and first is not none %}{{ first + '\\n\\n' }}{% endif %}"
        "{{ m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        "<end_of_turn>",
        tokens=("<s>", "<start_of_turn>", "<end_of_turn>"),
        forms=(("", str.strip),),
        refuses=breaks_alternation,
    ),
    "header that ends in a space": ChatTemplate(
        "{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}",
        "<|end|>",
    ),
    "header without the answer's space": ChatTemplate(
        "{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] }}"
        "{{ '<|end|>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "<|end|>",
        forms=((" ", str),),
    ),
    "phi-3-like": ChatTemplate(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}",
        "<|end|>",
        tokens=("<|endoftext|>",),
        eos="<|endoftext|>",
    ),
    "no end": ChatTemplate(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
        "<|end|>",
        forms=((" ", str),),
        own_rows=lambda turns: True,
    ),
    "end that is no token": ChatTemplate(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ###\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
        " ###\n",
        forms=((" ", str),),
    ),
    "drops system turns": ChatTemplate(
        "{% for m in messages %}{% if m['role'] != 'system' %}"
        "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}" + ASKS,
        "<|end|>",
        refuses=_has_system,
    ),
    "drops unknown roles": ChatTemplate(
        "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}" + CHATML_TURN
        + "{% endif %}{% endfor %}" + CHATML_PROMPT,
        "<|im_end|>",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
    "tools": ChatTemplate(
        "{% if tools %}{{ '<|system|>' + tools | tojson + '<|end|>' }}{% endif %}"
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        "{% for call in m['tool_calls'] or () %}{{ '<call>' + call['function'] | tojson + '</call>' }}{% endfor %}"
        "{{ '<|end|>' }}{% endfor %}" + ASKS,
        "<|end|>",
        tokens=("<|tool|>",),
        tools=True,
    ),
}  # fmt: skip
"""What the name says → template."""


def chat_model(tiny: Path, template: ChatTemplate, into: Path) -> Path:
    """Make a model directory without weights: the tiny base's tokenizer with a template and the tokens it needs."""
    from transformers import AddedToken, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in template.tokens])
    if template.eos is not None:
        tokenizer.eos_token = template.eos
    if "<s>" in template.tokens:
        tokenizer.bos_token = "<s>"
    tokenizer.chat_template = template.jinja
    tokenizer.save_pretrained(into)
    config = json.loads((tiny / "config.json").read_text()) | {"vocab_size": len(tokenizer)}
    (into / "config.json").write_text(json.dumps(config))
    return into


def with_template(model: Path, jinja: str | None, into: Path) -> Path:
    """Copy a model directory without its weights, and give it another template, or None."""
    shutil.copytree(model, into, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    (into / "chat_template.jinja").unlink(missing_ok=True)
    file = into / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}))
    if jinja is not None:
        (into / "chat_template.jinja").write_text(jinja)
    return into
