"""`check_files`: report all missing or unusable files of a site file at once, before an engine is started.

`ports_in_use`: report the ports that another program has.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from umbel import ports, secret_file, signing
from umbel.base.config import config_mistakes
from umbel.base.files import file_mistakes, tokenizer_mistakes
from umbel.base.origin import BaseOrigin
from umbel.base.packed import MISSING, bitsandbytes_is_missing, is_served, packing_of
from umbel.base.shapes import linear_shapes, read_config, weight_shapes
from umbel.errors import AdapterError, ConfigError, UmbelError
from umbel.peft_child import Order, look_in_child
from umbel.site import flags
from umbel.site.adapter_sections import AdapterSection, ServeSection
from umbel.site.config import SiteConfig
from umbel.site.daemon_lock import daemon_runs
from umbel.site.slow_dtype import on_cpu
from umbel.site.variables import blamed, name_of

LONGEST_SOCKET_PATH = 100
"""Largest length in bytes; the kernel's limit is 107."""
EVERYWHERE = {"0.0.0.0", "::"}  # noqa: S104 - compared, never bound


def check_files(config: SiteConfig) -> None:
    """Raise the only mistake itself, or a ConfigError with one line per mistake where there are several."""
    found = list(mistakes(config))
    if len(found) == 1:
        raise found[0]
    if found:
        raise ConfigError("\n".join(map(str, found)))


def mistakes(config: SiteConfig) -> Iterator[UmbelError]:
    """Yield every mistake in the files. The engine is not needed for it."""
    site = config.site
    yield from (_with_variable(error, "model", "path") for error in _model_mistakes(config))
    inherited = {name: value for name, value in os.environ.items() if name not in config.engine.env}
    yield from map(ConfigError, flags.refused_variables(inherited))
    yield from _one_port_for_two(config)
    if site.trusted_key is not None:
        key = site.trusted_key
        yield from _raised(lambda: signing.read_public(key), "site", "trusted_key")
    if site.signing_key is not None:
        own = site.signing_key
        yield from _raised(lambda: signing.read_private(own), "site", "signing_key")
    yield from _key_mistakes(config)
    for key_, file in _example_files(config).items():
        if file is not None and not file.is_file():
            what = "is a folder" if file.is_dir() else "does not exist"
            yield ConfigError(f"{key_}: {file} {what}; point it to a JSONL file")
    yield from _served_mistakes(config)
    taken = next((path for path in (site.state_dir, *site.state_dir.parents) if path.exists()), None)
    if taken is not None and not taken.is_dir():
        yield ConfigError(f"{name_of('site', 'state_dir')}: {taken} is a file; name a folder, or one that can be made")
    yield from _raised(lambda: require_sockets(config), "site", "state_dir")


def _adapters(config: SiteConfig) -> Iterator[tuple[str, AdapterSection | ServeSection]]:
    """Yield each table of an adapter, after its name in sentences: `[[adapter]] support`, or the variable's."""
    tables: dict[str, Sequence[AdapterSection | ServeSection]] = {"adapter": config.adapter, "serve": config.serve}
    for table, sections in tables.items():
        for number, section in enumerate(sections):
            yield f"{blamed((table, str(number))) or f'[[{table}]]'} {section.name}", section


def _example_files(config: SiteConfig) -> dict[str, Path | None]:
    """Return the files of examples by the settings, or the variables, that name them."""
    files = {name_of("training", key): getattr(config.training, key) for key in ("data", "eval_data")}
    for name, adapter in _adapters(config):
        if isinstance(adapter, AdapterSection):
            files |= {f"{name}.{key}": getattr(adapter, key) for key in ("data", "eval_data")}
            files |= {f"{name}.guard {guard.name}": guard.data for guard in adapter.guard}
    return files | {
        f"{blamed(('shadow', 'guard', number, 'data')) or '[[shadow.guard]]'} {guard.name}": guard.data
        for number, guard in enumerate(config.shadow.guard)
    }


def _key_mistakes(config: SiteConfig) -> Iterator[UmbelError]:
    """Yield every file of keys that cannot be used, with the setting, or the variable, that names it."""
    reads: dict[str, tuple[Path | None, Callable[[Path], object]]] = {
        name_of("engine", "api_keys"): (config.engine.api_keys, secret_file.read_keys)
    }
    for name, adapter in _adapters(config):
        reads[f"{name}.api_keys"] = adapter.api_keys, secret_file.read_keys
        if isinstance(adapter, AdapterSection):
            reads[f"{name}.trusted_key"] = adapter.trusted_key, signing.read_public
    for name, (file, read) in reads.items():
        try:
            read(file) if file is not None else None
        except ConfigError as error:
            yield ConfigError(f"{name}: {error}")


