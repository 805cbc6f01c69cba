"""The table of hostile inputs in docs/security.md: `python -m tests.toys.hostile` writes it, a test checks it."""

from scripts.tools.repository import REPOSITORY
from tests.toys.hostile import catalogue, examples, requests, sites
from tests.toys.hostile.catalogue import Hostile

BEGIN, END = "<!-- hostile inputs: written by `python -m tests.toys.hostile` -->\n", "<!-- end of hostile inputs -->\n"
PAGE = REPOSITORY / "docs" / "security.md"


def surfaces() -> dict[str, list[Hostile]]:
    """Return the hostile inputs of each surface, by the surface's name in the table."""
    return {
        "an adapter, from a site or the centre": catalogue.ADAPTERS,
        "a manifest, to a site that trusts a key": catalogue.MANIFESTS,
        "a message between processes": catalogue.MESSAGES,
        "what a site answers the centre": sites.REPLIES,
        "what a site answers a centre that has its key": sites.SIGNED,
        "the order of messages to a site": sites.ORDERS,
        "the users' port": requests.USERS,
        "a site's control API": requests.CONTROL,
        "a site file": sites.FILES,
        "a user's example, to the daemon": examples.EXAMPLES,
    }


def render() -> str:
    """Return the table, with its markers."""
    rows = [
        f"| {surface} | {'; '.join(one.what for one in found)} | {_answers(found)} |"
        for surface, found in surfaces().items()
    ]
    count = sum(map(len, surfaces().values()))
    head = (
        f"{count} inputs, each sent by a test that checks the answer, that nothing was stored, and that a good input\n"
    )
    head += "right after works:\n\n| where | what comes in | answered with |\n|---|---|---|\n"
    return f"{BEGIN}{head}" + "\n".join(rows).replace("<", "&lt;") + f"\n{END}"


def _answers(found: list[Hostile]) -> str:
    return ", ".join(dict.fromkeys(one.answer for one in found))


def write() -> None:
    """Replace the table between the markers of docs/security.md."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + render() + rest.partition(END)[2])
