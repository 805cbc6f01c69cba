"""Write the generated pages of docs/reference/: `scripts/reference`."""

from collections.abc import Callable

from scripts.tools.reference import commands, configuration, metrics, routes, run_configuration
from scripts.tools.reference.page import FOLDER

PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration.render,
    "run-configuration.md": run_configuration.render,
    "cli.md": commands.render,
    "http.md": routes.render,
    "metrics.md": metrics.render,
}
"""File name → the function that returns the page."""


def main() -> None:
    """Write every page whose text has changed, and say which."""
    for name, render in PAGES.items():
        page, path = render(), FOLDER / name
        if not path.exists() or path.read_text() != page:
            path.write_text(page)
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
