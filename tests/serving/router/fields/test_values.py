"""Bounds of single fields: what may go on, what is refused, in which words, and what SGLang gets of it."""

from typing import Any

import pytest

from serving.router.fields.body import parse, serialise
from serving.router.fields.routes import checked
from umbel.errors import RequestRefused

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
)  # fmt: skip
VOCAB = 512


def why(path: str, **fields: Any) -> str:
    with pytest.raises(RequestRefused) as refused:
        checked(path, fields, VOCAB)
    return str(refused.value)


@pytest.mark.parametrize(
    ("field", "lowest", "highest"),
    [("n", 1, 128), ("top_logprobs", 0, 20), ("temperature", 0, 2), ("min_p", 0, 1), ("frequency_penalty", -2, 2),
     ("presence_penalty", -2, 2), ("repetition_penalty", 0.01, 2), ("top_k", -1, 1 << 20), ("min_tokens", 0, 1 << 24),
     ("max_tokens", 1, 1 << 24), ("max_completion_tokens", 1, 1 << 24)],
)  # fmt: skip
def test_a_number_may_reach_its_bounds_and_no_more(field: str, lowest: float, highest: float) -> None:
    for value in (lowest, highest):
        assert checked(CHAT, {field: value}, VOCAB) == {field: value}
    assert why(CHAT, **{field: lowest - 1}) == f"{field!r} is below {lowest}; send more."
    assert why(CHAT, **{field: highest + 1}) == f"{field!r} is over {highest}; ask for less."
    for wrong in (True, False, [1], {}, "x"):
        assert why(CHAT, **{field: wrong}).startswith(f"{field!r} is ")


def test_a_seed_has_64_bits_and_a_whole_number_no_fraction() -> None:
    assert checked(CHAT, {"seed": (1 << 63) - 1}, VOCAB)
    assert "is over" in why(CHAT, seed=1 << 63)
    assert why(CHAT, n=1.5) == "'n' is a number; send a whole number."


def test_top_p_is_above_zero() -> None:
    assert why(CHAT, top_p=0) == "'top_p' is 0; send more than 0."


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_token_ids_are_of_the_bases_vocabulary(path: str) -> None:
    for token in (-1, VOCAB, 1 << 40, True, 1.0, "1", None):
        assert "which is no token id of the base" in why(path, stop_token_ids=[0, token])
    for key in (str(VOCAB), "-1", "1_0", "1.0", "", "x", "٣", "9" * 5000):
        assert "which is no token id of the base" in why(path, logit_bias={key: 1})
    for bias in (101, -101, float("inf"), float("nan"), True, "1", None):
        assert why(path, logit_bias={"3": bias}) == "'logit_bias.3' is no number from -100 to 100; send one."
    kept = {"stop_token_ids": [0, VOCAB - 1], "logit_bias": {"0": -100, str(VOCAB - 1): 100}}
    assert checked(path, kept, VOCAB) == kept


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, VOCAB - 1]]])
def test_a_prompt_is_a_text_texts_or_tokens(prompt: Any) -> None:
    assert checked(COMPLETIONS, {"prompt": prompt}, VOCAB) == {"prompt": prompt}


@pytest.mark.parametrize("prompt", ["", [], [""], ["a", ""], [[]], [1, "a"], ["a", 1], [[1], "a"], [VOCAB], [[VOCAB]],
                                    [True], {}, 3, ["a"] * 129])  # fmt: skip
def test_any_other_prompt_is_refused(prompt: Any) -> None:
    assert why(COMPLETIONS, prompt=prompt).startswith("'prompt")


def test_answers_are_counted_over_prompts_n_and_best_of() -> None:
    for fits in ({"prompt": ["a"] * 128}, {"prompt": ["a"] * 64, "n": 2}, {"prompt": list(range(500)), "n": 128}):
        assert checked(COMPLETIONS, fits, VOCAB) == fits
    for much in ({"prompt": ["a"] * 65, "n": 2}, {"prompt": [[1]] * 2, "n": 8, "best_of": 9}):
        assert "128 are allowed" in why(COMPLETIONS, **much)


