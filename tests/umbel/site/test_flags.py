"""Flags and variables of SGLang: owned by umbel, refused with the remedy under any spelling, or passed on."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.toys.sites.site_file import load, refusal
from umbel.site import flags
from umbel.site.flag_table import KNOWN, NEUTRAL_VALUES, OWNED_FLAGS, PASSED_ON, REFUSED_FLAGS


@pytest.mark.parametrize("flag", OWNED_FLAGS)
def test_a_flag_that_umbel_sets_is_refused_in_every_spelling(flag: str) -> None:
    for written in (flag, flag.replace("_", "-"), "--" + flag.replace("_", "-"), flag.upper()):
        for value in (1, False, "other"):
            assert flags.flag_refusal(written, value) == f"{written} is set by {OWNED_FLAGS[flag]}; remove it here"


@pytest.mark.parametrize("flag", REFUSED_FLAGS)
def test_a_flag_that_cannot_be_served_is_refused_in_every_spelling(flag: str) -> None:
    for written in (flag, flag.replace("_", "-"), "--" + flag.replace("_", "-"), flag.upper()):
        said = flags.flag_refusal(written, "/some/thing")
        assert said is not None
        assert said.startswith(f"{written} = ")
        assert said.endswith(f" cannot be served by umbel: {REFUSED_FLAGS[flag]}")
        assert flags.flag_refusal(flag, True) is not None
        assert flags.flag_refusal(flag, False) is None, "it is left out"


@pytest.mark.parametrize(
    ("flag", "value", "remedy"),
    [
        ("chat_template", "mine.jinja", "put your template there, as chat_template.jinja"),
        ("default_chat_template_kwargs", '{"enable_thinking": false}', "put your template there"),
        ("tokenizer_path", "/elsewhere", "put your tokenizer there"),
        ("json_model_override_args", '{"rope_theta": 1}', "change the files there"),
        ("trust_remote_code", True, "change the files there"),
        ("custom_weight_loader", "mine.load", "put them there as safetensors"),
        ("kv_cache_dtype", "fp8_e4m3", "and the cache would round them; leave it out"),
        ("quantization", "awq", "give a directory that `umbel base pack` has made"),
        ("tensor-parallel-size", 2, "one scheduler on one device"),
        ("speculative_algorithm", "EAGLE", "speculative decoding"),
        ("grpc_port", 50051, "umbel's router"),
        ("ssl_certfile", "cert.pem", "let a proxy in front of it speak TLS"),
        ("hicache_storage_backend", "file", "another version of its name"),
    ],
)
def test_a_site_file_whose_engine_would_serve_something_else_is_refused_with_the_remedy(
    tmp_path: Path, flag: str, value: Any, remedy: str
) -> None:
    (line,) = refusal(tmp_path, more=f"[engine.extra_args]\n{flag} = {json.dumps(value)}")
    assert line.startswith(f"engine.extra_args: {flag} = {value!r} cannot be served by umbel: ")
    assert remedy in line


@pytest.mark.parametrize(("flag", "values"), NEUTRAL_VALUES.items())
def test_a_value_that_changes_nothing_is_taken_also_as_text(flag: str, values: tuple[str, ...]) -> None:
    for value in values:
        assert flags.flag_refusal(flag, value) is None
        if value.lstrip("-").isdigit():
            assert flags.flag_refusal(flag, int(value)) is None
            assert flags.flag_refusal(flag, int(value) + 7) is not None


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("chat_templ", "chat_templ is short for chat_template; chat_template = '…' cannot be served by umbel: prompts"),
        ("--chat-t", "--chat-t is short for chat_template; chat_template = "),
        ("conf", "conf is short for config; config is set by umbel"),
        ("serv", "serv is short for served_model_name; served_model_name is set by [model].served_name"),
        ("tp", "tp is short for tp_size; write it out"),
        ("max_total", "max_total is short for max_total_tokens; write it out"),
        ("log_req", "log_req is short for one of log_requests, log_requests_format, log_requests_level, log_req"),
        ("chat_template=x", "chat_template=x is no flag of SGLang 0.5.23; did you mean chat_template?"),
        ("max_total_token5", "max_total_token5 is no flag of SGLang 0.5.23; did you mean max_total_tokens?"),
        ("MAX_TOTAL_TOKENS", "MAX_TOTAL_TOKENS is max_total_tokens at SGLang, in small letters; write it so"),
        (" max_total_tokens", " max_total_tokens is no flag of SGLang 0.5.23; did you mean max_total_tokens?"),
        ("qqqq", "qqqq is no flag of SGLang 0.5.23; see "),
        ("--", "-- is no flag of SGLang 0.5.23; see "),
    ],
)
def test_a_shortened_or_unknown_flag_is_refused_with_what_it_would_become(flag: str, says: str) -> None:
    said = flags.flag_refusal(flag, "x")
    assert said is not None
    assert said.startswith(says)


@pytest.mark.parametrize("value", ["--chat-template=mine", ["INFO", "--chat-template", "mine"], "-x"])
def test_a_value_that_would_become_another_flag_is_refused(value: Any) -> None:
    said = flags.flag_refusal("log_requests_target", value)
    assert said is not None
    assert said.endswith("as another flag; give each flag a line of its own")


@pytest.mark.parametrize("value", [{"a": 1}, None, [None], [{"a": 1}]])
def test_a_value_that_is_no_word_of_a_command_line_is_refused(value: Any) -> None:
    assert "write JSON as text" in (flags.flag_refusal("cuda_graph_config", value) or "")


@pytest.mark.parametrize("value", [-1, "-1", -0.5, "-.5", 20000, "file", True, [1, 2], ["a", "b"], '{"a": 1}', []])
def test_other_values_are_passed_on(value: Any) -> None:
    assert flags.flag_refusal("cuda_graph_bs_decode", value) is None


def test_a_password_is_not_repeated() -> None:
    assert "secret" not in (flags.flag_refusal("ssl_keyfile_password", "secret") or "secret")


def test_each_flag_has_one_judgement() -> None:
    assert len(KNOWN) == len(OWNED_FLAGS) + len(REFUSED_FLAGS) + len(PASSED_ON)
    assert NEUTRAL_VALUES.keys() <= REFUSED_FLAGS.keys()


@pytest.mark.parametrize("name", flags.REFUSED_VARIABLES)
def test_a_variable_that_changes_what_is_served_is_refused_unless_it_is_off(tmp_path: Path, name: str) -> None:
    (line,) = refusal(tmp_path, more=f'[engine.env]\n{name} = "1.5"')
    assert line == f"engine.env: {name} cannot be set for umbel's engine: {flags.REFUSED_VARIABLES[name]}; remove it"
    for off in ("", "0", "0.0", "false", "No"):
        assert load(tmp_path, more=f'[engine.env]\n{name} = "{off}"').engine.env == {name: off}


def test_two_flags_that_sglang_does_not_take_together_are_refused_before_it_starts(tmp_path: Path) -> None:
    ordered = "[engine.extra_args]\nenable_priority_scheduling = true\n"
    (line,) = refusal(tmp_path, more=f'{ordered}schedule_policy = "lpm"')
    assert "schedule_policy = 'lpm': with enable_priority_scheduling SGLang takes only 'fcfs' or 'lof'; set" in line
    for fine in (ordered, f'{ordered}schedule_policy = "lof"', '[engine.extra_args]\nschedule_policy = "lpm"'):
        load(tmp_path, more=fine)
