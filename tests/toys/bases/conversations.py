"""`conversations`: random conversations of the kinds that meet a tokenizer's and a template's seams."""

from hypothesis import strategies as st

from client.data.conversation import Conversation, Turn

PIECES = (
    " ", "  ", "\n", "\n\n", "\t", "a", "I", "7", "0", "2024", ".", ":", "...", "Paris", " pump", "SAE 30.",
    "é", "e\u0301", "ü", "A\u030a", "😀", "👩\u200d🔧", "🇫🇷", "日本", "油を", "한국", "مضخة",
    "def f(x):\n    return x\n", "{'a': [1, 2]}", "<b>", "# ", "```", "\\n", "%s", "{{ x }}", "{% if %}",
    "<|im_end", "|im_end|>", "< |end|>", "[INST", "/INST]", "</s", "<start_of_turn", "user\n", "assistant", "model\n",
)  # fmt: skip
"""Text that is written together from these. None is a token of a chat, though some are nearly one."""


def texts() -> st.SearchStrategy[str]:
    """Return texts of one to six pieces with something in them: spaces and line breaks at their ends, too."""
    return st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Draw one to four questions with answers, some behind a system turn, some behind the assistant's greeting.

    Turns often repeat each other's text. Some earlier answers carry no loss.
    """
    said = draw(st.lists(texts(), min_size=1, max_size=4))
    text = st.one_of(texts(), st.sampled_from(said))
    seldom = st.sampled_from([False, False, False, True])
    turns = [Turn("system", draw(text))] if draw(seldom) else []
    turns += [Turn("assistant", draw(text))] if draw(seldom) else []
    pairs = draw(st.integers(1, 4))
    for number in range(pairs):
        trained = number == pairs - 1 or not draw(seldom)
        turns += [Turn("user", draw(text)), Turn("assistant", draw(text), trained=trained)]
    return Conversation(tuple(turns))
