"""The generated pages of docs/reference/ say what the code says now."""

import pytest

from scripts.tools.reference import routes
from scripts.tools.reference.main import PAGES
from scripts.tools.reference.page import FOLDER, table


@pytest.mark.parametrize("name", sorted(set(PAGES) - {"configuration.md"}))
def test_a_generated_page_is_up_to_date(name: str) -> None:
    assert PAGES[name]() == (FOLDER / name).read_text(), "run scripts/reference"


def test_the_page_of_settings_is_up_to_date() -> None:
    assert PAGES["configuration.md"]() == (FOLDER / "configuration.md").read_text(), "run scripts/reference"


def test_a_cell_is_one_line_and_holds_no_bar() -> None:
    assert table(("a", "b"), [("one\ntwo", "x | y")]) == "| a | b |\n|---|---|\n| one two | x \\| y |\n"


def test_a_route_of_the_router_that_is_not_described_stops_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(routes.USERS, "/v1/completions")
    with pytest.raises(AssertionError, match="describe each route"):
        routes.render()


def test_the_pages_name_what_the_code_has() -> None:
    for query in ("", "`forced`"):  # the ClientApp's, and the operator's
        assert f"`POST /adapters/{{ref}}/promote` | {query} | `ShadowReport`" in PAGES["http.md"]()
    assert "\n### `umbel adapter gc`\n" in PAGES["cli.md"]()
    assert "| `umbel_quanta_total` | counter (*engine*) | `kind` |" in PAGES["metrics.md"]()
    assert '| `strategy` | `"exact"` |' in PAGES["run-configuration.md"]()
