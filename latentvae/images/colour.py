"""Any picture that Pillow has opened => plain sRGB: profiles, transparency, gray, CMYK, Lab and 16 bits."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from latentvae.images.pixels import DecodePolicy, ImageError
from latentvae.images.samples import is_deep, raw_mode, read_samples, white_level

_PROFILE_SPACE = {
    "L": "GRAY",
    "RGB": "RGB",
    "CMYK": "CMYK",
}  # Pillow's mode -> the colour space an ICC profile must declare
_GRAY_MODES = ("1", "L", "LA", "La")


def _probe(mode: str) -> Image.Image:
    """Colours from all over the space of `mode`, to see whether a transform changes anything."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    return Image.fromarray(cube)


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """ICC profile => transform to sRGB; None where it is broken, of another colour space, or sRGB already."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _PROFILE_SPACE[mode]:
            return None
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
        if mode != "CMYK":
            before = _probe(mode)
            after = ImageCms.applyTransform(before, transform)
            if after is None:
                return None
            change = np.abs(np.asarray(after).astype(np.int16) - np.asarray(before.convert("RGB")).astype(np.int16))
            if change.max() <= 1:  # rounding only: the profile is sRGB under some name
                return None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None  # what browsers do too: the picture is shown as if it had no profile
    return transform


@lru_cache(maxsize=1)
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _apply(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    if result is None:
        raise ImageError(f"a {image.mode} picture could not be converted to sRGB")
    return result


def _profile_transform(image: Image.Image, mode: str, policy: DecodePolicy) -> ImageCms.ImageCmsTransform | None:
    profile = image.info.get("icc_profile")
    if policy.icc == "ignore" or not isinstance(profile, bytes) or not profile or mode not in _PROFILE_SPACE:
        return None
    return _to_srgb(profile, mode)


def _rgb8(image: Image.Image, policy: DecodePolicy) -> np.ndarray:
    """A loaded 8-bit picture of any mode => (H, W, 3) uint8 sRGB."""
    if image.mode == "RGB" and "transparency" not in image.info and "icc_profile" not in image.info:
        return np.array(image)  # nearly every photograph
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode in _GRAY_MODES:
        colour = image.convert("L")
    elif image.mode in ("CMYK", "LAB"):
        colour = image
    else:
        colour = image.convert("RGB")
    transform = _lab_to_srgb() if colour.mode == "LAB" else _profile_transform(image, colour.mode, policy)
    colour = _apply(colour, transform) if transform is not None else colour.convert("RGB")
    if alpha is not None and alpha.getextrema() != (255, 255):
        canvas = Image.new("RGB", colour.size, policy.background)
        canvas.paste(colour, mask=alpha)
        colour = canvas
    return np.array(colour)


def _with_alpha(samples: np.ndarray, transparency: object, white: int) -> np.ndarray:
    """Turn a PNG's single transparent colour into an alpha channel: (H, W, 1 or 3) => (H, W, 2 or 4)."""
    if samples.shape[2] not in (1, 3) or not isinstance(transparency, int | tuple):
        return samples
    opaque = (samples != np.asarray(transparency, samples.dtype)).any(axis=2, keepdims=True)
    return np.concatenate([samples, opaque * samples.dtype.type(white)], axis=2)


def _rescale(samples: np.ndarray, white: int, new_white: int) -> np.ndarray:
    """[0, white] => [0, new_white], rounded: 16 bits to 8 is x / 257, never a clip and never a dropped byte."""
    scaled = samples.astype(np.uint32)  # holds 65535 * 65535 + 32767; in place, for a picture may be 90 megapixels
    scaled *= np.uint32(new_white)
    scaled += np.uint32(white // 2)
    scaled //= np.uint32(white)
    np.minimum(scaled, new_white, out=scaled)
    return scaled.astype(np.uint8 if new_white == 255 else np.uint16)


def _rgb16(samples: np.ndarray, policy: DecodePolicy) -> np.ndarray:
    """(H, W, 1 to 4) uint16 gray or RGB, with or without alpha => (H, W, 3) uint16 on the policy's background."""
    has_alpha = samples.shape[2] in (2, 4)
    colour = samples[:, :, :-1] if has_alpha else samples
    colour = np.repeat(colour, 3, axis=2) if colour.shape[2] == 1 else colour
    if not has_alpha:
        return colour
    alpha = samples[:, :, -1:].astype(np.uint32)
    background = np.asarray(policy.background, np.uint32) * 257
    return ((colour * alpha + background * (65535 - alpha) + 32767) // 65535).astype(np.uint16)


def to_srgb(image: Image.Image, policy: DecodePolicy, *, depth: int) -> np.ndarray:
    """A freshly opened picture => (H, W, 3) sRGB, uint8 for `depth` 8 and uint16 for `depth` 16.

    An embedded ICC profile is applied with 8-bit arithmetic, so a `depth` of 16 refuses a 16-bit picture whose profile
    is not sRGB.
    """
    if image.mode in ("F", "I") and not is_deep(image):
        raise ImageError(
            f"holds {'floating-point' if image.mode == 'F' else '32-bit'} samples, which no rule maps to RGB"
        )
    if not is_deep(image) or image.mode == "CMYK":
        bits = {"L;2": 2, "L;4": 4}.get(raw_mode(image))
        if bits and isinstance(image.info.get("transparency"), int):
            # Pillow stretches the samples to 8 bits but leaves the transparent one as the file has it
            image.info["transparency"] = image.info["transparency"] * 255 // (2**bits - 1)
        image.load()
        rgb = _rgb8(image, policy)
        return rgb.astype(np.uint16) * np.uint16(257) if depth == 16 else rgb
    white = white_level(image)
    samples = _with_alpha(read_samples(image), image.info.get("transparency"), white)
    if depth == 8:
        reduced = _rescale(samples, white, 255)
        picture = Image.fromarray(reduced[:, :, 0] if reduced.shape[2] == 1 else reduced)
        if "icc_profile" in image.info:
            picture.info["icc_profile"] = image.info["icc_profile"]
        return _rgb8(picture, policy)
    if _profile_transform(image, "L" if samples.shape[2] < 3 else "RGB", policy) is not None:
        raise ImageError(
            "is a 16-bit picture with an ICC profile other than sRGB: convert it first, or set policy.icc to ignore"
        )
    return _rgb16(samples if white == 65535 else _rescale(samples, white, 65535), policy)
