"""What a site takes in: a version is refused, with the reason, before anything of it is stored or loaded."""

from umbel import peft_dir
from umbel.adapter import AdapterManifest
from umbel.base import BaseFingerprint
from umbel.config import SiteConfig
from umbel.errors import AdapterError, BaseMismatch


def validate(
    config: SiteConfig, fingerprint: BaseFingerprint, shapes: peft_dir.Shapes,
    name: str, manifest: AdapterManifest, blob: bytes,
) -> None:  # fmt: skip
    """Raise AdapterError or BaseMismatch unless `blob` is the version of the manifest, and this site can serve it."""
    if manifest.name != name or name not in config.adapters:
        raise AdapterError(f"{manifest.ref}: this site serves {', '.join(s.name for s in config.adapter)}")
    if manifest.base != fingerprint.digest:
        raise BaseMismatch(
            f"{manifest.ref} was trained on the base {manifest.base[:12]}…, this site holds "
            f"{fingerprint.digest[:12]}…; copy the same model directory to both"
        )
    if peft_dir.digest(blob) != manifest.digest:
        raise AdapterError(f"{manifest.ref}: its bytes are not those of its manifest; send it again")
    tensors = peft_dir.decode(blob)
    wrong = next((key for key, array in tensors.items() if str(array.dtype) != config.engine.dtype), None)
    if wrong is not None:
        raise AdapterError(f"{manifest.ref}: {wrong} is {tensors[wrong].dtype}, this site serves {config.engine.dtype}")
    peft_dir.validate(tensors, shapes, rank=manifest.rank, max_rank=config.engine.max_lora_rank)
