"""`Pin`: the version that answers one request, and its class, chosen once, before SGLang sees the request.

SGLang's endpoints each read `model` differently, and Anthropic's has no `priority`. So neither is written into the
body: the pin is in a context variable, and one hook on `TokenizerManager.generate_request`, `apply_pin`, applies it for
every endpoint.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

from serving.aliases import BASE_LABEL
from serving.priorities import Priority
from serving.router.asgi import Message, Send
from umbel.adapter import EngineRef


@dataclass
class Pin:
    """The version and the class of one request."""

    engine_name: str | None
    """The name inside SGLang (`support-v12`, `legal-sha256-…`); None is the base."""
    label: str
    """The version's name for users and counts (`support@v12`, `base`)."""
    priority: Priority
    apart: str | None = None
    """Keeps what the request leaves in the KV cache from others that the base answers; None: it is shared with them."""
    applied: bool = False
    """True once the tokenizer manager has taken the request with this version."""

    @classmethod
    def set(cls, ref: EngineRef | None, priority: Priority, apart: str | None = None) -> Self:
        """Pin the request that this task answers, and the tasks that come from it; None is the base."""
        pin = cls(ref.engine_name, str(ref), priority) if ref else cls(None, BASE_LABEL, priority, apart)
        _pin.set(pin)
        return pin

    def tagged(self, send: Send) -> Send:
        """Wrap `send`, so that the header `x-umbel-adapter` names the version that was applied.

        Some streams begin with an event before anything is generated. So messages are held back until the version has
        been applied or the response ends.
        """
        held: list[Message] = []

        async def tagged(message: Message) -> None:
            held.append(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not (self.applied or ended):
                return
            if self.applied and held[0]["type"] == "http.response.start":
                held[0]["headers"] = [*held[0].get("headers", []), (b"x-umbel-adapter", self.label.encode())]
            while held:
                await send(held.pop(0))

        return tagged


NOT_LOADED = "The version that is to answer is not loaded now; try again."
_pin: ContextVar[Pin | None] = ContextVar("umbel_pin", default=None)


def apply_pin(manager: Any, obj: Any, request: Any = None, *args: Any, **kwargs: Any) -> None:
    """Set version and class of a request, whatever its body asked for; a hook BEFORE `generate_request`.

    A request without a pin is the daemon's or the operator's own, or SGLang's warm-up. With
    `enable_priority_scheduling` SGLang would put one without a number below every class.
    """
    pin = _pin.get()
    if pin is None:
        obj.priority = Priority.INTERACTIVE.value if obj.priority is None else obj.priority
        return
    obj.lora_path = pin.engine_name
    obj.priority = pin.priority.value
    obj.extra_key = pin.apart  # part of the KV cache's key: a client must not choose it (sglang#24638)
    pin.applied = True


def refuse_unloaded(manager: Any, obj: Any) -> None:
    """Raise ValueError for a request whose version is not loaded; a hook BEFORE `_resolve_lora_path`.

    SGLang would load one that was unloaded again, by itself, or name to the user all that are loaded.
    """
    asked = obj.lora_path if isinstance(obj.lora_path, list) else [obj.lora_path]
    loaded = manager.lora_registry.get_all_adapters()
    if any(name is not None and name not in loaded for name in asked):
        raise ValueError(NOT_LOADED)
