"""A latent store to pictures: what a diffusion model trained on it would see at best."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from latentvae.errors import UserError
from latentvae.files import check_writable
from latentvae.images import from_model, save_image
from latentvae.latents.encoding.encoder import reproducible_float32
from latentvae.latents.encoding.launch import Launch
from latentvae.latents.operating.file_names import are_apart, safe_part, safe_path
from latentvae.latents.operating.parts import stored_keys, stored_parts
from latentvae.latents.operating.recorded import recorded_autoencoder, recorded_pixels
from latentvae.latents.reading.readable import ReadableStore
from latentvae.latents.store.files import LatentStore
from latentvae.latents.store.records import TENSORS, Manifest
from latentvae.progress import ImageProgress

logger = logging.getLogger("latentvae")


@dataclass(frozen=True)
class DecodeReport:
    """What was written."""

    folder: Path
    num_images: int
    total: int  # latents in the store
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([f"{self.folder}: {self.num_images} of {self.total} latents decoded", *self.notes])


def decode_store(
    store: str | Path,
    out: str | Path,
    *,
    vae: Any = None,
    limit: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    progress: bool = True,
) -> DecodeReport:
    """Decode the latents of a store (the mean, where there is one) in float32 into one picture per image.

    Args:
        store: folder or URL of a latent store; one that is not complete is decoded as far as it is.
        out: folder of the pictures, named by key: PNG (8-bit gray or RGB, 16-bit gray), .npy for what PNG cannot hold.
        vae: a model or whatever `load_autoencoder` takes; None: the one that the store names.
        limit: the first so many in the store's order; None: all.
        batch_size: images per forward; all of one size.
        device: such as cuda:1; None: the accelerator where there is one, else cpu.
        progress: a bar on a terminal, log lines elsewhere.

    Raises UserError for what is no store or VAE of it, and where a picture exists already: it may be the original.
    """
    for name, number in (("limit", limit), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}: it must be at least 1")
    readable = ReadableStore(store, partial=True)
    manifest = readable.manifest
    keys = stored_keys(readable)
    if not keys:
        raise UserError(f"{store} holds no latents: latentvae stats says why")
    given = recorded_autoencoder(manifest, store, vae)
    notes = _notes(manifest, given.encoder_hash, given.decoder_hash)
    for note in notes:
        logger.warning("%s", note)
    pixels = recorded_pixels(manifest)
    if LatentStore(out).manifest_path.exists():
        raise UserError(f"{out} is a latent store: choose another --out for the pictures")
    folder = check_writable(out)
    names = picture_names(keys)
    total = len(keys) if limit is None else min(limit, len(keys))
    paths = (folder / name for name in names[:total])
    taken = next((path for one in paths for path in (one, one.with_suffix(".npy")) if os.path.lexists(path)), None)
    if taken is not None:  # it may be the image that was encoded
        raise UserError(f"{taken} exists already: choose another --out")
    target = Launch.current(device).device
    model = given.float().to(target)
    was_training = model.module.training
    model.module.eval()
    done = 0
    try:
        with ImageProgress("decoding", total, enabled=progress) as bar, torch.no_grad(), reproducible_float32():
            for part in stored_parts(readable):
                latents = part.tensors[TENSORS[manifest.store][0]]
                for raw in latents[: total - done].split(batch_size):
                    arrays = from_model(model.decode(raw.float().to(target)), pixels).cpu().numpy()
                    for array in arrays:
                        save_image(array, folder / names[done], pixels)
                        done += 1
                    bar.update(done)
                if done == total:
                    break
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    finally:
        model.module.train(was_training)
        readable.close()
    return DecodeReport(folder, total, len(keys), notes)


def _notes(manifest: Manifest, encoder: str, decoder: str) -> list[str]:
    if encoder != manifest.vae.encoder:
        return ["note: this VAE's encoder is not the one that made the store: the pictures may be off"]
    if decoder not in manifest.vae.decoders:
        return ["note: this decoder is another than the one the store was begun with"]
    return []


def picture_names(keys: Sequence[str]) -> list[str]:
    """A relative path for each key: its extension replaced by .png where that keeps the names apart, else appended."""
    safe = [safe_path(key) for key in keys]
    for names in ([str(PurePosixPath(name).with_suffix(".png")) for name in safe], [f"{name}.png" for name in safe]):
        if are_apart(names):
            return names
    return [f"{index:08d}_{safe_part(name.replace('/', '_'))}.png" for index, name in enumerate(safe)]
