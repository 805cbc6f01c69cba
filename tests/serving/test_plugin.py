"""SGLang's plugin: nothing without a run directory, and in each process of SGLang only that process's part.

Toys stand for SGLang's modules here. tests/e2e starts the real one, which needs every hook.
"""

import multiprocessing
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from serving import engine_state, plugin
from serving.cotrainer.hooks import Hooks
from serving.engine_state import EngineState
from serving.router.api_keys import ALL
from serving.router.consent import Consent
from serving.router.pin import apply_pin
from serving.router.router import Router
from serving.router.suspects import RefuseSuspects
from serving.run_dir import ADMIN_KEY, ALIASES, ROUTER, RUN_DIR_VARIABLE, RouterSettings
from serving.suspects import Suspects
from serving.user_example import SETTINGS, ConsentSettings
from tests.toys.serving.router import KEY, TABLE, Inner

ROUTERS_HOOKS = {
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request": "before",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._resolve_lora_path": "before",
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_output": "before",
    "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses._known_model_names": "after",
    "sglang.srt.entrypoints.engine._server_args_for_logging": "after",
    "sglang.srt.server_args.ServerArgs.__repr__": "after",
    "sglang.srt.parser.template_manager.TemplateManager.guess_chat_template_from_model_path": "around",
}
SCHEDULERS_HOOKS = {
    "sglang.srt.managers.scheduler.Scheduler.__init__": "after",
    "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run": "before",
    "sglang.srt.managers.scheduler.Scheduler.run_batch": "before",
    "sglang.srt.managers.scheduler.Scheduler.process_batch_result": "after",
    "sglang.srt.managers.scheduler.Scheduler.maybe_sleep_on_idle": "around",
    "sglang.srt.managers.scheduler.Scheduler.init_lora_drainer": "after",
    "sglang.srt.managers.scheduler.dispatch_event_loop": "around",
    "sglang.srt.model_executor.model_runner.ModelRunner.initialize": "before",
    "sglang.srt.distributed.parallel_state.graph_capture": "before",
    "sglang.srt.model_loader.loader.get_model_loader": "around",
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes": "after",
    "sglang.srt.constrained.base_grammar_backend.BaseGrammarBackend.__init__": "after",
    "sglang.srt.constrained.xgrammar_backend.GrammarCompiler.__init__": "before",
}


