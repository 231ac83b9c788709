"""Datasets of the `datasets` library: from the hub, written by `save_to_disk`, or made in Python."""

import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from latentvae.data.entries import EntryTable, ListedSource, SourceEntry, io_reason
from latentvae.data.parquet import ParquetSource, as_keys, choose_columns, image_bytes, row_key
from latentvae.data.storage import file_name, read_file, suffix
from latentvae.data.tar import TAR_SUFFIXES, TarSource
from latentvae.errors import UserError
from latentvae.images import DecodePolicy, ImageError, PixelFormat

_OPTIONS = ("split", "config", "revision", "streaming", "key_column", "image_column")
_HUB_SECONDS = 10.0  # until an unreachable hub is an error; the library itself would try for half a minute


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("Hugging Face datasets need the library `datasets`: pip install 'latentvae[data]'") from error
    return datasets


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    is_one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return is_one or (folder / "dataset_dict.json").is_file()


def is_dataset(value: object) -> bool:
    """Whether this is a map-style dataset of the library, or a dict of them by split; without importing it."""
    names = {(kind.__module__.split(".")[0], kind.__name__) for kind in type(value).__mro__}
    return bool({("datasets", "Dataset"), ("datasets", "DatasetDict")} & names)


class DatasetSource(ListedSource):
    """The images in a column of a map-style `datasets.Dataset`, by row, still encoded.

    Keys are those of `key_column` (by itself: `key`, `__key__` or `id`), else "<label>/<row as nine digits>".
    """

    def __init__(
        self,
        dataset: Any,
        pixels: PixelFormat | None = None,
        policy: DecodePolicy | None = None,
        *,
        key_column: str | None = None,
        image_column: str | None = None,
        name: str | None = None,
        label: str | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        """`label` begins the keys of rows (None: the split's name); `mtime_ns`: of the files behind it."""
        self.label = label or str(dataset.split or "dataset")
        super().__init__(name or f"datasets.Dataset {self.label}", pixels, policy)
        schema = dataset.features.arrow_schema
        self.image_column, self.key_column = choose_columns(schema, self.name, image_column, key_column)
        self.dataset = dataset
        columns = [self.image_column] if self.key_column is None else [self.image_column, self.key_column]
        self._rows = dataset.select_columns(columns).with_format("arrow")  # Arrow: nothing is decoded
        self._mtime_ns = mtime_ns

    def list_entries(self) -> EntryTable:
        count = len(self.dataset)
        if self.key_column is None:
            keys: Any = [row_key(self.label, row) for row in range(count)]
        else:
            only_keys = self.dataset.select_columns([self.key_column]).with_format("arrow")
            keys = as_keys(only_keys[:][self.key_column], self.name)
        return EntryTable.from_columns(keys, self.name, np.arange(count), None, self._mtime_ns)

    def looked_for(self) -> str:
        return "the dataset has no rows"

    def fetch(self, entries: Sequence[SourceEntry]) -> list[bytes | np.ndarray | Exception]:
        contents: list[bytes | np.ndarray | Exception] = []
        for is_there, group in groupby(entries, lambda entry: 0 <= (entry.offset or 0) < len(self.dataset)):
            some = list(group)
            contents += self._fetch_rows(some) if is_there else [self._changed(entry) for entry in some]
        return contents

    def _changed(self, entry: SourceEntry) -> ImageError:
        return ImageError(f"is no longer in row {entry.offset} of {self.name}, which has changed since it was listed")

    def _fetch_rows(self, entries: Sequence[SourceEntry]) -> list[bytes | Exception]:
        try:
            table = self._rows[[entry.offset or 0 for entry in entries]]
        except Exception as error:  # whatever Arrow and the files behind it raise
            reason = f"cannot be read from {self.name} ({type(error).__name__}: {io_reason(error)})"
            return [ImageError(reason) for _ in entries]
        contents: list[bytes | Exception] = []
        for entry, row in zip(entries, table.to_pylist(), strict=True):
            if self.key_column is None:
                is_same = entry.key == row_key(self.label, entry.offset or 0) and entry.mtime_ns == self._mtime_ns
            else:
                is_same = entry.key == str(row[self.key_column])
            contents.append(self._content(row[self.image_column]) if is_same else self._changed(entry))
        return contents

    def _content(self, value: Any) -> bytes | Exception:
        content = image_bytes(value)
        if isinstance(content, ImageError) and isinstance(value, Mapping) and value.get("path"):
            return read_file(value["path"])  # a dataset made in Python may name files instead
        return content


def choose_split(splits: Sequence[str], split: str | None, name: str) -> str:
    """The split that was asked for, or the only one. UserError where that is not clear."""
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        given = "none was named" if split is None else f"{split!r} is not one of them"
        raise UserError(f"{name} has the splits {', '.join(splits)}, and {given}: choose one with split")
    return split


def open_dataset(
    dataset: Any, pixels: PixelFormat | None, policy: DecodePolicy | None, split: str | None, **options: Any
) -> DatasetSource:
    """A `datasets.Dataset`, or one split of a `datasets.DatasetDict`."""
    if isinstance(dataset, Mapping):
        name = str(options.get("name") or "the DatasetDict")
        split = choose_split([str(one) for one in dataset], split, name)
        return DatasetSource(dataset[split], pixels, policy, **{**options, "label": split})
    if split is not None and str(dataset.split) != split:
        raise UserError(f"the dataset is of split {dataset.split}, and {split!r} was asked for")
    return DatasetSource(dataset, pixels, policy, **options)


def open_saved(
    path: Path, pixels: PixelFormat | None, policy: DecodePolicy | None, split: str | None, **options: Any
) -> DatasetSource:
    """A folder that `save_to_disk` wrote, or one `.arrow` file."""
    datasets = _library()
    try:
        dataset = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_file(str(path))
        states = [*path.glob("state.json"), *path.glob("*/state.json")]  # of the dataset, or of each split
        mtime_ns = max(os.stat(state).st_mtime_ns for state in states or [path])
    except Exception as error:  # a damaged file raises almost anything
        raise UserError(f"{path} cannot be read as a dataset: {type(error).__name__}: {io_reason(error)}") from error
    label = path.name if not isinstance(dataset, Mapping) else None
    split = split if path.is_dir() else None
    return open_dataset(dataset, pixels, policy, split, name=str(path), label=label, mtime_ns=mtime_ns, **options)


def open_hub(
    source: str,
    pixels: PixelFormat | None,
    policy: DecodePolicy | None,
    *,
    streaming: bool = False,
    split: str | None = None,
    key_column: str | None = None,
    image_column: str | None = None,
) -> ListedSource:
    """`hf:owner/name?split=train&config=x&revision=y&streaming=1`; a folder of data files may stand for owner/name.

    With streaming nothing is downloaded as a whole: the dataset's Parquet or tar files are read in place.
    """
    path, _, query = source.removeprefix("hf:").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for option in options:
        if option not in _OPTIONS:
            raise UserError(f"source {source}: no option {option!r}; known are {', '.join(_OPTIONS)}")
    if not path:
        raise UserError(f"source {source}: write it as hf:owner/name, or hf:owner/name?split=train")
    split = options.get("split", split)
    key_column = options.get("key_column", key_column)
    image_column = options.get("image_column", image_column)
    streaming = options.get("streaming", "1" if streaming else "0").lower() in ("1", "true", "yes")
    datasets, config = _library(), options.get("config")
    revision = options.get("revision") if os.path.isdir(path) else _commit(source, path, options.get("revision"))
    try:
        builder = datasets.load_dataset_builder(path, config, revision=revision)
        files = builder.config.data_files or {}
        split = choose_split([str(one) for one in (files or builder.info.splits or {})], split, source)
        if not streaming:
            dataset = datasets.load_dataset(path, config, split=split, revision=revision)
            name = f"hf:{path}{f'@{revision}' if revision else ''}?split={split}{f'&config={config}' if config else ''}"
    except UserError:
        raise
    except Exception as error:  # network, scripts that are not allowed, a missing config, broken files
        raise UserError(f"source {source} cannot be opened: {type(error).__name__}: {io_reason(error)}") from error
    if not streaming:
        return DatasetSource(
            dataset, pixels, policy, key_column=key_column, image_column=image_column, name=name, label=split
        )
    return _open_files([str(file) for file in files.get(split, ())], source, pixels, policy, key_column, image_column)


def _open_files(
    files: list[str],
    source: str,
    pixels: PixelFormat | None,
    policy: DecodePolicy | None,
    key_column: str | None,
    image_column: str | None,
) -> ListedSource:
    kinds = {suffix(file) for file in files}
    if kinds == {".parquet"}:
        return ParquetSource(files, pixels, policy, key_column=key_column, image_column=image_column, name=source)
    if kinds and kinds <= TAR_SUFFIXES:
        return TarSource(files, pixels, policy, name=source)
    example = f"files such as {file_name(files[0])}" if files else "no data files of its own"
    raise UserError(f"source {source} has {example}: only Parquet and tar can be streamed; leave streaming out")


def _commit(source: str, repository: str, revision: str | None) -> str | None:
    """The hash of the commit that is read, so that rows keep their places; what was given, where the hub is off."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return revision
    try:
        return huggingface_hub.HfApi().dataset_info(repository, revision=revision, timeout=_HUB_SECONDS).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, ValueError) as error:
        raise UserError(
            f"source {source}: the hub has no such dataset or revision, or it needs a login "
            f"(huggingface-cli login): {io_reason(error)}"
        ) from error
    except Exception as error:
        raise UserError(
            f"source {source}: the hub cannot be reached ({type(error).__name__}); check the network, or set "
            "HF_HUB_OFFLINE=1 to read what was downloaded before"
        ) from error
