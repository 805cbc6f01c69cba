"""Examples as users give them, and a scrubber that needs no Presidio."""

from pathlib import Path

from client.data.scrub import pseudonym
from serving.user_example import Example


def example(folder: Path, user: str = "eva", text: str = "call 0170 123", adapter: str = "support") -> Example:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "ward 7"}]
    return Example(
        user=pseudonym(folder, user), messages=messages, adapter=adapter, version=f"{adapter}@v1", kind="accepted"
    )


def scrub(text: str) -> str:
    return text.replace("0170 123", "<PHONE_NUMBER>")
