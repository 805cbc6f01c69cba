"""`forget_damaged`, `sweep`: forget damaged versions at a start, and remove files that a crash left over.

No operator is asked. Afterwards the last version that verifies answers users, or the base; the centre learns it from
the next hello, and a forgotten version may be pushed again as if it had never been here. Every step is one transaction
or one removal, so recovery itself may be cut off at any line.
"""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from client.journal import Journal
from client.rounds.folder import PARENT
from client.versions.version_files import directory, verify
from umbel.adapter import Lifecycle
from umbel.errors import AdapterError
from umbel.faults import Point, reach
from umbel.site.config import SiteConfig

logger = logging.getLogger(__name__)


def forget_damaged(config: SiteConfig, journal: Journal) -> list[str]:
    """Forget versions whose files do not verify; return what was done, in words.

    Where the live version is damaged, the one before is live again, or else the base answers.
    """
    done: list[str] = []
    kept = [version for version in journal.versions() if version.state is not Lifecycle.REJECTED]
    # Retired versions first, so that a damaged live one falls back to one that verifies.
    for version in sorted(kept, key=lambda version: version.state is not Lifecycle.RETIRED):
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
    """Remove files that no entry of the journal stands for; return what was removed, in words.

    Only before an engine is started.
    """
    _adopt_rounds(config, journal)
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


def _adopt_rounds(config: SiteConfig, journal: Journal) -> None:
    """Move the folders of rounds to their adapter's, from where they lay while a site had one adapter.

    A round's folder has the parent as a file; an adapter's, which may have the same name, has folders only.
    """
    folder = config.site.state_dir / "rounds"
    for adapter, key in journal.known_rounds():
        if (folder / key / PARENT).is_file() and not (folder / adapter / key).exists():
            (folder / adapter).mkdir(exist_ok=True)
            (folder / key).rename(folder / adapter / key)


def _left_over(config: SiteConfig, journal: Journal) -> Iterator[Path]:
    state_dir = config.site.state_dir
    needed = {
        directory(config, version.ref)
        for version in journal.versions()
        if version.state not in (Lifecycle.RETIRED, Lifecycle.REJECTED)
        or version.ref == journal.alias(version.ref.name, "previous")
    }
    yield from (path for path in _entries(state_dir / "adapters") if path not in needed)
    served = {entry.ref.folder_name for entry in journal.imported.all()}
    yield from (path for path in _entries(state_dir / "served") if path.name not in served)
    yield from (state_dir / "served").glob("*/.*.tmp")
    rounds = {state_dir / "rounds" / adapter / key for adapter, key in journal.known_rounds()}
    folders = {round_.parent for round_ in rounds} | {state_dir / "rounds" / name for name in config.adapters}
    for folder in _entries(state_dir / "rounds"):
        if folder not in folders:
            yield folder
            continue
        for path in _entries(folder):  # scores of an evaluation lie here, too
            if path not in rounds:
                yield path
            else:
                yield from path.glob(".*.tmp")
    yield from state_dir.glob(".*.tmp")
    yield from (state_dir / "personal").glob("**/.*.tmp")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
