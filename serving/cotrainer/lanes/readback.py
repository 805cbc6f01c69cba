"""`Readback`: a copy of a tensor to the host, started now and read later. A tensor of the CPU is not copied unasked."""

import torch


class Readback:
    """The copy, and the event after it on the stream that it runs on.

    Started in one quantum and read in the next one, it is never waited for: a lane runs one at a time.
    """

    def __init__(self, values: torch.Tensor, *, own: bool = False) -> None:
        """Start the copy. `own`: copy a tensor of the CPU, too, because it goes on changing."""
        self._event: torch.cuda.Event | None = None
        self._host = values.detach().clone() if own and not values.is_cuda else values.detach()
        if values.is_cuda:
            self._host = torch.empty_like(self._host, device="cpu", pin_memory=True)
            self._host.copy_(values.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> torch.Tensor:
        """Return the values on the host. Waits for the copy where no lane has, as in a plain loop over quanta."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
