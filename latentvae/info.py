"""What a path is: a model folder, a weight file, a run, a checkpoint or a latent store, told in a few lines."""

import json
import math
import struct
from pathlib import Path
from typing import Any

from latentvae.errors import UserError

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors header => ours
_SHOWN_SIZES = 6
_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def describe_path(path: str | Path) -> dict[str, str]:
    """Name of a property => its value, in the order to be shown.

    Raises:
        UserError: there is nothing at `path`, or nothing that latentvae knows.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is nothing at {path}")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is not a .safetensors file: give one, or the folder of a model, run or store")
        return {"what": "weight file", **_weights([path])}
    if (path / "manifest.json").is_file():
        return _store(path)
    if (path / "state.json").is_file():
        from latentvae.training.description import describe_checkpoint

        return describe_checkpoint(path)
    if (path / "recipe.yaml").is_file():
        from latentvae.training.description import describe_run

        return describe_run(path)
    if (path / "config.json").is_file():
        return _model(path)
    raise UserError(
        f"{path} is no model (config.json), run (recipe.yaml), checkpoint (state.json) or latent store (manifest.json)"
    )


def _model(folder: Path) -> dict[str, str]:
    from latentvae.training.description import measured_beside

    config = _json(folder / "config.json")
    rows = {"what": f"model folder, {config.get('_class_name', 'class not named')}"}
    files = sorted(folder.glob("*.safetensors"))
    rows |= _weights(files) if files else {"parameters": "no .safetensors file in it"}
    if isinstance(config.get("block_out_channels"), list):
        rows["downsample factor"] = str(2 ** (len(config["block_out_channels"]) - 1))
        rows["widths"] = str(config["block_out_channels"])
    for key in ("in_channels", "latent_channels"):
        if key in config:
            rows[key.replace("_", " ")] = str(config[key])
    rows |= {key: str(config[key]) for key in _SCALING if config.get(key) is not None}
    return rows | measured_beside(folder)


def _weights(files: list[Path]) -> dict[str, str]:
    """Parameters and their types, from the headers alone; shards and variants of one tensor count once."""
    sizes: dict[str, int] = {}
    dtypes: set[str] = set()
    for file in files:
        try:
            for name, entry in _header(file).items():
                if name != "__metadata__":
                    sizes[name] = math.prod(entry["shape"])
                    dtypes.add(_DTYPES.get(entry["dtype"], entry["dtype"]))
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{file} is not a readable safetensors file: its header names no tensors") from error
    num_bytes = sum(file.stat().st_size for file in files)
    return {
        "parameters": f"{sum(sizes.values()):,} in {len(sizes)} tensors, {', '.join(sorted(dtypes))}",
        "bytes": f"{num_bytes:,} in {len(files)} file{'s' if len(files) > 1 else ''}",
    }


def _header(file: Path) -> dict[str, Any]:
    """The JSON at the head of a safetensors file: 8 bytes of length (little-endian), then that many bytes."""
    try:
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header: dict[str, Any] = json.loads(opened.read(length))
            return header
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}") from error


def _store(folder: Path) -> dict[str, str]:
    from latentvae.latents.store.files import LatentStore

    manifest = LatentStore(folder).read_manifest()
    totals = manifest.totals
    records = sum(1 for _ in folder.glob("shards/*/u*.json"))
    sizes = [
        f"{bucket.width}x{bucket.height} pixels => {bucket.latent_width}x{bucket.latent_height}"
        for bucket in manifest.buckets
    ]
    more = f" and {len(sizes) - _SHOWN_SIZES} more" if len(sizes) > _SHOWN_SIZES else ""
    return {
        "what": "latent store, " + ("complete" if manifest.complete else "not complete: run the same encode again"),
        "images": f"{totals.inputs}: {totals.ok} ok, {totals.error} errors, {totals.skipped} skipped"
        if totals
        else "counted when it is complete",
        "units": f"{records} committed, in {len(manifest.plan)} plan file{'s' if len(manifest.plan) != 1 else ''}",
        "source": manifest.source,
        "vae": f"{manifest.vae.class_name}, {manifest.vae.name or 'given in memory'}",
        "encoder": manifest.vae.encoder,
        "kept": f"{' and '.join(manifest.tensors)} in {manifest.dtype}, {manifest.latent_channels} channels, raw",
        "normalized by": _scaling(manifest.vae.scaling),
        "sizes": ", ".join(sizes[:_SHOWN_SIZES]) + more,
        "fingerprint": manifest.fingerprint,
    }


def _scaling(scaling: dict[str, Any]) -> str:
    """Of LatentScaling.to_dict()."""
    if scaling.get("mean") is not None:
        text = f"mean and std of {len(scaling['mean'])} channels, times {scaling['scale']:g}"
    else:
        text = f"(raw - {scaling['shift']:g}) * {scaling['scale']:g}"
    patch = scaling.get("patch", 1)
    return text if patch == 1 else f"{text}, in squares of {patch}x{patch}"


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} does not hold a JSON object")
    return values
