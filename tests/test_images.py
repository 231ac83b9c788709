"""images: real files with known contents => right pixels or an ImageError; and the way to the model and back."""

import csv
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile
from pydantic import ValidationError

from latentvae.errors import UserError
from latentvae.images import (
    DecodePolicy,
    ImageError,
    PixelFormat,
    center_crop,
    crop,
    crop_back,
    decode,
    from_model,
    from_pillow,
    image_grid,
    pad_to_multiple,
    probe_size,
    resize,
    resize_shorter_side,
    save_image,
    to_model,
)

GRAY16 = PixelFormat(channels=1, dtype="uint16")
RGB16 = PixelFormat(channels=3, dtype="uint16")
RGB32 = PixelFormat(channels=3, dtype="float32", range=(-1.0, 1.0))
FORMATS = [
    PixelFormat(),
    GRAY16,
    RGB16,
    RGB32,
    PixelFormat(channels=1),
    PixelFormat(channels=4),
    PixelFormat(channels=2, dtype="uint16"),
    PixelFormat(channels=1, dtype="float32", range=(0, 65535)),
]


def png(samples: np.ndarray, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written byte by byte: (H, W, C) uint8 or uint16, chunks put before the data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = samples.shape[:2]
    depth = samples.dtype.itemsize * 8
    rows = b"".join(b"\0" + row.astype(samples.dtype.newbyteorder(">")).tobytes() for row in samples)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    body = b"".join(chunk(*pair) for pair in chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def saved(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return stream.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b.astype(float)) ** 2), 1e-9)))


def random16(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)


# --- files of every kind ---


@pytest.mark.parametrize("folder", ["bad_images", "pngsuite", "exif_orientation"])
def test_every_file_gives_an_array_or_an_image_error(shared_data, folder):
    readable = []
    files = sorted(path for path in shared_data(folder).iterdir() if path.is_file())
    for path in files:
        for pixels in FORMATS[:1] if folder == "exif_orientation" else (PixelFormat(), GRAY16, RGB32):
            try:
                array = decode(path, pixels)
            except ImageError as error:
                assert "\n" not in str(error) and str(error)
                continue
            readable += [path.name] if pixels == PixelFormat() else []
            assert array.dtype == pixels.numpy_dtype and array.ndim == 3 and array.shape[2] == pixels.channels
            assert array.flags.c_contiguous and array.flags.writeable
            assert probe_size(path) == (array.shape[1], array.shape[0])
    if folder == "bad_images":  # the manifest was made by opening each file with Pillow
        with open(shared_data(folder) / "manifest.csv", newline="") as file:
            assert readable == sorted(row["file"] for row in csv.DictReader(file) if row["pil_result"] == "ok")
    assert len(readable) == {"bad_images": 74, "pngsuite": 162, "exif_orientation": 18}[folder]


def test_the_deliberately_broken_files_are_refused(shared_data):
    suite = shared_data("pngsuite")
    # only a checksum is wrong in this one, its pixels are whole
    assert np.array_equal(decode(suite / "xcsn0g01.png"), decode(suite / "basn0g01.png"))
    for path in sorted(set(suite.glob("x*.png")) - {suite / "xcsn0g01.png"}):
        with pytest.raises(ImageError):
            decode(path)
    for name in ("sharp__truncated.jpg", "Pillow__truncated_image.png", "Pillow__decompression_bomb.gif"):
        with pytest.raises(ImageError):
            decode(shared_data("bad_images") / name)


def test_a_bomb_is_refused_from_its_header():
    bomb = png(np.zeros((1, 1, 3), np.uint8), 2).replace(struct.pack(">II", 1, 1), struct.pack(">II", 60000, 60000))
    header = bomb[:16] + struct.pack(">II", 60000, 60000) + bomb[24:29]
    bomb = header + struct.pack(">I", zlib.crc32(header[12:29])) + bomb[33:]
    for call in (decode, probe_size):
        with pytest.raises(ImageError, match=r"60000|3600000000"):
            call(bomb)
    small = saved(Image.new("RGB", (100, 100)), "PNG")
    with pytest.raises(ImageError, match=r"100x100 = 10,000 pixels; at most 9,999"):
        decode(small, policy=DecodePolicy(max_pixels=9_999))
    with pytest.raises(ImageError, match="max_pixels"):
        probe_size(small, DecodePolicy(max_pixels=9_999))


