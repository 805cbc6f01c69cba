"""`Preference`: direct preference optimisation (DPO), by pairs of a chosen and a rejected answer to one prompt.

The loss of a pair is −log σ(β [(log π(chosen) − log π(rejected)) − (log π_ref(chosen) − log π_ref(rejected))]), with
log-probabilities summed over the tokens of an answer, and that of a step the mean over its pairs (Rafailov et al.,
arXiv 2305.18290, equation 7). The reference is the round's parent.

The gradient of a pair's loss is that of the two rows' summed losses, times βσ(−β […]) and its negative. So a step first
scores its rows, in a forward pass that keeps nothing; then each row is trained by itself with a known weight, and
micro-batches of any size give the same gradient. A step so costs another forward pass, about a third more; the
reference takes one forward pass for each pair, once in a round.
"""

from collections.abc import Callable
from itertools import islice

import torch
import torch.nn.functional as F

from serving.cotrainer.lanes.readback import Readback
from serving.cotrainer.microbatch import epochs, sent
from serving.cotrainer.objectives.objective import Draw, Objective, Score, Weighed
from serving.cotrainer.quantum import Quanta, Quantum
from umbel.errors import TrainingError
from umbel.messages import TrainPlan
from umbel.token_file import TokenFile

REFERENCE_SHARE = 0.2
"""Share of the plan's seconds after which no more pairs are scored under the parent: a step takes about four times as
long as the reference of its pairs, so what is scored by then is trained on once."""


class Preference(Objective):
    """DPO. An example is a pair: rows 2n (chosen) and 2n + 1 (rejected) of the token file."""

    def __init__(self, plan: TrainPlan, data: TokenFile, draw: Draw) -> None:
        """Raise TrainingError for a token file that cannot be of pairs."""
        if len(data) % 2:
            raise TrainingError(f"{data.path}: {len(data)} rows are no pairs; prepare the data again")
        super().__init__(plan, data, draw)
        self._reference: dict[int, float] = {}
        """Pair → log π_ref(chosen) − log π_ref(rejected) in nats, of those that may be drawn."""

    def prepare(self, score: Score, spent: Callable[[], float]) -> Quanta:
        """Score the pairs that will be drawn under the parent, those of a step at a time.

        Before each of them another job may have the buffers. Pairs for which there was no time are not drawn.
        """
        plan, pairs = self._plan, len(self._data) // 2
        drawn = list(dict.fromkeys(islice(epochs(pairs, plan.seed), min(plan.steps * plan.batch_size, pairs))))
        scored: list[tuple[list[int], Readback]] = []
        for at in range(0, len(drawn), plan.batch_size):
            yield Quantum("step")
            self._keep(scored)
            if at and spent() >= REFERENCE_SHARE:
                break
            some = drawn[at : at + plan.batch_size]
            margins_p = _margins(-(yield from score(_rows(some)))[:, 0])
            scored.append((some, Readback(margins_p)))
        yield Quantum("read_back")
        self._keep(scored)

    def draw(self) -> list[int]:
        """Return the rows of the next pairs, chosen and rejected in turn."""
        pairs: list[int] = []
        while len(pairs) < self._plan.batch_size:
            pairs += [pair for pair in self._draw(1) if pair in self._reference]
        return _rows(pairs)

    def weigh(self, rows: list[int], score: Score, device: torch.device) -> Weighed:
        """Score the rows of a step with the adapter as it is, and weigh each by what its pair is still lacking."""
        scores_e3 = yield from score(rows)
        beta, pairs = self._plan.beta, len(rows) // 2
        with torch.inference_mode(False), torch.no_grad():
            known = [self._reference[row // 2] for row in rows[::2]]
            reference_p = sent(torch.tensor(known, dtype=torch.float64), device)
            logits_p = beta * (_margins(-scores_e3[:, 0]) - reference_p)
            weight_p = beta * torch.sigmoid(-logits_p) / pairs
            loss = -F.logsigmoid(logits_p).sum()
            return torch.stack((weight_p, -weight_p), dim=1).flatten().float(), loss

    def _keep(self, scored: list[tuple[list[int], Readback]]) -> None:
        while scored:
            pairs, margins = scored.pop()
            self._reference |= zip(pairs, margins.read().tolist(), strict=True)


def _rows(pairs: list[int]) -> list[int]:
    return [row for pair in pairs for row in (2 * pair, 2 * pair + 1)]


@torch.inference_mode(mode=False)
@torch.no_grad()
def _margins(logs_e: torch.Tensor) -> torch.Tensor:
    """Return log π(chosen) − log π(rejected) of each pair [E / 2], from the log-probability of each row."""
    return logs_e[0::2] - logs_e[1::2]
