"""TCP ports: whether a server can listen, asked before it is started."""

import socket


def refusal(host: str, port: int) -> str:
    """Return why no server can listen on `host` and `port` now, in the system's words; empty when one can.

    >>> if why := refusal("127.0.0.1", 8650):
    ...     raise ConfigError(f"127.0.0.1:8650 cannot be listened on ({why}); choose another --port")
    """
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return ""
    except OverflowError:
        return "a port is at most 65535"
    except OSError as error:
        said = error.strerror or str(error)
        return said.partition(" (while")[0]  # Python repeats the address
