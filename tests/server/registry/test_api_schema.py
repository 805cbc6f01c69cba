"""schemathesis against the registry's REST API: whatever is sent, no 5xx, and errors of one shape."""

from pathlib import Path

from server.registry.api import registry_api
from tests.server.registry.test_api import BEARER, TOKEN
from tests.toys.registry import begun, grow
from tests.toys.schema import answers


def test_no_request_is_answered_with_a_server_error(tmp_path: Path) -> None:
    registry = begun(tmp_path / "r")
    grow(registry, "aaro")
    registry.close()
    asked = answers(registry_api(tmp_path / "r", TOKEN), [{}, BEARER])
    assert len(asked) == 13, "every route"
    registry = begun(tmp_path / "r")
    assert str(registry.resolve("support@live")) == "support@v2"
    registry.close()
