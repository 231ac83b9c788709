"""Ship a model: a diffusers folder in the wanted precision, proven by loading it back, with a model card."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from huggingface_hub import HfApi
from torch import Tensor

from latentvae.checkpoint import (
    ModelHashes,
    check_no_adapter,
    check_replaceable,
    first_line,
    load_model,
    model_folder,
    model_hashes,
)
from latentvae.errors import UserError
from latentvae.files import canonical_json
from latentvae.images import PixelFormat, to_model
from latentvae.model.autoencoder import CONFIG_FIELDS, AutoencoderKL
from latentvae.model.scaling import LatentScaling

ExportDtype = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
# Both networks compute in float32 from the same numbers; only the order of sums may differ.
TOLERANCE = 1e-4


class ExportError(RuntimeError):
    """What was written, loaded back by plain diffusers, is not the model: a fault of ours, not of the user."""


@dataclass(frozen=True)
class ExportReport:
    """What was shipped. Differences are |a - b| / |b| over the whole check batch."""

    folder: Path
    dtype: str
    num_parameters: int
    num_bytes: int  # of the weights file
    hashes: ModelHashes  # of the exported weights
    moments_difference: float  # plain diffusers on the exported folder against our network, same weights
    reconstruction_difference: float
    rounding_difference: float  # reconstructions of the exported weights against the unrounded model's; 0 in fp32
    checked_on: str  # which images


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
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known: use {', '.join(DTYPES)}")
    check_replaceable(out, overwrite)
    vae = _private_copy(model)
    _check_values(vae, dtype)
    sample = _sample(vae, images, pixels)
    unrounded = _outputs(vae, sample)
    exported = {"fp32": vae.float, "fp16": vae.half, "bf16": vae.bfloat16}[dtype]()  # diffusers' `.to` warns needlessly
    with model_folder(exported, out, overwrite=overwrite) as temporary:
        theirs = _outputs(_loaded_back(temporary, exported), sample)
        num_bytes = (temporary / WEIGHTS_FILE).stat().st_size
        hashes = model_hashes(exported)
        ours = _outputs(exported.float(), sample)
        report = ExportReport(
            folder=out,
            dtype=dtype,
            num_parameters=sum(parameter.numel() for parameter in exported.parameters()),
            num_bytes=num_bytes,
            hashes=hashes,
            moments_difference=_difference(theirs.moments, ours.moments),
            reconstruction_difference=_difference(theirs.reconstructions, ours.reconstructions),
            rounding_difference=_difference(ours.reconstructions, unrounded.reconstructions),
            checked_on=f"{len(sample)} {'noise' if images is None else 'given'} image(s) of "
            f"{sample.shape[-1]}x{sample.shape[-2]}",
        )
        differences = (report.moments_difference, report.reconstruction_difference)
        if not all(difference <= TOLERANCE for difference in differences):  # NaN is not either
            raise ExportError(f"plain diffusers gives other outputs, {TOLERANCE:g} is allowed: {report}")
        card = model_card(exported, report, metrics)
        (temporary / "README.md").write_text(card, encoding="utf-8", newline="\n")
    if push_to_hub is not None:
        _upload(out, push_to_hub)
    return report


def _private_copy(model: str | Path | AutoencoderKL) -> AutoencoderKL:
    """The model to export, in float32 on the CPU and eval mode; what was given stays as it is.

    Built anew: tiling, hooks and casts of the given one, and where it was loaded from, are not part of the model.
    """
    given = load_model(model) if isinstance(model, str | Path) else model
    check_no_adapter(given)
    with torch.device("meta"):
        vae = AutoencoderKL(**{name: given.config[name] for name in CONFIG_FIELDS})
    weights = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in given.state_dict().items()}
    vae.load_state_dict(weights, assign=True)
    return vae.eval()


def _check_values(vae: AutoencoderKL, dtype: str) -> None:
    """Raise a UserError naming the first weight that `dtype` cannot hold."""
    largest = torch.finfo(DTYPES[dtype]).max
    for name, tensor in vae.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"the model's {name} has values that are not finite: export a checkpoint from before")
        extreme = tensor.abs().max().item()
        if extreme > largest:
            raise UserError(f"{name} reaches {extreme:g} and {dtype} ends at {largest:g}: export bf16 or fp32")


def _sample(vae: AutoencoderKL, images: np.ndarray | None, pixels: PixelFormat | None) -> Tensor:
    """Images for the check, [-1, 1] (B, C, H, W), sides multiples of f."""
    channels, factor = vae.config.in_channels, vae.downsample_factor
    if images is None:
        side = factor * max(4, 32 // factor)  # enough positions for attention and every border to matter
        return torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixel_format = pixels or PixelFormat(channels=channels, dtype="uint8", range=None)
    batch = to_model(torch.from_numpy(np.ascontiguousarray(images)), pixel_format)
    height, width = (side - side % factor for side in batch.shape[-2:])
    if not height or not width:
        raise UserError(f"images are {batch.shape[-1]}x{batch.shape[-2]}: at least {factor}x{factor} is needed")
    return batch[..., :height, :width]


@dataclass(frozen=True)
class _Outputs:
    moments: Tensor  # (B, 2D, h, w)
    reconstructions: Tensor  # (B, C, H, W)


@torch.no_grad()
def _outputs(vae: Any, sample: Tensor) -> _Outputs:
    """What any AutoencoderKL, ours or plain, makes of the sample, in float32 on the CPU."""
    posterior = vae.encode(sample).latent_dist
    return _Outputs(posterior.parameters, vae.decode(posterior.mode()).sample)


def _difference(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, 0 where both are 0."""
    distance = torch.linalg.vector_norm((a - b).double()).item()
    return distance / torch.linalg.vector_norm(b.double()).item() if distance else 0.0


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


def _own_version() -> str:
    try:
        return version("latentvae")
    except PackageNotFoundError:  # run from a clone
        return "(not installed)"


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
