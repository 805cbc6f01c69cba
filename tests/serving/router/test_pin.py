"""The pin's hooks on SGLang's tokenizer manager, with SGLang's own registry of loaded versions."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.lora.lora_registry import LoRARef, LoRARegistry
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from serving.router.pin import NOT_LOADED, refuse_unloaded


def manager(*loaded: str) -> Any:
    """Return what `_resolve_lora_path` needs of a tokenizer manager that has unloaded `support-v1`."""
    refs = {name: LoRARef(lora_name=name, lora_path=f"/adapters/{name}") for name in (*loaded, "support-v1")}
    registry = LoRARegistry([refs[name] for name in loaded])
    return SimpleNamespace(lora_registry=registry, lora_ref_cache={"support-v1": refs["support-v1"]})


def test_a_version_that_is_not_loaded_is_refused_without_a_word_of_others() -> None:
    running = manager("support-v2", "triage-v7")
    for asked in ("support-v1", "support-v9", ["support-v2", "support-v1"], [None, "support-v9"]):
        with pytest.raises(ValueError, match=NOT_LOADED) as refused:
            refuse_unloaded(running, SimpleNamespace(lora_path=asked))
        assert "triage" not in str(refused.value)
    for asked in ("support-v2", ["triage-v7", None], None):
        refuse_unloaded(running, SimpleNamespace(lora_path=asked))


def test_sglang_itself_names_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for the hook: where this fails, SGLang has learnt it."""
    monkeypatch.setattr(
        "sglang.srt.managers.tokenizer_manager.get_lora", lambda: SimpleNamespace(max_loaded_loras=None)
    )
    resolve = TokenizerManager._resolve_lora_path
    with pytest.raises(ValueError, match="never been loaded: support-v9") as refused:
        asyncio.run(resolve(manager("support-v2", "triage-v7"), SimpleNamespace(lora_path="support-v9")))  # type: ignore[arg-type]
    assert "support-v1" in str(refused.value)
