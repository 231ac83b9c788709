"""The command that hands a model or the latents of a store to others."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from latentvae.cli.app import app, given
from latentvae.errors import UserError, one_line

MODEL_FORMATS = ("diffusers",)
STORE_FORMATS = ("webdataset", "parquet", "sd-scripts")


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="model (folder, hub id, .safetensors file), or folder or URL of a latent store")
    ],
    out: Annotated[Path, typer.Option(help="folder to write")],
    format: Annotated[
        Literal["diffusers", "webdataset", "parquet", "sd-scripts"] | None,
        typer.Option(help="diffusers for a model, the others for a store  [default: diffusers, or webdataset]"),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="of the written weights, or latents (not bf16)")
    ] = None,
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
    """Write a model for diffusers, or the latents of a store for another trainer.

    A model is loaded back with plain diffusers, and configuration and outputs are compared, before success is reported.
    """
    for_store = given(posterior=posterior, seed=seed, captions=captions, shard_images=shard_images, family=family)
    for_store |= ({"normalize": True} if normalize else {}) | ({"partial": True} if partial else {})
    for_model = given(push_to_hub=push_to_hub) | ({"overwrite": True} if overwrite else {})
    is_store = "://" in source or (Path(source) / "manifest.json").is_file()
    kind, formats, misfits = ("store", STORE_FORMATS, for_model) if is_store else ("model", MODEL_FORMATS, for_store)
    if format is not None and format not in formats:
        raise UserError(f"{source} is a {kind}, and --format {format} is not for one: choose {', '.join(formats)}")
    if misfits:
        raise UserError(f"{source} is a {kind}, and --{min(misfits).replace('_', '-')} is not for one")
    if is_store:
        _export_store(source, out, given(format=format, dtype=dtype) | for_store)
    else:
        _export_model(source, out, given(dtype=dtype) | for_model)


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
