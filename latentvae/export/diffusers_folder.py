"""Ship a model: a diffusers folder in the wanted precision, proven by loading it back, with a model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from huggingface_hub import HfApi

from latentvae.checkpoint import check_replaceable, first_line, model_folder, model_hashes
from latentvae.errors import UserError
from latentvae.export.card import model_card
from latentvae.export.proof import (
    TOLERANCE,
    ExportDtype,
    ExportError,
    check_images,
    check_values,
    described,
    difference,
    known_dtype,
    outputs_of,
    private_copy,
)
from latentvae.export.report import ExportReport
from latentvae.files import canonical_json
from latentvae.images import PixelFormat
from latentvae.model.autoencoder import CONFIG_FIELDS, AutoencoderKL

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def export_model(
    model: str | Path | AutoencoderKL,
    out: str | Path,
    *,
    dtype: ExportDtype = "fp32",
    overwrite: bool = False,
    metrics: Mapping[str, float] | None = None,
    images: np.ndarray | None = None,
    pixels: PixelFormat | None = None,
    push_to_hub: str | None = None,
) -> ExportReport:
    """Write `out`, a diffusers folder with a model card, and report it only after plain diffusers reproduced it.

    Before the folder appears under its name it is loaded by `diffusers.AutoencoderKL` itself; configuration and
    weights must be equal and moments and reconstructions agree within 1e-4.

    Args:
        model: whatever `load_model` takes, or a model, which stays as it is.
        dtype: precision of the exported weights.
        overwrite: replace an existing `out`.
        metrics: name -> value, for the model card.
        images: real sample to check on, (H, W, C) or (B, H, W, C) as `pixels` says; sides are cropped to multiples of
            the downsample factor. Seeded noise if not given.
        pixels: format of `images`; 8 bit with the model's channels unless given.
        push_to_hub: hub id (owner/name) to upload the finished folder to.

    Raises:
        UserError: nothing to load, `out` exists or cannot be written, weights that are not finite or do not fit fp16.
        ExportError: the folder does not reproduce the model.
    """
    out = Path(out)
    known_dtype(dtype)
    check_replaceable(out, overwrite)
    vae = private_copy(model)
    check_values(vae.state_dict(), dtype)
    sample = check_images(vae, images, pixels)
    unrounded = outputs_of(vae, sample)
    exported = {"fp32": vae.float, "fp16": vae.half, "bf16": vae.bfloat16}[dtype]()  # diffusers' `.to` warns needlessly
    with model_folder(exported, out, overwrite=overwrite) as temporary:
        theirs = outputs_of(_loaded_back(temporary, exported), sample)
        num_bytes = (temporary / WEIGHTS_FILE).stat().st_size
        hashes = model_hashes(exported)
        ours = outputs_of(exported.float(), sample)
        report = ExportReport(
            folder=out,
            dtype=dtype,
            num_parameters=sum(parameter.numel() for parameter in exported.parameters()),
            num_bytes=num_bytes,
            hashes=hashes,
            moments_difference=difference(theirs.moments, ours.moments),
            reconstruction_difference=difference(theirs.reconstructions, ours.reconstructions),
            rounding_difference=difference(ours.reconstructions, unrounded.reconstructions),
            checked_on=described(sample, is_given=images is not None),
        )
        differences = (report.moments_difference, report.reconstruction_difference)
        if not all(value <= TOLERANCE for value in differences):  # NaN is not either
            raise ExportError(f"plain diffusers gives other outputs, {TOLERANCE:g} is allowed: {report}")
        card = model_card(exported, report, metrics)
        (temporary / "README.md").write_text(card, encoding="utf-8", newline="\n")
    if push_to_hub is not None:
        _upload(out, push_to_hub)
    return report


def _loaded_back(folder: Path, exported: AutoencoderKL) -> Any:
    """`folder` as plain diffusers loads it, in float32; ExportError unless configuration and weights are the same."""
    try:
        plain: Any = diffusers.AutoencoderKL.from_pretrained(folder, torch_dtype=exported.dtype, use_safetensors=True)
    except Exception as error:
        raise ExportError(f"plain diffusers cannot load what was written: {first_line(error)}") from error
    for name in CONFIG_FIELDS:
        written, meant = (canonical_json(config[name]) for config in (plain.config, exported.config))
        if written != meant:
            raise ExportError(f"config.json came back with {name} {written!r} instead of {meant!r}")
    weights, meant_weights = plain.state_dict(), exported.state_dict()
    if weights.keys() != meant_weights.keys():
        raise ExportError(f"other weights came back: {sorted(weights.keys() ^ meant_weights.keys())[:3]}")
    for name, tensor in weights.items():
        if tensor.dtype != exported.dtype or not torch.equal(tensor, meant_weights[name]):
            raise ExportError(f"{name} came back with other values")
    return plain.float().eval()


def _upload(folder: Path, hub_id: str) -> None:
    """Create the hub repository where needed and upload the folder."""
    try:
        api = HfApi()
        api.create_repo(hub_id, exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=folder)
    except Exception as error:  # the hub's library has changed its HTTP client, and with it the errors, more than once
        raise UserError(f"{folder} is written, but not uploaded to {hub_id}: {first_line(error)}") from error
