"""A training step in pieces: the sub-blocks of a layer and the head, forward and backward, announced before they run.

A decoder layer has two sub-blocks that end in a sum with their own input: attention, whose rows do not see each other,
and the MLP, whose tokens do not. So attention can be cut into groups of rows and the MLP into runs of tokens, and the
gradients of the parts add up to those of the whole. Each piece runs forward on a detached input and is differentiated
alone; the gradient is handed from piece to piece.

Shapes: B micro-batch rows, T tokens, H hidden, V vocabulary, N = B · T, M answer tokens in a head piece.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from serving.cotrainer.microbatch import Answers
from serving.cotrainer.quantum import Quanta, Quantum

Block = Literal["attention", "mlp"]


Whole = Generator[Quantum, None, torch.Tensor]
"""Quanta that bring one tensor."""


@dataclass
class SubBlock:
    """Attention or the MLP of one layer over one micro-batch, cut along the first dimension of its input."""

    kind: Block
    run: Callable[[torch.Tensor], torch.Tensor]
    size: int
    """Rows (attention) or tokens (MLP) of a piece."""
    width: int
    """Tokens of each of them."""
    needs_input_gradient: bool = False
    """Whether anything below is trained."""
    differentiated: bool = False
    """Whether anything below or within is trained."""
    recompute: bool = False
    _tape: list[tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=list)

    def forward(self, whole: torch.Tensor) -> Whole:
        """The sub-block's output, without a graph; the pieces' graphs are kept for `backward`."""
        keep = self.differentiated and not self.recompute
        result = whole
        for at in range(0, len(whole), self.size):
            count = min(self.size, len(whole) - at)
            yield Quantum(self.kind, count * self.width)
            with torch.inference_mode(False), torch.set_grad_enabled(keep):
                inner = whole[at : at + count].detach().requires_grad_(self.needs_input_gradient)
                outer = self.run(inner)
                if self.differentiated:
                    self._tape.append((inner, outer if keep else None))
                result = _placed(outer.detach(), at, result, whole)
        return result

    def backward(self, gradient: torch.Tensor) -> Whole:
        """Add to the factors' gradients; return that of the input in place of the output's, if it is needed."""
        single = len(self._tape) == 1
        while self._tape:
            inner, outer = self._tape[-1]
            yield Quantum("mlp_backward" if self.kind == "mlp" else "attention_backward", len(inner) * self.width)
            with torch.inference_mode(False), torch.enable_grad():
                self._tape.pop()
                at = len(self._tape) * self.size
                part = gradient if single else gradient[at : at + len(inner)]
                torch.autograd.backward(self.run(inner) if outer is None else outer, part)
                if inner.grad is not None:
                    gradient = inner.grad if single else _copied(inner.grad, part, gradient)
        return gradient

    def evaluate(self, whole: torch.Tensor) -> Whole:
        """The sub-block's output, when nothing will be differentiated."""
        result = whole
        for at in range(0, len(whole), self.size):
            count = min(self.size, len(whole) - at)
            yield Quantum("evaluate_mlp" if self.kind == "mlp" else "evaluate_attention", count * self.width)
            with torch.inference_mode(False), torch.no_grad():
                result = _placed(self.run(whole[at : at + count]), at, result, whole)
        return result


def attention(layer: Any, rotary: tuple[torch.Tensor, torch.Tensor], hidden_bth: torch.Tensor) -> torch.Tensor:
    """The first half of a decoder layer, on some rows. Without a mask, sdpa attends causally."""
    normed = layer.input_layernorm(hidden_bth)
    output: torch.Tensor = layer.self_attn(hidden_states=normed, position_embeddings=rotary, attention_mask=None)[0]
    return hidden_bth + output


def mlp(layer: Any, hidden_nh: torch.Tensor) -> torch.Tensor:
    """The second half of a decoder layer, on some tokens."""
    output: torch.Tensor = layer.mlp(layer.post_attention_layernorm(hidden_nh))
    return hidden_nh + output


def head(
    model: PreTrainedModel,
    hidden_nh: torch.Tensor,
    answers: Answers,
    size: int,
    scale: torch.Tensor,
    loss_sum: torch.Tensor,
) -> Whole:
    """Final norm, logits and loss of the answer tokens, `size` at a time, forward and backward in the same piece.

    Adds their losses to `loss_sum`; returns the gradient of `scale` times what was added, [N, H].
    """
    gradient = hidden_nh
    for at in range(0, answers.count, size):
        part = answers.part(at, size)
        yield Quantum("head", part.count)
        with torch.inference_mode(False), torch.enable_grad():
            inner_mh = hidden_nh.index_select(0, part.index).requires_grad_()
            summed = F.cross_entropy(_logits(model, inner_mh), part.targets, reduction="sum")
            torch.autograd.backward(summed, scale)
            assert inner_mh.grad is not None
            gradient = torch.zeros_like(hidden_nh) if at == 0 else gradient
            gradient.index_copy_(0, part.index, inner_mh.grad)
            loss_sum += summed.detach()
    return gradient


def evaluate_head(
    model: PreTrainedModel, hidden_nh: torch.Tensor, answers: Answers, size: int, scores_b2: torch.Tensor
) -> Quanta:
    """Add each row's (loss, wrong answer tokens) to `scores_b2` [B, 2]."""
    for at in range(0, answers.count, size):
        part = answers.part(at, size)
        yield Quantum("evaluate_head", part.count)
        with torch.inference_mode(False), torch.no_grad():
            logits_mv = _logits(model, hidden_nh.index_select(0, part.index))
            loss_m = F.cross_entropy(logits_mv, part.targets, reduction="none")
            wrong_m = logits_mv.argmax(-1) != part.targets
            scores_b2.index_add_(0, part.rows, torch.stack((loss_m.double(), wrong_m.double()), dim=1))


def _logits(model: PreTrainedModel, hidden_mh: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.lm_head(model.model.norm(hidden_mh))
    return logits.float()


def _placed(part: torch.Tensor, at: int, result: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """`part` as the whole result where it covers it, else written into a result that the first part makes."""
    if len(part) == len(whole):
        return part
    result = torch.empty_like(whole) if at == 0 else result
    result[at : at + len(part)] = part
    return result


def _copied(source: torch.Tensor, into: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    into.copy_(source)
    return whole
