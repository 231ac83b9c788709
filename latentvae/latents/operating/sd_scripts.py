"""Latents as kohya-ss/sd-scripts caches them: one `.npz` per image, named by the image and its size."""

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal

import numpy as np

from latentvae.errors import UserError
from latentvae.latents.operating.handed import HandedImage, Handing, npy_bytes
from latentvae.latents.operating.parts import stored_buckets
from latentvae.latents.store.records import IndexRow, Manifest

Family = Literal["sd", "sdxl", "sd3", "flux"]
STRIDE = 8  # pixels per latent position, in all of them


@dataclass(frozen=True)
class FamilyLayout:
    """How sd-scripts names and recognises the caches of one model family."""

    channels: int
    scaling_factor: float  # published with the family's VAE: by it a store's family is recognised
    by_resolution: bool  # names in the file carry the size of the latents, so that several sizes may share it


FAMILIES: dict[Family, FamilyLayout] = {
    "sd": FamilyLayout(4, 0.18215, by_resolution=False),
    "sdxl": FamilyLayout(4, 0.13025, by_resolution=False),
    "sd3": FamilyLayout(16, 1.5305, by_resolution=True),
    "flux": FamilyLayout(16, 0.3611, by_resolution=True),
}


def resolved_family(manifest: Manifest, family: Family | None) -> Family:
    """`family`, or the one whose scaling the store's VAE has. UserError where its latents do not fit."""
    choices = ", ".join(FAMILIES)
    if family is None:
        scale = manifest.vae.scaling["scale"]
        found = [name for name, layout in FAMILIES.items() if (layout.channels, layout.scaling_factor) ==
                 (manifest.latent_channels, scale)]  # fmt: skip
        if not found:
            raise UserError(
                f"the VAE of this store has scaling_factor {scale}, which no family of sd-scripts has: pass --family "
                f"({choices})"
            )
        return found[0]
    if family not in FAMILIES:
        raise UserError(f"family is {family}; it must be one of {choices}")
    bucket = manifest.buckets[0]
    stride, wanted = bucket.width // bucket.latent_width, FAMILIES[family].channels
    if (manifest.latent_channels, stride) != (wanted, STRIDE):
        raise UserError(
            f"{family} takes {wanted} channels at 1/{STRIDE} of the size; this store has {manifest.latent_channels} at "
            f"1/{stride}"
        )
    return family


def write_npz_files(
    handing: Handing, folder: Path, family: Family, captions: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Write `NAME_WWWWxHHHH_family.npz` for each image, in the folders of its key; yields their names.

    WWWW x HHHH is the size of the original after EXIF orientation (sd-scripts itself does not turn images, so it looks
    for another name where EXIF does). Latents are raw float32; `captions` become `NAME.txt`.
    """
    layout = FAMILIES[family]
    taken: dict[str, str] = {}
    for bucket in stored_buckets(handing.store):
        for image in handing.images(bucket):
            name = _name(image.row, family)
            if name.lower() in taken:
                raise UserError(
                    f"{taken[name.lower()]} and {image.row.key} would both be {name}: sd-scripts tells images apart by "
                    "their names without extension; rename one and encode again"
                )
            taken[name.lower()] = image.row.key
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(path, "w") as npz:
                for entry, array in _arrays(image, layout).items():
                    npz.writestr(zipfile.ZipInfo(f"{entry}.npy"), npy_bytes(array))  # no time: equal bytes each time
            caption = captions.get(image.row.key, {}).get("caption")
            if caption is not None:
                _write_caption(folder / PurePosixPath(image.row.key).with_suffix(".txt"), caption, image.row.key)
            yield name


def _write_caption(path: Path, caption: str, key: str) -> None:
    if path.exists() and path.read_text(encoding="utf-8") != caption:
        raise UserError(f"{key} and another image share {path.name}, and have other captions: rename one")
    path.write_text(caption, encoding="utf-8", newline="\n")


def _name(row: IndexRow, family: Family) -> str:
    key = PurePosixPath(row.key)
    here = PurePath(row.key)  # on Windows a drive leads out too
    if key.is_absolute() or here.anchor or ".." in (*key.parts, *here.parts):
        raise UserError(f"the key {row.key} leads out of the folder: sd-scripts needs files beside the images")
    if not key.name or "\0" in row.key:
        raise UserError(f"the key {row.key!r} is no name of a file: sd-scripts needs files beside the images")
    size = f"{row.width or 0:04d}x{row.height or 0:04d}"
    return str(key.with_name(f"{key.stem}_{size}_{family}.npz"))


def _arrays(image: HandedImage, layout: FamilyLayout) -> dict[str, np.ndarray]:
    height, width = image.latents.shape[-2:]
    suffix = f"_{height}x{width}" if layout.by_resolution else ""
    arrays = {
        "latents": image.latents,
        "original_size": np.array([image.row.width, image.row.height]),
        "crop_ltrb": np.array(crop_ltrb(image.row, width * STRIDE, height * STRIDE)),
    }
    if image.mirrored is not None:
        arrays["latents_flipped"] = image.mirrored
    return {name + suffix: array for name, array in arrays.items()}


def crop_ltrb(row: IndexRow, width: int, height: int) -> tuple[int, int, int, int]:
    """What sd-scripts keeps as an image's crop, and conditions SDXL on: left, top, right, bottom in pixels.

    By its own rule (`BucketManager.get_crop_ltrb`) that is not the crop in the scaled image, but where an image of this
    shape would lie, whole and centred, in the bucket width x height. The true crop is in the store's index.
    """
    original_width, original_height = row.width or 1, row.height or 1
    wide, high = float(width), float(height)
    if width / height > original_width / original_height:
        wide = height * original_width / original_height
    else:
        high = width * original_height / original_width
    left, top = int((width - wide) // 2), int((height - high) // 2)
    return left, top, int(left + wide), int(top + high)
