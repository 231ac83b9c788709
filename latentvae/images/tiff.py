"""TIFF files whose samples Pillow cannot give: many bands, floating point, planes, tiles; read as they are stored.

Nothing here is taken for a colour. The file is not trusted: sizes are checked before memory is taken, and only
compressions whose output is bounded by the size of the strip or tile are read.
"""

import importlib
import logging
import math
from importlib.util import find_spec
from typing import IO, Any

import numpy as np
from PIL import Image

from latentvae.errors import UserError
from latentvae.images.pixels import DecodePolicy, ImageError, PixelFormat, conform
from latentvae.images.samples import is_deep

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # TIFF 6.0 and BigTIFF, in either byte order
PILLOW_BANDS = 4  # more than these it has no mode for
_SAMPLES_PER_PIXEL, _PLANAR, _ORIENTATION = 277, 284, 274
_COMPRESSIONS = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, deflate, PackBits, old deflate, LZMA, Zstandard
_MAX_RATIO = 4096  # of samples to file: LZW and deflate stay below; what is far above is a bomb
_MIN_IS_WHITE, _PALETTE = 0, 3


def is_tiff(stream: IO[bytes]) -> bool:
    """Whether a stream at its start holds a TIFF; it is left there."""
    magic = stream.read(4)
    stream.seek(0)
    return magic in _MAGIC


def pillow_gives(image: Image.Image, pixels: PixelFormat) -> bool:
    """Whether Pillow reads the samples of this opened TIFF whole, or the file has other channels than are declared."""
    tags = dict(getattr(image, "tag_v2", {}))
    count = tags.get(_SAMPLES_PER_PIXEL, 1)
    if count != pixels.channels:
        return True
    if pixels.channels == 3:
        return image.mode not in ("F", "I")  # one plane of three
    is_planar = tags.get(_PLANAR, 1) == 2 and count > 1
    if len(image.getbands()) != count:
        return False
    return not is_planar if is_deep(image) else _is_8_bit(tags) or count == 1


def _is_8_bit(tags: dict[int, Any]) -> bool:
    bits = tags.get(258, (1,))
    return all(one == 8 for one in (bits if isinstance(bits, tuple) else (bits,)))


def read_tiff(stream: IO[bytes], pixels: PixelFormat, policy: DecodePolicy) -> tuple[np.ndarray, int]:
    """((H, W, C) samples of the first page in the declared format, EXIF orientation).

    Raises ImageError, whatever tifffile raises for a damaged file, and UserError where tifffile is not installed.
    """
    with _library().TiffFile(stream) as file:
        page = file.pages[0]
        _check(page, pixels, policy)
        if policy.animation == "refuse" and len(file.pages) > 1:
            raise ImageError(f"has {len(file.pages)} pages, which the policy refuses")
        _check_data(page, stream.seek(0, 2))
        samples = page.asarray(maxworkers=1).reshape(page.shaped)  # (planes, 1, H, W, samples of a plane)
        if samples.shape[1] != 1:
            raise ImageError(f"holds a volume of depth {samples.shape[1]}")
        array = np.moveaxis(samples[:, 0], 0, -1)  # (H, W, samples of a plane, planes)
        array = array.reshape(*array.shape[:2], -1)
        if page.photometric == _MIN_IS_WHITE and array.dtype.kind == "u":
            array = np.iinfo(array.dtype).max - array
        return conform(array.astype(array.dtype.newbyteorder("="), copy=False), pixels), orientation_of(page)


def tiff_size(stream: IO[bytes], policy: DecodePolicy) -> tuple[int, int]:
    """(width, height) of the first page as `read_tiff` would give it turned upright, from the header alone."""
    with _library().TiffFile(stream) as file:
        page = file.pages[0]
        width, height = int(page.imagewidth), int(page.imagelength)
        policy.check_size(width, height)
        return (height, width) if orientation_of(page) >= 5 else (width, height)


def orientation_of(page: Any) -> int:
    """1 to 8; 1 where there is none."""
    value = page.tags.valueof(_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check(page: Any, pixels: PixelFormat, policy: DecodePolicy) -> None:
    """Refuse from the header what cannot or must not be read."""
    policy.check_size(int(page.imagewidth), int(page.imagelength))
    if page.samplesperpixel != pixels.channels:
        raise ImageError(f"has {page.samplesperpixel} channels; {pixels.channels} are declared")
    if page.photometric == _PALETTE:
        raise ImageError("is a palette picture, which has no samples of its own")
    if page.imagedepth != 1:
        raise ImageError(f"holds a volume of depth {page.imagedepth}")
    if page.dtype is None or page.dtype.kind not in "uif" or page.bitspersample != page.dtype.itemsize * 8:
        raise ImageError(f"has samples of {page.bitspersample} bits in format {page.sampleformat}, which are not read")
    if page.compression not in _COMPRESSIONS:
        raise ImageError(f"is compressed as {getattr(page.compression, 'name', page.compression)}, which is not read")
    if page.compression != 1 and find_spec("imagecodecs") is None:
        raise UserError("compressed TIFF files of this kind need imagecodecs: pip install 'latentvae[data]'")
    if page.is_tiled:
        policy.check_size(int(page.tilewidth), int(page.tilelength))


def _check_data(page: Any, size: int) -> None:
    """Refuse what a file of `size` bytes cannot hold, before memory is taken for it."""
    places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if len(places) != math.prod(page.chunked) or any(count == 0 for _, count in places):
        raise ImageError("has strips or tiles without data")  # tifffile would fill them with zeros
    if any(start + count > size for start, count in places):
        raise ImageError("is cut off: its samples go beyond the end of the file")
    if page.nbytes > size * (1 if page.compression == 1 else _MAX_RATIO):
        raise ImageError(f"claims {page.nbytes:,} bytes of samples in a file of {size:,}")


def _library() -> Any:
    if find_spec("tifffile") is None:
        raise UserError("TIFF files of this kind need tifffile: pip install 'latentvae[data]'")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is told in its ImageError
    return importlib.import_module("tifffile")
