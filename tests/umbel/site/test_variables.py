"""Environment variables that set something in a site file: what is wrong with one is blamed on it."""

from pathlib import Path

import pytest

from tests.toys.sites.site_file import GOOD, GUARD, load
from umbel import telemetry
from umbel.errors import ConfigError
from umbel.site.check import check_files

P = "UMBEL_SITE__"


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("ENGINE__PROT", "1", "is no setting of a site; did you mean UMBEL_SITE__ENGINE__PORT?"),
        ("ENGIN__PORT", "1", "is no setting of a site; did you mean UMBEL_SITE__ENGINE__PORT?"),
        ("ENGINE_PORT", "1", "is no setting of a site; did you mean UMBEL_SITE__ENGINE__PORT?"),
        ("METRICS__PROT", "1", "is no setting of a site; did you mean UMBEL_SITE__METRICS__PORT?"),
        ("ZZZ", "1", "is no setting of a site; unset it"),
        ("ENGINE__ENV__OMP_NUM_THREADS", "1", "write it into [engine.env], or set UMBEL_SITE__ENGINE__ENV"),
        ("ENGINE__PORT", "many", "engine.port: Input should be a valid integer"),
        ("ENGINE__PORT", "", "engine.port: Input should be a valid integer"),
        ("SLO__TTFT_MS", "inf", "slo.ttft_ms: Input should be a finite number"),
        ("ENGINE", "many", """not JSON; write it such as '{"host": …}'"""),
        ("ENGINE", "[1]", "engine: Input should be a valid dictionary"),
        ("ENGINE", "null", "null sets nothing; unset it"),
        ("ENGINE", '{"slots": 1}', "engine.slots: Input should be greater than"),
        ("ENGINE", '{"prot": 1}', "engine.prot is not a setting; did you mean 'port'?"),
        ("ENGINE__ENV", "{", """not JSON; write it such as '{"NAME": "value"}'"""),
        ("ENGINE__ENV", '{"A": 1}', "engine.env.A: Input should be a valid string"),
        ("ENGINE__TARGET_MODULES", "q_proj", """not JSON; write it such as '["q_proj", "v_proj"]'"""),
        ("ENGINE__TARGET_MODULES", '["x"]', "engine.target_modules: x cannot be adapted"),
        ("ENGINE__EXTRA_ARGS", "max_total_tokens=1", "not JSON; write it such as"),
        ("ENGINE__EXTRA_ARGS", '{"port": 1}', "engine.extra_args: port"),
        ("ENGINE__EXTRA_ARGS__PORT", "1", "engine.extra_args: port"),
        ("ENGINE__EXTRA_ARGS__TP_SIZE", "2", "engine.extra_args: tp_size = 2 cannot be served"),
        ("ADAPTER", '{"name": "x"}', """adapter: a list of tables; write it such as '[{"name": "support"}]'"""),
        ("ADAPTER", "[{}]", "adapter.0.name is missing"),
        ("ADAPTER", "support", """not JSON; write it such as '[{"name": "support"}]'"""),
        ("ADAPTER__NAME", "x", """a list of tables is set as a whole: UMBEL_SITE__ADAPTER='[{"name": "support"}]'"""),
        ("ADAPTER__0__NAME", "x", "a list of tables is set as a whole: UMBEL_SITE__ADAPTER="),
        ("SHADOW__GUARD", '[{"name": "a"}]', "shadow.guard.0.data is missing"),
        ("SHADOW__GUARD", '{"name": "a"}', "shadow.guard: a list of tables; write it such as"),
        ("SHADOW__GUARD__0__DATA", "x", "a list of tables is set as a whole: UMBEL_SITE__SHADOW__GUARD="),
        ("TRAINING__SHARE_FLOOR", "0.999", "training: share_floor = 0.999 is above share_cap"),
        ("SHADOW__WATCH_S", "5", "shadow: watch_s = 5 without canary_share"),
        ("MODEL__SERVED_NAME", "support", "model.served_name and adapter.0.name are both 'support'"),
    ],
)  # fmt: skip
def test_a_variable_that_is_wrong_is_named_and_not_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, line: str
) -> None:
    monkeypatch.setenv(P + name, value)
    with pytest.raises(ConfigError) as error:
        load(tmp_path, training="share_cap = 0.9")
    assert str(error.value).startswith(f"{P}{name}: {line}"), error.value
    assert "\n" not in str(error.value)
    monkeypatch.delenv(P + name)
    load(tmp_path)


@pytest.mark.parametrize("name", ["UMBEL_SITE_ENGINE__PORT", "UMBEL_SITE_ENGINE_PORT", "umbel_site_engine__port"])
def test_a_name_with_one_underscore_for_two_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "30001")
    with pytest.raises(ConfigError, match=f"^{name}: sets nothing.*did you mean UMBEL_SITE__ENGINE__PORT"):
        load(tmp_path)


