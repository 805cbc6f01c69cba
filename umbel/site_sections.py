"""The tables of a site file, one class each; docs/configuration.md is made from what stands below every key."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from umbel.adapter import AdapterName
from umbel.base import LINEARS

OWNED_FLAGS = {
    "model_path": "[model].path", "served_model_name": "[model].served_name", "host": "[engine].host",
    "port": "[engine].port", "device": "[engine].device", "dtype": "[engine].dtype",
    "max_lora_rank": "[engine].max_lora_rank", "lora_target_modules": "[engine].target_modules",
    "max_loras_per_batch": "[engine].slots", "lora_paths": "the journal", "enable_lora": "umbel",
    "admin_api_key": "umbel", "api_key": "umbel", "sleep_on_idle": "umbel",
}  # fmt: skip
"""SGLang flags that umbel sets itself, and where."""
UNSERVED_FLAGS = {
    "tp": 1, "tp_size": 1, "tensor_parallel_size": 1, "pp_size": 1, "pipeline_parallel_size": 1, "dp": 1, "dp_size": 1,
    "data_parallel_size": 1, "nnodes": 1, "tokenizer_worker_num": 1, "quantization": None,
    "speculative_algorithm": None, "skip_server_warmup": False,
    "enable_custom_logit_processor": False, "enable_response_store": False,
}  # fmt: skip
"""SGLang flags with the only value that umbel can serve yet."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class SiteSection(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """What the federation calls this site."""
    state_dir: Path
    """Journal, adapters, logs and sockets; made with mode 0700."""
    socket: Path | None = None
    """The control API's Unix socket, open to the group, too. Default: `site.sock` in state_dir, for its owner only."""
    trusted_key: Path | None = None
    """The centre's public key (Ed25519, PEM). With it, no version and no order is taken that it did not sign."""
    signing_key: Path | None = None
    """The site's private key (Ed25519, PEM), with which it signs its updates."""


class ModelSection(Section):
    path: Path
    """A Hugging Face model directory: config.json, tokenizer, *.safetensors."""
    served_name: str = "base"
    """What users call the base without an adapter."""

    @field_validator("served_name")
    @classmethod
    def _no_version(cls, name: str) -> str:
        if not name or "@" in name or name.startswith("-") or any(c.isspace() or not c.isprintable() for c in name):
            raise ValueError(
                f"{name!r} cannot name the base: no spaces, no '-' at its beginning, and no '@', which is for versions "
                "of adapters"
            )
        return name


class AdapterSection(Section):
    name: AdapterName
    """What users put into `model` to be answered by the live version."""


class EngineSection(Section):
    host: str = "127.0.0.1"
    """The address users reach; 0.0.0.0 for all of the machine's."""
    port: int = Field(ge=1, le=65535)
    """Where users reach SGLang's OpenAI API."""
    api_keys: Path | None = None
    """A file of keys, one per line, mode 0600. With it users must send one: `Authorization: Bearer` or `x-api-key`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes an accelerator if there is one, and else any CPU through umbel's platform."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """In which the base is served and adapters are stored."""
    max_lora_rank: int = Field(default=16, ge=1, le=512)
    """The largest rank this site can serve; fixed while the engine runs."""
    target_modules: tuple[str, ...] = LINEARS
    """The linear layers that adapters may change."""
    slots: int = Field(default=5, ge=5)
    """Adapters on the device at a time: base, live, shadow, previous, draining."""
    drain_s: PositiveFloat = 30.0
    """How long open requests may go on when the site stops."""
    start_timeout_s: PositiveFloat = 600.0
    """How long the engine may take until it answers."""
    extra_args: dict[str, Any] = Field(default_factory=dict)
    """SGLang flags, passed on as they are: `max_total_tokens = 20000` becomes `--max-total-tokens 20000`."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables for the engine, such as OMP_NUM_THREADS."""

    @field_validator("target_modules")
    @classmethod
    def _known_linears(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in LINEARS]
        if unknown or not names:
            raise ValueError(f"{', '.join(unknown) or 'nothing'} cannot be adapted; choose from {', '.join(LINEARS)}")
        if {"q_proj", "k_proj", "v_proj"} & set(names) and not {"q_proj", "v_proj"} <= set(names):
            raise ValueError("SGLang needs q_proj and v_proj together once one of q, k, v is adapted")
        return tuple(name for name in LINEARS if name in names)

    @field_validator("extra_args")
    @classmethod
    def _servable(cls, args: dict[str, Any]) -> dict[str, Any]:
        for flag, value in args.items():
            plain = flag.lstrip("-").replace("-", "_")
            if plain in OWNED_FLAGS:
                raise ValueError(f"{flag} is set by {OWNED_FLAGS[plain]}; remove it here")
            if plain in UNSERVED_FLAGS and value != UNSERVED_FLAGS[plain]:
                raise ValueError(
                    f"{flag} = {value!r} cannot be served by umbel yet; only {UNSERVED_FLAGS[plain]!r} can"
                )
        return args

    @field_validator("env")
    @classmethod
    def _python_front_end(cls, env: dict[str, str]) -> dict[str, str]:
        if env.get("SGLANG_RUST_SERVER", "0") not in ("", "0"):
            raise ValueError("SGLANG_RUST_SERVER replaces the HTTP server that umbel's router lives in; remove it")
        return env


