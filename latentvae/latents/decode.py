"""A latent store to pictures: what a diffusion model trained on it would see at best."""

import copy
import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import torch

from latentvae.checkpoint import load_model, model_hashes
from latentvae.errors import UserError
from latentvae.files import check_writable
from latentvae.images import PixelFormat, from_model, save_image
from latentvae.latents.dataset import LatentDataset
from latentvae.latents.encoder import reproducible_float32
from latentvae.latents.settings import resolved_device, resolved_model
from latentvae.latents.store import LatentStore
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.progress import ImageProgress

logger = logging.getLogger("latentvae")

MAX_NAME_BYTES = 200  # file systems take 255


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
    vae: AutoencoderKL | str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    progress: bool = True,
) -> DecodeReport:
    """Decode the latents of a store (the mean, where there is one) in float32 into one picture per image.

    Args:
        store: folder of a latent store; one that is not complete is decoded as far as it is.
        out: folder of the pictures, named by key: PNG (8-bit gray or RGB, 16-bit gray), .npy for what PNG cannot hold.
        vae: a model or whatever `load_model` takes; None: the one that the store names.
        limit: the first so many in the store's order; None: all.
        batch_size: images per forward.
        device: such as cuda:1; None: the accelerator where there is one, else cpu.
        progress: a bar on a terminal, log lines elsewhere.
    """
    manifest = LatentStore(store).read_manifest()
    posterior: Literal["mode", "sample"] = "sample" if manifest.store == "sample" else "mode"
    dataset = LatentDataset(store, posterior=posterior, normalize=False, partial=True)
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: it must be at least 1")
    model = resolved_model(vae) if vae is not None else _recorded_model(manifest.vae.name, str(store))
    if model.config.latent_channels != manifest.latent_channels:
        raise UserError(
            f"{store} has {manifest.latent_channels} latent channels, the VAE {model.config.latent_channels}: pass the "
            "--vae that made it"
        )
    notes = []
    hashes = model_hashes(model)
    if hashes.encoder != manifest.vae.encoder:
        notes.append("note: this VAE's encoder is not the one that made the store: the pictures may be off")
    elif hashes.decoder not in manifest.vae.decoders:
        notes.append("note: this decoder is another than the one the store was begun with")
    for note in notes:
        logger.warning("%s", note)

    pixels = PixelFormat.model_validate(manifest.fields["pixels"])
    folder = check_writable(out)
    names = picture_names(dataset.keys)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    target = resolved_device(device)
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        model = copy.deepcopy(model).float()
    was_training = model.training
    model.to(target).eval()
    try:
        with ImageProgress("decoding", total, enabled=progress) as bar, torch.no_grad(), reproducible_float32():
            for start in range(0, total, batch_size):
                places = range(start, min(start + batch_size, total))
                raw = torch.stack([item["latents"] for item in dataset.__getitems__(places)])  # (B, D, h, w)
                arrays = from_model(model.decode(raw.to(target)).sample, pixels).cpu().numpy()
                for place, array in zip(places, arrays, strict=True):
                    save_image(array, folder / names[place], pixels)
                bar.update(places.stop)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    finally:
        model.train(was_training)
        dataset.close()
    return DecodeReport(folder, total, len(dataset), notes)


def picture_names(keys: Sequence[str]) -> list[str]:
    """A relative path for each key: its extension replaced by .png where that keeps the names apart, else appended.

    Keys are the user's, so a part such as ".." or a drive does not lead out of the folder, and what some system does
    not take in a file name is replaced.
    """
    safe = ["/".join(_safe_part(part) for part in PurePosixPath(key).parts if part not in ("/", "..", ".")) or "_"
            for key in keys]  # fmt: skip
    for names in ([str(PurePosixPath(name).with_suffix(".png")) for name in safe], [f"{name}.png" for name in safe]):
        lower = {name.lower() for name in names}
        folders = {str(parent) for name in lower for parent in PurePosixPath(name).parents}
        if len(lower) == len(names) and not lower & folders:
            return names
    return [f"{index:08d}_{_safe_part(name.replace('/', '_'))}.png" for index, name in enumerate(safe)]


def _safe_part(part: str) -> str:
    """One part of a key as a file name of any system: at most 200 bytes, which leaves room for a temporary name."""
    name = re.sub(r'[\x00-\x1f<>:"|?*\\]', "_", part)
    data = name.encode("utf-8", "surrogateescape")
    if len(data) <= MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(data).hexdigest()[:16]
    return f"{data[: MAX_NAME_BYTES - 17].decode('utf-8', 'ignore')}-{digest}"


def _recorded_model(name: str | None, where: str) -> AutoencoderKL:
    if name is None:
        raise UserError(f"{where} does not name a VAE that could be loaded: pass --vae")
    try:
        return load_model(name)
    except UserError as error:
        raise UserError(
            f"{where} was made with the VAE {name}, which does not load here: {error}; pass --vae"
        ) from error
