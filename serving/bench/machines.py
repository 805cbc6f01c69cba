"""`Machine`: the latencies of a simulated engine and trainer on one device. All times are seconds."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from serving.cotrainer.predictor import Batch, Predictor
from serving.cotrainer.quantum import Quantum

P99 = 2.326
"""Standard deviations from the mean of a normal distribution to its P99."""


@dataclass(frozen=True)
class TimedQuantum(Quantum):
    """A quantum, with the seconds that it takes alone."""

    seconds: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Latencies that are linear in the contents of the batch, times a random factor."""

    decode: tuple[float, float, float]
    """Seconds of a decode iteration: constant, per request, per token in the KV cache."""
    prefill: tuple[float, float, float]
    """Seconds of a prefill: constant, per new token, per pair of tokens that attention looks at."""
    quanta: tuple[TimedQuantum, ...]
    """One optimizer step."""
    launch_s: float = 0.0
    """Time in which the host launches a quantum, and does nothing else."""
    lag_s: float | None = None
    """Seconds from the launch of a quantum to its start on a device that works while the host goes on.

    None where the host runs quanta itself.
    """
    overlap: float = 1.0
    """Seconds by which one second of a quantum on the device delays an iteration beside it: 1 where they take turns."""
    noise: float = 0.08
    """Standard deviation of the logarithm of a latency."""
    hiccup: tuple[float, float] = (0.005, 2.0)
    """Probability that an iteration or quantum takes longer, and how many times as long it then takes."""
    turn_s: float = 1e-4
    """Seconds of a turn of the scheduler without work."""
    max_running: int = 32
    chunk_tokens: int = 2048

    def seconds(self, batch: Batch) -> float:
        """Return the typical latency of an iteration without training."""
        constant, first, second = self.prefill if batch.regime == "prefill" else self.decode
        if batch.regime == "prefill":
            return constant + first * batch.new_tokens + second * batch.attended
        return constant + first * batch.requests + second * batch.cached_tokens

    def factors(self, seed: int) -> Iterator[float]:
        """Yield random factors of latencies, without end."""
        if not (self.noise or self.hiccup[0]):
            yield from repeat(1.0)
        rng = np.random.default_rng(seed)
        probability, factor = self.hiccup
        while True:
            factors = np.exp(rng.normal(0.0, self.noise, 1024)) * np.where(rng.random(1024) < probability, factor, 1.0)
            yield from factors.tolist()


def _step(
    layers: int, forward: float, backward: float, heads: int, head: float, optimizer: float
) -> tuple[TimedQuantum, ...]:
    """Return the quanta of one step of one micro-batch, in the trainer's order."""
    forwards = [TimedQuantum("attention", 64, forward), TimedQuantum("mlp", 64, forward)] * layers
    backwards = [TimedQuantum("mlp_backward", 64, backward), TimedQuantum("attention_backward", 64, backward)] * layers
    return (*forwards, *[TimedQuantum("head", 64, head)] * heads, *backwards, TimedQuantum("optimizer", 0, optimizer))


PRESETS = {
    "cpu": Machine(
        decode=(8e-3, 0.8e-3, 0.0),
        prefill=(8e-3, 0.15e-3, 0.0),
        quanta=_step(layers=4, forward=2e-3, backward=3e-3, heads=2, head=5e-3, optimizer=2e-3),
    ),
    "gpu": Machine(
        decode=(6e-3, 0.02e-3, 2e-9),
        prefill=(10e-3, 0.03e-3, 0.0),
        quanta=_step(layers=32, forward=0.5e-3, backward=0.9e-3, heads=4, head=1e-3, optimizer=1e-3),
        launch_s=0.2e-3,
        lag_s=0.05e-3,
        overlap=0.4,
        noise=0.03,
        max_running=256,
        chunk_tokens=8192,
    ),
}
"""Two cores with a tiny model, and one large accelerator with a model of 8·10⁹ parameters."""


def calibrated(machine: Machine) -> Predictor:
    """Return a predictor as after a real engine's calibration: it knows each quantum, and no iteration yet."""
    predictor = Predictor()
    for quantum in machine.quanta:
        seconds = machine.launch_s + quantum.seconds * float(np.exp(P99 * machine.noise))
        predictor.seed_quantum(quantum.kind, quantum.tokens, seconds)
    return predictor
