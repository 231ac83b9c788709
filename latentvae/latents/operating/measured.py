"""Write measured latent statistics into a model's config.json, where it has none of its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentvae.autoencoders.adapter import load_autoencoder
from latentvae.checkpoint import CONFIG_FILE
from latentvae.errors import UserError
from latentvae.files import write_json
from latentvae.latents.operating.recorded import require_encoder
from latentvae.latents.operating.statistics import StoreStatistics

SCALING_FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
DIFFUSERS_DEFAULT = 0.18215  # what diffusers writes for an AutoencoderKL that nobody measured, and SD 1.x's own figure
# Only a model of SD's shape can be SD, to which that figure belongs: diffusion models were trained on it.
SD_SHAPE: dict[str, Any] = {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}


def write_measured(
    statistics: StoreStatistics, folder: str | Path, *, per_channel: bool = False, force: bool = False
) -> dict[str, Any]:
    """Write measured values into the config.json of a diffusers folder, atomically; returns the fields that changed.

    scaling_factor is one over the standard deviation; shift_factor the mean, written where the model has one (null in
    the SD family, whose pipelines ignore it).

    Args:
        statistics: of a store that this model's encoder made.
        folder: a diffusers folder.
        per_channel: write latents_mean and latents_std instead, and a scaling_factor of 1 where the class has one, as
            SDXL's and Qwen-Image's pipelines take them (SD 1.x ignores them, SD3 and FLUX fail on them).
        force: replace values that somebody measured; diffusion models trained on them do not fit any more.

    Raises:
        UserError: no model folder, another encoder's, a class without these fields, or values that are there already.
    """
    path = Path(folder) / CONFIG_FILE
    if not Path(folder).is_dir():  # else a hub id would be downloaded
        raise UserError(f"{folder} is no diffusers folder on this machine: there is no {CONFIG_FILE} to write to")
    model = load_autoencoder(folder)
    require_encoder(statistics.encoder, statistics.store, model)
    config = json.loads(path.read_text(encoding="utf-8"))
    wanted = _wanted(statistics, model.config, per_channel)
    absent = [name for name in wanted if name not in model.config]
    if absent:
        raise UserError(f"{model.class_name} has no {absent[0]} in its {CONFIG_FILE}: nothing can be written to it")
    changed = {name: value for name, value in wanted.items() if model.config.get(name) != value}
    if not changed:
        return {}
    there = _measured_fields(model.config)
    if there and not force:
        told = ", ".join(f"{name} {_shown(value)}" for name, value in there.items())
        raise UserError(
            f"{path} has values already ({told}), which diffusion models may have been trained on: pass --force to "
            "replace them"
        )
    try:
        write_json(path, config | changed)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return changed


def _wanted(statistics: StoreStatistics, config: Mapping[str, Any], per_channel: bool) -> dict[str, Any]:
    if per_channel:
        deviations = [channel.diffusion_std for channel in statistics.channels]
        if not deviations or not all(deviation > 0 for deviation in deviations):
            raise UserError(f"{statistics.store} holds no latents, or a channel that is constant: it has no scale")
        return (
            {
                "latents_mean": [_rounded(channel.mean) for channel in statistics.channels],
                "latents_std": [_rounded(deviation) for deviation in deviations],
            }
            | ({"scaling_factor": 1.0} if "scaling_factor" in config else {})  # Qwen-Image and Wan have none
            | ({"shift_factor": None} if config.get("shift_factor") else {})
        )
    values: dict[str, Any] = {"scaling_factor": _rounded(statistics.scaling_factor)}
    if config.get("shift_factor") is not None:
        values["shift_factor"] = _rounded(statistics.shift_factor)
    return values | {name: None for name in ("latents_mean", "latents_std") if config.get(name) is not None}


def _measured_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that somebody has measured, or may have."""
    found = {name: config[name] for name in SCALING_FIELDS[1:] if config.get(name) not in (None, 0, 0.0)}
    scale = config.get("scaling_factor")
    may_be_sd = all(config.get(name) == value for name, value in SD_SHAPE.items())
    unmeasured = scale in (None, 1) or (scale == DIFFUSERS_DEFAULT and not may_be_sd)
    return found if unmeasured else {"scaling_factor": scale} | found


def _rounded(value: float) -> float:
    """Six significant digits, as configs are written."""
    return float(f"{value:.6g}")


def _shown(value: Any) -> str:
    return f"of {len(value)} channels" if isinstance(value, list) else str(value)
