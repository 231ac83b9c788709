"""Image files, trusted or not => arrays of the declared format. Whatever is wrong with a file ends as an ImageError."""

import functools
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from latentvae.errors import UserError, one_line
from latentvae.images.colour import to_srgb
from latentvae.images.pixels import DecodePolicy, ImageError, PixelFormat, conform
from latentvae.images.samples import read_samples
from latentvae.images.tiff import PILLOW_BANDS, is_tiff, pillow_gives, read_tiff, tiff_size

ImageSourceLike = str | Path | bytes | BinaryIO

# EPS starts Ghostscript on the file; the others are recognised by Pillow but decoded by nobody.
_UNREADABLE_FORMATS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_NUMPY_MAGIC = b"\x93NUMPY"
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # its complaints are told in an ImageError
_ORIENTATION_TAG = 274  # EXIF 2.32, 4.6.4; its values 5 to 8 swap width and height


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.preinit()
    common = list(Image.ID)
    Image.init()
    return tuple(name for name in dict.fromkeys(common + list(Image.ID)) if name not in _UNREADABLE_FORMATS)


@functools.cache
def image_extensions() -> frozenset[str]:
    """Lower-case file extensions, with their dot, of every format that Pillow can decode here."""
    readable = {*_formats(), "MPO"}  # several JPEG pictures in one file, which the JPEG plugin opens
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in readable)


IMAGE_EXTENSIONS = image_extensions()


@contextmanager
def _stream(source: ImageSourceLike) -> Iterator[IO[bytes]]:
    """A seekable binary stream at its start; one that was given stays open."""
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        if os.path.exists(source) and not os.path.isfile(source):
            raise ImageError("is not a regular file")  # opening a named pipe would wait for ever
        with open(source, "rb") as file:
            yield file
    elif source.seekable():
        source.seek(0)
        yield source
    else:
        yield io.BytesIO(source.read())