def test_the_probabilities_of_a_whole_prompt_are_not_given() -> None:
    assert "send one of the two" in why(COMPLETIONS, prompt="a", echo=True, logprobs=1)


def test_stops_are_few_and_short() -> None:
    for fits in ("a", ["a"] * 16, "a" * 256):
        assert checked(CHAT, {"stop": fits}, VOCAB) == {"stop": fits}
    for stop in (["a"] * 17, [""] * 17, "a" * 257, [1], {}):
        assert why(CHAT, stop=stop).startswith("'stop")


def test_an_empty_stop_is_none_as_an_answer_would_end_at_its_first_token() -> None:
    assert checked(CHAT, {"stop": ""}, VOCAB) == checked(CHAT, {"stop": [""]}, VOCAB) == {"stop": []}
    assert checked(COMPLETIONS, {"stop": ["", "a"]}, VOCAB) == {"stop": ["a"]}
    assert checked(MESSAGES, {"stop_sequences": ["a", ""]}, VOCAB) == {"stop_sequences": ["a"]}


def test_template_arguments_are_scalars_under_known_names() -> None:
    kept = {"chat_template_kwargs": {"enable_thinking": False, "thinking": True, "reasoning_effort": "low"}}
    for path in (CHAT, RESPONSES):
        assert checked(path, kept, VOCAB) == kept
        for wrong in ({"chat_template": "x"}, {"enable_thinking": []}, {"enable_thinking": 0}, {"x": 1}):
            assert why(path, chat_template_kwargs=wrong).startswith("'chat_template_kwargs.")


def test_what_clients_send_anyway_and_what_is_null_is_left_out_and_the_order_stays() -> None:
    function = {"name": "f", "parameters": {"z": 1, "a": 2}, "description": "d"}
    request = {
        "tools": [{"function": function, "type": "function"}], "user": "u", "store": False, "metadata": {"a": "b"},
        "model": "tiny", "rid": None, "messages": [{"content": "a", "role": "assistant", "refusal": None, "audio": {}}],
    }  # fmt: skip
    found = checked(CHAT, request, VOCAB)
    assert list(found) == ["tools", "model", "messages"]
    assert list(found["tools"][0]["function"]) == ["name", "parameters", "description"]
    assert list(found["tools"][0]["function"]["parameters"]) == ["z", "a"]
    assert found["messages"] == [{"content": "a", "role": "assistant"}]
    cached = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    assert checked(MESSAGES, {"system": [cached]}, VOCAB) == {"system": [{"type": "text", "text": "a"}]}


@pytest.mark.parametrize(
    "kind", ["image_url", "video_url", "audio_url", "input_audio", "tool_reference", "thinking", 3]
)
def test_only_text_is_answered(kind: object) -> None:
    message = {"role": "user", "content": [{"type": kind, "text": "a"}]}
    assert "only 'text' or 'refusal' is answered here" in why(CHAT, messages=[message])


def test_an_unknown_field_is_named_wherever_it_is() -> None:
    assert why(MESSAGES, top_p=1, n=2) == "'n' is not a field of /v1/messages; leave it out."
    message = {"role": "user", "content": "a", "tools": []}
    assert why(CHAT, messages=[message]).startswith("'messages[0].tools' is not a field")
    assert len(why(CHAT, **{"x" * 10_000: 1})) < 300


@pytest.mark.parametrize(
    "body",
    [b'{"a": 1, "a": 2}', b'{"a": {"b": 1, "b": 1}}', b'{"a": NaN}', b'{"a": -Infinity}', b"[]", b"{", b"[" * 200_000],
)
def test_a_body_has_one_meaning_or_none(body: bytes) -> None:
    with pytest.raises(RequestRefused):
        parse(body)


def test_what_is_written_is_what_was_read() -> None:
    request = parse('{"b": "ü😀\\u0000", "a": [1, 2.5, null]}'.encode())
    assert parse(serialise(request)) == request
    with pytest.raises(RequestRefused, match="surrogate"):
        serialise({"a": "\ud800"})
    with pytest.raises(ValueError, match="Out of range"):
        serialise({"a": float("inf")})
