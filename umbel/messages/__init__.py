"""The messages between centre and site: bodies of Flower messages and of the site's control API.

Both ends use these definitions. Every count is a sum, so that the centre can add up sites without trusting their means.
"""

from umbel.messages.hello import Hello, HelloQuery
from umbel.messages.message import NONCE, Failure, Message
from umbel.messages.training import JobState, Objective, RoundOrder, RoundQuery, RoundReport, Submit, TrainPlan
from umbel.messages.versions import (
    AdapterQuery,
    Decision,
    Evaluation,
    LiveVersion,
    Restore,
    Restored,
    Shadow,
    ShadowReport,
    Verdict,
    VersionQuery,
)

__all__ = [
    "NONCE",
    "AdapterQuery",
    "Decision",
    "Evaluation",
    "Failure",
    "Hello",
    "HelloQuery",
    "JobState",
    "LiveVersion",
    "Message",
    "Objective",
    "Restore",
    "Restored",
    "RoundOrder",
    "RoundQuery",
    "RoundReport",
    "Shadow",
    "ShadowReport",
    "Submit",
    "TrainPlan",
    "Verdict",
    "VersionQuery",
]
