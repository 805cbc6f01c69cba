"""`Preference`: direct preference optimisation (DPO), by pairs of a chosen and a rejected answer to one prompt.

The loss of a pair is −log σ(β [(log π(chosen) − log π(rejected)) − (log π_ref(chosen) − log π_ref(rejected))]), with
log-probabilities summed over the tokens of an answer, and that of a step the mean over its pairs (Rafailov et al.,
arXiv 2305.18290, equation 7). The reference is the round's parent.

The gradient of a pair's loss is that of the two rows' summed losses, times βσ(−β […]) and its negative. So a step first
scores its rows, in a forward pass that keeps nothing; then each row is trained by itself with a known weight, and
micro-batches of any size give the same gradient. A step so costs another forward pass, about a third more; the
reference takes one forward pass for each pair, once in a round and again where a round goes on from a checkpoint.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from serving.cotrainer.lanes.readback import Readback
from serving.cotrainer.microbatch import sent
from serving.cotrainer.objectives.objective import Objective, Score, Weighed
from serving.cotrainer.quantum import Quanta, Quantum
from umbel.messages import TrainPlan
from umbel.token_file import TokenFile

REFERENCE_SHARE = 0.2
"""Share of the plan's seconds after which no more pairs are scored under the parent: a step takes about four times as
long as the reference of its pairs, so what is scored by then is trained on once."""


class Preference(Objective):
    """DPO. An example is a pair: rows 2n (chosen) and 2n + 1 (rejected) of the token file."""

    def __init__(self, plan: TrainPlan, data: TokenFile) -> None:
        super().__init__(plan, data)
        self._reference: dict[int, float] = {}
        """Pair → log π_ref(chosen) − log π_ref(rejected) in nats, of those that may be drawn."""

    def prepare(self, ahead: Callable[[], list[int]], score: Score, spent: Callable[[], float]) -> Quanta:
        """Score the pairs that will be drawn under the parent, each by itself.

        So a pair's reference is the same to the bit, whatever else is drawn: a job that goes on from a checkpoint
        computes it again. Before each pair another job may have the buffers. Pairs for which there was no time, once
        there are enough for a step, are not drawn.
        """
        self._reference.clear()
        scored: list[tuple[int, Readback]] = []
        for number, pair in enumerate(ahead()):
            yield Quantum("step")
            self._keep(scored)
            if number >= self._plan.batch_size and spent() >= REFERENCE_SHARE:
                break
            scores_e3 = yield from score(self.rows([pair]))
            scored.append((pair, Readback(_margins(-scores_e3[:, 0]))))
        yield Quantum("read_back")
        self._keep(scored)

    def knows(self, example: int) -> bool:
        """Return whether a pair has been scored under the parent."""
        return example in self._reference

    def rows(self, examples: list[int]) -> list[int]:
        """Return the rows of some pairs, chosen and rejected in turn."""
        return [row for pair in examples for row in (2 * pair, 2 * pair + 1)]

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

    def _keep(self, scored: list[tuple[int, Readback]]) -> None:
        while scored:
            pair, margin = scored.pop()
            self._reference[pair] = float(margin.read())


@torch.inference_mode(mode=False)
@torch.no_grad()
def _margins(logs_e: torch.Tensor) -> torch.Tensor:
    """Return log π(chosen) − log π(rejected) of each pair [E / 2], from the log-probability of each row."""
    return logs_e[0::2] - logs_e[1::2]
