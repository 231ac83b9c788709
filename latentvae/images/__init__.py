"""The only place that knows pixels: files -> arrays -> the model's float tensors, and back.

Outside the model an image is an HWC array of a declared dtype and range (`PixelFormat`); at the model it is float CHW
in [-1, 1].
"""

from latentvae.images.decode import IMAGE_EXTENSIONS, decode, from_pillow, probe_size
from latentvae.images.display import image_grid, save_image
from latentvae.images.geometry import (
    AspectRatios,
    center_crop,
    covering_size,
    crop,
    resize,
    resize_shorter_side,
    shorter_side_size,
    sizes_of_area,
)
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
    "AspectRatios",
    "DecodePolicy",
    "ImageError",
    "PixelFormat",
    "center_crop",
    "conform",
    "covering_size",
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
    "sizes_of_area",
    "to_model",
]
