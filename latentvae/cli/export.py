"""The command that hands a model or the latents of a store to others."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from latentvae.cli.app import app, given
from latentvae.errors import UserError, one_line

MODEL_FORMATS = ("diffusers", "ldm")
STORE_FORMATS = ("webdataset", "parquet", "sd-scripts")


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="model (folder, hub id, .safetensors file), run, or folder or URL of a latent store")
    ],
    out: Annotated[Path, typer.Option(help="folder to write; with --format ldm a .safetensors file")],
    format: Annotated[
        Literal["diffusers", "ldm", "webdataset", "parquet", "sd-scripts"] | None,
        typer.Option(
            help="diffusers, or ldm for one file, for a model; the others for a store  [default: diffusers, webdataset]"
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        typer.Option(help="of the written weights, or latents (not bf16)  [default: fp32; ldm: as it is]"),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="ldm: write a copy of this checkpoint with the model as its VAE"),
    ] = None,
    any_shape: Annotated[
        bool, typer.Option("--any-shape", help="ldm: also what ComfyUI cannot build, for loaders given its config.json")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="model: replace what is there")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ID", help="model: also upload it as this repository")
    ] = None,
    posterior: Annotated[
        Literal["mode", "sample", "moments"] | None,
        typer.Option(help="store: mean, a sample, or mean and logvar  [default: mean; sd-scripts: sample]"),
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="store: as the VAE's pipelines do, not raw")] = False,
    seed: Annotated[int | None, typer.Option(help="store: of the samples  [default: 0]")] = None,
    captions: Annotated[
        str | None, typer.Option(help="store: a table or source of captions by key; `source`: the one that was encoded")
    ] = None,
    shard_images: Annotated[int | None, typer.Option(help="store: images per file, at most  [default: 4096]")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="store: what is there of one that is not complete")
    ] = False,
    family: Annotated[
        Literal["sd", "sdxl", "sd3", "flux"] | None,
        typer.Option(help="store, sd-scripts: whose caches to write  [default: by the VAE's scaling factor]"),
    ] = None,
) -> None:
    """Write a model for diffusers, ComfyUI and the like, or the latents of a store for another trainer.

    A model is loaded back with plain diffusers, and weights and outputs are compared, before success is reported. Of a
    training run the finished model is taken.
    """
    for_store = given(posterior=posterior, seed=seed, captions=captions, shard_images=shard_images, family=family)
    for_store |= ({"normalize": True} if normalize else {}) | ({"partial": True} if partial else {})
    for_model = given(push_to_hub=push_to_hub, into=into) | ({"overwrite": True} if overwrite else {})
    for_model |= {"any_shape": True} if any_shape else {}
    is_store = "://" in source or (Path(source) / "manifest.json").is_file()
    kind, formats, misfits = ("store", STORE_FORMATS, for_model) if is_store else ("model", MODEL_FORMATS, for_store)
    if format is not None and format not in formats:
        raise UserError(f"{source} is a {kind}, and --format {format} is not for one: choose {', '.join(formats)}")
    if misfits:
        raise UserError(f"{source} is a {kind}, and --{min(misfits).replace('_', '-')} is not for one")
    if is_store:
        _export_store(source, out, given(format=format, dtype=dtype) | for_store)
        return
    is_ldm = format == "ldm"
    of_other_format = for_model.keys() & ({"push_to_hub"} if is_ldm else {"into", "any_shape"})
    if of_other_format:
        wanted = "diffusers" if is_ldm else "ldm"
        raise UserError(f"--{min(of_other_format).replace('_', '-')} is for --format {wanted}")
    if not is_ldm and out.suffix == ".safetensors":
        raise UserError(f"{out} is the name of a file: add --format ldm, or name a folder")
    (_export_file if is_ldm else _export_model)(_model_of(source), out, given(dtype=dtype) | for_model)


def _model_of(source: str) -> str:
    """The finished model where `source` is a run, otherwise `source`."""
    run = Path(source)
    if not (run / "recipe.yaml").is_file() or (run / "config.json").is_file():
        return source
    if (run / "model" / "config.json").is_file():
        return str(run / "model")
    best = run / "best"
    instead = f"export {best}, its best model so far, or" if (best / "config.json").is_file() else "to do so,"
    raise UserError(f"{source} is a run that has not finished: {instead} continue it with train --resume auto")


def _export_store(source: str, out: Path, options: dict[str, Any]) -> None:
    from latentvae.latents.operating.hand_over import export_store

    if options.get("captions") == "source":
        options["captions"] = True
    print(export_store(source, out, **options))


def _export_model(source: str, out: Path, options: dict[str, Any]) -> None:
    from latentvae.export import export_model

    metrics_file = Path(source) / "metrics.json"  # beside the model of a finished run
    try:
        metrics = json.loads(metrics_file.read_text(encoding="utf-8")) if metrics_file.is_file() else None
    except ValueError as error:
        raise UserError(f"{metrics_file} cannot be read as JSON: {one_line(error)}; mend or remove it") from error
    report = export_model(source, out, metrics=metrics, **options)
    print(f"{report.folder}: {report.num_parameters:,} parameters in {report.dtype}, {report.num_bytes / 1e6:.1f} MB")
    print(
        f"loaded back with plain diffusers: reconstructions differ by {report.reconstruction_difference:.1e}, "
        f"by rounding to {report.dtype} {report.rounding_difference:.1e} (relative, on {report.checked_on})"
    )


def _export_file(source: str, out: Path, options: dict[str, Any]) -> None:
    from latentvae.export import export_single_file

    report = export_single_file(source, out, **options)
    print(
        f"{report.file}: {report.num_parameters:,} parameters of the autoencoder in {report.dtype}, "
        f"{report.num_bytes / 1e6:.1f} MB"
    )
    print(
        f"loaded back with plain diffusers: weights equal, reconstructions differ by "
        f"{report.reconstruction_difference:.1e} (relative, on {report.checked_on})"
    )
    for note in report.notes:
        print(f"note: {note}")
    for warning in report.warnings:
        print(f"WARNING: {warning}")
