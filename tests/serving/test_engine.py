"""How SGLang is started: one command line, a port that is free, and the flags of a machine without accelerator."""

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving.engine import Engine, command_line, require_free_port
from serving.launch import CPU_FLAGS, with_cpu_flags
from umbel.adapter import AdapterRef
from umbel.config import SiteConfig
from umbel.errors import EngineError


def config(folder: Path, extra: dict[str, Any] | None = None, **engine: Any) -> SiteConfig:
    return SiteConfig(
        site={"name": "clinic-a", "state_dir": folder / "state"},
        model={"path": folder / "base", "served_name": "tiny"},
        adapter=[{"name": "support"}],
        engine={"port": 30000, "extra_args": extra or {}, **engine},
        training={"data": folder / "train.jsonl"},
    )


def words(line: list[str], flag: str) -> list[str]:
    """What follows a flag, up to the next one."""
    assert line.count(flag) == 1, (flag, line)
    rest = line[line.index(flag) + 1 :]
    return rest[: next((at for at, word in enumerate(rest) if word.startswith("--")), len(rest))]


def test_the_command_line_says_what_the_site_file_says(tmp_path: Path) -> None:
    line = command_line(config(tmp_path, max_lora_rank=32, slots=6, dtype="float32", host="0.0.0.0"), {})
    assert line[:2] == ["-m", "serving.launch"]
    assert words(line, "--model-path") == [str(tmp_path / "base")]
    assert words(line, "--served-model-name") == ["tiny"]
    assert (words(line, "--host"), words(line, "--port")) == (["0.0.0.0"], ["30000"])
    assert (words(line, "--max-lora-rank"), words(line, "--max-loras-per-batch")) == (["32"], ["6"])
    assert words(line, "--dtype") == ["float32"]
    assert words(line, "--config") == [str(tmp_path / "state" / "engine.yaml")]
    assert (words(line, "--enable-lora"), words(line, "--sleep-on-idle")) == ([], [])
    assert words(line, "--lora-target-modules")[:2] == ["q_proj", "k_proj"]
    assert not any("key" in word for word in line), "the key must not show in `ps`"


@pytest.mark.parametrize(("device", "expected"), [("auto", None), ("cpu", ["cpu"]), ("cuda", ["cuda"])])
def test_the_device_is_left_to_sglang_unless_one_is_set(
    tmp_path: Path, device: str, expected: list[str] | None
) -> None:
    line = command_line(config(tmp_path, device=device), {})
    assert (words(line, "--device") if "--device" in line else None) == expected


def test_flags_of_the_operator_are_passed_on_as_they_are(tmp_path: Path) -> None:
    extra = {
        "max_total_tokens": 20000, "--mem-fraction-static": 0.5, "disable_radix_cache": True, "enable_metrics": False,
        "cuda-graph-bs": [1, 2, 4],
    }  # fmt: skip
    line = command_line(config(tmp_path, extra), {})
    assert words(line, "--max-total-tokens") == ["20000"]
    assert words(line, "--mem-fraction-static") == ["0.5"]
    assert words(line, "--disable-radix-cache") == []
    assert words(line, "--cuda-graph-bs") == ["1", "2", "4"]
    assert "--enable-metrics" not in line


def test_live_and_previous_are_loaded_from_the_start(tmp_path: Path) -> None:
    adapters = {AdapterRef("support", 2): tmp_path / "a b" / "support-v2", AdapterRef("support", 1): tmp_path / "v1"}
    line = command_line(config(tmp_path), adapters)
    assert words(line, "--lora-paths") == [f"support-v2={tmp_path}/a b/support-v2", f"support-v1={tmp_path}/v1"]
    assert "--lora-paths" not in command_line(config(tmp_path), {})


def test_sglang_knows_every_flag_that_is_set(tmp_path: Path) -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    line = command_line(config(tmp_path, device="cpu"), {AdapterRef("support", 1): tmp_path})
    known, unknown = parser.parse_known_args(with_cpu_flags(line[2:]))
    assert [word for word in unknown if word.startswith("--")] in ([], ["--config"])
    assert (known.port, known.max_lora_rank, known.enable_lora) == (30000, 16, True)


@contextlib.contextmanager
def listening(host: str) -> Iterator[int]:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        taken.bind((host, 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.mark.parametrize("taken", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("wanted", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_is_named_with_the_setting_to_change(taken: str, wanted: str) -> None:
    with (
        listening(taken) as port,
        pytest.raises(EngineError, match=rf"{re.escape(wanted)}:{port} .*in use.*\[engine\]\.port"),
    ):
        require_free_port(wanted, port)


def test_a_port_is_free_again_when_its_owner_is_gone() -> None:
    with listening("127.0.0.1") as port:
        client = socket.create_connection(("127.0.0.1", port))
    client.close()
    require_free_port("127.0.0.1", port)
    require_free_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_an_address_that_is_not_this_machines_is_an_engine_error(host: str) -> None:
    with pytest.raises(EngineError, match=f"{host}:30000 cannot be used"):
        require_free_port(host, 30000)


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:30000"), ("::", "http://[::1]:30000"), ("192.0.2.1", "http://192.0.2.1:30000")],
)
def test_the_engine_is_asked_where_it_can_be_reached(tmp_path: Path, host: str, url: str) -> None:
    assert Engine(config(tmp_path, host=host)).client.url == url


def test_each_run_of_the_engine_has_a_key_of_its_own(tmp_path: Path) -> None:
    keys = {Engine(config(tmp_path)).key for _ in range(20)}
    assert len(keys) == 20
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in keys), "argparse takes it for no flag"


@pytest.mark.parametrize("flag", CPU_FLAGS)
def test_what_the_operator_has_set_stays_on_the_cpu(flag: str) -> None:
    given = ["--port", "1", flag, "theirs"]
    completed = with_cpu_flags(given)
    assert completed[: len(given)] == given
    assert words(completed, flag) == ["theirs"]
    assert {other: words(completed, other) for other in CPU_FLAGS if other != flag} == {
        other: [value] for other, value in CPU_FLAGS.items() if other != flag
    }
    assert with_cpu_flags(completed) == completed


def test_the_engine_ends_when_its_parent_is_killed() -> None:
    child = "from serving.launch import die_with_parent; die_with_parent(); print('ready', flush=True); input()"
    parent = textwrap.dedent(f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", {child!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        child.stdout.readline()
        print(child.pid, flush=True)
        input()
    """)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", parent], **pipes) as process:
        assert process.stdout is not None
        engine = psutil.Process(int(process.stdout.readline()))
        os.kill(process.pid, signal.SIGKILL)
        assert psutil.wait_procs([engine], timeout=30)[1] == []
