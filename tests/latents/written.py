"""Latent stores written without an encoder: every key's moments are known, in several buckets and kinds of unit."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from latentvae.files import sha256_file
from latentvae.latents.store.files import LatentStore, UnitContent, file_record, write_unit
from latentvae.latents.store.fingerprint import fingerprint
from latentvae.latents.store.plan import PLAN, publish
from latentvae.latents.store.records import (
    DTYPES,
    FLIPPED,
    MIXED,
    SCHEMA,
    TENSORS,
    Bucket,
    Counts,
    IndexRow,
    Manifest,
    VAERecord,
    merge_sums,
)
from latentvae.model.scaling import LatentScaling

SCALING = LatentScaling(scale=0.5, shift=0.25)
FACTOR = 2  # pixels per latent position
CHANNELS = 2
ENVIRONMENT = {"batch_size": 2, "device": "cpu", "threads": 1}


@dataclass(frozen=True)
class Written:
    """A store and what it must hold."""

    folder: Path
    manifest: Manifest
    tensors: dict[str, dict[str, Tensor]]  # key -> tensor name -> (C, h, w) as stored, for keys with latents
    rows: dict[str, IndexRow]  # of every key
    units: list[list[str]] = field(default_factory=list)  # keys of each unit, in its order

    @property
    def store(self) -> LatentStore:
        return LatentStore(self.folder)

    @property
    def keys(self) -> list[str]:
        """Of the latents, in the store's order."""
        return [key for unit in self.units for key in unit if key in self.tensors]


