"""The observer knows what of a prompt is still to be computed.

The cache is SGLang's own, without an engine.
"""

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serving.cotrainer.governor import Waiting
from serving.cotrainer.observer import Observer, batch_of
from serving.cotrainer.predictor import prefill_batch
from tests.toys.scheduler import request

SYSTEM_PROMPT = tuple(range(100))


@pytest.fixture(params=["python", "rust"])
def tree_cache(request: pytest.FixtureRequest) -> Any:
    """Make SGLang's default cache, which holds one prompt of the base and a longer one of an adapter."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    pool = SimpleNamespace(device=torch.device("cpu"), page_size=1, free=lambda indices: None)
    params = CacheInitParams(
        disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=pool, page_size=1,
        tree_components=(ComponentType.FULL,), tree_core_backend=request.param,
    )  # fmt: skip
    cache = UnifiedRadixCache(params)
    for name, length in ((None, 40), ("adapter", 60)):
        key = RadixKey(array("q", SYSTEM_PROMPT[:length]), name)
        cache.insert(InsertParams(key=key, value=torch.arange(length)))
    return cache


def asking(rid: str, prompt: tuple[int, ...], extra_key: str | None = None, cache_salt: str | None = None) -> Any:
    """Make a request with the cache's namespaces: SGLang appends the adapter's id to `extra_key`."""
    req = request(rid)
    req.origin_input_ids, req.extra_key, req.cache_salt = array("q", prompt), extra_key, cache_salt
    return req


def queue(tree_cache: Any, *reqs: Any) -> Any:
    return SimpleNamespace(
        running_batch=None, last_batch=None, waiting_queue=list(reqs), chunked_req=None, tree_cache=tree_cache
    )


@pytest.mark.parametrize(
    ("prompt", "extra_key", "cache_salt", "cached"),
    [
        (SYSTEM_PROMPT, None, None, 40),
        (SYSTEM_PROMPT, "adapter", None, 60),
        (SYSTEM_PROMPT, "another", None, 0),
        (SYSTEM_PROMPT, None, "salt", 0),
        ((*SYSTEM_PROMPT[:30], 7, 7), None, None, 30),
        (SYSTEM_PROMPT[:40], None, None, 39),
        ((9, *SYSTEM_PROMPT), None, None, 0),
        ((0,), None, None, 0),
    ],
    ids=["base", "adapter", "another adapter", "salted", "in a node", "all of it", "nothing", "one token"],
)
def test_what_is_cached_is_not_to_be_computed(
    tree_cache: Any, prompt: tuple[int, ...], extra_key: str | None, cache_salt: str | None, cached: int
) -> None:
    load, _, _ = Observer().look(queue(tree_cache, asking("a", prompt, extra_key, cache_salt)), now=1.0)
    assert load.waiting == (Waiting(0.0, len(prompt) - cached, cached_tokens=cached, computed_tokens=0),)
    assert load.waiting[0].asked_tokens == len(prompt) - cached


def test_the_cache_is_asked_once_per_request_and_is_not_changed(
    tree_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, match = [], tree_cache.tree_core.match_full_device_prefix
    monkeypatch.setattr(tree_cache, "match_prefix", None)
    monkeypatch.setattr(
        tree_cache.tree_core, "match_full_device_prefix", lambda key: asked.append(len(key)) or match(key)
    )
    observer, reqs = Observer(), [asking("a", SYSTEM_PROMPT), asking("b", SYSTEM_PROMPT[:20])]
    before = tree_cache.total_size(), tree_cache.evictable_size()
    for now in range(5):
        observer.look(queue(tree_cache, *reqs), float(now))
    assert asked == [99, 19]
    assert (tree_cache.total_size(), tree_cache.evictable_size()) == before


def test_chunks_that_are_computed_are_not_to_be_computed_again(tree_cache: Any) -> None:
    """The target is that of the prompt as it came, and what is left becomes less with each chunk."""
    observer, req = Observer(), asking("a", SYSTEM_PROMPT)
    state = queue(tree_cache, req)
    observer.look(state, now=1.0)
    state.waiting_queue, state.chunked_req = [], req
    for extend_end, left in ((70, 30), (90, 10)):
        req.extend_end = extend_end
        (waiting,) = observer.look(state, now=2.0)[0].waiting
        assert (waiting.prompt_tokens, waiting.cached_tokens, waiting.asked_tokens) == (left, extend_end, 60)


@pytest.mark.parametrize("cache", [None, SimpleNamespace()], ids=["none", "of another kind"])
def test_without_a_cache_that_can_be_asked_all_of_a_prompt_is_to_be_computed(cache: Any) -> None:
    (waiting,) = Observer().look(queue(cache, asking("a", SYSTEM_PROMPT)), now=1.0)[0].waiting
    assert (waiting.prompt_tokens, waiting.cached_tokens) == (100, 0)


def test_the_batch_that_is_expected_is_the_batch_that_is_run(tree_cache: Any) -> None:
    """The features of what waits are those of SGLang's batch of the same requests."""
    reqs = [asking("a", SYSTEM_PROMPT), asking("b", SYSTEM_PROMPT, "adapter"), asking("c", SYSTEM_PROMPT[:20])]
    load, _, _ = Observer().look(queue(tree_cache, *reqs), now=1.0)
    cached = [40, 60, 19]
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: True), reqs=reqs, prefix_lens=cached,
        extend_lens=[len(req.origin_input_ids) - before for req, before in zip(reqs, cached, strict=True)],
    )  # fmt: skip
    assert load.prefill == batch_of(batch) == prefill_batch([(60, 40), (40, 60), (1, 19)])


def test_the_target_of_an_answer_follows_from_what_was_computed() -> None:
    """SGLang counts the cached tokens of each prompt when it makes the batch."""
    observer, req = Observer(), request("a", prompt=100)
    req.cached_tokens = 64
    observer.look(queue(None, req), now=1.0)
    state = queue(None)
    req.output_ids, req.finished_reason = [1], SimpleNamespace()
    state.last_batch = SimpleNamespace(reqs=[req])
    (finished,) = observer.look(state, now=2.0)[2]
    assert finished.asked_tokens == 36
