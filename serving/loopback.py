"""`alone`: the environment in which an engine's process group listens on no address of the network."""

from pathlib import Path

from umbel.errors import EngineError

RENDEZVOUS = "rendezvous"
"""Name of the file in the run directory by which torch's process group, of one process, finds itself."""
LOOPBACK = "lo"
"""Linux's name of the interface that nobody else reaches."""


def alone(run_dir: Path) -> dict[str, str]:
    """Return environment variables for an engine of one process group, and remove what a killed engine left of it.

    Without them torch's TCPStore listens on every interface, whatever its address, and takes what anybody writes to
    it; gloo and NCCL listen where the machine's name leads. Raises EngineError for a path that no URL can hold.
    """
    file = run_dir / RENDEZVOUS
    if {"?", "#"} & set(str(file)):
        raise EngineError(f"{run_dir}: a path with '?' or '#' cannot be used; choose another [site].state_dir")
    file.unlink(missing_ok=True)
    return {
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{file}",
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "NCCL_SOCKET_IFNAME": LOOPBACK,
    }
