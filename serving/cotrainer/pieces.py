"""`SubBlock`, `head`: a training step cut into pieces of layers and of the head, each announced before it runs.

A decoder layer has two sub-blocks that end in a sum with their own input: attention, in which no row sees another, and
the MLP, in which no token sees another. So attention can be cut into groups of rows and the MLP into runs of tokens,
and the gradients of the parts add up to those of the whole. Each piece runs forward on a detached input and is
differentiated alone; the gradient is handed from piece to piece.

Notation of this folder: the suffix of a tensor's name gives its shape, a letter per dimension (`hidden_bth` is
[B, T, H], `scores_b3` is [B, 3]). B micro-batch rows, T tokens of a row, N = B · T, H hidden, V vocabulary, M answer
tokens, E examples of an evaluation, R rank, I inputs and O outputs of a linear layer. A name without a suffix may have
any shape.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from serving.cotrainer.microbatch import Answers
from serving.cotrainer.quantum import Pieces, Quanta, Quantum

Block = Literal["attention", "mlp"]
Whole = Generator[Quantum, None, torch.Tensor]
"""Quanta that return one tensor at their end."""


@dataclass
class SubBlock:
    """Attention or the MLP of one layer over one micro-batch, cut along the first dimension of its input.

    Attention takes and returns [B, T, H], the MLP [N, H].
    """

    kind: Block
    run: Callable[[torch.Tensor], torch.Tensor]
    size: int
    """Rows (attention) or tokens (MLP) of a piece."""
    width: int
    """Tokens in a row (attention: T) or in a token (MLP: 1)."""
    needs_input_gradient: bool = False
    """True if a factor of a sub-block below is trained."""
    differentiated: bool = False
    """True if a factor of this sub-block or of one below is trained."""
    recompute: bool = False
    """Keep only the inputs, and run forward again in `backward`."""
    _tape: list[tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=list)

    def forward(self, whole: torch.Tensor) -> Whole:
        """Return the output, detached; the graphs of the pieces are kept for `backward`."""
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
        """Add to the gradients of the factors; return the gradient of the input, written over that of the output.

        If no sub-block below needs it, the gradient of the output is returned unchanged.
        """
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
        """Return the output without keeping anything for a backward pass."""
        result = whole
        for at in range(0, len(whole), self.size):
            count = min(self.size, len(whole) - at)
            yield Quantum("evaluate_mlp" if self.kind == "mlp" else "evaluate_attention", count * self.width)
            with torch.inference_mode(False), torch.no_grad():
                result = _placed(self.run(whole[at : at + count]), at, result, whole)
        return result


def sub_blocks(
    layers: Sequence[Any],
    adapts: Sequence[Callable[[Block], bool]],
    rotary: tuple[torch.Tensor, torch.Tensor],
    tokens: int,
    pieces: Pieces,
) -> list[SubBlock]:
    """Return the sub-blocks of a step on rows of `tokens`, in order.

    `adapts` says of each layer which of its sub-blocks have adapted modules.
    """
    blocks: list[SubBlock] = []
    trained_below = False
    for layer, adapted in zip(layers, adapts, strict=True):
        runs: dict[Block, partial[torch.Tensor]] = {
            "attention": partial(attention, layer, rotary),
            "mlp": partial(mlp, layer),
        }
        for kind, run in runs.items():
            size, width = (pieces.mlp_tokens, 1) if kind == "mlp" else (pieces.attention_rows, tokens)
            trained = trained_below or adapted(kind)
            blocks.append(SubBlock(kind, run, size, width, trained_below, trained, pieces.recompute))
            trained_below = trained
    return blocks


def attention(layer: Any, rotary: tuple[torch.Tensor, torch.Tensor], hidden_bth: torch.Tensor) -> torch.Tensor:
    """Run the first half of a decoder layer on some rows. Without a mask, sdpa attends causally."""
    normed = layer.input_layernorm(hidden_bth)
    output: torch.Tensor = layer.self_attn(hidden_states=normed, position_embeddings=rotary, attention_mask=None)[0]
    return hidden_bth + output


def mlp(layer: Any, hidden_nh: torch.Tensor) -> torch.Tensor:
    """Run the second half of a decoder layer on some tokens."""
    output: torch.Tensor = layer.mlp(layer.post_attention_layernorm(hidden_nh))
    return hidden_nh + output


def head(
    model: PreTrainedModel,
    hidden_nh: torch.Tensor,
    answers: Answers,
    size: int,
    weight_b: torch.Tensor,
    loss_sum: torch.Tensor,
) -> Whole:
    """Compute final norm, logits and loss of the answer tokens, `size` at a time, forward and backward in one piece.

    Adds their losses to `loss_sum` in place; returns the gradient of that sum with each row's losses times its weight,
    [N, H].
    """
    gradient_nh = hidden_nh
    for at in range(0, answers.count, size):
        part = answers.part(at, size)
        yield Quantum("head", part.count)
        with torch.inference_mode(False), torch.enable_grad():
            inner_mh = hidden_nh.index_select(0, part.index).requires_grad_()
            loss_m = F.cross_entropy(_logits(model, inner_mh), part.targets, reduction="none")
            torch.autograd.backward(loss_m, weight_b.index_select(0, part.rows))
            assert inner_mh.grad is not None
            gradient_nh = torch.zeros_like(hidden_nh) if at == 0 else gradient_nh
            gradient_nh.index_copy_(0, part.index, inner_mh.grad)
            loss_sum += loss_m.detach().sum()
    return gradient_nh


def evaluate_head(
    model: PreTrainedModel, hidden_nh: torch.Tensor, answers: Answers, size: int, scores_b3: torch.Tensor
) -> Quanta:
    """Add each row's loss and numbers of wrong and of all answer tokens to `scores_b3` in place, `size` at a time."""
    for at in range(0, answers.count, size):
        part = answers.part(at, size)
        yield Quantum("evaluate_head", part.count)
        with torch.inference_mode(False), torch.no_grad():
            logits_mv = _logits(model, hidden_nh.index_select(0, part.index))
            loss_m = F.cross_entropy(logits_mv, part.targets, reduction="none")
            wrong_m = logits_mv.argmax(-1) != part.targets
            scores_m3 = torch.stack((loss_m.double(), wrong_m.double(), torch.ones_like(loss_m).double()), dim=1)
            scores_b3.index_add_(0, part.rows, scores_m3)


def _logits(model: PreTrainedModel, hidden_mh: torch.Tensor) -> torch.Tensor:
    logits_mv: torch.Tensor = model.lm_head(model.model.norm(hidden_mh))
    return logits_mv.float()


def _placed(part: torch.Tensor, at: int, result: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Write `part` at `at` into the result, which the first part allocates; a part that is the whole is the result."""
    if len(part) == len(whole):
        return part
    result = torch.empty_like(whole) if at == 0 else result
    result[at : at + len(part)] = part
    return result


def _copied(source: torch.Tensor, into: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    into.copy_(source)
    return whole
