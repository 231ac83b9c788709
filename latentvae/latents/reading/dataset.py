"""Latents for diffusion training: a map-style dataset over a store."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.utils.data import Dataset

from latentvae.errors import UserError
from latentvae.latents.reading.draws import key_words, shuffled
from latentvae.latents.reading.items import (
    COLUMNS,
    OWN_FIELDS,
    ItemReader,
    LatentItem,
    PosteriorMode,
    ReadOptions,
    Rows,
    rows_of,
)
from latentvae.latents.reading.joins import PROBED, ArraysLike, CaptionsLike, Filter, Joins, filtered
from latentvae.latents.reading.readable import Autoencoder, ReadableStore, bucket_size, latent_shape


class LatentDataset(Dataset[LatentItem]):
    """Map-style over the images of a store that have latents, in the store's order (shuffle as you like).

    Shards are memory-mapped when first touched, in each worker process for itself. `__getitems__` serves a whole
    batch, which PyTorch's DataLoader uses by itself. Where a store has several sizes, `BucketBatchSampler` makes
    batches of one size each.

    Args:
        store: folder of a latent store, or a URL (`s3://`, `hf://`, `https://`, ...): its shards are then downloaded
            once each, when first touched.
        posterior: "mode" gives the mean; "sample" draws anew in each epoch, keyed by (seed, epoch, key), so neither
            the order nor the number of workers matters. A store of samples gives the one it holds.
        normalize: as the diffusion model wants them, by the scaling that the store records; False: raw, as `decode`
            takes them.
        seed: of the sampling and the mirroring.
        partial: read what is committed of a store that is not complete.
        vae: the autoencoder that will decode (a model, folder or hub id); refused where its encoder is not the one
            that made the store.
        captions: True (of the source that the store names), a source, a table or mapping of captions, or a `Captions`
            object. Items then have "caption", "" for an image without one. Read by key when an item is.
        fields: names of the captions' other fields that items are to have, such as "label".
        hflip: in each epoch mirror half of the images, keyed by (seed, epoch, key); for stores encoded with --hflip.
        filter: which rows of the index: an Arrow expression such as `pc.field("width") > 512`, or a function of the
            index (pyarrow.Table) that gives a mask.
        arrays: name -> mapping from key to array, or (keys, array): joined by key.
        cache_dir, max_cache_bytes: of what is downloaded; see `RemoteFiles`.

    Raises UserError where the store is absent, incomplete, damaged, or mixed from several, and where it or what is to
    be joined lacks what was asked for.
    """

    def __init__(
        self,
        store: str | Path,
        *,
        posterior: PosteriorMode = "mode",
        normalize: bool = True,
        seed: int = 0,
        partial: bool = False,
        vae: Autoencoder | None = None,
        captions: CaptionsLike | None = None,
        fields: Sequence[str] = (),
        hflip: bool = False,
        filter: Filter | None = None,
        arrays: ArraysLike | None = None,
        cache_dir: str | Path | None = None,
        max_cache_bytes: int | None = None,
    ) -> None:
        self.store = ReadableStore(
            store, partial=partial, vae=vae, cache_dir=cache_dir, max_cache_bytes=max_cache_bytes
        )
        self.manifest, self.scaling = self.store.manifest, self.store.scaling
        joins = Joins(captions, fields, arrays, self.manifest, OWN_FIELDS)
        self.options = ReadOptions(posterior, normalize, seed, hflip)
        self._reader = ItemReader(self.store, self.options, joins)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on
        self._rows = self._load(filter)
        if joins.arrays:
            joins.check_arrays(self.keys)
        joins.check_captions(self._rows.keys[:PROBED].to_pylist())
        self._words: np.ndarray | None = None
        self._number_buckets()

    def _load(self, wanted: Filter | None) -> Rows:
        name = self.store.name
        tables = self.store.indexes(COLUMNS if wanted is None else None)
        if not sum(map(len, tables)):
            raise UserError(f"{name} holds no latents: see the reasons in its index files")
        tables = [filtered(table, wanted, name) for table in tables]
        if not sum(map(len, tables)):
            raise UserError(f"the filter leaves none of the latents of {name}")
        return rows_of(self.store, self.store.units, tables)

    def _number_buckets(self) -> None:
        """The buckets that occur, by size."""
        shards = self.store.shards
        occurring = np.unique(self._rows.shard).tolist()
        self.bucket_names = sorted({shards[number].bucket for number in occurring}, key=bucket_size)
        of_shard = np.full(len(shards), -1, np.int64)
        for number in occurring:
            of_shard[number] = self.bucket_names.index(shards[number].bucket)
        self.buckets = of_shard[self._rows.shard]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def keys(self) -> list[str]:
        """The key of every item, in order."""
        return self._rows.keys.to_pylist()

    @property
    def item_fields(self) -> list[str]:
        """Names of the fields of every item."""
        return self._reader.fields

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(D, h, w) of the items of each bucket, in the order of `bucket_names`; `buckets` (n,) has each item's."""
        normalize = self.options.normalize
        return [latent_shape(self.manifest, self.scaling, name, normalize) for name in self.bucket_names]

    @property
    def epoch(self) -> int:
        """See `set_epoch`."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Before each pass: other noise and mirroring. Reaches persistent workers too."""
        self._epoch.fill_(epoch)

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """An order of the items for one pass, (n,) int64, decided by seed, epoch and their keys alone."""
        if self._words is None:
            self._words = key_words(self.keys)
        return shuffled(self._words, seed, epoch)

    def __getitem__(self, index: int) -> LatentItem:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[LatentItem]:
        """A batch of items."""
        if not len(indices):
            return []
        return self._reader.read(self._rows, self._places(indices), self.epoch)

    def _places(self, indices: Sequence[int]) -> np.ndarray:
        places = np.asarray(indices, dtype=np.int64)
        if not (-len(self) <= places.min() and places.max() < len(self)):
            raise IndexError(f"index out of range for {len(self)} latents")
        return places % len(self)

    def latent_dist(self, index: int) -> DiagonalGaussianDistribution:
        """The posterior of one image, raw, not mirrored, as `vae.encode(images).latent_dist` gives it: (1, D, h, w)."""
        if self.manifest.store != "moments":
            raise UserError(
                f"{self.store.name} holds the {self.manifest.store} alone; a posterior needs --store moments"
            )
        place = int(self._places([index])[0])
        tensors = self.store.shard(int(self._rows.shard[place])).tensors
        row = int(self._rows.row[place])
        moments = torch.cat([tensors["mean"][row], tensors["logvar"][row]])  # (2D, h, w)
        return DiagonalGaussianDistribution(moments[None].float())

    def close(self) -> None:
        """Release the memory maps (Windows keeps mapped files from being replaced); reading opens them again."""
        self.store.close()
