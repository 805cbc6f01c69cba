"""`Parity`: checks of what is served, by the base and by an adapter: the tokens of `transformers` and `peft`."""

import time
from typing import Any

from scripts.tools.gpu_check.findings import Finding
from scripts.tools.gpu_check.greedy_tokens import compare
from scripts.tools.gpu_check.site import VERSION, CheckedSite
from scripts.tools.packed_base import reference

PROMPTS = (
    "Return the number of",
    "import os",
    "The quick brown fox",
    "class Reader:",
    "What does this function do?",
    "a list of strings and",
    "If the file does not exist",
    "one two three four",
)
TOKENS = 32
CLEAR = {"float32": 0.01, "bfloat16": 0.75, "float16": 0.1}
"""Lead of the reference's choice over the second, in logits, above which the engine has to choose the same."""
COMPARED = 0.25
"""Least share of all tokens at which the reference's choice has to be clear."""
Answers = list[tuple[list[int], list[int]]]
"""(ids of a prompt, ids of the engine's answer) for each prompt."""


class Parity:
    """The three checks, in their order. The reference is computed on the CPU: the engine has the GPU's memory."""

    def __init__(self, site: CheckedSite) -> None:
        import torch
        import transformers

        self.site = site
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(site.model)
        self.base = reference(site.model, getattr(torch, site.device.dtype))
        self._adapted: Answers = []

    async def tokens_of_base(self) -> Finding:
        """Compare the base's greedy tokens with those of `transformers`."""
        return self._compared(self.base, await self._ask(None))

    async def load(self) -> Finding:
        """Load the adapter as a site does, and have it answer; the base has to answer as before, and otherwise."""
        client = self.site.engine.client
        before = await self._ask(None)
        began = time.perf_counter()
        await client.load(VERSION, self.site.adapter)
        loaded = time.perf_counter()
        await client.warm(VERSION)
        warmed = time.perf_counter()
        self._adapted = await self._ask(VERSION.engine_name)
        differ = sum(now != then for now, then in zip(self._adapted, before, strict=True))
        size = sum(path.stat().st_size for path in self.site.adapter.iterdir())
        figures = {"load_s": loaded - began, "warm_s": warmed - loaded, "bytes": size, "answers_that_differ": differ}
        if await self._ask(None) != before:
            return Finding(figures, failed="the base answers otherwise than before the adapter was loaded")
        return Finding(figures, failed="" if differ else "the adapter answers every prompt as the base does")

    async def tokens_of_adapter(self) -> Finding:
        """Compare the adapter's greedy tokens with those of `peft`; the base alone must not give them."""
        import peft

        without = compare(self.base, self._adapted, CLEAR[self.site.device.dtype])[1]
        adapted = peft.PeftModel.from_pretrained(self.base, str(self.site.adapter), autocast_adapter_dtype=False)
        finding = self._compared(adapted, self._adapted)
        figures = {**finding.figures, "tokens_that_the_base_would_not_choose": len(without)}
        return Finding(figures, failed=finding.failed or ("" if without else "the base would choose the same"))

    async def _ask(self, adapter: str | None) -> Answers:
        prompts = [self.tokenizer(text, add_special_tokens=False).input_ids for text in PROMPTS]
        return list(zip(prompts, await self.site.generate(prompts, TOKENS, adapter), strict=True))

    def _compared(self, model: Any, answers: Answers) -> Finding:
        clear, wrong = compare(model, answers, CLEAR[self.site.device.dtype])
        tokens = len(PROMPTS) * TOKENS
        figures = {
            "tokens": tokens, "clear": clear, "wrong": len(wrong),
            "largest_lead_of_a_wrong_one": max((lead for _, _, lead in wrong), default=0.0),
        }  # fmt: skip
        if wrong:
            return Finding(figures, failed=f"{len(wrong)} of {clear} tokens are not the reference's; first: {wrong[0]}")
        few = clear < COMPARED * tokens
        return Finding(figures, failed=f"only {clear} of {tokens} tokens have a clear choice" if few else "")
