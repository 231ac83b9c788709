"""Latents for diffusion training: a map-style dataset over a store."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.utils.data import Dataset

from latentvae.checkpoint import model_hashes
from latentvae.errors import UserError
from latentvae.keyed import keyed_noise
from latentvae.latents.fingerprint import fingerprint, require_same
from latentvae.latents.plan import read_plan
from latentvae.latents.records import TENSORS, Manifest
from latentvae.latents.settings import resolved_model
from latentvae.latents.store import LatentStore, Shard, open_shard, read_index
from latentvae.model.scaling import LatentScaling

MAX_OPEN_SHARDS = 512  # maps per process; the kernel allows 65,530 by default
COLUMNS = ["key", "row", "width", "height", "crop_top", "crop_left"]


class LatentItem(TypedDict):
    """One image's latents. Sizes are (height, width) and (top, left), as SDXL's conditioning takes them."""

    latents: Tensor  # (D, h, w) float32
    key: str
    original_size: tuple[int, int]  # pixels, after EXIF orientation
    crop_top_left: tuple[int, int]  # pixels in the scaled image


class LatentDataset(Dataset[LatentItem]):
    """Map-style over the images of a store that have latents, in the store's order (shuffle as you like).

    Shards are memory-mapped when first touched, in each worker process for itself. `__getitems__` serves a whole
    batch, which PyTorch's DataLoader uses by itself.

    Args:
        store: folder of a latent store.
        posterior: "mode" gives the mean; "sample" draws anew in each epoch, keyed by (seed, epoch, key), so neither
            the order nor the number of workers matters. A store of samples gives the one it holds.
        normalize: (raw - shift) * scale, or per channel, from the VAE's config; False: raw, as `decode` takes it.
        seed: of the sampling.
        partial: read what is committed of a store that is not complete.
        vae: the autoencoder that will decode; refused where its encoder is not the one that made the store.

    Raises UserError where the store is absent, incomplete, damaged, or mixed from several.
    """

    def __init__(
        self,
        store: str | Path,
        *,
        posterior: Literal["mode", "sample"] = "mode",
        normalize: bool = True,
        seed: int = 0,
        partial: bool = False,
        vae: AutoencoderKL | None = None,
    ) -> None:
        self.store = LatentStore(store)
        self.manifest = self.store.read_manifest()
        self.posterior, self.normalize, self.seed = posterior, normalize, seed
        self.scaling = LatentScaling.from_config(self.manifest.vae.config)
        _require_posterior(self.manifest, posterior, str(store))
        if vae is not None:
            _require_encoder(self.manifest, vae, str(store))
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._load_index(partial)

    def _load_index(self, partial: bool) -> None:
        """Keys, sizes and places of all latents, as arrays: 1 million images take about 100 MB."""
        manifest, folder = self.manifest, self.store.folder
        if fingerprint(manifest.fields) != manifest.fingerprint:
            raise UserError(f"{self.store.manifest_path} is damaged: its fingerprint does not belong to its fields")
        tables, units = [], []
        plan = read_plan(self.store.plan_folder)
        self._buckets = [unit.bucket for unit in plan.units]
        missing = 0
        for unit in plan.units:
            record = self.store.read_record(unit.bucket, unit.number)
            if record is None:
                missing += 1
                continue
            what = f"unit {unit.number} of {folder}"
            require_same(record.fields, manifest.fields, what, "it is not of this store: encode again in another --out")
            table = read_index(self.store.paths(unit.bucket, unit.number)[1], COLUMNS)
            table = table.filter(pc.greater_equal(table["row"], 0))
            tables.append(table)
            units.append(np.full(len(table), unit.number, np.int32))
        if (missing or not manifest.complete) and not partial:
            raise UserError(
                f"{folder} is not complete ({missing} of {len(plan.units)} units are to be encoded): "
                "run encode again to finish it, or pass partial=True"
            )
        if not sum(map(len, tables)):
            raise UserError(f"{folder} holds no latents: see the reasons in its index files")
        table = pa.concat_tables(tables)
        self._keys = table["key"].cast(pa.large_string()).combine_chunks()
        self._units = np.concatenate(units)
        self._rows, *sizes = (table[name].to_numpy() for name in COLUMNS[1:])
        self._sizes = np.stack(sizes, axis=1)  # (items, 4): width, height, top, left

    def __len__(self) -> int:
        return len(self._units)

    @property
    def keys(self) -> list[str]:
        """The key of every item, in order."""
        return self._keys.to_pylist()

    @property
    def epoch(self) -> int:
        """See `set_epoch`."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Before each pass: other noise with posterior="sample". Reaches persistent workers too."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> LatentItem:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[LatentItem]:
        """A batch of items; each shard is visited once."""
        if not len(indices):
            return []
        places = np.asarray(indices, dtype=np.int64)
        if not (-len(self) <= places.min() and places.max() < len(self)):
            raise IndexError(f"index out of range for {len(self)} latents")
        places = places % len(self)
        keys = self._keys.take(pa.array(places)).to_pylist()
        stored = self._read(places)
        if self.posterior == "sample" and "logvar" in stored:
            mean = stored["mean"]
            noise = torch.stack([keyed_noise(mean.shape[1:], self.seed, self.epoch, key) for key in keys])
            latents = mean + torch.exp(0.5 * stored["logvar"]) * noise
        else:
            latents = stored[TENSORS[self.manifest.store][0]]
        if self.normalize:
            latents = self.scaling.normalize(latents)
        items: list[LatentItem] = []
        for latent, key, place in zip(latents, keys, places, strict=True):
            width, height, top, left = self._sizes[place].tolist()
            items.append(
                {"latents": latent, "key": key, "original_size": (height, width), "crop_top_left": (top, left)}
            )
        return items

    def latent_dist(self, index: int) -> DiagonalGaussianDistribution:
        """The posterior of one image, raw, as `vae.encode(images).latent_dist` gives it: (1, D, h, w)."""
        if self.manifest.store != "moments":
            raise UserError(
                f"{self.store.folder} holds the {self.manifest.store} alone; a posterior needs --store moments"
            )
        stored = self._read(np.asarray([range(len(self))[index]]))
        return DiagonalGaussianDistribution(torch.cat([stored["mean"], stored["logvar"]], dim=1))

    def _read(self, places: np.ndarray) -> dict[str, Tensor]:
        """The stored tensors of these items, raw: (n, D, h, w) float32 each."""
        units, rows = self._units[places], self._rows[places]
        parts: dict[str, Tensor] = {}
        for unit in np.unique(units):
            here = np.flatnonzero(units == unit)
            wanted = torch.from_numpy(rows[here].astype(np.int64))
            for name, tensor in self._shard(int(unit)).tensors.items():
                values = tensor[wanted].float()
                if name not in parts:
                    parts[name] = values.new_empty(len(places), *values.shape[1:])
                parts[name][torch.from_numpy(here)] = values
        return parts

    def _shard(self, unit: int) -> Shard:
        if unit in self._shards:
            self._shards.move_to_end(unit)
            return self._shards[unit]
        path = self.store.paths(self._buckets[unit], unit)[0]
        shard = open_shard(path)
        if (shard.fingerprint, shard.unit) != (self.manifest.fingerprint, unit):
            raise UserError(f"{path} is not the shard of unit {unit} of this store: run latentvae verify")
        self._shards[unit] = shard
        if len(self._shards) > MAX_OPEN_SHARDS:
            self._shards.popitem(last=False)
        return shard

    def close(self) -> None:
        """Release the memory maps (Windows keeps mapped files from being replaced); reading opens them again."""
        self._shards.clear()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": OrderedDict()}


def _require_posterior(manifest: Manifest, posterior: str, where: str) -> None:
    if posterior not in ("mode", "sample"):
        raise UserError(f'posterior is {posterior!r}; it must be "mode" or "sample"')
    if manifest.store == "mean" and posterior == "sample":
        raise UserError(f'{where} holds the mean alone and cannot be sampled: pass posterior="mode"')
    if manifest.store == "sample" and posterior == "mode":
        raise UserError(f'{where} holds one sample per image and not its mode: pass posterior="sample"')


def _require_encoder(manifest: Manifest, vae: AutoencoderKL, where: str) -> None:
    there, here = {"encoder": manifest.vae.encoder}, {"encoder": model_hashes(resolved_model(vae)).encoder}
    require_same(there, here, where, "pass the VAE that made it, or encode again")
