"""Numbers on their way from the device to the host, without a wait for the device."""

import torch


class Readback:
    """A copy of a tensor, started now and read later; on a CPU there is nothing to wait for."""

    def __init__(self, values: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = values.detach()
        if values.is_cuda:
            self._host = torch.empty_like(self._host, device="cpu", pin_memory=True)
            self._host.copy_(values.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def on_device(self) -> bool:
        return self._event is not None

    def read(self) -> torch.Tensor:
        """The values, on the host; waits for this one copy, which has long ended where it is asked for a step later."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
