"""What a start finds and mends: damaged versions are forgotten, and what a crash left half-made or unrecorded goes.

Nobody is asked. What answers afterwards is the last version that verifies, or the base; the centre hears of it by the
next hello, and a version that was forgotten may be pushed again as if it had never been here. Every step is one
transaction or one removal, so that recovery may itself be cut off at any line.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from client.journal import Journal, Version
from umbel import peft_dir
from umbel.adapter import AdapterManifest, AdapterRef, Lifecycle
from umbel.config import SiteConfig
from umbel.errors import AdapterError
from umbel.faults import Point, reach

NEEDED = ("r", "lora_alpha", "target_modules")
"""What no release ever left out of `adapter_config.json`."""

logger = logging.getLogger(__name__)


def directory(config: SiteConfig, ref: AdapterRef) -> Path:
    """Where a version lies at this site; never shared by two versions."""
    return config.site.state_dir / "adapters" / ref.engine_name


def verify(config: SiteConfig, version: Version) -> Path:
    """Where a version lies, once every byte there is known to be the one that was received; raises AdapterError."""
    folder = directory(config, version.ref)
    _, stored = peft_dir.read(folder)
    expected = version.manifest
    if expected.personal is not None:  # joined to the part that stays here, which the journal's manifest is not
        joined = {"digest": stored.digest, "rank": stored.rank, "personal": stored.personal}
        expected = expected.model_copy(update=joined)
    if stored != expected:
        raise AdapterError(f"{folder}: not the {version.ref} that was received; its files were changed or exchanged")
    _require_settings(folder / peft_dir.CONFIG, stored)
    return folder


def _require_settings(path: Path, manifest: AdapterManifest) -> None:
    """That `adapter_config.json` tells SGLang what is true of the weights; newer keys may lack."""
    try:
        found = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise AdapterError(f"{path}: missing, or changed or damaged ({error})") from error
    wanted = peft_dir.peft_config(rank=manifest.rank, target_modules=manifest.target_modules, base="")
    for key, value in wanted.items():
        if key != "base_model_name_or_path" and found.get(key, None if key in NEEDED else value) != value:
            raise AdapterError(f"{path}: {key} is {found.get(key)!r}, not {value!r}; the file was changed or damaged")


def forget_damaged(config: SiteConfig, journal: Journal) -> list[str]:
    """Forget versions whose files do not verify; what was done, in words.

    Where the live one is damaged, what answered before is live again, or else the base.
    """
    done: list[str] = []
    kept = (Lifecycle.CANDIDATE, Lifecycle.SHADOW, Lifecycle.LIVE, Lifecycle.RETIRED)
    # Retired ones first: what is live falls back to one that verifies.
    for version in sorted(journal.versions(*kept), key=lambda one: one.state is not Lifecycle.RETIRED):
        ref, name = version.ref, version.ref.name
        if version.state is Lifecycle.RETIRED and ref != journal.alias(name, "previous"):
            continue
        try:
            verify(config, version)
        except AdapterError as damage:
            was_live = version.state is Lifecycle.LIVE
            journal.forget(ref, "forgotten: its files are damaged")
            answers = f"; {journal.alias(name, 'live') or 'the base'} answers users instead" if was_live else ""
            done.append(f"{ref} is damaged and was forgotten{answers} ({damage})")
            logger.error("adapter.damaged %s", done[-1])
            reach(Point.DAMAGE_FORGOTTEN)
    return done


def sweep(config: SiteConfig, journal: Journal) -> list[str]:
    """Remove what no entry of the journal stands for; what was removed, in words. Only before an engine is started."""
    removed = [str(path.relative_to(config.site.state_dir)) for path in _left_over(config, journal)]
    for name in removed:
        path = config.site.state_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if removed:
        logger.warning("recovery.swept site=%s %s", config.site.name, " ".join(removed))
    return [f"removed {name}, which nothing needs" for name in removed]


def _left_over(config: SiteConfig, journal: Journal) -> Iterator[Path]:
    state_dir = config.site.state_dir
    needed = {
        directory(config, version.ref)
        for version in journal.versions()
        if version.state in (Lifecycle.CANDIDATE, Lifecycle.SHADOW, Lifecycle.LIVE)
        or version.ref == journal.alias(version.ref.name, "previous")
    }
    yield from (path for path in _entries(state_dir / "adapters") if path not in needed)
    rounds = {state_dir / "rounds" / key for key in journal.rounds.known()}
    for path in _entries(state_dir / "rounds"):  # scores of an evaluation lie there, too
        if path not in rounds:
            yield path
        else:
            yield from path.glob(".*.tmp")
    yield from state_dir.glob(".*.tmp")
    yield from (state_dir / "personal").glob("**/.*.tmp")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
