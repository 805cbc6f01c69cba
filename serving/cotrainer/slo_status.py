"""`slo_status`: the latency targets and what became of them, as `umbel status` shows it."""

from serving.cotrainer.governor import Governor, SloGovernor
from serving.trainer_socket import SloStatus


def slo_status(governor: Governor) -> SloStatus | None:
    """Return the targets and margins of an SloGovernor; None for another, and before there are targets."""
    slo = governor.slo
    if slo is None or not isinstance(governor, SloGovernor):
        return None
    return SloStatus(
        ttft_ms=slo.ttft_s * 1000,
        ttft_ms_per_token=slo.ttft_per_token_s * 1000,
        tpot_ms=slo.tpot_s * 1000,
        quantile=slo.quantile,
        margin_ttft=governor.margin_ttft.value,
        margin_tpot=governor.margin_tpot.value,
        debt_s=governor.slo_debt_s,
        answered=governor.answered,
        met=governor.met,
    )