def bucket_of(name: str) -> Bucket:
    """From "WxH" in pixels."""
    width, height = map(int, name.split("x"))
    return Bucket(width=width, height=height, latent_width=width // FACTOR, latent_height=height // FACTOR)


def known_tensors(key: str, shape: Sequence[int], store: str, dtype: str, hflip: bool) -> dict[str, Tensor]:
    """What a store holds of a key: random, and decided by the key alone; the mirrored ones are other numbers."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    names = [name + suffix for suffix in (("", FLIPPED) if hflip else ("",)) for name in TENSORS[store]]
    drawn = {name: torch.randn(tuple(shape), generator=generator) for name in names}
    return {
        name: (values.mul(0.3).sub(2.0) if name.startswith("logvar") else values.mul(2.0)).to(DTYPES[dtype])
        for name, values in drawn.items()
    }


def write_store(
    folder: Path,
    *,
    store: str = "moments",
    dtype: str = "fp32",
    hflip: bool = False,
    units: Sequence[tuple[str, Sequence[str]]] | None = None,
    bad: Mapping[str, str] | None = None,
    channels: int = CHANNELS,
    scaling: LatentScaling = SCALING,
    vae: Any = None,
    fields: Mapping[str, Any] | None = None,
    source: str = "images",
    complete: bool = True,
    leave_out: Sequence[int] = (),
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Written:
    """Write a store.

    units: (home bucket, keys) each; a key in a "mixed" unit goes into 32x32, 48x32 or 16x24 in turn. None: three
        buckets, a mixed unit, an error row and a skipped one.
    bad: key -> "error" or "skipped".
    vae: an ImageAutoencoder that the manifest then names; None: a made-up record.
    fields: changes to the fingerprint's fields.
    complete: whether the manifest says so, with totals and statistics.
    leave_out: units that are planned but not written.
    tensors: key -> name -> (C, h, w), in the place of what `known_tensors` gives.
    """
    if units is None:
        units, bad = default_units()
    bad = bad or {}
    manifest = _manifest(store, dtype, hflip, units, channels, scaling, vae, fields or {}, source)
    made = Written(folder, manifest, {}, {}, [list(keys) for _, keys in units])
    layout = LatentStore(folder)
    planned, records = [], []
    for number, (home, keys) in enumerate(units):
        rows, content = _unit_content(home, keys, bad, manifest, channels, tensors or {})
        for position, row in enumerate(rows):
            probed = (row.width, row.height) if home != MIXED else (None, None)
            uri = f"{source}/{row.key}"
            planned.append((number, position, row.key, uri, None, *probed, home, 1000, 1_700_000_000_000_000_000))
        made.rows.update({row.key: row for row in rows})
        if number in leave_out:
            made.units[number] = []
            continue
        stacked = {bucket: _stacked(list(named.values())) for bucket, named in content.items()}
        for named in content.values():
            made.tensors.update(named)
        unit = write_unit(layout, manifest, UnitContent(number, home, stacked, rows), ENVIRONMENT, owner="builder")
        assert unit.publish()
        records.append(unit.record)
    columns = list(zip(*planned, strict=True))
    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, PLAN, strict=True)]
    path = publish(layout.plan_folder, pa.table(arrays, schema=PLAN))
    update: dict[str, Any] = {"plan": {path.name: file_record(path)}}
    assert update["plan"][path.name].sha256 == sha256_file(path)
    if complete:
        totals = sum((record.counts for record in records), Counts())
        statistics = merge_sums([record.channels for record in records])
        update |= {"complete": True, "totals": totals, "statistics": statistics}
    final = manifest.model_copy(update=update)
    layout.write_manifest(final)
    return Written(folder, final, made.tensors, made.rows, made.units)


def default_units() -> tuple[list[tuple[str, list[str]]], dict[str, str]]:
    """Two units of 32x32, one of 48x32, a mixed one; 19 keys, 17 with latents."""
    names = [f"{'abc'[index % 3]}/image {index:02d}.png" for index in range(19)]
    units = [("32x32", names[:5]), ("32x32", names[5:8]), ("48x32", names[8:12]), (MIXED, names[12:])]
    return units, {names[2]: "error", names[14]: "skipped"}


def rewrite_unit(made: Written, unit: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Redo a unit with other latents, as encode does after an edit: new files, a new record; the old files stay."""
    home = next(record for record in made.folder.glob(f"shards/*/u{unit:06d}.json"))
    keys = made.units[unit]
    bad = {key: row.status for key, row in made.rows.items() if row.status != "ok"}
    rows, content = _unit_content(home.parent.name, keys, bad, made.manifest, made.manifest.latent_channels, tensors)
    stacked = {bucket: _stacked(list(named.values())) for bucket, named in content.items()}
    written = UnitContent(unit, home.parent.name, stacked, rows)
    home.unlink()
    assert write_unit(made.store, made.manifest, written, ENVIRONMENT, owner="builder").publish()


def _manifest(
    store: str,
    dtype: str,
    hflip: bool,
    units: Sequence[tuple[str, Sequence[str]]],
    channels: int,
    scaling: LatentScaling,
    vae: Any,
    changed: Mapping[str, Any],
    source: str,
) -> Manifest:
    fields = {
        "schema_version": SCHEMA,
        "encoder": vae.encoder_hash if vae is not None else "0" * 64,
        "precision": "fp32",
        "tiling": False,
        "buckets": "+".join(sorted({home for home, _ in units if home != MIXED})),
        "crop": "center",
        "filter": "bicubic",
        "small": "skip",
        "policy": {"background": 255},
        "pixels": {"channels": 3, "dtype": "uint8", "range": [0, 255]},
        "store": store,
        "dtype": dtype,
        "hflip": hflip,
        "seed": 0 if store == "sample" else None,
        **changed,
    }
    record = VAERecord(
        name=vae.name if vae is not None else None,
        class_name=vae.class_name if vae is not None else "AutoencoderKL",
        encoder=fields["encoder"],
        decoders=[vae.decoder_hash if vae is not None else "1" * 64],
        config=vae.config if vae is not None else {"latent_channels": channels},
        scaling=(vae.scaling if vae is not None else scaling).to_dict(),
    )
    names = {home for home, _ in units if home != MIXED} | ({"32x32"} if any(h == MIXED for h, _ in units) else set())
    return Manifest(
        fingerprint=fingerprint(fields),
        fields=fields,
        store=store,
        dtype=dtype,
        hflip=hflip,
        latent_channels=channels,
        buckets=[bucket_of(name) for name in sorted(names)],
        vae=record,
        source=source,
    )


def _unit_content(
    home: str,
    keys: Sequence[str],
    bad: Mapping[str, str],
    manifest: Manifest,
    channels: int,
    given: Mapping[str, Mapping[str, Tensor]],
) -> tuple[list[IndexRow], dict[str, dict[str, dict[str, Tensor]]]]:
    """(index rows, bucket -> key -> tensors) of one unit."""
    rows: list[IndexRow] = []
    content: dict[str, dict[str, dict[str, Tensor]]] = {}
    for position, key in enumerate(keys):
        digest = hashlib.sha256(key.encode()).hexdigest()
        if key in bad:
            why = {"error": "cannot be decoded: truncated", "skipped": "5x5 is smaller than 32x32"}[bad[key]]
            rows.append(IndexRow(key=key, row=-1, status=bad[key], error=why, source_hash=f"sha256:{digest}"))
            continue
        name = home if home != MIXED else ("32x32", "48x32", "16x24")[position % 3]
        bucket = bucket_of(name)
        shape = (channels, bucket.latent_height, bucket.latent_width)
        tensors = given.get(key) or known_tensors(key, shape, manifest.store, manifest.dtype, manifest.hflip)
        row = len(content.setdefault(name, {}))
        content[name][key] = {tensor: values.to(DTYPES[manifest.dtype]) for tensor, values in tensors.items()}
        extra = int(digest[:2], 16) % 7  # the scaled image is that much larger than the crop
        rows.append(
            IndexRow(
                key=key,
                row=row,
                status="ok",
                source_hash=f"sha256:{digest}",
                width=2 * bucket.width + 2 * extra,
                height=2 * bucket.height,
                scaled_width=bucket.width + extra,
                scaled_height=bucket.height,
                crop_top=0,
                crop_left=extra // 2,
                bucket=name,
            )
        )
    return rows, content


def _stacked(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
