"""`ask`: call a site's daemon on the operator's socket, for the commands of its operator."""

from typing import Any

from umbel.errors import ConfigError
from umbel.site.config import SiteConfig

ANSWER_S = 60
"""Seconds that the daemon may take for an answer."""


class NoDaemon(ConfigError):
    """No daemon listens on the operator's socket."""


def ask(config: SiteConfig, method: str, path: str, seconds: float = ANSWER_S) -> dict[str, Any]:
    """Call the site's control API; raise ConfigError with the daemon's reason, or where no daemon answers."""
    import httpx

    socket = config.operator_socket
    try:
        with httpx.Client(transport=httpx.HTTPTransport(verify=False, uds=str(socket)), timeout=seconds) as client:
            reply = client.request(method, f"http://site{path}")
    except httpx.TimeoutException as error:  # it listens; a roll-back that is asked for twice would be taken back
        raise ConfigError(
            f"{socket}: the daemon did not answer within {seconds:g} s, and may still do it; see `umbel status` "
            "before you ask again"
        ) from error
    except httpx.TransportError as error:
        raise NoDaemon(f"{socket}: nobody answers ({error}); is `umbel serve` running?") from error
    body: dict[str, Any] = reply.json()
    if reply.status_code != 200:
        raise ConfigError(body["error"]["message"])
    return body
