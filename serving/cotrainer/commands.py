"""`CommandSocket`: the scheduler's end of the socket on which the daemon starts jobs and asks for status."""

from dataclasses import dataclass
from pathlib import Path

import zmq

from serving.trainer_socket import CancelJob, CoTrainerStatus, EvaluateJob, StatusQuery, TrainJob, socket_path
from umbel import wire
from umbel.errors import WireError

Command = TrainJob | EvaluateJob | StatusQuery | CancelJob
COMMANDS: dict[str, type[Command]] = {
    body.__name__: body for body in (TrainJob, EvaluateJob, StatusQuery, CancelJob)
}  # fmt: skip


@dataclass(frozen=True)
class Message:
    """One message, and the address to which its answer goes."""

    sender: bytes
    payload: bytes


class CommandSocket:
    """A ZeroMQ ROUTER in the run directory. It is looked at between quanta; nothing ever waits for it."""

    def __init__(self, run_dir: Path) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        """Registered with the scheduler's own poller, so that a message wakes an idle engine."""
        address = socket_path(run_dir)
        address.unlink(missing_ok=True)
        self.socket.bind(f"ipc://{address}")

    def receive(self) -> Message | None:
        """Return the next message, or None at once if there is none."""
        if not int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            return None
        sender, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
        return Message(sender, b"".join(frames))

    def reply(self, message: Message, status: CoTrainerStatus) -> None:
        """Answer a message; every one is answered with the co-trainer's status."""
        self.socket.send_multipart([message.sender, wire.pack_model(status)], zmq.NOBLOCK)


def read_command(payload: bytes) -> Command:
    """Decode a message of the daemon's. Raises WireError for any other."""
    kind, _ = wire.unpack(payload)
    if kind not in COMMANDS:
        raise WireError(f"unknown message {kind!r}")
    return wire.unpack_model(payload, COMMANDS[kind])
