"""`LayerFactors`: LoRA factors of one layer, with gradients and AdamW's moments, in flat buffers allocated once.

All A of the layer lie in one buffer and all B in another, and each factor of the model is a view. So a norm, an
optimizer step or a reset is one operation, and no gradient is ever allocated while serving. `KeptLinear` is the layer
that they are in. Shapes as in `serving.cotrainer.pieces`.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from serving.cotrainer.lanes.readback import Readback
from serving.cotrainer.microbatch import sent
from serving.cotrainer.pieces import Block
from serving.four_bit.peft_layers import Linear, LoraConfig, LoraLayer
from umbel.messages import TrainPlan
from umbel.site import memory

Factor = Literal["A", "B"]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module path → (A [R, I], B [O, R])."""
ReadFactors = Callable[[str], tuple[torch.Tensor, torch.Tensor]]
"""Function from a module path to its (A [R, I], B [O, R])."""


class KeptLinear(Linear):
    """peft's LoRA layer, which keeps its input for the backward pass as it is: peft keeps a copy in fp32.

    The factors are fp32, and what they add to the base's output is rounded once, as in peft. An input is kept once for
    all layers that read it, such as q, k and v.
    """

    @classmethod
    def put_into(cls, model: torch.nn.Module, target_modules: Collection[str], rank: int) -> None:
        """Put one of these around each linear layer whose name is in `target_modules`, and freeze all other weights.

        peft's `inject_adapter_in_model` would do the same, and import bitsandbytes where it is installed.
        """
        model.requires_grad_(False)
        # alpha == r: adapters travel in canonical form, their scaling folded into the factors.
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0)
        for path, module in list(model.named_modules()):
            if path.rpartition(".")[2] in target_modules:
                model.set_submodule(path, cls(module, "default", config=config, r=rank, lora_alpha=rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a_ri, b_or = self.lora_A["default"].weight, self.lora_B["default"].weight
        added: torch.Tensor = _Added.apply(self.base_layer(x), x, a_ri, b_or)
        return added


class _Added(torch.autograd.Function):
    """The sum base + x·Aᵀ·Bᵀ. Leading dimensions are any; of the inputs only x [.., I] and x·Aᵀ [.., R] are kept."""

    @staticmethod
    def forward(ctx: Any, base: torch.Tensor, x: torch.Tensor, a_ri: torch.Tensor, b_or: torch.Tensor) -> torch.Tensor:
        low = F.linear(x.float(), a_ri)
        _, _, a_trains, b_trains = ctx.needs_input_grad
        ctx.save_for_backward(x if a_trains else None, low if b_trains else None, a_ri, b_or)
        return (base + F.linear(low, b_or)).to(base.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, a_ri, b_or = ctx.saved_tensors
        of_base, of_x, a_trains, b_trains = ctx.needs_input_grad
        gradient_no = gradient.float().flatten(0, -2)
        of_x_ni = of_a = of_b = None
        if of_x or a_trains:
            of_low = gradient_no @ b_or
            of_x_ni = (of_low @ a_ri).to(gradient.dtype).view(*gradient.shape[:-1], -1) if of_x else None
            of_a = of_low.T @ x.float().flatten(0, -2) if a_trains else None
        if b_trains:
            of_b = gradient_no.T @ low.flatten(0, -2)
        return gradient if of_base else None, of_x_ni, of_a, of_b


@dataclass(frozen=True)
class ParkedLayer:
    """All of one layer that the next optimizer step of a job depends on, in memory of its own on the same device."""

    factors: dict[Factor, torch.Tensor]
    moments: dict[Factor, dict[str, torch.Tensor]]
    """AdamW's state of the trained factors; without tensors before the first step."""
    parents: dict[Factor, torch.Tensor]
    """FedProx's parent; empty without its term."""
    trained: tuple[Factor, ...]

    @property
    def bytes(self) -> int:
        """Return the memory that it takes."""
        moments = [moment for state in self.moments.values() for moment in state.values()]
        return sum(tensor.nbytes for tensor in (*self.factors.values(), *moments, *self.parents.values()))


class LayerFactors:
    """Factors of the adapted modules of one layer. Every method leaves grad mode as it was."""

    def __init__(self, layer: torch.nn.Module, prefix: str) -> None:
        self.pairs: dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]] = {
            f"{prefix}.{name}": (
                layer.get_parameter(f"{name}.lora_A.default.weight"),
                layer.get_parameter(f"{name}.lora_B.default.weight"),
            )
            for name, module in layer.named_modules()
            if isinstance(module, LoraLayer)
        }
        """Module path → (A, B), padded to the largest rank."""
        # The factors are kept in fp32, whatever dtype the base computes in.
        self._flat: dict[Factor, torch.nn.Parameter] = {
            "A": _flattened([a for a, _ in self.pairs.values()]),
            "B": _flattened([b for _, b in self.pairs.values()]),
        }
        self._gradients = {factor: torch.zeros_like(flat.data) for factor, flat in self._flat.items()}
        self._parents: dict[Factor, torch.Tensor] = {}
        self._trained: tuple[Factor, ...] = ()
        self.optimizer = torch.optim.AdamW(list(self._flat.values()), lr=0.0, fused=True)
        self.train_only("AB")

    def adapts(self, block: Block) -> bool:
        """Return whether a module of this sub-block is adapted."""
        part = ".self_attn." if block == "attention" else ".mlp."
        return any(part in module for module in self.pairs)

    @property
    def elements(self) -> int:
        """Return the number of elements of all factors."""
        return sum(flat.numel() for flat in self._flat.values())

    def train_only(self, factors: Collection[str]) -> None:
        """Let autograd compute gradients for these factors only, given as text such as `AB` or one by one."""
        self._trained = tuple(factor for factor in self._flat if factor in factors)
        for number, factor in enumerate(self._flat):
            trained = factor in self._trained
            self._flat[factor].grad = self._gradients[factor] if trained else None
            weights = [pair[number] for pair in self.pairs.values()]
            for weight, view in zip(weights, _views(self._gradients[factor], weights), strict=True):
                weight.requires_grad_(trained)
                weight.grad = view if trained else None  # autograd adds to it, in place

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def load(self, source: ReadFactors | None, *, remember: bool = False) -> None:
        """Fill the factors from `source` (None: with zeros); set gradients and moments to zero.

        `remember` keeps a copy, to which FedProx pulls.
        """
        for module, (a_ri, b_or) in self.pairs.items():
            a_ri.zero_()
            b_or.zero_()
            if source is not None:
                new_a, new_b = source(module)
                a_ri[: new_a.shape[0]] = sent(new_a.float(), a_ri.device)
                b_or[:, : new_b.shape[1]] = sent(new_b.float(), b_or.device)
        self.forget_gradients()
        for state in self.optimizer.state.values():
            for moment in state.values():
                moment.zero_()
        self._parents = {factor: self._flat[factor].detach().clone() for factor in self._flat} if remember else {}

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def park(self) -> ParkedLayer:
        """Return a copy of what the next step depends on. Only between two steps, where all gradients are zero.

        The parent of FedProx's term is not copied: the buffers have none until the next `load` or `resume`.
        """
        moments = {factor: self.optimizer.state.get(self._flat[factor], {}) for factor in self._trained}
        parked = ParkedLayer(
            {factor: flat.detach().clone() for factor, flat in self._flat.items()},
            {factor: {name: one.clone() for name, one in state.items()} for factor, state in moments.items()},
            self._parents,
            self._trained,
        )
        self._parents = {}
        return parked

    def room_to_park(self) -> list[torch.Tensor]:
        """Return as much memory as `park` takes, with FedProx's parent."""
        return [torch.empty_like(flat.data) for flat in self._flat.values() for _ in range(memory.PARKED)]

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def resume(self, parked: ParkedLayer) -> None:
        """Go on where `park` left off, whatever another job has left in the buffers."""
        self.train_only(parked.trained)
        self.forget_gradients()
        for factor, flat in self._flat.items():
            flat.copy_(parked.factors[factor])
        for factor in parked.trained:
            for name, moment in self.optimizer.state.get(self._flat[factor], {}).items():
                kept = parked.moments[factor].get(name)
                moment.zero_() if kept is None else moment.copy_(kept)
        self._parents = parked.parents

    def kept(self) -> dict[str, torch.Tensor]:
        """Return what the next step depends on but FedProx's parent: the tensors themselves, such as `B.exp_avg`."""
        kept = {str(factor): flat.detach() for factor, flat in self._flat.items()}
        for factor in self._trained:
            state = self.optimizer.state.get(self._flat[factor], {})
            kept |= {f"{factor}.{name}": moment for name, moment in state.items()}
        return kept

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def restore(self, kept: Mapping[str, torch.Tensor]) -> None:
        """Put copies of what `kept` returned into buffers that were just loaded, also in another process."""
        for name, tensor in kept.items():
            factor, _, moment = name.partition(".")
            flat = self._flat["A" if factor == "A" else "B"]
            new = sent(tensor, flat.device)
            if not moment:
                flat.copy_(new)
            elif (state := self.optimizer.state[flat]).get(moment) is None:
                state[moment] = new.clone()  # before its first step an optimizer has none
            else:
                state[moment].copy_(new)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def forget_gradients(self) -> None:
        """Set the gradients to zero."""
        for gradient in self._gradients.values():
            gradient.zero_()

    def start_copy(self) -> dict[Factor, Readback]:
        """Start copying the factors to the host."""
        return {factor: Readback(flat) for factor, flat in self._flat.items()}

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def end_copy(self, copies: dict[Factor, Readback], rank: int, into: Factors) -> None:
        """Put copies of the first `rank` rows of A and columns of B into `into`, in fp32."""
        views = [
            _views(copies[factor].read(), [pair[number] for pair in self.pairs.values()])
            for number, factor in enumerate(self._flat)
        ]
        for module, a_ri, b_or in zip(self.pairs, *views, strict=True):
            into[module] = (a_ri[:rank].clone(), b_or[:, :rank].clone(memory_format=torch.contiguous_format))

    def norm(self, proximal: float) -> torch.Tensor:
        """Add the FedProx term μ · (w − w_parent) to the gradients **in place**, then return their L2 norm, 0-d.

        `proximal` is μ (arXiv 1812.06127); with 0 the gradients stay as they are.
        """
        if proximal:
            for factor in self._trained:
                self._gradients[factor].add_(self._flat[factor].detach() - self._parents[factor], alpha=proximal)
        return _norm_of([torch.linalg.vector_norm(self._gradients[factor]) for factor in self._trained])

    def step(self, scale: torch.Tensor, rate: float, weight_decay: float) -> None:
        """Take one AdamW step with the gradients times `scale`, a 0-d tensor, then set the gradients to zero."""
        for factor in self._trained:
            self._gradients[factor].mul_(scale)
        self.optimizer.param_groups[0].update(lr=rate, weight_decay=weight_decay)
        self.optimizer.step()
        for factor in self._trained:
            self._gradients[factor].zero_()


def learning_rate(plan: TrainPlan, step: int, spent: float) -> float:
    """Return the rate of a step: linear warm-up, then constant or half a cosine.

    The cosine ends with the steps or with the seconds, of which a share is `spent`, whichever are used up first: a site
    that its users keep busy ends as low as the others.
    """
    if step < plan.warmup_steps:
        return plan.learning_rate * (step + 1) / plan.warmup_steps
    if plan.schedule == "constant":
        return plan.learning_rate
    progress = max((step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps), spent)
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def clip_scale(norms: list[torch.Tensor], clip_norm: float) -> torch.Tensor:
    """Return the 0-d factor that `torch.nn.utils.clip_grad_norm_` would apply, from the norm of each layer."""
    return torch.clamp(clip_norm / (_norm_of(norms) + 1e-6), max=1.0)


def _norm_of(norms: list[torch.Tensor]) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _flattened(weights: list[torch.nn.Parameter]) -> torch.nn.Parameter:
    """Copy `weights` into one fp32 buffer and make them views of it."""
    flat = torch.cat([weight.detach().float().flatten() for weight in weights])
    for weight, view in zip(weights, _views(flat, weights), strict=True):
        weight.data = view
    return torch.nn.Parameter(flat, requires_grad=False)


def _views(flat: torch.Tensor, like: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    parts = torch.split(flat, [weight.numel() for weight in like])
    return [part.view_as(weight) for part, weight in zip(parts, like, strict=True)]
