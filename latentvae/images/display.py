"""Write pictures to disk and lay them out side by side for people to look at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latentvae.errors import UserError
from latentvae.files import atomic_file
from latentvae.images.pixels import PixelFormat, conform


def save_image(array: np.ndarray, path: str | Path, pixels: PixelFormat) -> Path:
    """Write one (H, W, C) array of `pixels` losslessly and atomically; returns the path written.

    8-bit with 1 or 3 channels and 16-bit with 1 channel become PNG; whatever Pillow cannot put into a PNG without loss
    (other channel counts, 16-bit RGB, floats) becomes NumPy's .npy, and the extension of `path` is replaced to say so.
    """
    path = Path(path)
    array = conform(array, pixels)
    channels = array.shape[2]
    if (channels in (1, 3) and array.dtype == np.uint8) or (channels == 1 and array.dtype == np.uint16):
        path = path.with_suffix(".png")
        picture = Image.fromarray(array[:, :, 0] if channels == 1 else array)
        with atomic_file(path) as temporary:
            picture.save(temporary, format="PNG")
    else:
        path = path.with_suffix(".npy")
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)
    return path


def _for_display(array: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """(H, W, C) of `pixels` => (H, W, 3) uint8: gray repeated, of more channels the first three."""
    samples = array.astype(np.float32)
    samples = np.rint(np.clip((samples - pixels.low) / (pixels.high - pixels.low), 0.0, 1.0) * 255.0)
    channels = [min(index, samples.shape[2] - 1) if samples.shape[2] != 2 else 0 for index in range(3)]
    return samples[:, :, channels].astype(np.uint8)


def image_grid(
    images: Sequence[np.ndarray | torch.Tensor] | torch.Tensor,
    columns: int,
    pixels: PixelFormat | None = None,
    gap: int = 2,
) -> np.ndarray:
    """Lay images out row by row on white, left to right: for people, not for measurements.

    images: (H, W, C) each (or one (B, H, W, C) tensor) of `pixels` (default: 8-bit, as many channels as they have), of
    one size or several.                                                 -> (rows * H + gaps, columns * W + gaps, 3)
    uint8
    """
    arrays = [image.cpu().numpy() if isinstance(image, torch.Tensor) else image for image in images]
    if not arrays or columns < 1:
        raise UserError(f"a grid of {len(arrays)} images in {columns} columns is empty: give at least one of each")
    pixels = pixels or PixelFormat(channels=arrays[0].shape[2])
    tiles = [_for_display(conform(array, pixels), pixels) for array in arrays]
    height, width = max(tile.shape[0] for tile in tiles), max(tile.shape[1] for tile in tiles)
    rows = -(-len(tiles) // columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return grid
