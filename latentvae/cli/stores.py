"""Commands about latent stores: encode, decode, verify."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from latentvae.cli.app import RevisionOption, SubfolderOption, VaeOption, VariantOption, app, given
from latentvae.errors import UserError


@app.command()
def encode(
    source: Annotated[str, typer.Argument(help="folder of images, or python:module:function")],
    vae: VaeOption,
    out: Annotated[Path, typer.Option(help="folder of the latent store")],
    resolution: Annotated[
        int | None, typer.Option(help="shorter side in pixels; the centre square is cut out  [default: 256]")
    ] = None,
    subfolder: SubfolderOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    store: Annotated[
        Literal["moments", "mean", "sample"] | None,
        typer.Option(help="what to keep of the posterior  [default: moments]"),
    ] = None,
    dtype: Annotated[
        Literal["fp16", "bf16", "fp32"] | None, typer.Option(help="of the stored latents  [default: fp16]")
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="of the encoder's arithmetic  [default: fp32]")
    ] = None,
    small: Annotated[
        Literal["skip", "upscale"] | None,
        typer.Option(help="images smaller than the resolution: leave out and count, or enlarge  [default: skip]"),
    ] = None,
    pixel_dtype: Annotated[
        Literal["uint8", "uint16", "float32"] | None, typer.Option(help="of the images  [default: uint8]")
    ] = None,
    pixel_range: Annotated[
        tuple[float, float] | None, typer.Option(help="darkest and brightest  [default: all of the integer type]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="images per forward  [default: 16]")] = None,
    unit_images: Annotated[int | None, typer.Option(help="images per shard, at most  [default: 1024]")] = None,
    num_workers: Annotated[
        int | None, typer.Option(help="processes that read images  [default: one per core, 8 at most]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="such as cuda:1  [default: a GPU where there is one]")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="fail where any image could not be encoded")] = False,
) -> None:
    """Turn images into a latent store.

    Run it again with the same arguments to continue a store that was interrupted.
    """
    from latentvae.checkpoint import load_model
    from latentvae.images import PixelFormat
    from latentvae.latents.encode import encode_dataset

    _one_process("encode")
    is_plain = (subfolder, revision, variant, pixel_dtype, pixel_range) == (None,) * 5
    model = vae if is_plain else load_model(vae, subfolder=subfolder, revision=revision, variant=variant)
    options = given(
        resolution=resolution,
        store=store,
        dtype=dtype,
        precision=precision,
        small=small,
        batch_size=batch_size,
        unit_images=unit_images,
        num_workers=num_workers,
        device=device,
    )
    if not isinstance(model, str) and (pixel_dtype or pixel_range):
        chosen = given(dtype=pixel_dtype, range=pixel_range)
        options["pixels"] = PixelFormat(channels=model.config.in_channels, **chosen)
    report = encode_dataset(source, model, out, **options)
    print(report)
    if strict and report.counts.error:
        raise typer.Exit(1)


@app.command()
def decode(
    store: Annotated[Path, typer.Argument(help="folder of a latent store")],
    out: Annotated[Path, typer.Option(help="folder for the pictures")],
    vae: Annotated[
        str | None, typer.Option(help="diffusers folder, hub id or file  [default: the one that encoded]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="decode the first N only")] = None,
) -> None:
    """Turn the latents of a store into pictures."""
    from latentvae.latents.decode import decode_store

    _one_process("decode")
    print(decode_store(store, out, **given(vae=vae, limit=limit)))


@app.command()
def verify(store: Annotated[Path, typer.Argument(help="folder of a latent store")]) -> None:
    """Check that a latent store is whole.

    Plan, records, sizes and headers are read, not the latents themselves. Exits 1 where something is wrong.
    """
    from latentvae.latents.verify import verify_store

    report = verify_store(store)
    print(report)
    if not report.is_whole:
        raise typer.Exit(1)


def _one_process(command: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise UserError(f"latentvae {command} runs in one process so far, and {processes} were started: start one")