def test_warnings_of_pillow_neither_leak_nor_stop_anything(shared_data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("Pillow__truncated_exif_dpi.jpg", "Pillow__sugarshack_no_data.mpo", "Pillow__invalid-exif.jpg"):
            assert decode(shared_data("bad_images") / name).shape[2] == 3


def test_things_that_are_no_image_files(tmp_path):
    with pytest.raises(ImageError, match="No such file"):
        decode(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="not a regular file"):
        decode(tmp_path)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ImageError, match="identify"):
        decode(tmp_path / "empty.jpg")
    with pytest.raises(ImageError, match="identify"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # would start Ghostscript


def test_paths_bytes_and_streams_give_the_same(shared_data):
    path = shared_data("bad_images") / "Pillow__hopper.jpg"
    array = decode(path)
    assert np.array_equal(array, decode(str(path))) and np.array_equal(array, decode(path.read_bytes()))
    with open(path, "rb") as stream:
        stream.read(7)
        assert np.array_equal(array, decode(stream))
        assert not stream.closed


@pytest.mark.parametrize("kind", ["Landscape", "Portrait"])
def test_exif_orientation(shared_data, kind):
    folder = shared_data("exif_orientation")
    reference = decode(folder / f"{kind}_1.jpg")
    assert (reference.shape[1] > reference.shape[0]) == (kind == "Landscape")
    for number in range(9):
        array = decode(folder / f"{kind}_{number}.jpg")
        assert array.shape == reference.shape
        # the files are the same photograph with its number painted on; turned wrongly it scores below 15 dB
        assert psnr(resize(array, (60, 60)), resize(reference, (60, 60))) > 26
        assert psnr(resize(array[::-1], (60, 60)), resize(reference, (60, 60))) < 15


def test_orientation_in_every_container_and_value():
    picture = np.random.default_rng(1).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    undo = {  # what must be stored so that the orientation tag shows `picture`
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.swapaxes(0, 1),
        6: np.rot90(picture),
        7: picture[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(picture, -1),
    }
    for orientation, stored in undo.items():
        exif = Image.Exif()
        exif[274] = orientation
        for format, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
            file = saved(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options)
            assert np.array_equal(decode(file), picture), (orientation, format)
            assert probe_size(file) == (6, 4)


def test_the_size_of_a_png_is_probed_without_its_pixels(monkeypatch):
    """A PNG may carry EXIF before or behind its pixels; only the latter is worth decoding them for."""
    exif = Image.Exif()
    exif[274] = 6
    plain = png(np.zeros((4, 6, 3), np.uint8), 2)
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    early, late = plain[:33] + chunk + plain[33:], plain[:-12] + chunk + plain[-12:]
    for file in (early, late):
        assert decode(file).shape == (6, 4, 3) and probe_size(file) == (4, 6)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    assert probe_size(plain) == (6, 4) and probe_size(early) == (4, 6)


def test_orientation_from_xmp_and_broken_exif(shared_data):
    folder = shared_data("bad_images")
    upright = decode(folder / "Pillow__hopper.jpg")
    for name in (
        "orientation_2.jpg",
        "orientation_5.jpg",
        "orientation_6.jpg",
        "orientation_8.jpg",
        "orientation_6.webp",
    ):
        assert psnr(decode(folder / f"Pillow__hopper_{name}"), upright) > 28, name
    path = folder / "Pillow__xmp_tags_orientation.png"  # 3: turned by half
    with Image.open(path) as image:
        raw = np.asarray(image.convert("RGBA"))
    opaque = raw[::-1, ::-1, 3] == 255
    assert opaque.any() and np.array_equal(
        decode(path, policy=DecodePolicy(icc="ignore"))[opaque], raw[::-1, ::-1, :3][opaque]
    )


# --- 16 bits ---


def test_16_bit_gray_is_scaled_not_clipped(shared_data):
    folder = shared_data("pngsuite")
    raw = decode(folder / "basn0g16.png", GRAY16)
    with Image.open(folder / "basn0g16.png") as image:
        assert np.array_equal(raw[:, :, 0], np.asarray(image))
    assert raw.dtype == np.uint16 and raw.max() == 65535 and len(np.unique(raw)) > 256
    rgb = decode(folder / "basn0g16.png")
    assert np.array_equal(rgb, np.repeat(np.rint(raw / 257.0).astype(np.uint8), 3, axis=2))
    assert (rgb == 255).mean() < 0.05  # Pillow's own conversion saturates nearly all of it
    assert np.array_equal(raw, decode(folder / "basi0g16.png", GRAY16))  # interlaced


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_16_bit_png_keeps_its_low_bytes(colour_type, channels):
    samples = random16(9, 7, channels)
    if channels in (2, 4):
        samples[..., -1] = 65535
    file = png(samples, colour_type)
    if channels != 3:
        assert np.array_equal(decode(file, PixelFormat(channels=channels, dtype="uint16")), samples)
    colour = samples[..., :3] if channels >= 3 else np.repeat(samples[..., :1], 3, axis=2)
    assert np.array_equal(decode(file, RGB16), colour)
    assert np.array_equal(decode(file), np.rint(colour / 257.0).astype(np.uint8))
    floats = decode(file, RGB32)
    assert floats.dtype == np.float32 and np.allclose(floats, colour / 65535.0 * 2 - 1, atol=1e-7)


def test_16_bit_transparency_is_composited():
    samples = random16(5, 5, 4)
    alpha = samples[..., 3:] / 65535.0
    for background in ((255, 255, 255), (0, 128, 7)):
        expected = samples[..., :3] * alpha + np.array(background) * 257.0 * (1 - alpha)
        array = decode(png(samples, 6), RGB16, DecodePolicy(background=background))
        assert np.abs(array - expected).max() <= 0.51
        assert (
            np.abs(decode(png(samples, 6), policy=DecodePolicy(background=background)) - expected / 257).max() <= 1.51
        )
    # the single transparent colour of a 16-bit file is compared at 16 bits: one that differs in the low byte stays
    samples = np.array([[[1000, 2000, 3000], [1001, 2000, 3000]]], np.uint16)
    array = decode(png(samples, 2, (b"tRNS", struct.pack(">HHH", 1000, 2000, 3000))), RGB16)
    assert array.tolist() == [[[65535] * 3, [1001, 2000, 3000]]]


def test_16_bit_tiff_against_tifffile(shared_data):
    tifffile = pytest.importorskip("tifffile")
    folder = shared_data("bad_images")
    reference = tifffile.imread(folder / "Pillow__tiff_16bit_RGB.tiff")
    assert np.array_equal(decode(folder / "Pillow__tiff_16bit_RGB.tiff", RGB16), reference)
    assert np.array_equal(decode(folder / "Pillow__tiff_16bit_RGB.tiff"), np.rint(reference / 257.0).astype(np.uint8))
    gray = tifffile.imread(folder / "Pillow__16bit.cropped.tif")
    assert np.array_equal(decode(folder / "Pillow__16bit.cropped.tif", GRAY16)[..., 0], gray)
    samples = random16(6, 5, 3)
    for byteorder in "<>":
        stream = io.BytesIO()
        tifffile.imwrite(stream, samples, photometric="rgb", byteorder=byteorder)
        assert np.array_equal(decode(stream.getvalue(), RGB16), samples)


def test_16_bit_pgm(shared_data):
    raw = decode(shared_data("bad_images") / "Pillow__16_bit_binary.pgm", GRAY16)
    assert raw.min() == 0 and raw.max() == 65535
    assert np.array_equal(decode(b"P5\n2 1\n65535\n\x01\x02\xff\xfe", GRAY16), [[[0x0102], [0xFFFE]]])


def test_other_depths_of_other_channel_counts():
    gray8 = png(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 0)
    assert np.array_equal(decode(gray8, GRAY16)[..., 0].ravel(), np.arange(256) * 257)
    gray16 = png(random16(4, 4, 1), 0)
    with pytest.raises(ImageError, match="uint16 samples; uint8"):
        decode(gray16, PixelFormat(channels=1))
    with pytest.raises(ImageError, match="has 3 channels; 1 are declared"):
        decode(png(random16(4, 4, 3), 2), GRAY16)
    with pytest.raises(ImageError, match="has 1 channels; 4 are declared"):
        decode(gray16, PixelFormat(channels=4, dtype="uint16"))
    floats = decode(gray16, PixelFormat(channels=1, dtype="float32", range=(0, 65535)))
    assert np.array_equal(floats, random16(4, 4, 1).astype(np.float32))
    with pytest.raises(ImageError, match="0, 100"):
        decode(gray16, PixelFormat(channels=1, dtype="uint16", range=(0, 100)))
    real = saved(Image.fromarray(np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)), "TIFF")
    assert decode(real, PixelFormat(channels=1, dtype="float32", range=(-3, 3)))[2, 3, 0] == 3.0
    with pytest.raises(ImageError, match="floating-point"):
        decode(real)
    rgba = np.arange(64, dtype=np.uint8).reshape(4, 4, 4)
    assert np.array_equal(decode(png(rgba, 6), PixelFormat(channels=4)), rgba)  # samples, not composited


# --- colour ---


@pytest.mark.parametrize("name", ["tp1n3p08", "tbbn3p08", "tbwn3p08", "tbyn3p08", "tbbn0g04", "tbrn2c08", "tbgn2c16"])
def test_transparent_pixels_become_the_background(shared_data, name):
    path = shared_data("pngsuite") / f"{name}.png"
    white, green = decode(path), decode(path, policy=DecodePolicy(background=(0, 255, 0)))
    transparent = (white == 255).all(-1) & (green == (0, 255, 0)).all(-1)
    assert transparent.mean() > 0.2  # the corners around the symbol
    assert transparent[0, 0] and transparent[-1, -1]
    assert np.array_equal(white[~transparent], green[~transparent])


def test_partial_transparency_and_hidden_colours(shared_data):
    red = np.full((2, 2, 4), (255, 0, 0, 0), np.uint8)
    red[0, 0, 3] = 128
    array = decode(png(red, 6), policy=DecodePolicy(background=(255, 255, 255)))
    assert array[0, 0].tolist() == [255, 127, 127] and (array[1] == 255).all()
    gray_alpha = np.dstack([np.zeros((2, 2), np.uint8), np.full((2, 2), 51, np.uint8)])
    assert np.abs(decode(png(gray_alpha, 4)).astype(int) - 204).max() <= 1
    folder = shared_data("bad_images")
    assert (decode(folder / "sharp__full-transparent.png") == 255).all()
    gif, webp = decode(folder / "Pillow__transparent.gif"), decode(folder / "Pillow__transparent.webp")
    assert (gif[0, 0] == 255).all() and psnr(gif, webp) > 25


def test_gray_palette_and_bit_depths_agree(shared_data):
    folder = shared_data("pngsuite")
    for name in ("basn0g01", "basn0g02", "basn0g04", "basn0g08", "basn4a08"):
        array = decode(folder / f"{name}.png")
        assert (array[..., 0] == array[..., 1]).all() and (array[..., 0] == array[..., 2]).all()
        assert array.max() >= 238 and array.min() == 0
    assert sorted(np.unique(decode(folder / "basn0g02.png"))) == [0, 85, 170, 255]
    with pytest.raises(ImageError):
        decode(folder / "basn3p08.png", PixelFormat(channels=1))  # palette indices are not samples


def test_cmyk_lab_and_rgb_show_the_same_picture(shared_data):
    folder = shared_data("bad_images")
    hopper = decode(folder / "Pillow__hopper.png")
    assert psnr(decode(folder / "Pillow__hopper.Lab.tif"), hopper) > 35
    # stored inverted by Adobe's convention in the JPEG, straight in the TIFF
    jpeg, tiff = decode(folder / "Pillow__pil_sample_cmyk.jpg"), decode(folder / "Pillow__tiff_strip_cmyk_jpeg.tif")
    assert np.abs(jpeg.astype(int) - tiff).mean() < 2
    assert jpeg[..., 0].mean() > 3 * jpeg[..., 1].mean()  # a dark red picture
    squares = Image.new("CMYK", (2, 1), (0, 0, 0, 0))
    squares.putpixel((1, 0), (255, 0, 0, 0))
    assert decode(saved(squares, "TIFF")).tolist() == [[[255, 255, 255], [0, 255, 255]]]
    jpeg = decode(saved(squares.resize((32, 16), Image.Resampling.NEAREST), "JPEG", quality=95))
    assert (jpeg[8, 2] > 245).all() and jpeg[8, 30, 0] < 10 and (jpeg[8, 30, 1:] > 245).all()


def test_icc_profiles(shared_data):
    path = shared_data("bad_images") / "sharp__p3.png"
    stored, converted = decode(path, policy=DecodePolicy(icc="ignore")), decode(path)
    assert stored[..., 0].min() == 240  # Display-P3 red 240 is beyond sRGB's red
    assert converted[..., 0].min() == 255 and (converted[..., 1:] == 0).all()
    with Image.open(path) as image, pytest.raises(ImageError, match="ICC"):
        decode(png(random16(4, 4, 3), 2, (b"iCCP", b"p3\0\0" + zlib.compress(image.info["icc_profile"]))), RGB16)
    photo = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (srgb, lab, b"not a profile", srgb[:200], b""):  # sRGB, another space, broken: pixels as they are
        assert np.array_equal(decode(saved(Image.fromarray(photo), "PNG", icc_profile=profile)), photo)
    assert decode(shared_data("bad_images") / "image-png__iccp_broken_iccp.png").shape == (248, 248, 3)


def test_animation_gives_its_first_frame_or_is_refused(shared_data):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        file = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert (decode(file) == (255, 0, 0)).all(), format
        with pytest.raises(ImageError, match="2 frames"):
            decode(file, policy=DecodePolicy(animation="refuse"))
    photograph = shared_data("bad_images") / "Pillow__frame_size.mpo"
    assert decode(photograph, policy=DecodePolicy(animation="refuse")).shape == (70, 56, 3)


# --- .npy, writing, Pillow objects ---


@pytest.mark.parametrize("pixels", [*FORMATS, PixelFormat(channels=13, dtype="uint16")], ids=str)
def test_what_is_saved_is_read_back(tmp_path, pixels):
    generator = np.random.default_rng(0)
    array = generator.uniform(pixels.low, pixels.high, (6, 9, pixels.channels)).astype(pixels.numpy_dtype)
    path = save_image(array, tmp_path / "a.png", pixels)
    assert np.array_equal(decode(path, pixels), array) and decode(path, pixels).dtype == array.dtype
    assert probe_size(path) == (9, 6)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_numpy_files_are_checked_before_they_are_read():
    stream = io.BytesIO()
    np.save(stream, np.zeros((3, 4), "complex64"))
    with pytest.raises(ImageError, match="complex64"):
        decode(stream.getvalue(), GRAY16)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (10**6, 10**6, 1)})
    with pytest.raises(ImageError, match="max_pixels"):
        decode(header.getvalue(), GRAY16)
    stream = io.BytesIO()
    np.save(stream, np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(ImageError):
        decode(stream.getvalue(), GRAY16)


def test_from_pillow_follows_the_same_rules():
    picture = Image.fromarray(np.full((3, 2, 4), (10, 20, 30, 0), np.uint8))
    assert (from_pillow(picture) == 255).all()
    assert np.array_equal(from_pillow(Image.fromarray(random16(3, 2)), GRAY16)[..., 0], random16(3, 2))


# --- to the model and back ---


@pytest.mark.parametrize("pixels", [PixelFormat(channels=1), GRAY16], ids=str)
def test_every_integer_value_survives_the_model_range(pixels):
    values = np.arange(int(pixels.high) + 1, dtype=pixels.numpy_dtype).reshape(1, 1, -1, 1)
    images = to_model(torch.from_numpy(values), pixels)
    assert images.dtype == torch.float32 and images.shape == (1, 1, 1, values.size)
    assert images.min() == -1.0 and images.max() == 1.0 and images.is_contiguous()
    back = from_model(images, pixels)
    assert back.dtype == pixels.torch_dtype and np.array_equal(back.numpy(), values)
    assert np.array_equal(from_model(images.double(), pixels).numpy(), values)


def test_from_model_clamps_and_rounds():
    images = torch.tensor([-5.0, -1.0, -1 + 0.6 * 2 / 255, 0.0, 1 - 0.4 * 2 / 255, 9.0]).view(1, 1, 1, 6)
    assert from_model(images, PixelFormat(channels=1)).flatten().tolist() == [0, 0, 1, 128, 255, 255]
    assert from_model(images.bfloat16(), PixelFormat(channels=1)).dtype == torch.uint8
    twelve = PixelFormat(channels=1, dtype="uint16", range=(0, 4095))
    assert from_model(images, twelve).flatten().tolist()[-1] == 4095
    assert to_model(torch.tensor([[[4095]]], dtype=torch.uint16), twelve).item() == 1.0
    real = PixelFormat(channels=1, dtype="float32", range=(-3, 5))
    assert torch.allclose(
        from_model(to_model(torch.tensor([[[-3.0], [0.5], [5.0]]]), real), real).flatten()[1:2], torch.tensor([0.5])
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_to_model_leaves_the_images_as_they_were(channels):
    images = torch.full((1, 2, 2, channels), 0.5)
    to_model(images, PixelFormat(channels=channels, dtype="float32", range=(0, 1)))
    assert (images == 0.5).all()


def test_to_model_takes_one_image_and_refuses_others():
    assert to_model(torch.zeros(4, 6, 3, dtype=torch.uint8), PixelFormat()).shape == (1, 3, 4, 6)
    array = torch.randint(0, 256, (2, 4, 6, 3), dtype=torch.uint8)
    assert torch.equal(to_model(array, PixelFormat())[1, 2], to_model(array[1], PixelFormat())[0, 2])
    for wrong in (torch.zeros(1, 4, 4, 1, dtype=torch.uint8), torch.zeros(1, 4, 4, 3)):
        with pytest.raises(UserError, match="declared"):
            to_model(wrong, PixelFormat())
    with pytest.raises(UserError, match="floating"):
        from_model(array, PixelFormat())


def test_padding_and_its_undoing():
    images = torch.randn(2, 3, 13, 16)
    padded, size = pad_to_multiple(images, 8)
    assert padded.shape == (2, 3, 16, 16) and size == (13, 16)
    assert torch.equal(padded[:, :, 15], images[:, :, 12]) and torch.equal(crop_back(padded, size), images)
    assert pad_to_multiple(padded, 8)[0] is padded


def test_declared_formats_are_checked():
    for wrong in (
        {"dtype": "float32"},
        {"range": (5, 5)},
        {"range": (0, 256)},
        {"dtype": "float32", "range": (0, float("nan"))},
    ):
        with pytest.raises(ValidationError):
            PixelFormat(**wrong)
    with pytest.raises(ValidationError):
        DecodePolicy(background=(0, 0, 256))


# --- geometry ---


def test_resize_of_rgb_is_pillows_and_of_other_data_agrees_with_it():
    generator = np.random.default_rng(0)
    array = generator.integers(0, 256, (20, 31, 3), dtype=np.uint8)
    reference = np.asarray(Image.fromarray(array).resize((11, 9), Image.Resampling.BICUBIC))
    assert np.array_equal(resize(array, (11, 9)), reference)
    four = np.dstack([array, array[..., :1]])  # not RGBA: the fourth channel must not weigh the others
    assert np.array_equal(resize(four, (11, 9))[..., :3], reference)
    sixteen = resize(array.astype(np.uint16) * 257, (11, 9))
    assert sixteen.dtype == np.uint16 and np.abs(sixteen / 257.0 - reference).max() < 1.01
    floats = resize(array.astype(np.float32), (11, 9))
    assert floats.dtype == np.float32 and np.abs(floats - reference).max() < 1.01
    assert np.array_equal(resize(array, (31, 20)), array)


def test_16_bit_resize_keeps_16_bits_and_does_not_wrap():
    ramp = np.linspace(0, 65535, 256 * 64).reshape(64, 256, 1).astype(np.uint16)
    assert len(np.unique(resize(ramp, (128, 32)))) > 2000
    edge = np.zeros((8, 8, 1), np.uint16)
    edge[:, 4:] = 65535
    enlarged = resize(edge, (64, 64), "lanczos")  # overshoots on both sides of the edge
    assert enlarged[:, :8].max() < 3000 and enlarged[:, -8:].min() > 62000
    unit = resize((edge / 65535).astype(np.float32), (64, 64))
    assert unit.min() >= 0.0 and unit.max() <= 1.0


def test_box_is_the_crop_of_the_resized_whole():
    array = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    whole = resize(array, (40, 30))
    part = resize(array, (16, 16), box=(2 * 10.0, 2 * 5.0, 2 * 26.0, 2 * 21.0))
    assert np.abs(part.astype(int) - crop(whole, 5, 10, 16, 16)).max() <= 1


def test_shorter_side_and_crops():
    array = np.arange(6 * 9, dtype=np.uint8).reshape(6, 9, 1)
    assert resize_shorter_side(array, 12).shape == (12, 18, 1) and resize_shorter_side(array[:, :4], 2).shape == (
        3,
        2,
        1,
    )
    assert np.array_equal(center_crop(array, 4), array[1:5, 2:6])
    with pytest.raises(UserError, match="resize"):
        crop(array, 3, 0, 4, 4)
    with pytest.raises(ImageError, match="would become"):
        resize_shorter_side(np.zeros((1, 60000, 3), np.uint8), 256)


def test_grid():
    tiles = [np.full((4, 6, 1), value, np.uint16) for value in (0, 65535, 257)]
    grid = image_grid(tiles, 2, GRAY16)
    assert grid.shape == (10, 14, 3) and grid.dtype == np.uint8
    assert (grid[:4, :6] == 0).all() and (grid[:4, 8:] == 255).all() and (grid[6:, :6] == 1).all()
    assert (image_grid(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), 2)[:, 4:6] == 255).all()
    with pytest.raises(UserError, match="empty"):
        image_grid([], 2)


# --- many bands, floating point, and files that anybody could have sent ---


@pytest.fixture
def tifffile():
    return pytest.importorskip("tifffile")


def tiff(library, samples: np.ndarray, **options) -> bytes:
    """A TIFF of (H, W, C) samples; planarconfig "separate" stores them band by band."""
    stored = np.moveaxis(samples, -1, 0) if options.get("planarconfig") == "separate" else samples
    stream = io.BytesIO()
    library.imwrite(stream, stored, photometric="minisblack", **{"planarconfig": "contig", **options})
    return stream.getvalue()


def cube(dtype: str, channels: int, height: int = 37, width: int = 41) -> np.ndarray:
    samples = np.random.default_rng(channels).integers(0, 65536, (height, width, channels))
    return (samples / 65536).astype(dtype) if dtype.startswith("float") else samples.astype(dtype)


@pytest.mark.parametrize("planarconfig", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd", "packbits"])
@pytest.mark.parametrize("tile", [None, (16, 16)], ids=["strips", "tiles"])
def test_13_band_tiff_round_trips(tifffile, planarconfig, compression, tile):
    if compression not in (None, "packbits", "deflate"):
        pytest.importorskip("imagecodecs")
    samples = cube("uint16", 13)
    pixels = PixelFormat(channels=13, dtype="uint16")
    for byteorder in "<>":
        for predictor in (None, True) if compression in ("lzw", "deflate", "zstd") else (None,):
            options = {"compression": compression, "tile": tile, "byteorder": byteorder, "predictor": predictor}
            file = tiff(tifffile, samples, planarconfig=planarconfig, **options)
            array = decode(file, pixels)
            assert np.array_equal(array, samples) and array.dtype == np.uint16 and array.flags.c_contiguous
            assert probe_size(file) == (41, 37)


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [("uint8", 1), ("uint8", 2), ("uint8", 4), ("uint8", 5), ("uint16", 1), ("uint16", 2), ("uint16", 4), ("uint16", 7)]
    + [("float32", channels) for channels in (1, 2, 3, 4, 12)],
)
@pytest.mark.parametrize("planarconfig", ["contig", "separate"])
def test_every_kind_of_sample_comes_back(tifffile, dtype, channels, planarconfig):
    samples = cube(dtype, channels)
    options = {} if channels == 1 else {"planarconfig": planarconfig}
    file = tiff(tifffile, samples, **options) if channels > 1 else tiff(tifffile, samples[..., 0], planarconfig=None)
    pixels = PixelFormat(channels=channels, dtype=dtype, range=(0, 1) if dtype == "float32" else None)
    assert np.array_equal(decode(file, pixels), samples)
    assert probe_size(file) == (41, 37)
    with pytest.raises(ImageError, match=f"{channels} channels; 6"):
        decode(file, PixelFormat(channels=6, dtype=dtype, range=pixels.range))


def test_bigtiff_float64_and_orientation(tifffile):
    samples = cube("float64", 5)
    pixels = PixelFormat(channels=5, dtype="float32", range=(0, 1))
    assert np.array_equal(decode(tiff(tifffile, samples, bigtiff=True), pixels), samples.astype(np.float32))
    turned = tiff(tifffile, cube("uint16", 5), extratags=[(274, "H", 1, 6, True)])
    assert np.array_equal(decode(turned, PixelFormat(channels=5, dtype="uint16")), np.rot90(cube("uint16", 5), -1))
    assert probe_size(turned) == (37, 41)


def test_what_a_multi_band_tiff_may_not_be(tifffile):
    samples, pixels = cube("uint16", 13), PixelFormat(channels=13, dtype="uint16")
    file = tiff(tifffile, samples)
    with pytest.raises(ImageError, match=r"41x37 = 1,517 pixels; at most 1,000"):
        decode(file, pixels, DecodePolicy(max_pixels=1000))
    with pytest.raises(ImageError, match=r"max_pixels"):
        probe_size(file, DecodePolicy(max_pixels=1000))
    with pytest.raises(ImageError, match="uint16 samples; uint8"):
        decode(file, PixelFormat(channels=13))
    with pytest.raises(ImageError, match="identify"):
        decode(file)  # never made RGB
    pages = io.BytesIO()
    with tifffile.TiffWriter(pages) as writer:
        for _ in range(3):
            writer.write(samples, photometric="minisblack", planarconfig="contig", metadata=None)
    assert np.array_equal(decode(pages.getvalue(), pixels), samples)
    with pytest.raises(ImageError, match="3 pages, which the policy refuses"):
        decode(pages.getvalue(), pixels, DecodePolicy(animation="refuse"))
    for size in (len(file) - 1, len(file) // 2, 9):
        with pytest.raises(ImageError):
            decode(file[:size], pixels)


def test_a_tiff_bomb_takes_no_memory(tifffile):
    """9,000 x 9,000 pixels of 13 bands in a few bytes: refused from the header, by the share that a file can hold."""
    small = tiff(tifffile, np.zeros((1, 1, 13), np.uint16), compression="deflate", rowsperstrip=9000)
    for width, height in ((9000, 9000), (60000, 60000)):
        bomb = bytearray(small)
        for tag, value in ((256, width), (257, height)):  # ImageWidth, ImageLength
            place = bomb.index(struct.pack("<H", tag), 8)
            bomb[place + 2 : place + 12] = struct.pack("<HII", 4, 1, value)
        with pytest.raises(ImageError, match=r"bytes of samples in a file of|max_pixels|without data"):
            decode(bytes(bomb), PixelFormat(channels=13, dtype="uint16"))


def test_without_tifffile_it_is_named(tifffile, monkeypatch):
    file = tiff(tifffile, cube("uint16", 13))
    monkeypatch.setattr("latentvae.images.tiff.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need tifffile: pip install 'latentvae\[data\]'") as caught:
        decode(file, PixelFormat(channels=13, dtype="uint16"))
    assert not isinstance(caught.value, ImageError)  # every file would fail for it: the run stops instead
    assert decode(tiff(tifffile, cube("uint16", 1)[..., 0], planarconfig=None), GRAY16).shape == (37, 41, 1)  # Pillow's


def damaged(file: bytes, generator: np.random.Generator) -> bytes:
    """Cut off somewhere, or with some bits turned, half of them near the beginning."""
    if generator.random() < 0.3:
        return file[: generator.integers(len(file))]
    data = bytearray(file)
    for _ in range(generator.integers(1, 8)):
        reach = len(data) if generator.random() < 0.5 else min(len(data), 700)
        data[generator.integers(reach)] ^= 1 << int(generator.integers(8))
    return bytes(data)


def survives(file: bytes, pixels: PixelFormat) -> bool:
    """Whether it decodes; anything but an array of the format or an ImageError of one line fails the test."""
    try:
        array = decode(file, pixels, DecodePolicy(max_pixels=4_000_000))
    except ImageError as error:
        assert str(error) and "\n" not in str(error)
        return False
    assert array.dtype == pixels.numpy_dtype and array.shape[2] == pixels.channels
    return True


@pytest.mark.timeout(120)
def test_a_thousand_damaged_photographs(shared_data):
    """Real JPEG, PNG and WebP files cut off and with bits turned: an array or an ImageError, and always an end."""
    generator = np.random.default_rng(0)
    photographs = [Image.open(path) for path in sorted(shared_data("bsds_test").glob("*.jpg"))[:4]]
    files = [path.read_bytes() for path in sorted(shared_data("bsds_test").glob("*.jpg"))[:4]]
    files += [path.read_bytes() for path in sorted(shared_data("bad_images").glob("Pillow__hopper*.[jpw]*"))]
    for photograph in photographs:
        small = photograph.resize((160, 120))
        files += [saved(small, "PNG"), saved(small, "WEBP"), saved(small, "WEBP", lossless=True)]
        files += [saved(small, "JPEG", progressive=True), saved(small.convert("CMYK"), "JPEG")]
    kinds = {Image.open(io.BytesIO(file)).format for file in files}
    assert kinds == {"JPEG", "PNG", "WEBP"}
    outcomes = [survives(damaged(files[index % len(files)], generator), PixelFormat()) for index in range(1000)]
    assert 100 < sum(outcomes) < 900  # both happen


@pytest.mark.timeout(120)
def test_damaged_multi_band_tiffs(tifffile):
    generator = np.random.default_rng(0)
    options = [{}, {"planarconfig": "separate"}, {"tile": (16, 16)}, {"compression": "deflate", "predictor": True}]
    files = [tiff(tifffile, cube("uint16", 13), **chosen) for chosen in options]
    pixels = PixelFormat(channels=13, dtype="uint16")
    outcomes = [survives(damaged(files[index % len(files)], generator), pixels) for index in range(1000)]
    assert 50 < sum(outcomes) < 900
