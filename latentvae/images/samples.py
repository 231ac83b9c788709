"""The samples of a file at their full precision, which Pillow's own modes do not always keep.

Pillow 13 reads 16-bit gray as it is, but drops the low byte of every other 16-bit picture (RGB, RGBA, gray with alpha,
CMYK). The low bytes are still in the file: asked for the opposite byte order, Pillow's unpackers hand out exactly them.
"""

import io
import sys
from typing import IO

import numpy as np
from PIL import Image, ImageFile

from latentvae.images.pixels import ImageError

_GRAY16 = ("I;16", "I;16L", "I;16B", "I;16N")
_LAYOUTS16 = ("RGB", "RGBA", "RGBX", "CMYK")  # of Pillow's 16-bit raw modes, those that it unpacks in either byte order
_NATIVE_LOW_BYTE = "16B" if sys.byteorder == "little" else "16L"
_LOW_BYTE = {"16B": "16L", "16L": "16B", "16N": _NATIVE_LOW_BYTE}
_BAND_MODES = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")  # 8-bit modes whose bands are the samples
_WHITE_IS_ZERO = (262, 0)  # TIFF tag PhotometricInterpretation and its value for negatives


def raw_mode(image: Image.Image) -> str:
    """How an opened file lays out its samples, in Pillow's names ("RGB;16B"); "" once loaded or where unknown."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    arguments = tiles[0].args
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def is_deep(image: Image.Image) -> bool:
    """Whether the file holds more than 8 bits per sample, in a layout that `read_samples` reads exactly."""
    if image.mode in _GRAY16:
        return True
    if image.mode == "I":  # PGM: Pillow scales it to 16 bits, whatever its largest value
        return image.format == "PPM"
    layout, _, depth = raw_mode(image).partition(";")
    return (layout in _LAYOUTS16 and depth in _LOW_BYTE) or (layout, depth) == ("LA", "16B")


def white_level(image: Image.Image) -> int:
    """The largest sample value of a deep file."""
    return 4095 if raw_mode(image) == "I;12" else 65535


def _reopened(image: Image.Image, raw: str) -> np.ndarray:
    """Decode the same file again with another raw mode, in the image's own mode."""
    stream: IO[bytes] | None = getattr(image, "fp", None)
    if stream is None:
        raise ImageError("is closed already")
    stream.seek(0)
    with Image.open(io.BytesIO(stream.read()), formats=[image.format or ""]) as again:
        if not isinstance(again, ImageFile.ImageFile):
            raise ImageError("cannot be read twice")
        again.tile = [
            tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw) for tile in again.tile
        ]
        return np.array(again)


def _deep_samples(image: Image.Image) -> np.ndarray:
    raw = raw_mode(image)
    layout, _, depth = raw.partition(";")
    if image.mode in _GRAY16:
        negative = dict(getattr(image, "tag_v2", {})).get(_WHITE_IS_ZERO[0]) == _WHITE_IS_ZERO[1]
        samples = np.array(image).astype(np.uint16)[:, :, None]
        return 65535 - samples if negative else samples
    if image.mode == "I":
        return np.array(image).astype(np.uint16)[:, :, None]
    if layout == "LA":  # Pillow has no way to its low bytes, but four bytes per pixel also read as RGBA
        quads = _reopened(image, "RGBA").astype(np.uint16)
        return quads[:, :, 0::2] << 8 | quads[:, :, 1::2]
    low = _reopened(image, f"{layout};{_LOW_BYTE[depth]}").astype(np.uint16)
    return np.array(image).astype(np.uint16) << 8 | low


def read_samples(image: Image.Image) -> np.ndarray:
    """The samples as stored: (H, W, C) uint8, uint16, int32 or float32. Alpha is a channel; colour is left as it is.

    A palette index is not a sample, and neither is the upper half of a 16-bit one: both raise ImageError.
    """
    if is_deep(image):
        return _deep_samples(image)
    if ";16" in raw_mode(image):
        raise ImageError(f"holds 16-bit samples in a layout ({raw_mode(image)}) that can only be read as 8 bits")
    if image.mode in ("I", "F"):
        return np.array(image)[:, :, None]
    if image.mode == "1":
        image = image.convert("L")
    if image.mode not in _BAND_MODES:
        raise ImageError(f"is a {image.mode} picture (a palette or premultiplied), which has no samples of its own")
    samples = np.array(image)
    return samples[:, :, None] if samples.ndim == 2 else samples
