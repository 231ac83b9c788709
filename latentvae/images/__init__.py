"""The only place that knows pixels: files -> arrays -> the model's float tensors, and back.

Outside the model an image is an HWC array of a declared dtype and range (`PixelFormat`); at the model it is float CHW
in [-1, 1].
"""

from latentvae.images.decode import IMAGE_EXTENSIONS, decode, from_pillow, probe_size
from latentvae.images.display import image_grid, save_image
from latentvae.images.geometry import center_crop, crop, resize, resize_shorter_side, shorter_side_size
from latentvae.images.pixels import (
    DecodePolicy,
    ImageError,
    PixelFormat,
    conform,
    crop_back,
    from_model,
    pad_to_multiple,
    to_model,
)

__all__ = [
    "IMAGE_EXTENSIONS",
    "DecodePolicy",
    "ImageError",
    "PixelFormat",
    "center_crop",
    "conform",
    "crop",
    "crop_back",
    "decode",
    "from_model",
    "from_pillow",
    "image_grid",
    "pad_to_multiple",
    "probe_size",
    "resize",
    "resize_shorter_side",
    "save_image",
    "shorter_side_size",
    "to_model",
]