def doubt_of_origin(config: SiteConfig) -> str | None:
    """Say why a packed base will be kin to none in runs with `mixed-bases`; None where nothing speaks against it.

    No weights are read, so an `origin.json` of another directory is only found when the site starts.
    """
    trusted = config.site.trusted_key
    try:
        origin = BaseOrigin.parse(config.model.path)
        if origin is not None and trusted is not None:
            signing.verify(signing.read_public(trusted), origin, origin.signature)
    except UmbelError as error:
        return f"{error}; until then this base is kin to none in runs with mixed-bases"
    return None


def require_sockets(config: SiteConfig) -> None:
    """Raise ConfigError for a path that the kernel cannot bind a Unix socket to, and for one path for two of them."""
    own = config.operator_socket, config.site.state_dir / "trainer.sock"
    for path in (config.socket, *own):
        if len(str(path).encode()) > LONGEST_SOCKET_PATH:
            key = "[site].socket" if path == config.site.socket else "[site].state_dir"
            raise ConfigError(f"{path}: longer than a Unix socket's path may be; choose a shorter {key}")
    if os.path.realpath(config.socket) in map(os.path.realpath, own):
        raise ConfigError(
            f"[site].socket: {config.socket} is a socket that the site's group must not open; name another path"
        )


def ports_in_use(config: SiteConfig) -> list[ConfigError]:
    """Return a mistake for each port on which the engine or the metrics could not listen now.

    Empty while the site's own daemon runs, which listens there itself.
    """
    wanted = {name_of("engine", "port"): (config.engine.host, config.engine.port)}
    if config.metrics is not None:
        wanted[name_of("metrics", "port")] = (config.metrics.host, config.metrics.port)
    found = [
        ConfigError(f"{key}: {host}:{port} cannot be used ({why}); stop what listens there or choose another port")
        for key, (host, port) in wanted.items()
        if (why := ports.refusal(host, port))
    ]
    return found if found and not daemon_runs(config.site.state_dir) else []


def _one_port_for_two(config: SiteConfig) -> Iterator[UmbelError]:
    engine, metrics = config.engine, config.metrics
    if metrics is None or engine.port != metrics.port:
        return
    if engine.host == metrics.host or EVERYWHERE & {engine.host, metrics.host}:
        yield ConfigError(
            f"{name_of('metrics', 'port')}: {metrics.port} is the port of [engine], too; choose another one"
        )


def _model_mistakes(config: SiteConfig) -> Iterator[UmbelError]:
    """Yield why this model directory cannot be served and trained. No weights are read."""
    model = config.model.path
    try:
        base = read_config(model)
    except UmbelError as error:
        yield error
        return
    yield from tokenizer_mistakes(model)
    found = list(config_mistakes(model, base, _longest_text(config, base)))
    yield from found
    if bitsandbytes_is_missing(base):
        yield ConfigError(f"{model / 'config.json'}: {MISSING}")
    if packing_of(base) and config.engine.dtype == "float32" and not on_cpu(config.engine.device):
        yield ConfigError(
            f"{name_of('engine', 'dtype')}: on a GPU SGLang serves a packed base in 16 bits only; set bfloat16 or "
            "float16"
        )
    # Without the sizes nothing can be expected of the weights.
    known = is_served(base) and not any(isinstance(one, ConfigError) for one in found)
    yield from file_mistakes(model, weight_shapes(model) if known else {})


def _served_mistakes(config: SiteConfig) -> Iterator[UmbelError]:
    """Yield why adapters under [[serve]] cannot be served: by their settings and headers, no weights are read."""
    engine = config.engine
    try:
        shapes = linear_shapes(config.model.path, engine.target_modules) if config.serve else {}
        orders = [
            Order(path=one.path, shapes=shapes, max_rank=engine.max_lora_rank, target_modules=engine.target_modules)
            for one in config.serve
        ]
    except (UmbelError, KeyError, TypeError, ValidationError):
        return  # the base itself cannot be served, and is reported
    for number, (section, order) in enumerate(zip(config.serve, orders, strict=True)):
        try:
            look_in_child(order)
        except AdapterError as error:
            where = blamed(("serve", number, "path")) or "[[serve]]"
            yield ConfigError(f"{where} {section.name}: {error}")


def _longest_text(config: SiteConfig, base: dict[str, object]) -> int | None:
    """Return how many tokens a text can have here: a user's, or an example; None if only the base knows."""
    asked = {flags.plain(flag): value for flag, value in config.engine.extra_args.items()}.get("context_length")
    served = asked if isinstance(asked, int) else base.get("max_position_embeddings")
    return max(served, config.training.seq_len) if isinstance(served, int) else None


def _raised(check: Callable[[], object], table: str, key: str) -> Iterator[UmbelError]:
    """Run a check and yield the error that it raises, if any; it names the variable that set `[table].key`, if any."""
    try:
        check()
    except UmbelError as error:
        yield _with_variable(error, table, key)


def _with_variable(error: UmbelError, table: str, key: str) -> UmbelError:
    variable = blamed((table, key))
    return type(error)(f"{variable}: {error}") if variable else error
