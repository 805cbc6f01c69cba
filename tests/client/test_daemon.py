"""The daemon's sockets and state directory: who may open them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import daemon
from tests.toys.engine import site_config
from umbel.errors import ConfigError


@pytest.fixture
def umask() -> Iterator[None]:
    """A daemon sets its own, for good; the tests after these want theirs back."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize(("where", "socket_mode", "folder_mode"), [(None, 0o600, 0o700), ("run/a.sock", 0o660, 0o750)])
def test_the_socket_is_the_owners_unless_it_was_put_somewhere_for_the_group(
    sockets: Path, where: str | None, socket_mode: int, folder_mode: int
) -> None:
    config = site_config(sockets / "state")
    section = config.site.model_copy(update={"socket": sockets / where if where else None})
    config = config.model_copy(update={"site": section})
    with daemon._only_daemon(config), daemon._listen(config):
        assert config.socket.stat().st_mode & 0o777 == socket_mode
        assert config.socket.parent.stat().st_mode & 0o777 == folder_mode
        assert config.operator_socket == config.site.state_dir / "operator.sock"
        assert config.operator_socket.stat().st_mode & 0o777 == 0o600, "never the group's"
        assert config.site.state_dir.stat().st_mode & 0o777 == 0o700
    assert not config.socket.exists()
    assert not config.operator_socket.exists()


@pytest.mark.usefixtures("umask")
def test_a_folder_that_is_there_keeps_its_mode(sockets: Path) -> None:
    (sockets / "shared").mkdir()
    (sockets / "shared").chmod(0o2770)
    config = site_config(sockets / "state")
    section = config.site.model_copy(update={"socket": sockets / "shared" / "a.sock"})
    with daemon._listen(config.model_copy(update={"site": section})):
        assert (sockets / "shared").stat().st_mode & 0o7777 == 0o2770


@pytest.mark.usefixtures("umask")
def test_the_groups_socket_cannot_take_the_operators_place(sockets: Path) -> None:
    config = site_config(sockets / "state")
    section = config.site.model_copy(update={"socket": sockets / "state" / ".." / "state" / "operator.sock"})
    with (
        pytest.raises(ConfigError, match="is a socket that the site's group must not open; name another path"),
        daemon._only_daemon(config.model_copy(update={"site": section})),
    ):
        pass
