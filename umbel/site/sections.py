"""The tables of a site file, one class each; docs/reference/configuration.md comes from the docstrings of the keys.

Those of adapters are in `umbel.site.adapter_sections`.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from umbel.base.shapes import LINEARS, adaptable
from umbel.site import flags
from umbel.site.adapter_sections import GuardSection, Section, require_distinct


class SiteSection(Section):
    """The site itself: its name, its directory and its keys."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of this site in the federation."""
    state_dir: Path
    """Directory for journal, adapters, logs and sockets; created with mode 0700."""
    socket: Path | None = None
    """Unix socket of the control API for the ClientApp, open to its owner and group. Default: `site.sock` in state_dir,
    for the owner only. The operator's socket is always `operator.sock` in state_dir, for the owner only."""
    trusted_key: Path | None = None
    """Public key of the centre (Ed25519, PEM). With it, the site refuses versions and orders that this key did not
    sign."""
    signing_key: Path | None = None
    """Private key of this site (Ed25519, PEM). With it, the site signs its updates, hellos and verdicts."""


class ModelSection(Section):
    """The base model."""

    path: Path
    """Hugging Face model directory: config.json, tokenizer, *.safetensors."""
    served_name: str = "base"
    """Name with which users ask for the base without an adapter."""

    @field_validator("served_name")
    @classmethod
    def _no_version(cls, name: str) -> str:
        odd = any(letter.isspace() or letter in "@:" or not letter.isprintable() for letter in name)
        if not name or name.startswith("-") or odd:
            raise ValueError(
                f"{name!r} cannot name the base: no spaces, no '-' at its beginning, no '@', which is for versions of "
                "adapters, and no ':', which SGLang keeps for adapters and does not start with"
            )
        return name


