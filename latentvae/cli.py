"""The command line. torch and diffusers are imported inside the commands, so that `--help` answers at once."""

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from latentvae import __version__
from latentvae.errors import UserError

app = typer.Typer(
    name="latentvae",
    help="Train image VAEs for latent diffusion, and turn image datasets into latents.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback
    rich_markup_mode=None,
)

VaeOption = Annotated[str, typer.Option("--vae", help="diffusers folder, hub id, or single .safetensors file")]
SubfolderOption = Annotated[str | None, typer.Option(help="folder of the VAE inside a hub repository or folder")]
RevisionOption = Annotated[str | None, typer.Option(help="branch, tag or commit on the hub")]
VariantOption = Annotated[str | None, typer.Option(help="variant of the weight files, such as fp16")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. A user's mistake prints one line and exits 2; anything else keeps its traceback and exits 1."""
    logger = logging.getLogger("latentvae")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if _is_main_process() else logging.WARNING)
    try:
        app(args=None if arguments is None else list(arguments))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    finally:
        logger.removeHandler(handler)


def _version(value: bool) -> None:
    if value:
        print(f"latentvae {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and stop")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    images: Annotated[Path | None, typer.Option(help="folder of your own images instead of the built-in ones")] = None,
    out: Annotated[Path, typer.Option(help="folder for everything it makes; must not exist")] = Path("latentvae-demo"),
) -> None:
    """See it work in a few minutes, on a CPU.

    Trains a tiny VAE, exports it, loads it in plain diffusers, encodes photographs, reads the latents back and
    decodes them. Nothing is downloaded.
    """
    from latentvae.demo import run_demo

    run_demo(out, images=images)


@app.command()
def train(
    recipe: Annotated[str, typer.Option(help="name of a shipped recipe, or a YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change one field; may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run  [default: runs/<recipe>]")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|PATH", help="continue from the newest checkpoint of --out, or from one")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be done, and stop")] = False,
) -> None:
    """Train or fine-tune a VAE on your images.

    On several GPUs: accelerate launch -m latentvae train --recipe ...
    """
    from latentvae.recipe import build, load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        from latentvae.dry_run import describe

        print(describe(loaded))
        return
    folder = out if out is not None else Path("runs") / Path(recipe).stem
    result = build(loaded, folder, resume=resume).train()
    if not _is_main_process():
        return
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    print(f"{result.reason} after {result.images_seen} images" + (f": {metrics}" if metrics else ""))
    if result.model_folder is not None:
        print(f"model: {result.model_folder}")
    else:
        print(f"continue with: latentvae train --recipe {recipe} --out {folder} --resume auto (and the same --set)")


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
    options = _given(
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
        chosen = _given(dtype=pixel_dtype, range=pixel_range)
        options["pixels"] = PixelFormat(channels=model.config.in_channels, **chosen)
    print(encode_dataset(source, model, out, strict=strict, **options))


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
    print(decode_store(store, out, **_given(vae=vae, limit=limit)))


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


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="model folder, hub id, or single .safetensors file")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    format: Annotated[
        Literal["diffusers"], typer.Option(help="layout of the files; diffusers is the one there is")
    ] = "diffusers",
    dtype: Annotated[Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="of the written weights")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False,
    push_to_hub: Annotated[str | None, typer.Option(metavar="ID", help="also upload it as this repository")] = None,
) -> None:
    """Write a model for diffusers, and prove it.

    It is loaded back with plain diffusers, and configuration and outputs are compared, before success is reported.
    """
    from latentvae.export import export_model

    metrics_file = Path(model) / "metrics.json"  # beside the model of a finished run
    metrics = json.loads(metrics_file.read_text(encoding="utf-8")) if metrics_file.is_file() else None
    report = export_model(
        model, out, overwrite=overwrite, metrics=metrics, **_given(dtype=dtype, push_to_hub=push_to_hub)
    )
    print(f"{report.folder}: {report.num_parameters:,} parameters in {report.dtype}, {report.num_bytes / 1e6:.1f} MB")
    print(
        f"loaded back with plain diffusers: reconstructions differ by {report.reconstruction_difference:.1e}, "
        f"by rounding to {report.dtype} {report.rounding_difference:.1e} (relative, on {report.checked_on})"
    )


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="show this one")] = None,
    copy: Annotated[Path | None, typer.Option(metavar="FILE", help="write it there, to be edited")] = None,
) -> None:
    """List the shipped recipes, or show or copy one."""
    from latentvae.recipe import shipped_recipes

    shipped = shipped_recipes()
    if name is None:
        if copy is not None:
            raise UserError(f"--copy needs the name of a recipe: latentvae recipes NAME --copy {copy}")
        for known, path in sorted(shipped.items()):
            first = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            print(f"{known:<20} {first}")
        return
    if name not in shipped:
        raise UserError(f"there is no recipe {name!r}; shipped are: {', '.join(sorted(shipped))}")
    text = shipped[name].read_text(encoding="utf-8")
    if copy is None:
        print(text, end="")
        return
    if copy.exists():
        raise UserError(f"{copy} exists already: choose another file")
    from latentvae.files import write_text

    write_text(copy, text)
    print(f"wrote {copy}; train with: latentvae train --recipe {copy} --set data.source=DIR")


@app.command()
def info(path: Annotated[Path, typer.Argument(help="model folder or file, run, checkpoint or latent store")]) -> None:
    """Say what a folder or a weight file is."""
    from latentvae.info import describe_path

    for name, value in describe_path(path).items():
        print(f"{name:<20} {value}")


def _given(**options: Any) -> dict[str, Any]:
    """The options that were passed; the others keep the default of the function that owns them."""
    return {name: value for name, value in options.items() if value is not None}


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _one_process(command: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise UserError(f"latentvae {command} runs in one process so far, and {processes} were started: start one")
