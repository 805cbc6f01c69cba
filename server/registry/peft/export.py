"""Export a version: a directory in PEFT's format, which peft and SGLang load, with a model card and checksums."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from server.registry.registry import IMPORTED, AdapterRegistry
from server.registry.version_dir import SUMS, checksums
from umbel import peft_dir
from umbel.adapter import AdapterManifest, AdapterRef
from umbel.base.files import json_object
from umbel.base.packed import Packing, packing_of
from umbel.errors import ConfigError
from umbel.peft_dir import CONFIG, MANIFEST, WEIGHTS
from umbel.printable import one_line

CARD = "README.md"
PRICE = "measured +0.016 nats, docs/how-to/choose-a-base.md"


def export(registry: AdapterRegistry, ref: AdapterRef, into: Path, *, base: str = "") -> Path:
    """Write a version to a new directory, whole or not at all, and return that directory.

    `base` is the name or path of the base model, for `base_model_name_or_path` and the card; without it they carry
    its fingerprint, which no library looks up. Raises ConfigError when the directory is there already.
    """
    if into.exists():
        raise ConfigError(f"{into} is there already; choose a new directory")
    blob, manifest = registry.read(ref)
    files: dict[str, bytes] = {
        CARD: card(manifest, base).encode(),
        CONFIG: peft_dir.encode_config(manifest, base=base or f"sha256:{manifest.base}"),
        MANIFEST: peft_dir.encode_manifest(manifest),
        WEIGHTS: blob,
    }
    sums = checksums({name: peft_dir.digest(content) for name, content in files.items()})
    into.parent.mkdir(parents=True, exist_ok=True)
    peft_dir.place(into, {**files, SUMS: sums.encode()})
    return into


def other_kind(manifest: AdapterManifest, base: str) -> str:
    """Say that the model directory `base` is of another kind than the bases that trained a version.

    Empty where it is of their kind, or no directory on this machine. Raises ConfigError for a damaged config.json.
    """
    config = Path(base) / "config.json"
    if not base or not config.is_file():
        return ""
    packing = packing_of(json_object(config))
    if manifest.bases:
        same = any((kind if kind in get_args(Packing) else "") == packing for kind in manifest.bases)
        largest_first = sorted(manifest.bases.items(), key=lambda one: -one[1])
        trained_on = " and ".join(f"{kind} ({share:.2g})" for kind, share in largest_first)
    elif manifest.fingerprint is not None:
        same = manifest.fingerprint.dense == (packing == "")
        trained_on = "a base in 16 or 32 bits" if manifest.fingerprint.dense else "a base in 4 bits"
    else:
        return ""
    return "" if same else f"trained on {trained_on}; on the other kind of base it is slightly worse: {PRICE}"


def card(manifest: AdapterManifest, base: str = "") -> str:
    """Return the model card in the Hugging Face hub's form: metadata, description, how to load it, how it was made."""
    name = manifest.ref.engine_name
    front = [
        *([f"base_model: {json.dumps(base)}"] if base else []),
        "library_name: peft",
        "tags: [lora, federated, umbel]",
    ]
    model = base or "BASE_MODEL"
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {manifest.ref}\n\nA LoRA adapter of rank {manifest.rank} on {', '.join(manifest.target_modules)}, "
        f"{_origin(manifest)}, made by umbel{' ' + manifest.code if manifest.code else ''} on "
        f"{manifest.created or 'an unknown day'}.",
        *([f"**This base**: the version was {warning}"] if (warning := other_kind(manifest, base)) else []),
        "## Loading\n\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model}"), "{name}")\n```\n\n'
        f"```sh\npython -m sglang.launch_server --model-path {model} --enable-lora --lora-paths {name}=./{name}\n"
        "# vLLM, by its documentation:\n"
        f"vllm serve {model} --enable-lora --max-lora-rank {manifest.rank} --lora-modules {name}=./{name}\n```",
        "## How it was made\n\n" + _table(("", ""), [(what, value) for what, value in _facts(manifest) if value]),
    ]
    if manifest.weights:
        rows = [
            (site, f"{share:.4f}", _plain(manifest.counts.get(site, {})), _plain(manifest.site_metrics.get(site, {})))
            for site, share in sorted(manifest.weights.items())
        ]
        parts.append("## Sites\n\n" + _table(("site", "share", "data", "metrics"), rows))
    if manifest.left_out:
        parts.append("## Left out\n\n" + _table(("site", "why"), sorted(manifest.left_out.items())))
    if manifest.skipped:
        parts.append("## Nothing worth training\n\n" + _table(("site", "why"), sorted(manifest.skipped.items())))
    if manifest.certificate:
        certificates = (manifest.certificate, manifest.change_certificate)
        errors = [
            (module, *(f"{found[module]:.3g}" if module in found else "" for found in certificates))
            for module in sorted(manifest.certificate)
        ]
        head = ("module", "of the exact version", "of the round's exact change")
        parts.append("## Relative error against the exact mean\n\n" + _table(head, errors))
    return "\n\n".join(parts) + "\n"


def _facts(manifest: AdapterManifest) -> list[tuple[str, str]]:
    fingerprint = manifest.fingerprint.model_dump() if manifest.fingerprint else {}
    return [
        ("stays at the sites", _own(manifest)),
        ("strategy", manifest.strategy), ("options", _plain(manifest.options)), ("round", str(manifest.round)),
        ("run", manifest.run_id), ("metrics", _plain(manifest.metrics)),
        ("came from", ", ".join(manifest.ancestors)), ("sha256 of the weights", manifest.digest),
        ("trained on", _plain(manifest.bases)), ("fingerprint of the base", manifest.base),
        *((f"its {part.replace('_', ' ')}", value) for part, value in fingerprint.items()),
        ("registry", manifest.lineage), ("sha256 of the run configuration", manifest.config),
    ]  # fmt: skip


def _origin(manifest: AdapterManifest) -> str:
    if manifest.strategy == IMPORTED:
        return "trained elsewhere and imported"
    return f"trained by {len(manifest.weights)} sites that kept their data" if manifest.round else "untrained"


def _own(manifest: AdapterManifest) -> str:
    """Describe the part of a version that stays at its sites; empty where there is none."""
    if manifest.personal is None:
        return ""
    if manifest.personal.part == "B":
        return "factor B: here it is the one that training began with, as a rule zero, which changes nothing"
    return f"an adapter of rank {manifest.personal.rank}, trained together with this one"


def _plain(values: object) -> str:
    entries = values.items() if isinstance(values, dict) else ()
    return ", ".join(f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in entries)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Format a Markdown table; text from a site cannot break out of its cell."""
    cells = [[one_line(" ".join(cell.split())).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *cells])
