"""`UmbelError` and its subclasses: every error that umbel raises on purpose.

    UmbelError
    ├── ConfigError        (ValueError)    a site file or run configuration cannot be used
    ├── DataError          (ValueError)    training data cannot be used
    ├── AdapterError       (ValueError)    an adapter is refused, before any engine sees it
    ├── BaseMismatch       (ValueError)    two parties do not hold the same frozen base
    ├── UnsupportedModel   (ValueError)    a base that cannot be viewed, trained or served
    ├── WireError          (ValueError)    bytes from outside that do not decode to what they claim
    ├── RequestRefused     (ValueError)    a user's request holds what is not taken here
    ├── NotFound           (LookupError)   no such version, round or alias
    ├── Conflict           (RuntimeError)  a name is taken by something different
    ├── EngineError        (RuntimeError)  the SGLang server does not start, answer or obey
    │   ├── EngineGone                     the server went away; the daemon is restarting it
    │   └── NoAnswer       (TimeoutError)  the server lives and did not answer in time
    ├── TrainingError      (RuntimeError)  a training or evaluation job stopped
    │   └── CoTrainerSilent (TimeoutError) the co-trainer lives and did not answer in time
    ├── JournalError       (RuntimeError)  a site's journal is damaged
    ├── NoRoom             (RuntimeError)  a disk is full, or would be
    └── RegistryError      (RuntimeError)  the adapter registry is damaged or refuses a change

A message says what is wrong, where, and what to do about it:

    AdapterError: adapter: rank 16 is not within 1..8, the engine's; raise [engine].max_lora_rank at every site and
    restart, or lower the rank of the run
"""


class UmbelError(Exception):
    """Root of the tree: catch this to catch everything umbel raises on purpose."""


class ConfigError(UmbelError, ValueError):
    """A site file or run configuration cannot be used."""


class DataError(UmbelError, ValueError):
    """Training data cannot be used: missing, malformed, or without a token to learn from."""


class AdapterError(UmbelError, ValueError):
    """An adapter is refused: not finite, wrong shape, rank, base, parent, digest or signature."""


class BaseMismatch(UmbelError, ValueError):
    """Two parties do not hold the same frozen base; the message says which part differs."""


class UnsupportedModel(UmbelError, ValueError):
    """A model family or weight layout that umbel cannot view, train or serve."""


class WireError(UmbelError, ValueError):
    """Bytes from outside that are too large or do not decode to what they claim."""


class RequestRefused(UmbelError, ValueError):
    """A user's request holds a field or a value that is not taken here; `field` says where, None is the body itself."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotFound(UmbelError, LookupError):
    """No such version, round or alias."""


class Conflict(UmbelError, RuntimeError):
    """A name or key is already taken by something different."""


class EngineError(UmbelError, RuntimeError):
    """The SGLang server does not start, answer or obey."""


class EngineGone(EngineError):
    """The SGLang server went away during a job; the daemon is restarting it."""


class NoAnswer(EngineError, TimeoutError):
    """The SGLang server did not answer in time: it lives, and may still do what was asked."""


class TrainingError(UmbelError, RuntimeError):
    """A training or evaluation job stopped before its end."""


class CoTrainerSilent(TrainingError, TimeoutError):
    """The co-trainer did not answer in time: it may still do what was asked."""


class JournalError(UmbelError, RuntimeError):
    """A site's journal is damaged, so the site cannot know which version was live."""


class NoRoom(UmbelError, RuntimeError):
    """A disk is full, or what was sent would leave too little room on it."""


class RegistryError(UmbelError, RuntimeError):
    """The adapter registry is damaged or refuses a change."""
