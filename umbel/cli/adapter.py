"""`umbel adapter …`: commands that read the centre's registry, and those that change it."""

import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from umbel.base.shapes import LINEARS
from umbel.cli.console import AsJson, Name, Registry, Why, calls, explained, part_of, reason, say, who
from umbel.signing import PrivateKey, read_private, read_public

AT = "--registry /srv/umbel/registry"
adapter_app = typer.Typer(
    no_args_is_help=True,
    help="Read the centre's adapter registry, and move its aliases; `load`, `unload`: what a site only serves.",
    epilog=calls(f"umbel adapter ls {AT}", f'umbel adapter rollback support --why "worse answers" {AT}'),
)

Ref = Annotated[str, typer.Argument(help="Such as support@v3, support@live or support@sha256:0123abcd.")]


@adapter_app.command("ls", epilog=calls(f"umbel adapter ls {AT}", f"umbel adapter ls --json {AT}"))
def ls(registry: Registry, as_json: AsJson = False) -> None:
    """List every version: its round, its state, and the aliases that point to it."""
    with _opened(registry) as (opened, views):
        rows = views.ls(opened)
        _print_json(rows) if as_json else say(*map(_line, rows))


@adapter_app.command(
    "show", epilog=calls(f"umbel adapter show support@live {AT}", f"umbel adapter show support@v3 {AT}")
)
def show(registry: Registry, ref: Ref) -> None:
    """Show one version: its parents, weights and reasons per site, truncation error per module."""
    with _opened(registry) as (opened, views):
        _print_json(views.show(opened, ref))


@adapter_app.command(
    "diff",
    epilog=calls(
        f"umbel adapter diff support@previous support@live {AT}",
        f"umbel adapter diff support@v3 support@v4 --json {AT}",
    ),
)
def diff(
    registry: Registry, old: Ref, new: Annotated[str, typer.Argument(help="The other one.")], as_json: AsJson = False
) -> None:
    """Compare two versions: fields of the manifest that differ, and how far apart their updates of the base are."""
    with _opened(registry) as (opened, views):
        found = views.diff(opened, old, new)
        _print_json(found) if as_json else say(*_diff_lines(found))


