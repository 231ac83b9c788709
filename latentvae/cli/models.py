"""Commands about models: demo, train, export, recipes, info."""

import json
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
    from latentvae.dry_run import describe, summarize
    from latentvae.recipe import build, load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        print(describe(loaded))
        return
    folder = out if out is not None else Path("runs") / Path(recipe).stem
    trainer = build(loaded, folder, resume=resume)
    for line in summarize(loaded, trainer.vae):
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
        model, out, overwrite=overwrite, metrics=metrics, **given(dtype=dtype, push_to_hub=push_to_hub)
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
