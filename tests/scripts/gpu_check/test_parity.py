"""Parity fails on a token that the reference clearly would not choose, and where too few choices are clear."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from scripts.tools.gpu_check.parity import PROMPTS, TOKENS, Parity


class ToySite:
    """A site whose engine answers as `transformers` does, but for the tokens that a test spoils."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.device = SimpleNamespace(dtype="float32")
        self.reference: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.reference.generation_config.eos_token_id = None
        self.spoilt = 0
        """Answers whose last token is another one."""

    async def generate(self, prompts: list[list[int]], tokens: int, adapter: str | None = None) -> list[list[int]]:
        answers = []
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            found = self.reference.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
            answer = found[0, len(prompt) :].tolist()
            answers.append([*answer[:-1], (answer[-1] + 1) % 512] if number < self.spoilt else answer)
        return answers


@pytest.fixture(scope="module")
def site(tiny_llama: Path) -> ToySite:
    return ToySite(tiny_llama)


@pytest.mark.parametrize("spoilt", [0, 1, 3])
def test_every_other_token_is_counted(site: ToySite, spoilt: int) -> None:
    site.spoilt = spoilt
    finding = asyncio.run(Parity(site).tokens_of_base())  # type: ignore[arg-type]
    assert finding.figures["wrong"] == spoilt
    assert finding.figures["tokens"] == len(PROMPTS) * TOKENS
    assert bool(finding.failed) == bool(spoilt)
    if spoilt:
        assert f"{spoilt} of {finding.figures['clear']} tokens are not the reference's" in finding.failed


def test_where_nothing_is_clear_nothing_is_proved(site: ToySite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.spoilt = 0
    monkeypatch.setattr("scripts.tools.gpu_check.parity.CLEAR", {"float32": 1e6})
    finding = asyncio.run(Parity(site).tokens_of_base())  # type: ignore[arg-type]
    assert finding.failed == f"only 0 of {len(PROMPTS) * TOKENS} tokens have a clear choice"