class TrainingSection(Section):
    data: Path
    """JSONL with `messages`, `prompt` and `completion`, or Alpaca fields. Never leaves the site."""
    eval_data: Path | None = None
    """Held-out examples for probes. Default: `eval_fraction` of `data`, the same ones every time."""
    eval_fraction: float = Field(default=0.1, gt=0, lt=1)
    """The share of `data` that is held out when there is no `eval_data`."""
    seq_len: int = Field(default=512, ge=8)
    """Tokens an example may have; longer ones are cut."""
    micro_batch: PositiveInt = 4
    """At most this many examples per forward pass; fewer where that is what memory or the targets allow."""
    memory_mb: PositiveInt | None = None
    """MB kept from the KV cache for activations and optimizer state. Default: what micro_batch needs, on top of it."""
    share_floor: float = Field(default=0.0, ge=0, lt=1)
    """The share of the time that training gets even where it breaks the targets; what that cost is reported."""
    share_cap: float = Field(default=1.0, gt=0, le=1)
    """The share of the engine's time that training may take."""

    @model_validator(mode="after")
    def _floor_below_cap(self) -> Self:
        if self.share_floor > self.share_cap:
            raise ValueError(f"share_floor = {self.share_floor} is above share_cap = {self.share_cap}")
        return self


class SloSection(Section):
    """What users were promised, and training leaves alone."""

    ttft_ms: PositiveFloat | None = None
    """Milliseconds to the first token. Default: three times what the engine needs without training."""
    tpot_ms: PositiveFloat | None = None
    """Mean milliseconds per later token. Default: twice what the engine needs without training."""
    quantile: float = Field(default=0.99, gt=0.5, lt=1)
    """The share of requests that must meet both."""
    batch_factor: float = Field(default=10.0, ge=1)
    """How many times as long a request with `"priority": "batch"` may take."""


class GuardSection(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """What verdicts call this task."""
    data: Path
    """JSONL as `[training].data`: examples of a task that no new version may break. Never leaves the site."""
    max_loss_ratio: float = Field(default=1.01, ge=1)
    """A shadow whose loss here is, with confidence, above this times that of what answers users now is rejected."""


class ShadowSection(Section):
    """What a new version must show before it answers users here."""

    max_loss_ratio: float = Field(default=1.0, gt=0)
    """A shadow is promoted when its held-out loss is, with confidence, below this times that of what answers users now.
    At 1 it must be better; above 1 one that is as good will do; below 1 it must be better by that much."""
    max_exact_drop: float = Field(default=0.0, ge=0, le=1)
    """A shadow whose share of exact matches is, with confidence, lower by more than this is rejected."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of the two-sided intervals that all of this is read from."""
    min_examples: PositiveInt = 30
    """With fewer examples, held out or in a guard, nothing is promoted: they cannot tell."""
    watch_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds for which a shadow that was not rejected is watched before the verdict; 0: it is judged at once. Must be
    well below the federation's grace-seconds, or the site's verdict comes too late to count."""
    canary_share: float = Field(default=0.0, ge=0, lt=1)
    """The share of the users whom a shadow answers while it is watched; the same ones every time."""
    mirror_share: float = Field(default=0.0, ge=0, le=1)
    """The share of the live version's requests that a watched shadow is given once more, when no user waits."""
    min_requests: PositiveInt = 100
    """The watch ends early when the shadow has answered this many, canary and mirror together."""
    max_latency_ratio: float = Field(default=1.5, ge=1, allow_inf_nan=False)
    """A version whose users wait, with confidence, over this times as long, for a first token or a next, is worse."""
    rollback_window_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds after a promotion in which a version that serves worse than the one before is rolled back; 0: never."""
    warm_prefixes: int = Field(default=8, ge=0, le=64)
    """The most used system prompts that a version computes before it answers users; 0: none."""
    guard: tuple[GuardSection, ...] = ()
    """Tasks on which no new version may be worse."""

    @model_validator(mode="after")
    def _a_watch_has_something_to_see(self) -> Self:
        shares = self.canary_share or self.mirror_share
        if self.watch_s and not shares:
            raise ValueError(f"watch_s = {self.watch_s:g} without canary_share or mirror_share would see nothing")
        if shares and not self.watch_s:
            raise ValueError("canary_share and mirror_share are of a watch; set watch_s")
        return self

    @field_validator("guard")
    @classmethod
    def _distinct_guards(cls, guards: tuple[GuardSection, ...]) -> tuple[GuardSection, ...]:
        if len({guard.name for guard in guards}) < len(guards):
            raise ValueError("two guards have the same name; a verdict could not tell them apart")
        return guards


class MetricsSection(Section):
    """What Prometheus scrapes; without this table there is nothing to scrape."""

    host: str = "127.0.0.1"
    """The address that Prometheus reaches. Without the table `[metrics]` nothing listens."""
    port: int = Field(default=9464, ge=1, le=65535)
    """Where `GET /metrics` is answered. Figures only: no texts, no users."""


class ExamplesSection(Section):
    """What users may give to be trained on."""

    enabled: bool = False
    """Whether answers are kept that a user accepts or corrects with `x-umbel-consent: train`. Needs umbel[examples]."""
    quarantine_hours: NonNegativeFloat = 24.0
    """How long an example waits before it can be released."""
    auto_release: bool = False
    """Whether it then is, without `umbel examples release`."""
    retention_days: PositiveFloat = 30.0
    """After which an example is deleted, wherever it is; from prepared data with the next start."""
    per_user: PositiveInt = 100
    """Examples that are kept of one user."""
