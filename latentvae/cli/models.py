"""Commands about models: demo, train, convert, recipes, info."""

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from latentvae.cli.app import app, given, is_main_process
from latentvae.errors import UserError
from latentvae.files import write_text

logger = logging.getLogger("latentvae")


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
    from latentvae.assembly import build
    from latentvae.dry_run import describe, summarize
    from latentvae.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        print(describe(loaded))
        return
    folder = out if out is not None else Path("runs") / Path(recipe).stem
    trainer = build(loaded, folder, resume=resume)
    begun = loaded.model_copy(update={"loss": trainer.updater.objective.config})  # a continued run keeps its phases
    for line in summarize(begun, trainer.vae, trainer.micro_batch.get("size")):
        logger.info(line)
    result = trainer.train()
    if not is_main_process():
        return
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    print(f"{result.reason} after {result.images_seen} images" + (f": {metrics}" if metrics else ""))
    if result.model_folder is not None:
        print(f"model: {result.model_folder}")
    else:
        print(f"continue with: latentvae train --recipe {recipe} --out {folder} --resume auto (and the same --set)")


@app.command()
def convert(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="one weight file, or encoder and decoder of a tiny autoencoder (or what their paths share)"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder to write")],
    arch: Annotated[
        Literal["auto", "sd1", "sdxl", "sd3", "flux1", "taesd"],
        typer.Option(help="family, whose latent scaling no file holds; taesd: tiny autoencoders"),
    ] = "auto",
    scaling_factor: Annotated[float | None, typer.Option(help="in place of the family's")] = None,
    shift_factor: Annotated[float | None, typer.Option(help="in place of the family's")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False,
) -> None:
    """Turn a weight file of another tool into a diffusers folder.

    Takes LDM, CompVis and Stability files, whole Stable Diffusion checkpoints, and TAESD's tiny autoencoders, as
    safetensors or as pickles (read without running their code). The folder is loaded back and compared.
    """
    from latentvae.convert import convert_model

    options = given(scaling_factor=scaling_factor, shift_factor=shift_factor)
    report = convert_model(files, out, arch=arch, overwrite=overwrite, **options)
    print(f"{report.folder}: {report.class_name}, {report.num_parameters:,} parameters in {report.dtype}")
    for note in report.notes:
        print(f"note: {note}")
    print(f"loaded back: weights equal, outputs differ by {report.difference:.1e} (relative)")


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
    try:
        write_text(copy, text)
    except OSError as error:
        raise UserError(f"cannot write {copy}: {error.strerror or error}; choose another file") from error
    print(f"wrote {copy}; train with: latentvae train --recipe {copy} --set data.source=DIR")


@app.command()
def info(path: Annotated[Path, typer.Argument(help="model folder or file, run, checkpoint or latent store")]) -> None:
    """Say what a folder or a weight file is."""
    from latentvae.info import describe_path

    for name, value in describe_path(path).items():
        print(f"{name:<20} {value}")