class ToySglang:
    """SGLang's application and its registry of hooks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hooks: dict[str, tuple[Any, str]] = {}
        self.lacks: set[str] = set()
        """Names of SGLang that this release has not."""
        monkeypatch.setattr(plugin, "_is_there", lambda target: target not in self.lacks)
        self.inner = Inner()
        self.app = SimpleNamespace(build_middleware_stack=self.build)
        self._monkeypatch = monkeypatch
        kinds = SimpleNamespace(BEFORE="before", AFTER="after", AROUND="around")
        registry = SimpleNamespace(register=lambda target, hook, kind: self.hooks.update({target: (hook, kind)}))
        for package in ("sglang", "sglang.srt", "sglang.srt.plugins"):
            self.module(package)
        self.module("sglang.srt.plugins.hook_registry", HookRegistry=registry, HookType=kinds)
        manager = SimpleNamespace(model_config=SimpleNamespace(vocab_size=512))
        state = SimpleNamespace(tokenizer_manager=manager)
        http_server = SimpleNamespace(app=self.app, get_global_state=lambda: state)
        self.module("sglang.srt.entrypoints", http_server=http_server)
        monkeypatch.delitem(sys.modules, "sglang.srt.managers.scheduler", raising=False)

    def module(self, name: str, **contents: Any) -> None:
        made = ModuleType(name)
        vars(made).update(contents)
        self._monkeypatch.setitem(sys.modules, name, made)

    def build(self) -> Inner:
        return self.inner

    def kinds(self) -> dict[str, str]:
        return {target: kind for target, (_, kind) in self.hooks.items()}


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> ToySglang:
    return ToySglang(monkeypatch)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ADMIN_KEY).write_text(KEY)
    TABLE.write(tmp_path / ALIASES)
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path))
    RouterSettings().write(tmp_path)
    return tmp_path


def in_a_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(pid=1))


def test_without_a_run_directory_sglang_stays_as_it_is(sglang: ToySglang, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    sglang.module("sglang.srt.managers.scheduler")
    for in_child in (False, True):
        if in_child:
            in_a_child_process(monkeypatch)
        plugin.register()
        assert sglang.hooks == {}
        assert sglang.app.build_middleware_stack == sglang.build


def test_the_http_process_gets_the_router_around_all_of_sglang(sglang: ToySglang, run_dir: Path) -> None:
    plugin.register()
    assert sglang.kinds() == ROUTERS_HOOKS
    assert sglang.hooks[next(iter(ROUTERS_HOOKS))][0] is apply_pin
    router = sglang.app.build_middleware_stack()
    assert isinstance(router, Router)
    assert (router.app, router.table, router.admin_key) == (sglang.inner, TABLE, KEY)
    assert router.keys.admit([]) == ALL, "no key is needed"
    assert router.vocab_size == 512


def test_an_engine_of_a_daemon_tells_what_comes_out_and_notes_what_it_answers(sglang: ToySglang, run_dir: Path) -> None:
    state = EngineState.create(run_dir / engine_state.FILE)
    Suspects().write(run_dir, now=0.0)
    plugin.register()
    count_output = sglang.hooks["sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_output"][0]
    assert [count_output("manager", "output") for _ in range(2)] == [None, None]
    assert state.outputs == 2
    router = sglang.app.build_middleware_stack()
    assert isinstance(router, Router)
    assert isinstance(router.app, RefuseSuspects)


def test_consent_is_around_the_router_where_the_daemon_wants_it(sglang: ToySglang, run_dir: Path) -> None:
    settings = ConsentSettings(key="ab" * 32, socket=run_dir / "operator.sock", models={"support": "support"})
    (run_dir / SETTINGS).write_text(settings.model_dump_json())
    plugin.register()
    consent = sglang.app.build_middleware_stack()
    assert isinstance(consent, Consent)
    assert isinstance(consent._app, Router)


def test_users_keys_and_classes_are_read_where_the_site_file_names_them(sglang: ToySglang, run_dir: Path) -> None:
    file = run_dir / "keys"
    file.write_text("sk-" + "a" * 40)
    file.chmod(0o600)
    RouterSettings(adapter_keys={"support": file}, priorities={"support": "batch"}).write(run_dir)
    plugin.register()
    router: Any = sglang.app.build_middleware_stack()
    assert router.keys.admit([(b"x-api-key", b"sk-" + b"a" * 40)]) == ALL
    assert router.keys.admit([]) is None
    assert router.classes == {"support": "batch"}


def test_without_the_daemons_settings_there_is_no_router_that_would_be_open_to_all(
    sglang: ToySglang, run_dir: Path
) -> None:
    (run_dir / ROUTER).unlink()
    with pytest.raises(FileNotFoundError, match=ROUTER):
        plugin.register()
    assert sglang.app.build_middleware_stack == sglang.build


def test_sglang_knows_the_names_of_the_table_and_logs_no_key(sglang: ToySglang, run_dir: Path) -> None:
    plugin.register()
    _, _, _, (known_names, _), (redact, _), (hide_key, _), (guess, _) = sglang.hooks.values()
    assert known_names({"tiny"}) == {"tiny"}, "before the application is built"
    sglang.app.build_middleware_stack()
    assert known_names({"another"}) == {"another", *TABLE.names()}
    logged = redact({"api_key": KEY, "admin_api_key": KEY, "port": 30000})
    assert logged == {"api_key": "…", "admin_api_key": "…", "port": 30000}
    assert hide_key(f"ServerArgs(api_key={KEY!r}, port=30000)") == "ServerArgs(api_key='…', port=30000)"
    asked: list[object] = []
    guess(asked.append, object(), "/models/vicuna-of-ours")
    assert not asked, "SGLang would take a template by words of the path, not the base's own"


def test_the_scheduler_process_gets_the_cotrainers_hooks(
    sglang: ToySglang, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_child_process(monkeypatch)
    sglang.module("sglang.srt.managers.scheduler")
    plugin.register("builtins:object")
    assert sglang.kinds() == SCHEDULERS_HOOKS
    assert isinstance(next(iter(sglang.hooks.values()))[0].__self__, Hooks)
    assert sglang.app.build_middleware_stack == sglang.build


def test_the_detokenizers_process_gets_nothing(
    sglang: ToySglang, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_child_process(monkeypatch)
    plugin.register()
    assert sglang.hooks == {}
    assert sglang.app.build_middleware_stack == sglang.build


@pytest.mark.parametrize(
    ("child", "hooks"), [(False, ROUTERS_HOOKS), (True, SCHEDULERS_HOOKS)], ids=["router", "scheduler"]
)
def test_an_engine_without_a_hooks_target_does_not_start(
    sglang: ToySglang, run_dir: Path, monkeypatch: pytest.MonkeyPatch, child: bool, hooks: dict[str, str]
) -> None:
    if child:
        in_a_child_process(monkeypatch)
        sglang.module("sglang.srt.managers.scheduler")
    monkeypatch.setattr(plugin.metadata, "version", lambda name: "0.5.99")
    for target in hooks:
        sglang.lacks = {target}
        with pytest.raises(
            SystemExit, match=rf"SGLang 0\.5\.99 has no {target.removeprefix('sglang.srt.')} .*engine\.txt"
        ):
            plugin.register("builtins:object")
    assert sglang.hooks == {}, "either all of umbel is there, or nothing"


def test_a_release_may_lack_what_it_has_no_need_of(
    sglang: ToySglang, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, targets = next(iter(plugin.NOT_NEEDED.items()))
    sglang.lacks = {f"sglang.srt.{target}" for target in targets}
    monkeypatch.setattr(plugin.metadata, "version", lambda name: release)
    plugin.register()
    assert sglang.kinds() == {target: kind for target, kind in ROUTERS_HOOKS.items() if target not in sglang.lacks}
    monkeypatch.setattr(plugin.metadata, "version", lambda name: "0.5.99")
    with pytest.raises(SystemExit, match=targets[0]):
        plugin.register()


def test_a_target_is_a_module_a_class_or_an_attribute() -> None:
    found = [
        plugin._is_there(f"json.{name}") for name in ("decoder.JSONDecoder.decode", "loads", "nothing", "no.thing")
    ]
    assert found == [True, True, False, False]
