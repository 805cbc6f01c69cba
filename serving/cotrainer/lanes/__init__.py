"""`lane_on`: the lane for the device that a base is on."""

import torch

from serving.cotrainer.lanes import lagging
from serving.cotrainer.lanes.device_lane import DeviceLane
from serving.cotrainer.lanes.lane import CpuLane, Lane
from serving.cotrainer.lanes.streams import Streams
from serving.cotrainer.memory import Arena, CudaAllocator


def lane_on(device: torch.device, streams: Streams, limit: int | None = None) -> Lane:
    """Return the lane for a device: on a CPU quanta run at once, unless the environment asks for a device that lags.

    `streams` are the engine's on the device. There quanta allocate from a pool of their own, of at most `limit` bytes.
    Raises ConfigError for a lag that is no number, TrainingError where the
    engine's would not go before training's.
    """
    if device.type == "cuda":
        from serving.cotrainer.lanes.cuda import Cuda

        return DeviceLane(Cuda(device, streams, Arena(CudaAllocator(device), limit)))
    factor = lagging.lag()
    return CpuLane() if factor is None else DeviceLane(lagging.LaggingDevice(factor))
