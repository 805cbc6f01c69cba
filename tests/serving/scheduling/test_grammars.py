"""SGLang's own grammar backend, of the pinned release: with our hooks it keeps the latest grammars, in bytes, only."""

import inspect
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend, InvalidGrammarObject
from sglang.srt.constrained.grammar_manager import GrammarManager
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.managers.schedule_batch import Req
from xgrammar import GrammarCompiler, TokenizerInfo, VocabType

from serving.scheduling import grammars
from serving.scheduling.grammars import LatestGrammars, bound_compiler, keep_latest

VOCAB = [*(chr(code) for code in range(32, 127)), "</s>"]


class Tokenizer:
    """Tells XGrammar its vocabulary in the way that SGLang asks special tokenizers."""

    def init_xgrammar(self) -> tuple[TokenizerInfo, None]:
        pieces = [piece.encode() for piece in VOCAB]
        return TokenizerInfo(pieces, VocabType.RAW, stop_token_ids=[len(VOCAB) - 1]), None


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the hook before the making of a compiler, as SGLang does."""
    init = GrammarCompiler.__init__

    def hooked(*args: Any, **kwargs: Any) -> None:
        args, kwargs = bound_compiler(*args, **kwargs)
        init(*args, **kwargs)

    monkeypatch.setattr(GrammarCompiler, "__init__", hooked)


@pytest.fixture
def backend(bounded: None) -> Iterator[XGrammarGrammarBackend]:
    made = XGrammarGrammarBackend(Tokenizer(), vocab_size=len(VOCAB))
    keep_latest(None, made)
    yield made
    made.executor.shutdown()


def key(number: int, **more: Any) -> tuple[str, str]:
    return "json", json.dumps({"type": "object", "properties": {f"p{number}": {"type": "string"}}, **more})


def answer(backend: BaseGrammarBackend, wanted: tuple[str, str]) -> bool:
    """Compile a grammar and keep it, as `GrammarManager` does for a request; return whether it was there."""
    value, hit = backend.get_cached_or_future_value(wanted, False)
    if not hit:
        backend.set_cache(wanted, value.result(60).copy())
    return hit


def test_the_hooks_name_what_the_pinned_release_has_and_it_asks_its_cache_in_no_other_way() -> None:
    assert type(BaseGrammarBackend().cache) is dict, "it would keep all"
    used = inspect.getsource(BaseGrammarBackend)
    assert used.count("self.cache") == 4, "made, got, set, cleared"
    for each in ("self.cache.get(key)", "self.cache[key] = value", "self.cache.clear()"):
        assert each in used


def test_ever_new_schemas_leave_the_latest_ones(
    backend: XGrammarGrammarBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "MOST", 8)
    assert not any(answer(backend, key(number)) for number in range(40))
    assert isinstance(backend.cache, LatestGrammars)
    assert list(backend.cache) == [key(number) for number in range(32, 40)]
    assert answer(backend, key(32)), "a use"
    answer(backend, key(40))
    assert key(32) in backend.cache, "what was used stays"
    assert key(33) not in backend.cache
    assert answer(backend, key(40))
    assert not answer(backend, key(1)), "and is compiled anew when it comes again"


def test_the_bytes_of_all_grammars_are_bounded_and_one_is_kept_whatever_it_has(
    backend: XGrammarGrammarBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(backend, key(0))
    one = backend.cache.size_bytes()
    assert one > len(key(0)[1]), "XGrammar says what a grammar has"
    monkeypatch.setattr(grammars, "MOST_BYTES", int(3.5 * one))
    for number in range(1, 10):
        answer(backend, key(number))
    assert list(backend.cache) == [key(7), key(8), key(9)]
    monkeypatch.setattr(grammars, "MOST_BYTES", 1)
    answer(backend, key(10))
    assert list(backend.cache) == [key(10)]
    wrapped = LatestGrammars()
    wrapped[key(10)] = SimpleNamespace(grammar=backend.cache[key(10)])
    assert wrapped.size_bytes() == backend.cache.size_bytes(), "after reasoning, too"


def test_sglang_gives_xgrammars_own_cache_no_limit() -> None:
    made = XGrammarGrammarBackend(Tokenizer(), vocab_size=len(VOCAB))
    assert made.grammar_compiler.cache_limit_bytes == -1, "it would keep all"
    made.executor.shutdown()


def test_xgrammars_own_cache_is_bounded(monkeypatch: pytest.MonkeyPatch, bounded: None) -> None:
    monkeypatch.setattr(grammars, "COMPILER_BYTES", 64 << 10)
    made = XGrammarGrammarBackend(Tokenizer(), vocab_size=len(VOCAB))
    for number in range(60):
        made.dispatch_json(key(number)[1])
    assert 0 < made.grammar_compiler.get_cache_size_bytes() <= 64 << 10
    made.executor.shutdown()


def test_a_schema_that_does_not_compile_is_its_users_mistake_and_no_evidence_against_a_version(
    backend: XGrammarGrammarBackend,
) -> None:
    manager = GrammarManager.__new__(GrammarManager)
    manager.grammar_backend = backend
    wanted = "json", json.dumps({"type": "no such type"})
    answer(backend, wanted)
    assert isinstance(backend.cache[wanted], InvalidGrammarObject)
    ended: list[str] = []
    sampling = SimpleNamespace(json_schema=wanted[1], custom_params=None)
    asked = SimpleNamespace(
        sampling_params=sampling, origin_input_ids=[], require_reasoning=False, set_finish_with_abort=ended.append
    )
    assert not manager.process_req_with_grammar(asked)
    assert ended
    assert ended[0].startswith("Failed to compile json grammar: ")
    assert inspect.signature(Req.set_finish_with_abort).parameters["status_code"].default == 400
