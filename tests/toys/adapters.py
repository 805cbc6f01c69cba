"""Random low-rank updates, adapters and sites' updates, hostile ones too, for the tests of the strategies."""

import numpy as np
import torch

from strategies.adapter import Adapter, Update, factors_of, tensors_of
from strategies.lowrank import LowRank
from umbel import peft_dir
from umbel.messages import JobState, RoundReport

SHAPES = {"model.layers.0.self_attn.q_proj": (12, 10), "model.layers.0.self_attn.v_proj": (6, 10)}
RANK = 3
WIDE = {"model.layers.0.self_attn.q_proj": (48, 40), "model.layers.0.mlp.up_proj": (64, 40)}
ATTACKED = {"model.layers.0.self_attn.q_proj": (30, 24), "model.layers.0.self_attn.v_proj": (20, 24)}
HONEST, HOSTILE = 7, 3
"""Sites in `attacked`."""


def random_update(m: int, n: int, rank: int, scale: float = 1.0, *, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed % 2**32)
    b = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    return LowRank(b, torch.randn(rank, n, generator=generator, dtype=torch.float64), scale)


def rotated(update: LowRank, *, seed: int = 0) -> LowRank:
    """The same ΔW in another gauge: B R, R⁻¹ A."""
    gauge = random_update(update.rank, update.rank, update.rank, seed=seed + 7).B
    orthogonal = torch.linalg.qr(gauge + 3 * torch.eye(update.rank, dtype=torch.float64)).Q
    gauge = orthogonal * torch.linspace(0.5, 2.0, update.rank, dtype=torch.float64)
    return LowRank(update.B.double() @ gauge, torch.linalg.inv(gauge) @ update.A.double(), update.scale)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """‖one − other‖ / ‖other‖."""
    return float(torch.linalg.norm(one - other) / torch.linalg.norm(other))


def random_tensors(
    seed: int, *, rank: int = RANK, dtype: type = np.float32, shapes: dict[str, tuple[int, int]] = SHAPES
) -> peft_dir.Tensors:
    rng = np.random.default_rng(seed)
    tensors: peft_dir.Tensors = {}
    for module, (out_features, in_features) in shapes.items():
        tensors[peft_dir.key(module, "A")] = rng.normal(size=(rank, in_features)).astype(dtype)
        tensors[peft_dir.key(module, "B")] = rng.normal(size=(out_features, rank)).astype(dtype)
    return tensors


def adapter(tensors: peft_dir.Tensors | int = 0, *, dtype: type = np.float32) -> Adapter:
    made = random_tensors(tensors, dtype=dtype) if isinstance(tensors, int) else tensors
    return Adapter.of(peft_dir.encode(made), "base")


def moved(received: Adapter, seed: int, step: float = 0.1) -> peft_dir.Tensors:
    """Return an adapter as training leaves it: each factor a step away."""
    rng = np.random.default_rng(seed)
    return {
        name: (array + step * rng.normal(size=array.shape)).astype(array.dtype)
        for name, array in received.tensors.items()
    }


def update(site: str, received: Adapter, tensors: peft_dir.Tensors, /, **report: object) -> Update:
    """A site's update, trained from what it received."""
    facts: dict[str, object] = {
        "key": "k", "state": JobState.DONE, "parent": received.digest, "steps": 5, "num_examples": 10,
        "num_loss_tokens": 100, "held_examples": 100,
        "held_loss_tokens": 10 * int(str(report.get("held_examples", 100))),
    }  # fmt: skip
    return Update(site, peft_dir.encode(tensors), RoundReport(**{**facts, **report}), received.base)


def dense(tensors: peft_dir.Tensors) -> dict[str, torch.Tensor]:
    """Module → ΔW in float64."""
    return {module: factors.dense() for module, factors in factors_of(tensors).items()}


def wide(seed: int, rank: int) -> Adapter:
    """Return an adapter of WIDE shapes, with room for several sites' ranks."""
    return adapter(random_tensors(seed, rank=rank, dtype=np.float64 if rank == 0 else np.float32, shapes=WIDE))


def untrained(dtype: type = np.float32) -> Adapter:
    """A registry's first version: A drawn, B zero."""
    drawn = random_tensors(0, dtype=dtype)
    return adapter({name: np.zeros_like(array) if "lora_B" in name else array for name, array in drawn.items()})


def parent_adapter() -> Adapter:
    """Return the parent of the rounds that `attacked` makes."""
    return adapter(random_tensors(0, rank=4, shapes=ATTACKED))


def away(parent: Adapter, times: float, seed: int, noise: float) -> peft_dir.Tensors:
    """G + times · (a common step + noise of one's own), in a random gauge, at the parent's rank: a step in B."""
    common, own = random_tensors(500, rank=4, shapes=ATTACKED), random_tensors(seed, rank=4, shapes=ATTACKED)
    made = {}
    for name, array in parent.tensors.items():
        step = 0.1 * times * (common[name] + noise * own[name]) if "lora_B" in name else 0.0
        made[name] = array + step
    return tensors_of({module: rotated(one, seed=seed) for module, one in factors_of(made).items()}, np.float32)


def attacked(parent: Adapter) -> list[Update]:
    """Seven honest sites, and three that send the opposite of theirs, times three."""
    honest = [update(f"honest-{i}", parent, away(parent, 1.0, i, 0.2)) for i in range(HONEST)]
    hostile = [update(f"hostile-{i}", parent, away(parent, -3.0, 90 + i, 0.2)) for i in range(HOSTILE)]
    return honest + hostile