def test_only_the_variable_that_is_no_json_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(P + "ENGINE__PORT", "30001")
    for name in ("ENGINE__ENV", "ADAPTER"):
        monkeypatch.setenv(P + name, "{")
    with pytest.raises(ConfigError) as error:
        load(tmp_path)
    named = [line.partition(": not JSON")[0] for line in str(error.value).splitlines()]
    assert named == [f"{P}ADAPTER", f"{P}ENGINE__ENV"]


def test_what_the_file_has_wrong_is_not_blamed_on_a_variable_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(P + "TRAINING", '{"micro_batch": 2}')
    monkeypatch.setenv(P + "ENGINE", '{"slots": 6}')
    text = GOOD.replace("port = 30000", "").format(
        engine='dtype = "int4"', training="share_floor = 0.5\nshare_cap = 0.2", more=""
    )
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{tmp_path}/site.toml: ") for line in lines), lines


def test_mistakes_of_the_file_and_of_variables_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(P + "ENGINE__SLOTS", "1")
    monkeypatch.setenv(P + "ENGINE__SLOT", "9")
    with pytest.raises(ConfigError) as error:
        load(tmp_path, training="seq_len = 0")
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == [
        "UMBEL_SITE__ENGINE__SLOT", "UMBEL_SITE__ENGINE__SLOTS", f"{tmp_path}/site.toml",
    ]  # fmt: skip


def test_a_flag_of_the_engine_from_a_variable_is_what_it_would_be_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flag, value in {"MAX_TOTAL_TOKENS": "20000", "DISABLE_RADIX_CACHE": "true", "LOG_LEVEL": "debug"}.items():
        monkeypatch.setenv(f"{P}ENGINE__EXTRA_ARGS__{flag}", value)
    found = load(tmp_path, engine="extra_args = { max_total_tokens = 5, schedule_policy = 'fcfs' }").engine.extra_args
    assert found == {
        "max_total_tokens": 20000, "disable_radix_cache": True, "log_level": "debug", "schedule_policy": "fcfs",
    }  # fmt: skip


def test_a_table_that_the_file_lacks_can_be_set_key_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(P + "METRICS__PORT", "9000")
    metrics = load(tmp_path).metrics
    assert metrics is not None
    assert metrics.port == 9000


def test_relative_paths_of_variables_start_where_those_of_the_file_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", "/home/umbel")
    for name, value in {
        "TRAINING__DATA": "mine.jsonl", "MODEL__PATH": "~/base", "SITE__STATE_DIR": "other",
        "SITE__SOCKET": "/run/u.sock",
        "SHADOW__GUARD": '[{"name": "a", "data": "guards/a.jsonl"}]',
    }.items():  # fmt: skip
        monkeypatch.setenv(P + name, value)
    config = load(tmp_path)
    assert config.training.data == tmp_path / "mine.jsonl"
    assert config.model.path == Path("/home/umbel/base")
    assert (config.site.state_dir, config.socket) == (tmp_path / "other", Path("/run/u.sock"))
    assert config.shadow.guard[0].data == tmp_path / "guards" / "a.jsonl"


def test_a_file_that_a_variable_names_and_that_is_not_there_is_blamed_on_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    for name, value in {
        "TRAINING__DATA": "mine.jsonl", "TRAINING": '{"eval_data": "folder"}', "MODEL__PATH": "nothing",
        "SITE__TRUSTED_KEY": "centre.pub", "ENGINE__API_KEYS": "keys",
    }.items():  # fmt: skip
        monkeypatch.setenv(P + name, value)
    with pytest.raises(ConfigError) as error:
        check_files(load(tmp_path, more=GUARD))
    lines = str(error.value).splitlines()
    assert [line for line in lines if line.startswith(f"{P}TRAINING__DATA: {tmp_path}/mine.jsonl does not exist")]
    assert [line for line in lines if line.startswith(f"{P}TRAINING: {tmp_path}/folder is a folder")]
    assert [line for line in lines if line.startswith("[[shadow.guard]] triage: ")]
    for name in ("MODEL__PATH", "SITE__TRUSTED_KEY", "ENGINE__API_KEYS"):
        assert [line for line in lines if line.startswith(f"{P}{name}: ")], lines


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("UMBEL_LOG", "jsn", "set it to text or json"),
        ("UMBEL_LOG_LEVEL", "LOUD", "DEBUG, INFO, WARNING, ERROR, CRITICAL"),
    ],
)
def test_a_wrong_form_or_level_of_the_log_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{name}: '{value}' is no .*{says}"):
        telemetry.configure_logging()
