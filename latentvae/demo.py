"""The whole job in a few minutes on a CPU: train, export, load in diffusers, encode, read back, decode, show."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from latentvae.assembly import build
from latentvae.data.sources import open_source
from latentvae.errors import UserError, one_line
from latentvae.evaluation.metrics import psnr
from latentvae.export import export_model
from latentvae.files import check_writable, write_json
from latentvae.images import PixelFormat, center_crop, decode, from_model, image_grid, resize_shorter_side, save_image
from latentvae.keyed import split_by_key
from latentvae.latents.encoding.encode import encode_dataset
from latentvae.latents.operating.decode import decode_store
from latentvae.latents.reading.dataset import LatentDataset
from latentvae.recipe import load_recipe

RECIPE = "smoke_cpu"
# Few images seen at every scale up to the one that is shown, and a PSNR to watch.
CHANGES = ("data.max_resize=4", "training.validate_every_images=800")
RESOLUTION = 256  # of the pictures that are encoded and shown; training sees smaller crops
HELD_OUT_FRACTION = 0.1  # of the user's own images
MAX_SHOWN = 8  # columns of the picture
# Natural photographs inside scikit-image's wheel (skimage/data); the held-out ones are shown, but never trained on.
TRAINED_PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
HELD_OUT_PHOTOGRAPHS = ("coffee.png",)


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and measured.

    Attributes:
        psnr: dB, mean over the encoded images that were trained on.
        psnr_held_out: dB, over those that were not; None where there are none.
        psnr_mean_colour: dB, all of them, each replaced by its own mean colour: what knowing nothing gives.
        compression_ratio: bytes of the 8-bit pixels over bytes of the fp16 latents.
        images_seen: by the training run.
    """

    psnr: float | None
    psnr_held_out: float | None
    psnr_mean_colour: float | None
    compression_ratio: float
    images_seen: int


def run_demo(out: str | Path, *, images: str | Path | None = None, overrides: Sequence[str] = ()) -> DemoResult:
    """Run it all below `out`, on the photographs of scikit-image or the user's own folder.

    `overrides` change fields of the recipe, as `--set` does. Raises UserError where `out` exists, `images` holds no
    image, or a signal stopped the training.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out or delete it")
    console = Console(stderr=True)
    sources = _own_images(Path(images), out) if images is not None else _photographs(out)
    shown = out / "photographs"

    console.rule("1. train a VAE")
    recipe = load_recipe(RECIPE, [*CHANGES, *sources, *overrides])
    result = build(recipe, out / "run").train()
    if result.model_folder is None:
        raise UserError(f"the training was stopped by {result.reason}: run the demo again with another --out")

    console.rule("2. export it and load it with plain diffusers")
    export_model(result.model_folder, out / "model", metrics=result.metrics)
    vae = diffusers.AutoencoderKL.from_pretrained(out / "model")

    console.rule("3. encode the photographs into a latent store")
    encode_dataset(
        shown, out / "model", out / "store", resolution=RESOLUTION, store="mean", small="upscale", num_workers=0
    )

    console.rule("4. read the latents back and decode them")
    decode_store(out / "store", out / "decoded")
    dataset = LatentDataset(out / "store")
    images_shown = _decode_all(dataset, vae, shown)
    save_image(_picture(images_shown), out / "reconstructions.png", PixelFormat())
    summary = DemoResult(
        psnr=_mean([one.psnr for one in images_shown if not one.is_held_out]),
        psnr_held_out=_mean([one.psnr for one in images_shown if one.is_held_out]),
        psnr_mean_colour=_mean([one.psnr_mean_colour for one in images_shown]),
        compression_ratio=3 * RESOLUTION**2 / (2 * dataset[0]["latents"].numel()),  # 1 byte a pixel value, 2 in fp16
        images_seen=result.images_seen,
    )
    write_json(out / "summary.json", asdict(summary))
    _report(summary, out, images)
    return summary


def _photographs(out: Path) -> list[str]:
    """Copy scikit-image's photographs below `out`, shrunk to RESOLUTION; the overrides that train on them."""
    found = find_spec("skimage")
    if found is None or found.origin is None:
        raise UserError(
            "the demo's photographs come with scikit-image: pip install 'latentvae[demo]', or pass --images"
        )
    folder = Path(found.origin).parent / "data"
    check_writable(out)
    for part, names in (("trained", TRAINED_PHOTOGRAPHS), ("held_out", HELD_OUT_PHOTOGRAPHS)):
        (out / "photographs" / part).mkdir(parents=True)
        for name in names:
            # Shrunk once, since decoding megapixels for crops of 64 would keep the two cores from training.
            array = resize_shorter_side(decode(folder / name), RESOLUTION)
            save_image(array, (out / "photographs" / part / name).with_suffix(".png"), PixelFormat())
    return [f"data.source={out / 'photographs' / 'trained'}", f"validation.source={out / 'photographs'}"]


