"""The model card of an exported folder: README.md, as the hub shows it."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import diffusers
import torch

from latentvae.export.proof import DTYPES
from latentvae.export.report import ExportReport
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.scaling import LatentScaling


def model_card(vae: AutoencoderKL, report: ExportReport, metrics: Mapping[str, float] | None = None) -> str:
    """README.md of a model folder: front matter for the hub, how to use it, what it is, how good, how checked."""
    config, scaling = vae.config, LatentScaling.from_config(vae.config)
    factor = vae.downsample_factor
    ratio = config.in_channels * factor**2 / config.latent_channels
    if scaling.mean is not None:
        formula = "normalized = (raw - latents_mean) * scaling_factor / latents_std"
    elif config.shift_factor is not None:
        formula = "normalized = (raw - shift_factor) * scaling_factor"
    else:
        formula = "normalized = raw * scaling_factor"
    dtype = str(DTYPES[report.dtype]).removeprefix("torch.")
    rows = {
        "downsampling": f"{factor} x {factor}",
        "image channels": f"{config.in_channels} in, {config.out_channels} out",
        "latent channels": config.latent_channels,
        "compression": f"1 latent number for {ratio:g} of the image",
        "block_out_channels": ", ".join(map(str, config.block_out_channels)),
        "parameters": f"{report.num_parameters:,}",
        "weights": f"{dtype}, {report.num_bytes / 1e6:.1f} MB",
        "scaling_factor": config.scaling_factor,
        "shift_factor": "none" if config.shift_factor is None else config.shift_factor,
    }
    measured = "\n".join(f"| {name} | {value:.4g} |" for name, value in (metrics or {}).items())
    parts = [
        "---\nlibrary_name: diffusers\ntags:\n- autoencoder\n- vae\n- latent-diffusion\n- latentvae\n---",
        f"# AutoencoderKL, {factor}x downsampling, {config.latent_channels} latent channels",
        "A convolutional KL autoencoder for latent diffusion, trained with latentvae. It loads in plain diffusers:",
        f"""```python
import torch
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("PATH_OR_HUB_ID", torch_dtype=torch.{dtype})
latents = vae.encode(images).latent_dist.sample()  # images in [-1, 1], (B, {config.in_channels}, H, W)
reconstructions = vae.decode(latents).sample
```""",
        f"Sides of the images must be multiples of {factor}. `encode` gives and `decode` takes raw latents; diffusion "
        f"trains on\n`{formula}`.",
        "## Architecture\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        "## Metrics\n\n" + (f"| metric | value |\n|---|---|\n{measured}" if measured else "None were given at export."),
        "## Checked at export\n\n"
        f"Loaded back with diffusers {diffusers.__version__} on {report.checked_on}, float32 arithmetic. Relative "
        "differences:\n\n| | |\n|---|---|\n"
        f"| moments, diffusers to latentvae | {report.moments_difference:.1e} |\n"
        f"| reconstructions, diffusers to latentvae | {report.reconstruction_difference:.1e} |\n"
        f"| reconstructions, {dtype} weights to unrounded | {report.rounding_difference:.1e} |\n\n"
        f"latentvae {_own_version()}, torch {torch.__version__}, Python {platform.python_version()}.",
        f"- encoder sha256 `{report.hashes.encoder}`\n- decoder sha256 `{report.hashes.decoder}`",
    ]
    return "\n\n".join(parts) + "\n"


def _own_version() -> str:
    try:
        return version("latentvae")
    except PackageNotFoundError:  # run from a clone
        return "(not installed)"
