"""`umbel base …`: prepare the base model of a federation."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from umbel import signing
from umbel.base.shapes import read_config
from umbel.cli.console import calls, explained, part_of
from umbel.site.memory import ITEMSIZE, kv_bytes_per_token

GB = 10**9
PACK = "umbel base pack models/llama-8b models/llama-8b-nf4"
base_app = typer.Typer(no_args_is_help=True, help="Prepare the base model of a federation.", epilog=calls(PACK))


@base_app.command("pack", epilog=calls(PACK, PACK + " --signing-key centre.pem"))
def pack(
    model: Annotated[Path, typer.Argument(help="The base: a Hugging Face model directory in 16 or 32 bits.")],
    out: Annotated[Path, typer.Argument(help="A new directory for the packed base.")],
    quant_type: Annotated[
        Literal["nf4", "fp4"], typer.Option(help="Kind of the 4-bit numbers; nf4 is the more exact one.")
    ] = "nf4",
    signing_key: Annotated[
        Path | None, typer.Option(help="The centre's private key: signs where the packed base comes from.")
    ] = None,
) -> None:
    """Pack a base's linear layers in 4 bits (bitsandbytes), so that an 8B model takes 5.7 GB instead of 16.

    Do it once, and copy the directory to every site: packing it again elsewhere may give other bytes, and then the
    sites' bases differ. Every site needs bitsandbytes.
    """
    with explained():
        key = signing.read_private(signing_key) if signing_key else None
        with part_of("site"):
            from serving.four_bit.pack import pack as packed_into
        packed = packed_into(model, out, quant_type=quant_type, key=key)
        tokens = (packed.before - packed.after) // kv_bytes_per_token(read_config(model), ITEMSIZE["bfloat16"])
        print(
            f"{out}: {packed.after / GB:.2f} GB instead of {packed.before / GB:.2f} GB, which leaves room for "
            f"{tokens:,} more tokens of KV cache in 16 bits; the weights are off by {packed.mean_error:.1%} of their "
            "norm on average, measured on the files as written"
        )
        print(f"copy this directory to every site, and name it in [model].path; {out}/origin.json says what it is of")
