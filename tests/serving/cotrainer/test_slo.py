"""Targets and lengths of quanta follow from what was measured."""

import pytest

from serving.cotrainer.predictor import Predictor, PredictorState, prefill_batch
from serving.cotrainer.slo import IDLE_PART, LONG_PROMPT, Slo, default_slo, idle_quantum_target, quantum_target
from tests.toys.serving.latencies import DECODE_S, PREFILL_S, SLO, known


def test_quanta_are_shorter_than_what_an_iteration_leaves() -> None:
    predictor = known()
    assert quantum_target(SLO, predictor) == pytest.approx(0.5 * (0.03 - DECODE_S))
    assert quantum_target(Slo.usual(1.0, DECODE_S), predictor) == pytest.approx(0.05 * DECODE_S)


def test_default_targets_are_multiples_of_what_was_measured() -> None:
    slo = default_slo(known())
    assert slo is not None
    assert (slo.ttft_s, slo.tpot_s) == (pytest.approx(3 * (PREFILL_S + DECODE_S)), pytest.approx(2 * DECODE_S))
    assert default_slo(Predictor()) is None


@pytest.mark.parametrize("attention_s", [0.0, 2e-7, 1e-5], ids=["linear", "mixed", "all attention"])
@pytest.mark.parametrize("tokens", [1, 100, LONG_PROMPT, 3 * LONG_PROMPT])
def test_the_default_target_of_a_prompt_is_what_prompts_of_its_length_need(attention_s: float, tokens: int) -> None:
    """Three times the prefill at both ends; never less than the prefill itself up to three times the long end."""
    prefill = (0.02, 1e-4 if attention_s < 1e-6 else 0.0, attention_s, 0.0)
    predictor = Predictor()
    predictor.resume(
        PredictorState(
            coefficients={"decode": (DECODE_S, 0.0, 0.0), "prefill": prefill},
            high={"decode": 1.0, "prefill": 1.0},
            typical={"decode": DECODE_S, "prefill": PREFILL_S},
        )
    )
    slo = default_slo(predictor)
    assert slo is not None
    needed = predictor.expected(prefill_batch([(tokens, 0)])) + DECODE_S
    if attention_s == 0 or tokens == LONG_PROMPT:
        assert slo.first_token_s(tokens) == pytest.approx(3 * needed, rel=1e-3)
    assert slo.first_token_s(tokens) >= 0.99 * needed
    assert slo.ttft_s == pytest.approx(3 * (prefill[0] + DECODE_S))


def test_one_number_of_the_site_holds_for_every_prompt() -> None:
    assert SLO.first_token_s(1) == SLO.first_token_s(10_000) == SLO.ttft_s


def test_an_idle_engine_has_longer_quanta_but_never_shorter_ones() -> None:
    assert idle_quantum_target(SLO, busy=0.001) == pytest.approx(IDLE_PART * SLO.ttft_s)
    assert idle_quantum_target(SLO, busy=1.0) == 1.0


def test_only_the_batch_class_has_more_time() -> None:
    assert (SLO.factor(interactive=True), SLO.factor(interactive=False)) == (1.0, SLO.batch_factor)
