"""Hand the latents of a store to other trainers: as WebDataset tars, Parquet files or the caches of sd-scripts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from latentvae.errors import UserError, one_line
from latentvae.files import atomic_folder, write_json
from latentvae.latents.operating.hand_over_files import write_parquets, write_tars
from latentvae.latents.operating.handed import HandedDtype, Handing, Posterior
from latentvae.latents.operating.parts import stored_buckets
from latentvae.latents.operating.sd_scripts import Family, resolved_family, write_npz_files
from latentvae.latents.reading.joins import opened_captions
from latentvae.latents.reading.readable import ReadableStore
from latentvae.progress import ImageProgress

Format = Literal["webdataset", "parquet", "sd-scripts"]
FORMATS: tuple[Format, ...] = ("webdataset", "parquet", "sd-scripts")
DESCRIPTION = "dataset.json"

_READING = {
    "webdataset": """import glob, webdataset
for sample in webdataset.WebDataset(sorted(glob.glob("latents-{bucket}-*.tar")), shardshuffle=False).decode():
    latents = sample["latents.npy"]  # {shape} {dtype}
    key, caption = sample["json"]["key"], sample.get("txt")""",
    "parquet": """import datasets, numpy
for row in datasets.load_dataset("THIS FOLDER", split="train"):
    latents = numpy.frombuffer(row["latents"], row["dtype"]).reshape(row["shape"])  # {shape} {dtype}""",
}
_DATA_FILES = {"webdataset": "*.tar", "parquet": "data/*.parquet"}


@dataclass(frozen=True)
class HandOverReport:
    """What was written."""

    folder: Path
    format: Format
    num_images: int
    num_files: int
    num_bytes: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{self.folder}: {self.num_images} latents in {self.num_files} files ({self.format}), "
        return "\n".join([f"{head}{self.num_bytes / 1e6:.1f} MB", *self.notes])


