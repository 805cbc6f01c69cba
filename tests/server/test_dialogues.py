"""What the centre asks a site, and when it stops asking."""

import pytest

from server import dialogues
from server.dialogues import Reply
from tests.toys.federation import v
from tests.toys.site import BASE
from umbel.adapter import AdapterManifest
from umbel.messages import ShadowReport, ShadowState, Verdict

REF = str(v(1))
MANIFEST = AdapterManifest(
    name="support", version=1, digest="0" * 64, base=BASE.digest, lineage="test", round=1, rank=2,
    target_modules=("q_proj", "v_proj"),
)  # fmt: skip


def test_a_shadow_that_is_watched_is_asked_for_until_it_has_a_verdict() -> None:
    dialogue = dialogues.shadow(MANIFEST, b"", "")
    request = next(dialogue)
    assert request.message_type == "query.shadow"
    for state in (ShadowState.VALIDATING, ShadowState.PROBING, ShadowState.WATCHING, ShadowState.WATCHING):
        request = dialogue.send(Reply(ShadowReport(ref=REF, state=state)))
        assert (request.message_type, request.delay) == ("query.collect", dialogues.POLL_S)
    judged = ShadowReport(ref=REF, state=ShadowState.JUDGED, verdict=Verdict(accepted=True, reasons=("better",)))
    with pytest.raises(StopIteration) as stop:
        dialogue.send(Reply(judged))
    assert stop.value.value == judged
