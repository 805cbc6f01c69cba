"""What SGLang calls in each of its processes (entry point group `sglang.srt.plugins`): registers, nothing else.

Without UMBEL_RUN_DIR (a directory that the daemon prepares, see `serving.engine`) SGLang stays as it is.
"""

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any


def register() -> None:
    """Put the router into the HTTP process and the co-trainer's hooks into the scheduler process."""
    run_dir = os.environ.get("UMBEL_RUN_DIR")
    if run_dir is None:
        return
    if multiprocessing.parent_process() is None:  # SGLang spawns all its other processes
        _register_router(Path(run_dir))
    elif "sglang.srt.managers.scheduler" in sys.modules:  # not the detokenizer
        _register_cotrainer(Path(run_dir))


def _register_router(run_dir: Path) -> None:
    from sglang.srt.entrypoints import http_server
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from serving.router import Router, apply_pin

    admin_key = (run_dir / "admin.key").read_text().strip()
    build_stack, routers = http_server.app.build_middleware_stack, []

    def build_with_router() -> Any:  # outermost, also of the key check that SGLang adds later
        routers.append(Router(build_stack(), run_dir / "aliases.json", admin_key))
        return routers[-1]

    def known_names(result: set[str], *args: Any, **kwargs: Any) -> set[str]:
        table = routers[-1].table if routers else None
        return result | set(table.names()) if table else result

    def redact(result: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {key: "…" if key in ("api_key", "admin_api_key") else value for key, value in result.items()}

    http_server.app.build_middleware_stack = build_with_router
    for target, hook, kind in (
        ("managers.tokenizer_manager.TokenizerManager.generate_request", apply_pin, HookType.BEFORE),
        # /v1/responses alone checks the name of the model, before the request reaches `generate_request`
        ("entrypoints.openai.serving_responses.OpenAIServingResponses._known_model_names", known_names, HookType.AFTER),
        ("entrypoints.engine._server_args_for_logging", redact, HookType.AFTER),
    ):
        HookRegistry.register(f"sglang.srt.{target}", hook, kind)


def _register_cotrainer(run_dir: Path) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from serving import cotrainer

    hooks = cotrainer.Hooks(run_dir)
    for method, hook, kind in (
        ("__init__", hooks.after_init, HookType.AFTER),
        ("get_next_batch_to_run", hooks.before_iteration, HookType.BEFORE),
        ("maybe_sleep_on_idle", hooks.around_sleep, HookType.AROUND),
    ):
        HookRegistry.register(f"sglang.srt.managers.scheduler.Scheduler.{method}", hook, kind)