@adapter_app.command(
    "alias",
    epilog=calls(
        f'umbel adapter alias support@v3 stable --why "passed the audit" {AT}', f"umbel adapter alias support {AT}"
    ),
)
def alias(
    registry: Registry,
    ref: Annotated[str, typer.Argument(help="A version, such as support@v3; or support alone, to see the history.")],
    name: Annotated[
        str, typer.Argument(metavar="[ALIAS]", help="The alias to point to it: head, live, or a word of yours.")
    ] = "",
    why: Why = "",
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the alias: `umbel adapter alias support word`.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Point an alias to a version, or show every move it made. `shadow` and `previous` cannot be moved."""
    with _opened(registry) as (opened, views):
        adapter = ref.partition("@")[0]
        if name:
            to = None if remove else opened.resolve(ref)
            opened.point(adapter, {name: to}, who=who(), why=reason(why))
            print(f"{adapter}@{name} {'is removed' if to is None else f'is {to}'}")
            return
        moves = views.history(opened, adapter)
        _print_json(moves) if as_json else say(*map(_move, moves))


@adapter_app.command(
    "rollback",
    epilog=calls(f'umbel adapter rollback support --why "worse answers" {AT}', "umbel fleet rollback --help"),
)
def rollback(registry: Registry, adapter: Name, why: Why = "") -> None:
    """Point head and live back to what was live before; the sites follow with the next run (`umbel fleet rollback`)."""
    with _opened(registry) as (opened, _):
        back = opened.roll_back(adapter, who=who(), why=reason(why))
        print(f"{adapter}: training goes on from {back}, which is live again; once more would take this back")
        shadow = opened.pointers(adapter).get("shadow")
        if shadow is not None:
            stopped = opened.overruled(adapter, opened.manifest(shadow).round)
            unless = "will be promoted if it is accepted; stop the run if it must not be"
            then = "will not be promoted any more" if stopped else unless
            print(f"{shadow} is being judged, and {then}", file=sys.stderr)


@adapter_app.command(
    "verify", epilog=calls(f"umbel adapter verify {AT}", f"umbel adapter verify support@live --key centre.pub {AT}")
)
def verify(
    registry: Registry,
    ref: Annotated[str, typer.Argument(help="One version; all without it.")] = "",
    key: Annotated[
        Path | None, typer.Option(help="The centre's public key; a version signed with another one is damaged.")
    ] = None,
) -> None:
    """Read every byte and compare it with what was published; exit status 1, naming what differs or is unsigned.

    Files and folders that are none of the registry's are named, too; they are no damage.
    """
    with _opened(registry) as (opened, views):
        found = views.verify(opened, ref or None, read_public(key) if key else None)
        unsigned = found.get("unsigned", [])
        say(*found["damages"], *(f"{version}: unsigned" for version in unsigned), *found.get("foreign", []))
        counted = f"{found['versions']} versions read, {len(found['damages'])} damaged files"
        print(counted + (f", {len(unsigned)} unsigned versions" if unsigned else ""))
    if found["damages"] or unsigned:
        raise typer.Exit(1)


@adapter_app.command(
    "export",
    epilog=calls(
        f"umbel adapter export support@live out/ --base meta-llama/Llama-3.1-8B-Instruct {AT}",
        f"umbel adapter export support@v3 out/ {AT}",
    ),
)
def export(
    registry: Registry,
    ref: Ref,
    into: Annotated[Path, typer.Argument(help="A new directory.")],
    base: Annotated[str, typer.Option(help="Name or path of the base model, for the settings and the card.")] = "",
) -> None:
    """Write a version as a PEFT directory with a model card: for peft, SGLang, or the Hugging Face hub."""
    with _opened(registry) as (opened, _):
        from server.registry.peft import export as exporter

        version = opened.resolve(ref)
        print(exporter.export(opened, version, into, base=base))
        if warning := exporter.other_kind(opened.manifest(version), base):
            print(f"{version}: {warning}", file=sys.stderr)


@adapter_app.command(
    "import",
    epilog=calls(
        f'umbel adapter import support adapters/support --base models/llama-8b --why "our own" {AT}',
        f'umbel adapter import support adapters/support --base models/llama-8b --dtype float16 --why "our own" {AT}',
    ),
)
def take_in(
    registry: Registry,
    adapter: Name,
    directory: Annotated[Path, typer.Argument(help="A LoRA adapter as peft saves it.")],
    base: Annotated[Path, typer.Option(help="The model directory that the sites serve.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="dtype in the sites' table engine: versions are rounded to it there."),
    ] = "bfloat16",
    target_modules: Annotated[
        str, typer.Option(help="target_modules in the sites' table engine, with commas between them.")
    ] = ",".join(LINEARS),
    signing_key: Annotated[
        Path | None, typer.Option(help="The centre's private key, as in the run's settings.")
    ] = None,
    why: Why = "",
) -> None:
    """Begin an adapter with one that was trained elsewhere: the next run brings it to the sites and trains on.

    Each site judges it first, as any version. The untrained adapter is v0, and a roll-back goes to the base.
    """
    with _opened(registry, read_private(signing_key) if signing_key else None) as (opened, _):
        from server.registry.peft import importing

        found = importing.take_in(
            opened, adapter, directory, base=base, dtype=dtype, who=who(), why=reason(why),
            target_modules=tuple(filter(None, map(str.strip, target_modules.split(",")))),
        )  # fmt: skip
        print(f"{found.ref} is head and live; run with adapter={json.dumps(adapter)} and rank={found.rank}")


@adapter_app.command("gc", epilog=calls(f"umbel adapter gc {AT}", f"umbel adapter gc --yes {AT}"))
def gc(
    registry: Registry,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it they are only named.")] = False,
    drop_ancestors: Annotated[
        bool,
        typer.Option(
            "--drop-ancestors", help="Also remove weights that are needed only as ancestors of later versions."
        ),
    ] = False,
    why: Why = "",
    as_json: AsJson = False,
) -> None:
    """Remove weights that no alias, no open round and no lineage needs. Manifests stay."""
    with _opened(registry) as (opened, views):
        given = why or "not needed by an alias, a round or a lineage"
        found = views.gc(opened, apply=yes, drop_ancestors=drop_ancestors, who=who(), why=given)
        _print_json(found) if as_json else say(*_gc_lines(found))


@adapter_app.command(
    "lineage",
    epilog=calls(
        f"umbel adapter lineage support {AT}", f"umbel adapter lineage support@live --picture lineage.svg {AT}"
    ),
)
def lineage(
    registry: Registry,
    ref: Annotated[str, typer.Argument(help="An adapter, such as support; or one version and what it came from.")],
    picture: Annotated[Path | None, typer.Option(help="Draw it into this .svg, .png or .pdf instead.")] = None,
) -> None:
    """Show from which version each one was trained, and whether it was promoted."""
    with _opened(registry) as (opened, views):
        nodes = views.nodes(opened, ref)
        if picture is None:
            from server.registry import lineage as pedigree

            print(pedigree.text(nodes))
        else:
            from server.registry import lineage_picture

            lineage_picture.draw(nodes, picture)
            print(picture)


@adapter_app.command("reindex", epilog=calls(f"umbel adapter reindex {AT}", f"umbel adapter verify {AT}"))
def reindex(registry: Registry) -> None:
    """Rebuild the index from the files, and name everything that could not be restored."""
    with _opened(registry) as (opened, _):
        lost = opened.reindex()
        say(*lost)
        versions = sum(len(opened.versions(name)) for name in opened.names())
        print(f"{versions} versions listed, {len(lost)} things not restored")
        if lost:
            raise typer.Exit(1)


@contextmanager
def _opened(registry: Path, key: PrivateKey | None = None) -> Iterator[tuple[Any, Any]]:
    """Open a registry; yield it and the module `server.registry.views`."""
    with explained():
        with part_of("server"):
            from server.registry import index, views
            from server.registry.registry import AdapterRegistry
        with index.explained(registry), closing(AdapterRegistry(registry, key=key)) as opened:
            yield opened, views


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))  # ASCII only: nothing that a site wrote drives a terminal


def _line(row: dict[str, Any]) -> str:
    sites, marks = " ".join(row["sites"]), [*row["aliases"], *(["pruned"] if row["pruned"] else [])]
    state = "" if row["state"] == "promoted" else row["state"]
    text = f"{row['ref']:<16} round {row['round']:<4} {row['strategy']:<8} {sites:<32} {', '.join(marks)}"
    return f"{text}  {state}".rstrip()


def _move(move: dict[str, Any]) -> str:
    to = ", ".join(
        f"{alias} → {'removed' if version is None else f'v{version}'}" for alias, version in move["to"].items()
    )
    run = f" (run {move['run_id']})" if move["run_id"] else ""
    return f"{move['at']}  {to:<32} {move['who']}{run}: {move['why']}"


def _diff_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"{field}: {old} → {new}" for field, (old, new) in found["fields"].items() if "certificate" not in field]
    lines.append(f"updates of the base: relative distance {found['distance']:.4g}, cosine {found['cosine']:.4f}")
    furthest = sorted(found["modules"].items(), key=lambda entry: -entry[1])[:5]
    return lines + [f"  {module} {distance:.4g}" for module, distance in furthest]


def _gc_lines(found: dict[str, Any]) -> list[str]:
    verb = "removed" if found["removed"] else "would remove"
    lines = [f"{verb} the weights of {ref}" for ref in found["versions"]]
    lines += [f"{verb} {path}" for path in found["left_overs"]]
    lines += [f"kept weights that no version here names, because of {why}" for why in found["kept"]]
    lines.append(f"{verb} {len(found['blobs'])} blobs")
    lines[-1] += f", {found['freed'] / 1e6:.1f} MB" if found["removed"] else "; --yes removes them"
    return lines
