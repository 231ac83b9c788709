"""The command `encode`: images to a latent store."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from latentvae.cli.app import RevisionOption, SubfolderOption, VaeOption, VariantOption, app, given, is_main_process
from latentvae.errors import UserError


@app.command()
def encode(
    source: Annotated[
        str,
        typer.Argument(
            help="folder of images, tar or Parquet files (path, glob, braces, URL), .txt or .jsonl list of paths, "
            "hf:owner/name, or python:module:function"
        ),
    ],
    vae: VaeOption,
    out: Annotated[Path | None, typer.Option(help="folder of the latent store; --dry-run needs none")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done, its disk and its time; write nothing")
    ] = False,
    resolution: Annotated[
        int | None, typer.Option(help="shorter side in pixels; the centre square is cut out  [default: 256]")
    ] = None,
    buckets: Annotated[
        str | None,
        typer.Option(help="sizes by aspect ratio instead: sdxl, or such as area=1048576,step=64,max-ratio=4"),
    ] = None,
    small: Annotated[
        Literal["skip", "keep", "upscale"] | None,
        typer.Option(
            help="images smaller than their bucket: leave out and count, keep at their size, or enlarge  "
            "[default: skip]"
        ),
    ] = None,
    filter: Annotated[
        Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] | None,
        typer.Option(help="of the resize, antialiased  [default: bicubic]"),
    ] = None,
    store: Annotated[
        Literal["auto", "moments", "mean", "sample"] | None,
        typer.Option(
            help="what to keep of the posterior; auto: the mean alone where the posterior is narrower than the "
            "rounding of --dtype  [default: moments, or mean of a model without a posterior]"
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp16", "bf16", "fp32"] | None, typer.Option(help="of the stored latents  [default: fp16]")
    ] = None,
    hflip: Annotated[bool, typer.Option("--hflip", help="encode every image mirrored too")] = False,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="of the encoder's arithmetic  [default: fp32]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of the noise of --store sample  [default: 0]")] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(metavar="N|auto", help="images per forward; auto: measured for each bucket  [default: 16]"),
    ] = None,
    unit_images: Annotated[
        int | None, typer.Option(help="images that are committed together, at most  [default: 1024]")
    ] = None,
    num_workers: Annotated[
        int | None, typer.Option(help="processes that read images  [default: one per core, 8 at most]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="such as cuda:1  [default: a GPU where there is one]")] = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="encode the units again in which images failed")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="exit 1 where any image could not be encoded")] = False,
    lease_seconds: Annotated[
        float | None,
        typer.Option(help="without a sign of life, after which another process takes a unit over  [default: 300.0]"),
    ] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="read a Hugging Face dataset in place, without a download")
    ] = False,
    split: Annotated[str | None, typer.Option(help="of a Hugging Face dataset")] = None,
    image_column: Annotated[str | None, typer.Option(help="of a table  [default: the one that holds images]")] = None,
    key_column: Annotated[
        str | None, typer.Option(help="of a table  [default: key, __key__ or id, else row numbers]")
    ] = None,
    subfolder: SubfolderOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    pixel_dtype: Annotated[
        Literal["uint8", "uint16", "float32"] | None, typer.Option(help="of the images  [default: uint8]")
    ] = None,
    pixel_range: Annotated[
        tuple[float, float] | None, typer.Option(help="darkest and brightest  [default: all of the integer type]")
    ] = None,
    background: Annotated[
        tuple[int, int, int] | None, typer.Option(help="colour behind transparent pixels  [default: 255 255 255]")
    ] = None,
    animation: Annotated[
        Literal["first", "refuse"] | None, typer.Option(help="of several frames: the first, or none  [default: first]")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="width times height above which an image is refused  [default: 89478485]")
    ] = None,
    icc: Annotated[
        Literal["srgb", "ignore"] | None,
        typer.Option(help="colour profiles: convert to sRGB, or ignore  [default: srgb]"),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"] | None,
        typer.Option(help="encode in the processes that were started, or on a Ray cluster  [default: local]"),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="of the cluster  [default: RAY_ADDRESS, or a Ray of its own on this machine]")
    ] = None,
    ray_actors: Annotated[int | None, typer.Option(help="encoders on the cluster  [default: one per GPU]")] = None,
) -> None:
    """Turn images into a latent store.

    Run it again with the same arguments to continue a store that was interrupted. On several GPUs: accelerate launch
    -m latentvae encode ...; any number of such commands may work on one store at once.
    """
    policy = given(background=background, animation=animation, max_pixels=max_pixels, icc=icc)
    pixels = given(dtype=pixel_dtype, range=pixel_range)
    options: dict[str, Any] = given(
        resolution=resolution,
        buckets=buckets,
        small=small,
        filter=filter,
        policy=policy or None,
        pixels=pixels or None,
        store=store,
        dtype=dtype,
        hflip=hflip,
        precision=precision,
        seed=seed,
        batch_size=batch_size,
        unit_images=unit_images,
        num_workers=num_workers,
        device=device,
        lease_seconds=lease_seconds,
        engine=engine,
        ray_address=ray_address,
        ray_actors=ray_actors,
        retry_errors=retry_errors,
        streaming=streaming,
        split=split,
        image_column=image_column,
        key_column=key_column,
        subfolder=subfolder,
        revision=revision,
        variant=variant,
    )
    if dry_run:
        if is_main_process():
            _tell_plan(source, vae, out, options)
        return
    if out is None:
        raise UserError("give --out, the folder of the latent store; or --dry-run")
    from latentvae.latents.encoding.encode import encode_dataset

    report = encode_dataset(source, vae, out, **options)
    if not is_main_process():
        return
    print(report)
    if strict and report.counts.error:
        raise typer.Exit(1)


def _tell_plan(source: str, vae: str, out: Path | None, options: dict[str, Any]) -> None:
    from latentvae.latents.encoding.estimate import plan_dataset

    print(plan_dataset(source, vae, out, **options))
