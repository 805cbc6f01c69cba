"""The daemon's messages are read one at a time, and each is answered, also one that is not understood."""

from pathlib import Path

import pytest
import zmq

from serving.cotrainer.commands import CommandSocket, read_command
from serving.trainer_socket import CancelJob, CoTrainerStatus, StatusQuery, socket_path
from tests.toys.scheduler import Make
from umbel import wire
from umbel.errors import WireError
from umbel.messages import JobState


def test_messages_come_one_at_a_time_and_none_is_waited_for(sockets: Path) -> None:
    """Two senders: each gets the answer to its own message."""
    commands = CommandSocket(sockets)
    senders = [zmq.Context.instance().socket(zmq.DEALER) for _ in range(2)]
    try:
        assert commands.receive() is None
        for number, sender in enumerate(senders):
            sender.connect(f"ipc://{socket_path(sockets)}")
            sender.send(f"message {number}".encode())
        for _ in senders:
            assert commands.socket.poll(20_000)
            message = commands.receive()
            assert message is not None
            commands.reply(message, CoTrainerStatus(error=message.payload.decode()))
        assert commands.receive() is None
        for number, sender in enumerate(senders):
            assert sender.poll(20_000)
            assert wire.unpack_model(sender.recv(), CoTrainerStatus).error == f"message {number}"
    finally:
        for socket in (*senders, commands.socket):
            socket.close(0)


def test_a_socket_that_a_dead_engine_left_is_replaced(sockets: Path) -> None:
    socket_path(sockets).write_text("left over")
    commands = CommandSocket(sockets)
    commands.socket.close(0)


def test_commands_are_decoded_by_their_name_and_others_refused() -> None:
    cancel = CancelJob(id="job")
    assert read_command(wire.pack_model(cancel)) == cancel
    with pytest.raises(WireError, match="unknown message 'Reboot'"):
        read_command(wire.pack("Reboot", {}))


@pytest.mark.parametrize(
    "message",
    [b"", b"junk", wire.pack("TrainJob", {"id": "x"}), wire.pack("Reboot", {}), wire.pack("CancelJob", {}),
     wire.pack("StatusQuery", {"more": 1})],
)  # fmt: skip
def test_a_message_that_is_not_understood_is_answered_and_changes_nothing(make: Make, message: bytes) -> None:
    scheduler = make()
    scheduler.tell(scheduler.train_job())
    answer = scheduler.tell(message)
    assert answer.error
    assert answer.job is None
    assert scheduler.tell(StatusQuery()).state is JobState.RUNNING
    assert scheduler.finish().state is JobState.DONE


def test_a_message_of_several_frames_changes_nothing(make: Make) -> None:
    scheduler = make()
    scheduler.tell(scheduler.train_job())
    scheduler._daemon.send_multipart([b"one", b"two"])
    assert scheduler.cotrainer.commands.socket.poll(20_000)
    scheduler.idle()
    assert scheduler.finish().state is JobState.DONE