def export_store(
    store: str | Path,
    out: str | Path,
    *,
    format: Format = "webdataset",
    posterior: Posterior | None = None,
    normalize: bool = False,
    dtype: HandedDtype | None = None,
    seed: int = 0,
    captions: Any = None,
    shard_images: int = 4096,
    family: Family | None = None,
    partial: bool = False,
    progress: bool = True,
) -> HandOverReport:
    """Write the latents of a store for another trainer; `out` appears whole or not at all.

    Args:
        store: folder or URL of a latent store.
        out: folder to write; must not exist.
        format: "webdataset": tars of `.latents.npy`, `.json` (key, sizes, crop) and `.txt`; "parquet": for `datasets`
            and others; both with one size of image per file and a README that says how to read them. "sd-scripts":
            one `.npz` per image, named as kohya-ss/sd-scripts does, in the folders of the keys.
        posterior: "mode" (the mean), "sample" (drawn by seed and key as `encode --store sample` does) or "moments"
            (mean, then log variance, along the channels). None: the mean, or the sample that the store holds; for
            sd-scripts a sample, which is what it stores, where the store can give one.
        normalize: as the VAE's pipelines do it; False: raw, which the trainer has to scale itself.
        dtype: "fp16" or "fp32"; None: fp16 where the store has it, else fp32. sd-scripts: fp32.
        seed: of the samples.
        captions: True for those of the source that the store names, or whatever `open_captions` takes.
        shard_images: images per tar or Parquet file, at most.
        family: of sd-scripts: "sd", "sdxl", "sd3" or "flux"; None: by the VAE's scaling factor.
        partial: take what is committed of a store that is not complete.
        progress: a bar on a terminal, log lines elsewhere.

    Raises UserError for a store that is absent, incomplete or damaged, for what it does not hold, and where `out`
    exists or cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is not for stores: use {', '.join(FORMATS)}")
    if shard_images < 1:
        raise UserError(f"shard_images is {shard_images}: it must be at least 1")
    if Path(out).exists():
        raise UserError(f"{out} exists already: choose another --out")
    readable = ReadableStore(store, partial=partial)
    total = sum(unit.num_latents for unit in readable.units)
    if not total:
        raise UserError(f"{store} holds no latents: latentvae stats says why")
    if format == "sd-scripts":
        if normalize or dtype == "fp16" or posterior == "moments":
            raise UserError("sd-scripts takes raw float32 latents: leave out --normalize, --dtype fp16 and moments")
        family = resolved_family(readable.manifest, family)
        dtype = "fp32"
        posterior = posterior or ("sample" if readable.manifest.store == "moments" else None)
    elif family is not None:
        raise UserError(f"family is for sd-scripts; the format is {format}")
    handing = Handing.resolved(readable, posterior, normalize, dtype, seed)
    told = _captions(readable, captions)
    notes = [f"note: {total - len(told)} images have no caption"] if told and len(told) < total else []
    files: list[str] = []
    try:
        with atomic_folder(out) as folder:
            with ImageProgress("exporting", total, enabled=progress) as bar:
                for name, count in _written(handing, folder, format, family, told, shard_images):
                    files.append(name)
                    bar.update(bar.done + count)
            if format != "sd-scripts":
                _describe(handing, folder, format, total, files)
            num_bytes = sum((folder / name).stat().st_size for name in files)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
    return HandOverReport(Path(out), format, total, len(files), num_bytes, notes)


def _written(
    handing: Handing,
    folder: Path,
    format: Format,
    family: Family | None,
    captions: Mapping[str, Mapping[str, Any]],
    shard_images: int,
) -> Iterator[tuple[str, int]]:
    if family is not None:
        for name in write_npz_files(handing, folder, family, captions):
            yield name, 1
        return
    write = write_tars if format == "webdataset" else write_parquets
    for file in write(handing, folder, captions, shard_images):
        yield file.name, file.num_images


def _captions(store: ReadableStore, captions: Any) -> dict[str, dict[str, Any]]:
    """Key -> fields, of the images that have any."""
    found = opened_captions(captions, store.manifest)
    if found is None:
        return {}
    source = store.manifest.source if captions is True else captions
    told: dict[str, dict[str, Any]] = {}
    for unit in store.units:  # unit by unit: neighbours of an archive are read together
        keys = store.index(unit, ["key", "row"])["key"].to_pylist()
        told.update({key: fields for key, fields in zip(keys, found.get(keys), strict=True) if fields})
    if not told:
        raise UserError(f"no image of {store.name} has a caption in {source}")
    for key, fields in told.items():
        _check_caption(key, fields.get("caption"))
    return told


def _check_caption(key: str, caption: object) -> None:
    if caption is None:
        return
    if not isinstance(caption, str):
        raise UserError(f"the caption of {key} is a {type(caption).__name__}: text is needed; give it another name")
    try:
        caption.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a character: "\\ud83d"
        raise UserError(f"the caption of {key} is not valid Unicode: {one_line(error)}; mend it") from error


def _describe(handing: Handing, folder: Path, format: Format, total: int, files: list[str]) -> None:
    """`dataset.json` for programs, README.md for people and for the Hugging Face hub."""
    manifest = handing.store.manifest
    bucket = stored_buckets(handing.store)[0]
    first = next(handing.images(bucket))
    about = {
        "made_from": {"fingerprint": manifest.fingerprint, "source": manifest.source},
        "vae": {"name": manifest.vae.name, "class_name": manifest.vae.class_name, "encoder": manifest.vae.encoder},
        "posterior": handing.posterior,
        "normalized": handing.normalize,
        "scaling": manifest.vae.scaling,
        "dtype": str(first.latents.dtype),
        "hflip": handing.has_mirrored,
        "num_images": total,
        "files": files,
    }
    write_json(folder / DESCRIPTION, about)
    state = "normalized for diffusion" if handing.normalize else f"raw; normalized = by scaling in {DESCRIPTION}"
    reading = _READING[format].format(bucket=bucket, shape=first.latents.shape, dtype=first.latents.dtype)
    (folder / "README.md").write_text(
        f'---\nconfigs:\n- config_name: default\n  data_files: "{_DATA_FILES[format]}"\n---\n# Latents\n\n'
        f"{about['num_images']} images, the {handing.posterior} of {manifest.vae.name or manifest.vae.class_name}, "
        f"{state}. One size of image per file.\n\n```python\n{reading}\n```\n",
        encoding="utf-8",
        newline="\n",
    )
