"""The fields that users' requests may have, by route; everything else is refused by name.

body        bytes ↔ the request, with one meaning only
values      checks of numbers, texts, lists and objects
schemas     JSON schemas, which SGLang compiles into grammars
tools       functions that an answer may call
sampling    fields of all of OpenAI's routes
chat, completions, responses, messages    the fields of one route each
routes      path → fields; what is refused everywhere, and why
"""
