"""`umbel base …`: prepare the base model of a federation."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from umbel import signing
from umbel.base.shapes import base_bytes, read_config
from umbel.cli.console import calls, explained, part_of
from umbel.site.memory import ITEMSIZE, kv_bytes_per_token

MB = 10**6
PACK = "umbel base pack models/llama-8b models/llama-8b-nf4"
base_app = typer.Typer(no_args_is_help=True, help="Prepare the base model of a federation.", epilog=calls(PACK))


@base_app.command("pack", epilog=calls(PACK, PACK + " --signing-key signing.key"))
def pack(
    model: Annotated[Path, typer.Argument(help="The base: a Hugging Face model directory in 16 or 32 bits.")],
    out: Annotated[Path, typer.Argument(help="A new directory for the packed base.")],
    quant_type: Annotated[
        Literal["nf4", "fp4"], typer.Option(help="Kind of the 4-bit numbers; nf4 is the more exact one.")
    ] = "nf4",
    signing_key: Annotated[
        Path | None,
        typer.Option(help="The centre's private key: signs origin.json, for sites with a trusted_key and mixed-bases."),
    ] = None,
) -> None:
    """Pack a base's linear layers in 4 bits (bitsandbytes), so that an 8B model takes 5.7 GB instead of 16.

    Do it once, and copy the directory to every site: packed again elsewhere it may have other bytes, and then
    be another base. Every site needs bitsandbytes. Missing folders above OUT are made.
    """
    with explained():
        key = signing.read_private(signing_key) if signing_key else None
        with part_of("site"):
            from serving.four_bit.pack import pack as packed_into
        errors = packed_into(model, out, quant_type=quant_type, key=key)
        held, dense = base_bytes(out, ITEMSIZE["bfloat16"])
        off = sum(errors.values()) / len(errors)
        tokens = (dense - held) // kv_bytes_per_token(read_config(model), ITEMSIZE["bfloat16"])
        print(
            f"{out}: served in bfloat16 it takes {held / MB:,.1f} MB instead of {dense / MB:,.1f}, which leaves room "
            f"for {tokens:,} more tokens of KV cache; the weights are off by {off:.1%} of their norm on average, "
            "measured on the files as written"
        )
        print(f"copy this directory to every site, and name it in [model].path; {out}/origin.json says what it is of")