@contextmanager
def _errors_told() -> Iterator[None]:
    """Every exception becomes an ImageError of one line; Pillow's warnings are not the caller's concern."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\b")
            yield
    except UserError:  # an ImageError, or a library that is not installed
        raise
    except (
        Exception
    ) as error:  # Pillow raises almost anything on a hostile file: struct.error, SyntaxError, ZeroDivisionError...
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = one_line(error) or "no further explanation"
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {reason[:200]})") from error


class UnidentifiedError(ImageError):
    """Pillow knows no such file."""


def _open(stream: IO[bytes], policy: DecodePolicy) -> Image.Image:
    """Read the header only, and refuse what the policy refuses."""
    try:
        image = Image.open(stream, formats=_formats())
    except UnidentifiedImageError:
        raise UnidentifiedError("is not an image that Pillow can identify") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"is too large: {error}") from error
    policy.check_size(*image.size)
    # the further pictures of an MPO are a preview or the other eye: its first one is the photograph
    if policy.animation == "refuse" and image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise ImageError(f"has {getattr(image, 'n_frames', 1)} frames, which the policy refuses")
    return image


def _orientation(image: Image.Image, *, header_only: bool = False) -> int:
    """1 to 8 from EXIF or XMP; 1 where there is none or it cannot be read, as in every viewer.

    `header_only`: from what opening the file has read; of a PNG, Pillow would decode the picture to look behind it.
    """
    try:
        exif = Image.Image.getexif(image) if header_only else image.getexif()
        value = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF raises almost anything, and says nothing about the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation on (H, W, C)."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)  # 5; the others are its mirror images
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _has_late_metadata(stream: IO[bytes]) -> bool:
    """Whether EXIF or text follows the pixels of a PNG (PNG 3, 5.6, allows it). Skips from chunk to chunk."""
    before = stream.tell()
    stream.seek(8)
    is_behind = found = False
    while not found and len(head := stream.read(8)) == 8 and head[4:] != b"IEND":
        is_behind |= head[4:] == b"IDAT"
        found = is_behind and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
        stream.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)  # data and checksum
    stream.seek(before)
    return found


def _numpy_shape(stream: IO[bytes]) -> tuple[int, ...]:
    """The shape in the header of a .npy file, read without its data."""
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape = read_header(stream)[0]
    if len(shape) not in (2, 3):
        raise ImageError(f"holds an array of shape {shape}: (height, width, channels) is needed")
    return shape


def _decode_numpy(stream: IO[bytes], pixels: PixelFormat, policy: DecodePolicy) -> np.ndarray:
    shape = _numpy_shape(stream)
    policy.check_size(shape[1], shape[0])
    if len(shape) == 3 and shape[2] != pixels.channels:
        raise ImageError(f"has {shape[2]} channels; {pixels.channels} are declared")
    stream.seek(0)
    samples = np.load(stream, allow_pickle=False)
    if samples.dtype.kind not in "uif" or samples.dtype.itemsize > 8:
        raise ImageError(f"holds {samples.dtype}: {pixels.dtype} is declared")
    return conform(samples.astype(samples.dtype.newbyteorder("="), copy=False), pixels)


def _is_numpy(stream: IO[bytes]) -> bool:
    magic = stream.read(len(_NUMPY_MAGIC))
    stream.seek(0)
    return magic == _NUMPY_MAGIC


def _to_array(image: Image.Image, pixels: PixelFormat, policy: DecodePolicy) -> np.ndarray:
    """A freshly opened picture => the declared format, upright."""
    if pixels.channels != 3:
        array = conform(read_samples(image), pixels)
    elif pixels.dtype == "float32":
        rgb = to_srgb(image, policy, depth=16).astype(np.float64)
        rgb *= (pixels.high - pixels.low) / 65535.0
        rgb += pixels.low
        array = rgb.clip(pixels.low, pixels.high, out=rgb).astype(np.float32)
    else:
        array = conform(to_srgb(image, policy, depth=8 if pixels.dtype == "uint8" else 16), pixels)
    policy.check_size(array.shape[1], array.shape[0])
    return _upright(array, _orientation(image))


def from_pillow(
    image: Image.Image, pixels: PixelFormat | None = None, policy: DecodePolicy | None = None
) -> np.ndarray:
    """A Pillow image (H, W, C) of `pixels`, by the same rules as `decode`."""
    pixels, policy = pixels or PixelFormat(), policy or DecodePolicy()
    with _errors_told():
        policy.check_size(*image.size)
        return _to_array(image, pixels, policy)


def decode(
    source: ImageSourceLike, pixels: PixelFormat | None = None, policy: DecodePolicy | None = None
) -> np.ndarray:
    """One image (path, bytes or binary stream; any Pillow format but EPS, or .npy) => (H, W, C) of `pixels`.

    Anything wrong is an ImageError. Always: the size is checked from the header before decoding, truncated data is
    refused, EXIF or XMP orientation is applied, the first frame is taken.
    Three channels: a picture in sRGB. ICC profiles are converted (8-bit arithmetic; a broken one is ignored),
    transparency is composited on the background, 16 bits are scaled (x / 257 rounded), gray is repeated, CMYK and Lab
    are converted; PNG's gAMA is ignored, as by most readers. For float32 the picture's black and white become the ends
    of the declared range.
    Any other channel count: the samples as stored, never through RGB and never narrowed (see `conform`); of TIFF files
    also many bands, planes and floating point (then in RGB too), where tifffile is installed: UserError without it.
    """
    pixels, policy = pixels or PixelFormat(), policy or DecodePolicy()
    with _errors_told(), _stream(source) as stream:
        if _is_numpy(stream):
            return _decode_numpy(stream, pixels, policy)
        may_be_samples = is_tiff(stream) and (pixels.channels != 3 or pixels.dtype == "float32")
        try:
            if not may_be_samples or pixels.channels <= PILLOW_BANDS:
                with _open(stream, policy) as image:
                    if not may_be_samples or pillow_gives(image, pixels):
                        return _to_array(image, pixels, policy)
        except UnidentifiedError:
            if not may_be_samples:
                raise
        stream.seek(0)
        samples, orientation = read_tiff(stream, pixels, policy)
        return _upright(samples, orientation)


def probe_size(source: ImageSourceLike, policy: DecodePolicy | None = None) -> tuple[int, int]:
    """(width, height) in pixels that `decode` would give, from the header alone; its data may still prove broken."""
    policy = policy or DecodePolicy()
    with _errors_told(), _stream(source) as stream:
        if _is_numpy(stream):
            height, width = _numpy_shape(stream)[:2]
            policy.check_size(width, height)
            return width, height
        try:
            image = _open(stream, policy)
        except UnidentifiedError:
            stream.seek(0)
            if not is_tiff(stream):
                raise
            return tiff_size(stream, policy)
        with image:
            width, height = image.size
            if image.format == "TIFF":
                return width, height  # Pillow has swapped the sides already
            header_only = image.format == "PNG" and not _has_late_metadata(stream)
            return (height, width) if _orientation(image, header_only=header_only) >= 5 else (width, height)
