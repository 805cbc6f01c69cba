"""`register`: put umbel into SGLang; SGLang calls it in each of its processes (entry points `sglang.srt.plugins`).

Without UMBEL_RUN_DIR (a directory that the daemon prepares, see `serving.engine`) SGLang is left as it is.
"""

import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from serving.run_dir import ADMIN_KEY, ALIASES, RUN_DIR_VARIABLE, RouterSettings

REMEDY = "install the release that constraints/engine.txt names"
Hook = tuple[str, Callable[..., Any], Any]
"""The target below `sglang.srt`, the function, and SGLang's HookType."""
NOT_NEEDED = {
    "0.5.16": (
        "entrypoints.openai.serving_responses.OpenAIServingResponses._known_model_names",
        "entrypoints.engine._server_args_for_logging",
    ),
}
"""Release of SGLang → targets that it has not, nor the need of their hooks: it refuses no name, and logs by `repr`."""


def register(cotrainer: str = "serving.cotrainer.cotrainer:CoTrainer") -> None:
    """Put the router into the HTTP process, and bounds and the co-trainer's hooks into the scheduler process.

    `cotrainer` names the co-trainer's class as `module:Class`; it is imported in the scheduler process only.
    """
    run_dir = os.environ.get(RUN_DIR_VARIABLE)
    if run_dir is None:
        return
    if multiprocessing.parent_process() is None:  # SGLang spawns all its other processes
        _register_router(Path(run_dir))
    elif "sglang.srt.managers.scheduler" in sys.modules:  # not the detokenizer
        _register_scheduler(Path(run_dir), cotrainer)


def _register_router(run_dir: Path) -> None:
    from sglang.srt.entrypoints import http_server
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from serving import engine_state
    from serving.router.api_keys import ApiKeys
    from serving.router.consent import with_consent
    from serving.router.pin import apply_pin, refuse_unloaded
    from serving.router.router import Router
    from serving.router.suspects import refuse_suspects

    admin_key = (run_dir / ADMIN_KEY).read_text().strip()
    settings = RouterSettings.read(run_dir)
    keys = ApiKeys.read(settings)
    build_stack, routers = http_server.app.build_middleware_stack, []
    state = engine_state.opened(run_dir)

    def build_with_router() -> Any:  # around all of SGLang's own layers, the key check that it adds later too
        vocab_size = http_server.get_global_state().tokenizer_manager.model_config.vocab_size
        inner = refuse_suspects(build_stack(), run_dir)
        routers.append(Router(inner, run_dir / ALIASES, admin_key, vocab_size, keys, settings.priorities))
        return with_consent(routers[-1], run_dir, keys, routers[-1].bodies)

    def count_output(*args: Any, **kwargs: Any) -> None:
        if state is not None:
            state.count_output()

    def known_names(result: set[str], *args: Any, **kwargs: Any) -> set[str]:
        table = routers[-1].table if routers else None
        return result | set(table.names()) if table else result

    def redact(result: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {key: "…" if key in ("api_key", "admin_api_key") else value for key, value in result.items()}

    def hide_key(result: str, *args: Any, **kwargs: Any) -> str:
        return result.replace(admin_key, "…")

    def guess_no_template(guess: Any, *args: Any, **kwargs: Any) -> None:
        """Leave out SGLang's guess by words in the model's path, such as `vicuna`: training follows the base's own."""

    http_server.app.build_middleware_stack = build_with_router
    templates = "parser.template_manager.TemplateManager"
    hooks: list[Hook] = [
        ("managers.tokenizer_manager.TokenizerManager.generate_request", apply_pin, HookType.BEFORE),
        ("managers.tokenizer_manager.TokenizerManager._resolve_lora_path", refuse_unloaded, HookType.BEFORE),
        ("managers.tokenizer_manager.TokenizerManager._handle_batch_output", count_output, HookType.BEFORE),
        # /v1/responses alone checks the name of the model, before the request reaches `generate_request`
        ("entrypoints.openai.serving_responses.OpenAIServingResponses._known_model_names", known_names, HookType.AFTER),
        ("entrypoints.engine._server_args_for_logging", redact, HookType.AFTER),
        ("server_args.ServerArgs.__repr__", hide_key, HookType.AFTER),
        (f"{templates}.guess_chat_template_from_model_path", guess_no_template, HookType.AROUND),
    ]
    _hook_all(hooks, HookRegistry)


def _register_scheduler(run_dir: Path, cotrainer: str) -> None:
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from serving.cotrainer.hooks import Hooks
    from serving.cotrainer.lanes.streams import EngineStreams
    from serving.four_bit.hook import choose_loader
    from serving.scheduling.grammars import bound_compiler, keep_latest
    from serving.scheduling.slots import drain_fairly

    hooks = Hooks(run_dir, pkgutil.resolve_name(cotrainer))
    streams = EngineStreams(torch.cuda)
    scheduler, cache = "managers.scheduler.Scheduler", "mem_cache.kv_cache_configurator.KVCacheConfigurator"
    these: list[Hook] = [
        (f"{scheduler}.__init__", hooks.after_init, HookType.AFTER),
        (f"{scheduler}.get_next_batch_to_run", hooks.before_iteration, HookType.BEFORE),
        (f"{scheduler}.run_batch", hooks.before_batch, HookType.BEFORE),
        (f"{scheduler}.process_batch_result", hooks.after_batch, HookType.AFTER),
        (f"{scheduler}.maybe_sleep_on_idle", hooks.around_sleep, HookType.AROUND),
        (f"{scheduler}.init_lora_drainer", drain_fairly, HookType.AFTER),
        ("managers.scheduler.dispatch_event_loop", streams.around_event_loop, HookType.AROUND),
        ("model_executor.model_runner.ModelRunner.initialize", streams.before_initialize, HookType.BEFORE),
        ("distributed.parallel_state.graph_capture", streams.before_capture, HookType.BEFORE),
        ("model_loader.loader.get_model_loader", choose_loader, HookType.AROUND),
        (f"{cache}._profile_available_bytes", hooks.leave_room, HookType.AFTER),
        ("constrained.base_grammar_backend.BaseGrammarBackend.__init__", keep_latest, HookType.AFTER),
        ("constrained.xgrammar_backend.GrammarCompiler.__init__", bound_compiler, HookType.BEFORE),
    ]
    _hook_all(these, HookRegistry)


def _hook_all(hooks: Sequence[Hook], registry: Any) -> None:
    """Register the hooks; end the process, and so the start of the engine, where SGLang has not what one hooks.

    SGLang itself would log an error, and then serve without that part of umbel.
    """
    release = metadata.version("sglang")
    missing = [target for target, _, _ in hooks if not _is_there(f"sglang.srt.{target}")]
    needed = [target for target in missing if target not in NOT_NEEDED.get(release, ())]
    if needed:
        sys.exit(f"SGLang {release} has no {', '.join(needed)} (below sglang.srt), which umbel hooks; {REMEDY}")
    for target, hook, kind in hooks:
        if target not in missing:
            registry.register(f"sglang.srt.{target}", hook, kind)


def _is_there(target: str) -> bool:
    try:
        pkgutil.resolve_name(target)
    except (AttributeError, ImportError):
        return False
    return True
