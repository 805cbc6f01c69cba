"""A start of SGLang: its command line, a free port, its key, a failure; and the client of a running engine."""

import argparse
import asyncio
import contextlib
import json
import re
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from serving import engine as engine_module
from serving.aliases import AliasTable
from serving.engine import Engine, EngineClient, command_line, require_free_port
from serving.launch import with_cpu_flags
from serving.loopback import RENDEZVOUS, alone
from serving.run_dir import ADMIN_KEY, ALIASES
from tests.toys.serving.engine_flags import config, words
from tests.toys.serving.router import TABLE
from umbel.adapter import AdapterRef
from umbel.errors import EngineError


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
        "cuda-graph-bs-decode": [1, 2, 4],
    }  # fmt: skip
    line = command_line(config(tmp_path, extra), {})
    assert words(line, "--max-total-tokens") == ["20000"]
    assert words(line, "--mem-fraction-static") == ["0.5"]
    assert words(line, "--disable-radix-cache") == []
    assert words(line, "--cuda-graph-bs-decode") == ["1", "2", "4"]
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


def test_a_file_of_keys_that_went_bad_is_named_before_an_engine_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang would load the base, go on without the router that could not read it, and be ended: minutes each time."""
    (tmp_path / "state").mkdir()
    keys = tmp_path / "support.keys"
    keys.write_text("sk-support-0123456789\n")
    keys.chmod(0o644)
    monkeypatch.setattr(engine_module, "require_free_port", lambda host, port: None)
    site = config(tmp_path)
    site = site.model_copy(update={"adapter": (site.adapter[0].model_copy(update={"api_keys": keys}),)})
    engine = Engine(site)
    with pytest.raises(EngineError, match=f"no engine is started before .*{keys}: others can read the API keys; chmod"):
        asyncio.run(engine.start(TABLE, {}))
    assert engine._process is None


def test_an_engine_that_ends_while_it_starts_says_so_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import os; print('run dir:', os.environ['UMBEL_RUN_DIR'], flush=True); raise SystemExit(3)"
    monkeypatch.setattr(engine_module, "command_line", lambda *_: ["-c", script])
    monkeypatch.setattr(engine_module, "READY_POLL_S", 0.01)
    with listening("127.0.0.1") as port:
        pass
    state = tmp_path / "state"
    state.mkdir()
    engine = Engine(config(tmp_path, port=port))

    async def main() -> None:
        with pytest.raises(EngineError, match=f"SGLang ended while starting.*\nrun dir: {re.escape(str(state))}"):
            await engine.start(TABLE, {})
        assert await engine.wait() == 3
        await engine.stop(drain_s=0)

    asyncio.run(main())
    assert AliasTable.read(state / ALIASES) == TABLE
    for secret in (ADMIN_KEY, "engine.yaml"):
        assert engine.key in (state / secret).read_text()


@pytest.mark.parametrize(
    ("daemon", "env", "spins"),
    [
        ({}, {}, "'0'"),
        ({}, {"OMP_WAIT_POLICY": "ACTIVE"}, "'30000000000'"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {}, "'30000000000'"),
        ({}, {"GOMP_SPINCOUNT": "7"}, "'7'"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "PASSIVE"}, "'0'"),
    ],
)
def test_threads_that_wait_do_not_spin_unless_the_operator_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, daemon: dict[str, str], env: dict[str, str], spins: str
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**daemon, "OMP_DISPLAY_ENV": "VERBOSE"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(engine_module, "command_line", lambda *_: ["-c", "import torch"])
    with listening("127.0.0.1") as port:
        pass
    (tmp_path / "state").mkdir()
    engine = Engine(config(tmp_path, port=port, env=env))

    async def main() -> None:
        with pytest.raises(EngineError, match="ended while starting"):
            await engine.start(TABLE, {})
        await engine.stop(drain_s=0)

    asyncio.run(main())
    assert re.findall("GOMP_SPINCOUNT = (.*)", engine.log.read_text()) == [spins], "as torch's OpenMP understood it"


def asked(story: Callable[[EngineClient], Awaitable[None]], answer: Callable[[httpx.Request], httpx.Response]) -> None:
    """Let a client talk to an engine that answers like this."""

    async def main() -> None:
        client = EngineClient("http://engine", "key")
        client._http = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://engine")
        await story(client)
        await client.close()

    asyncio.run(main())


REF = AdapterRef("support", 2)


@pytest.mark.parametrize(
    ("text", "refused"),
    [("support-v2 is already loaded", None), ("support-v2 does not exist", None), ("out of memory", "out of memory")],
)
def test_a_refusal_is_an_error_unless_there_is_nothing_to_do(tmp_path: Path, text: str, refused: str | None) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content)["lora_name"] == "support-v2"
        return httpx.Response(400, text=text)

    async def story(client: EngineClient) -> None:
        loading, unloading = client.load(REF, tmp_path), client.unload(REF)
        for call, fits in ((loading, "already loaded" in text), (unloading, "not exist" in text)):
            with contextlib.nullcontext() if fits else pytest.raises(EngineError, match=f"support@v2: .*{text}"):
                await call

    asked(story, answer)


def test_a_dead_engine_is_not_ready_and_needs_no_draining() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    async def story(client: EngineClient) -> None:
        assert not await client.ready()
        await client.drain(10.0)

    asked(story, answer)


def test_draining_waits_for_open_requests_and_not_for_ever() -> None:
    open_requests = [{"support@v2": 2}, {"support@v2": 1}, {}]

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/umbel/drain":
            return httpx.Response(200, json={})
        return httpx.Response(200, json=open_requests.pop(0) if len(open_requests) > 1 else open_requests[0])

    async def story(client: EngineClient) -> None:
        await client.drain(60.0)
        assert open_requests == [{}]
        open_requests[:] = [{"support@v2": 1}]
        await client.drain(0.05)

    asked(story, answer)


def test_an_engine_finds_itself_by_a_new_file_and_listens_to_nobody_else(tmp_path: Path) -> None:
    """tests/e2e/test_hostile.py looks at the ports of a real one."""
    (tmp_path / RENDEZVOUS).write_text("of an engine that was killed")
    variables = alone(tmp_path)
    assert variables.pop("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE") == f"file://{tmp_path}/rendezvous"
    assert set(variables.values()) == {"lo"}
    assert not (tmp_path / RENDEZVOUS).exists()
    for name in ("a?b", "a#b"):
        with pytest.raises(EngineError, match=r"cannot be used; choose another \[site\].state_dir"):
            alone(tmp_path / name)


def test_measuring_sends_requests_of_every_size_together() -> None:
    sizes: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sizes.append(len(json.loads(request.content)["input_ids"]))
        return httpx.Response(200, json={})

    asked(EngineClient.measure, answer)
    assert sizes == [tokens for together, tokens in engine_module.MEASURED_LOADS for _ in range(together)]
