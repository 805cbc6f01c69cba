"""The page of every `umbel …` command, made from the command line's own help."""

import inspect
from collections.abc import Iterator

import click
import typer.main

from scripts.tools.reference.page import code, head, table
from umbel.cli.main import app

INTRODUCTION = """
`umbel check`, `data`, `serve`, `adapt`, `status`, `rollback`, `promote`, `adapter load`, `adapter unload`, `examples …`
and `bench …` run in the site's environment (`.venv-engine`), all others in Flower's (`.venv`). A command that fails
names each mistake on a line of its own and exits with 1. Every command has `--help`.
"""


def render() -> str:
    """Return the whole page."""
    page = head("Commands", "the command line in `umbel/cli/`") + INTRODUCTION
    return page + "".join(_section(path, command) for path, command in _all("umbel", typer.main.get_command(app)))


def _all(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """Yield the commands below a group, each after the groups that it is in."""
    if path != "umbel":
        yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _all(f"{path} {name}", inner)


def _section(path: str, command: click.Command) -> str:
    told = inspect.cleandoc(command.help or "")
    if isinstance(command, click.Group):
        return f"\n## `{path} …`\n\n{told}\n"
    context = click.Context(command, info_name=path)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    if command.context_settings.get("allow_extra_args"):
        usage += " …"
    level = "#" * (1 + path.count(" "))
    rows = [_row(parameter, context) for parameter in command.params]
    parameters = "\n" + table(("argument or option", "default", "meaning"), rows) if rows else ""
    return f"\n{level} `{path}`\n\n`{usage}`\n\n{told}\n{parameters}{_examples(command.epilog or '')}"


def _examples(epilog: str) -> str:
    """Set the lines of an epilog as shell commands; its first line is their title."""
    title, *commands = [line.strip() for line in epilog.splitlines() if line.strip()] or [""]
    return f"\n{title}\n\n```sh\n" + "\n".join(commands) + "\n```\n" if commands else ""


def _row(parameter: click.Parameter, context: click.Context) -> tuple[str, str, str]:
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    if isinstance(parameter, click.Argument):
        names = parameter.make_metavar(context)
    elif not getattr(parameter, "is_flag", False):
        names += f" {parameter.make_metavar(context)}"
    default = "*required*" if parameter.required else _shown(parameter.default)
    return code(names), default, getattr(parameter, "help", None) or ""


def _shown(default: object) -> str:
    """Write a default; nothing for a flag that is off and for an option that is not given."""
    return "" if default in (None, False, "") else code(default)