def _own_images(images: Path, out: Path) -> list[str]:
    """Copy a few of the user's images below `out`, to be shown; the overrides that train on the whole folder."""
    source = open_source(images)
    entries = source.entries()
    trained, held_out = split_by_key(entries.keys, HELD_OUT_FRACTION)
    check_writable(out)
    for part, indices, limit in (("trained", trained, MAX_SHOWN - 2), ("held_out", held_out, 2)):
        (out / "photographs" / part).mkdir(parents=True)
        chosen = [entries[index] for index in indices[:limit]]
        for index, entry, content in zip(indices, chosen, source.fetch(chosen), strict=False):
            if not isinstance(content, bytes):
                raise UserError(f"{entry.key} cannot be read: {one_line(content)}")
            (out / "photographs" / part / f"{index:06d}{Path(entry.key).suffix}").write_bytes(content)
    held = [f"validation.fraction={HELD_OUT_FRACTION}"] if len(held_out) else [f"validation.source={images}"]
    return [f"data.source={images}", *held]


@dataclass(frozen=True)
class _Shown:
    """One image of the picture: (H, W, 3) uint8 before and after, and how close they are."""

    key: str
    original: np.ndarray
    restored: np.ndarray
    psnr: float
    psnr_mean_colour: float

    @property
    def is_held_out(self) -> bool:
        return self.key.startswith("held_out/")


def _decode_all(dataset: LatentDataset, vae: Any, originals: Path) -> list[_Shown]:
    """Decode every latent with plain diffusers beside its original; images that were trained on come first."""
    shown = []
    for index in range(len(dataset)):
        item = dataset[index]
        original = center_crop(resize_shorter_side(decode(originals / item["key"]), RESOLUTION), RESOLUTION)
        latents = dataset.scaling.denormalize(item["latents"].float()[None])  # (1, C, h, w), raw
        with torch.no_grad():
            restored = from_model(vae.decode(latents).sample, PixelFormat())  # (1, H, W, 3)
        image = torch.from_numpy(original)[None]
        mean_colour = image.double().mean((1, 2), keepdim=True).expand(image.shape)
        shown.append(
            _Shown(
                key=item["key"],
                original=original,
                restored=restored[0].numpy(),
                psnr=psnr(image, restored).item(),
                psnr_mean_colour=psnr(image, mean_colour).item(),
            )
        )
    return sorted(shown, key=lambda one: (one.is_held_out, one.key))


def _picture(shown: Sequence[_Shown]) -> np.ndarray:
    """Originals above reconstructions, each with a line of text; all held-out images and the first of the others."""
    held_out = [one for one in shown if one.is_held_out]
    trained = [one for one in shown if not one.is_held_out]
    columns = [*trained[: MAX_SHOWN - len(held_out)], *held_out]
    above = [_captioned(one.original, "new to it" if one.is_held_out else "trained on") for one in columns]
    below = [_captioned(one.restored, f"decoded, {one.psnr:.1f} dB") for one in columns]
    return image_grid([*above, *below], columns=len(columns))


def _captioned(array: np.ndarray, text: str) -> np.ndarray:
    """(H, W, 3) uint8 with a strip of text below."""
    height, width = array.shape[:2]
    canvas = Image.new("RGB", (width, height + 20), "white")
    canvas.paste(Image.fromarray(array))
    ImageDraw.Draw(canvas).text((4, height + 3), text, fill="black", font=ImageFont.load_default(size=13))
    return np.asarray(canvas)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _report(summary: DemoResult, out: Path, own_images: str | Path | None) -> None:
    rows = {
        "PSNR, images it was trained on": _decibel(summary.psnr),
        "PSNR, images that are new to it": _decibel(summary.psnr_held_out),
        "PSNR of each image's mean colour": _decibel(summary.psnr_mean_colour),
        "compression": f"{summary.compression_ratio:.0f} : 1, bytes of 8-bit pixels : bytes of fp16 latents (lossy)",
        "images seen in training": f"{summary.images_seen:,}",
        "picture to look at": out / "reconstructions.png",
        "model, a diffusers folder": out / "model",
        "latents": out / "store",
        "decoded latents": out / "decoded",
        "training run": out / "run",
    }
    for name, value in rows.items():
        print(f"{name:<34} {value}")
    source = own_images if own_images is not None else "path/to/images"
    print("A few minutes on a CPU give a blurred picture; the recipes for a GPU train for much longer. Next:")
    print(f"  latentvae train --recipe {RECIPE} --set data.source={source} --out runs/first")
    print(f"  latentvae encode {source} --vae {out / 'model'} --out stores/first --resolution {RESOLUTION}")
    print(f"  latentvae info {out / 'model'}")


def _decibel(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f} dB"