class EngineSection(Section):
    """The SGLang engine."""

    host: str = "127.0.0.1"
    """Address on which the engine listens for users; 0.0.0.0 means every address of the machine."""
    port: int = Field(ge=1, le=65535)
    """Port of SGLang's OpenAI API, for users."""
    api_keys: Path | None = None
    """File of keys, one per line, mode 0600. As soon as there is any file of keys, here, in `[[adapter]]` or in
    `[[serve]]`, every request needs a known key: `Authorization: Bearer` or `x-api-key`. An adapter with keys of its
    own is open to those only; the base, and adapters without, to each key of the site. A key in several files opens all
    of them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the engine. `auto` takes an accelerator if there is one, else the CPU, through umbel's platform."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format in which the base is served and adapters are stored; the same at every site of a federation. A CPU
    without instructions for it is slow: `umbel check` warns."""
    max_lora_rank: int = Field(default=16, ge=1, le=512)
    """Largest rank that this site can serve; fixed while the engine runs."""
    target_modules: tuple[str, ...] = LINEARS
    """Linear layers that adapters may change."""
    slots: int | None = Field(default=None, ge=2)
    """Number of adapters on the device at a time, of which the base is one. Default: three more than there are adapters
    of `[[adapter]]` and `[[serve]]`, and at least 5: the base, each live one, a shadow, and one that is drained. With
    fewer, requests of some adapters wait for those of others."""
    drain_s: PositiveFloat = 30.0
    """Seconds that open requests get to finish when the site stops."""
    start_timeout_s: PositiveFloat = 600.0
    """Seconds that the engine may take until it answers."""
    hang_timeout_s: PositiveFloat = 120.0
    """Seconds that a running engine may be silent before it is killed and started again. Silent means that its HTTP
    server does not answer, or that nothing is computed although a token was asked for. Keep it above the longest single
    step of the engine, which is a chunk of a prompt on a slow device; a load of an adapter may take it twice."""
    extra_args: dict[str, Any] = Field(default_factory=dict)
    """SGLang flags, passed on unchanged: `max_total_tokens = 20000` becomes `--max-total-tokens 20000`. Refused, with
    the reason: flags that umbel sets itself, those with which the engine would serve something else than is trained
    (another template, tokenizer, number format, …), and names that SGLang does not know."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables for the engine, such as OMP_NUM_THREADS; refused where they change what it computes."""

    @field_validator("target_modules")
    @classmethod
    def _known_linears(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return adaptable(names)

    @field_validator("extra_args")
    @classmethod
    def _servable(cls, args: dict[str, Any]) -> dict[str, Any]:
        for flag, value in args.items():
            if why := flags.flag_refusal(flag, value):
                raise ValueError(why)
        if why := flags.pair_refusal(args):
            raise ValueError(why)
        return args

    @field_validator("env")
    @classmethod
    def _same_engine(cls, env: dict[str, str]) -> dict[str, str]:
        for why in flags.refused_variables(env):
            raise ValueError(why)
        return env


class TrainingSection(Section):
    """Training data, and the time and memory that training may take."""

    data: Path | None = None
    """JSONL file with `messages`, with `prompt` and `completion`, or with Alpaca fields, for adapters that name none of
    their own. It never leaves the site."""
    eval_data: Path | None = None
    """Held-out examples for probes, in the same form. Default: `eval_fraction` of `data`, the same ones every time."""
    eval_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the questions in `data` that is held out when there is no `eval_data`. In neither case is anything
    trained on that held-out examples or guards ask."""
    seq_len: int = Field(default=512, ge=8)
    """Maximum number of tokens of an example; longer examples are cut."""
    micro_batch: PositiveInt = 4
    """Maximum number of examples per forward pass; fewer where memory or the latency targets allow no more."""
    memory_mb: PositiveInt | None = None
    """MiB for activations and optimizer state, taken from the KV cache. Default: what `micro_batch` needs, or fewer
    examples, or recomputed activations, so that it is at most 60 % of what both share; `umbel check` tells it."""
    checkpoint_s: NonNegativeFloat = 30.0
    """Seconds of a round between two checkpoints, from which it goes on after a death of the engine or the daemon; 0
    means that none are written, and a round that is cut off begins again."""
    worth: Literal["measured", "all"] = "measured"
    """With `measured` a round trains what is worth it, while the loss falls on examples that are set aside: a tenth of
    each domain, 64 at most. With `all` it trains everything, for all of the order's steps."""
    share_floor: float = Field(default=0.0, ge=0, lt=1)
    """Share of the time that training gets even where that breaks the latency targets; the cost is reported."""
    share_cap: float = Field(default=1.0, gt=0, le=1)
    """Maximum share of the engine's time that training may take."""

    @model_validator(mode="after")
    def _floor_below_cap(self) -> Self:
        if self.share_floor > self.share_cap:
            raise ValueError(f"share_floor = {self.share_floor} is above share_cap = {self.share_cap}")
        return self


class SloSection(Section):
    """Latency that users were promised, and that training must not break."""

    ttft_ms: PositiveFloat | None = None
    """Milliseconds to the first token, one number for all prompts. Default: three times as long as the engine needs for
    the prompt tokens that are not in its cache, without training."""
    tpot_ms: PositiveFloat | None = None
    """Mean milliseconds per later token. Default: twice as long as the engine needs without training."""
    quantile: float = Field(default=0.99, gt=0.5, lt=1)
    """Share of requests that must meet both targets."""
    batch_factor: float = Field(default=10.0, ge=1)
    """A request with `"priority": "batch"` may take this many times as long."""


class ShadowSection(Section):
    """Conditions that a new version must meet before it answers users here."""

    max_loss_ratio: float = Field(default=1.0, gt=0)
    """A shadow is promoted when its held-out loss is, with confidence, below this many times the loss of the version
    (or base) that answers users now. At 1 the shadow must be better; above 1 it may be as good; below 1 it must be
    better by that much."""
    max_exact_drop: float = Field(default=0.0, ge=0, le=1)
    """A shadow is rejected when its share of exact matches is, with confidence, lower by more than this."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence level of the intervals used in verdicts (0.95 is 95 %, two-sided). One error is shared by all tests of
    a verdict, and by all verdicts by the same held-out examples since a promotion."""
    min_examples: PositiveInt = 30
    """Minimum number of held-out examples, and of examples in each guard. Examples that ask the same, or of which a few
    are much longer, count as fewer. With fewer nothing is promoted, because the difference cannot be told."""
    watch_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds for which a shadow that was not rejected is watched before the verdict; with 0 it is judged at once. Must
    be well below the federation's grace-seconds, or the site's verdict comes too late to count."""
    canary_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the users whom a shadow answers while it is watched."""
    redraw_users: bool = False
    """Draw other users for the canary and the control of each version. Without it the same users go first every
    time."""
    mirror_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the live version's requests that are repeated with a watched shadow, when no user waits."""
    min_requests: PositiveInt = 100
    """The watch ends early when the shadow has answered this many requests, canary and mirror together, and where it
    has a canary, those of at least `min_users` users."""
    min_users: PositiveInt = 20
    """Number of distinct users that each of two versions must answer before latencies and ratings are compared. With
    fewer of them they cannot be told apart from the habits of these users, and decide nothing."""
    too_few_users: Literal["probe", "keep"] = "probe"
    """What becomes of a shadow whose watch ends with fewer than `min_users`: `probe`, its probe alone decides; `keep`,
    it is not promoted."""
    max_latency_ratio: float = Field(default=1.5, ge=1, allow_inf_nan=False)
    """A version counts as worse when its users wait, with confidence, over this many times as long for the first token
    or for each later one."""
    rollback_window_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds after a promotion in which a version that serves worse than its predecessor is rolled back; 0 means
    never."""
    control_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the users whom the version before still answers in that time, for comparison."""
    warm_prefixes: int = Field(default=8, ge=0, le=64)
    """Number of the most used system prompts that a version computes before it answers users; 0 means none."""
    guard: tuple[GuardSection, ...] = ()
    """Tasks on which no new version may be worse."""

    @model_validator(mode="after")
    def _a_watch_has_something_to_see(self) -> Self:
        shares = self.canary_share or self.mirror_share
        if self.watch_s and not shares:
            raise ValueError(f"watch_s = {self.watch_s:g} without canary_share or mirror_share would see nothing")
        if shares and not self.watch_s:
            raise ValueError("canary_share and mirror_share are of a watch; set watch_s")
        if self.rollback_window_s and self.canary_share + self.control_share > 1:
            raise ValueError(f"canary_share and control_share are {self.canary_share + self.control_share:g} together; "
                             "they are different users, so at most 1")  # fmt: skip
        return self

    @field_validator("guard")
    @classmethod
    def _distinct_guards(cls, guards: tuple[GuardSection, ...]) -> tuple[GuardSection, ...]:
        return require_distinct(guards)


class MetricsSection(Section):
    """Endpoint that Prometheus scrapes; without this table nothing listens."""

    host: str = "127.0.0.1"
    """Address on which metrics are served. Without the table `[metrics]` nothing listens."""
    port: int = Field(default=9464, ge=1, le=65535)
    """Port on which `GET /metrics` is answered. It tells figures only: no texts, no users."""


class ExamplesSection(Section):
    """Examples that users give, to be trained on."""

    enabled: bool = False
    """Keep answers that a user accepts or corrects with `x-umbel-consent: train`. Needs umbel[examples]."""
    quarantine_hours: NonNegativeFloat = 24.0
    """Hours that an example waits before it can be released."""
    auto_release: bool = False
    """Release every example after its quarantine, without `umbel examples release`."""
    retention_days: PositiveFloat = 30.0
    """Days after which an example is deleted everywhere; from prepared data before the next round."""
    per_user: PositiveInt = 100
    """Maximum number of examples that are kept of one user."""
    max_mb: PositiveInt = 256
    """MB on disk that all examples together may take; then no more are kept until room comes back. One example has at
    most 64 KiB."""
