"""A safetensors file with some of its tensors exchanged: everything else is copied byte by byte, a piece at a time."""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentvae.checkpoint import first_line
from latentvae.errors import UserError

_METADATA = "__metadata__"
_PIECE = 4 * 2**20  # bytes in memory at a time
_ALIGNMENT = 8  # of the first tensor, as the format asks for
# The names of types in the header => torch's; the others are copied without a look.
HEADER_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in HEADER_DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    dtype: str  # as the header says: "F16"
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    num_bytes: int

    @property
    def itemsize(self) -> int:
        """Bytes of one number, 1 where there is none or several share a byte."""
        return max(1, self.num_bytes // max(1, math.prod(self.shape)))


@dataclass(frozen=True)
class SafetensorsFile:
    """What the header of a safetensors file says."""

    path: Path
    raw_header: bytes  # with the 8 bytes of its length
    metadata: dict[str, str] | None
    tensors: dict[str, StoredTensor]  # in the order in which they lie in the file

    @classmethod
    def read(cls, path: Path) -> "SafetensorsFile":
        """Read the header alone. UserError for a file that is cut, damaged, or none of the format."""
        try:
            with safe_open(path, framework="pt"):  # checks that the tensors fill the file, without gaps or overlaps
                pass
            with open(path, "rb") as file:
                length_bytes = file.read(8)
                (length,) = struct.unpack("<Q", length_bytes)
                text = file.read(length)
            header: dict[str, Any] = json.loads(text)
        except (OSError, ValueError, struct.error, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as safetensors: {first_line(error)}") from error
        metadata = header.pop(_METADATA, None)
        data = 8 + length
        tensors = {
            name: StoredTensor(
                entry["dtype"],
                tuple(entry["shape"]),
                data + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
        in_order = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)))
        return cls(path, length_bytes + text, metadata, in_order)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor."""
        tensor = self.tensors[name]
        with open(self.path, "rb") as file:
            file.seek(tensor.start)
            left = tensor.num_bytes
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise UserError(f"{self.path} ended in the midst of {name}: it changed while it was read")
                left -= len(piece)
                yield piece

    def load(self, name: str) -> Tensor:
        """One tensor of a type that `HEADER_DTYPES` has."""
        tensor = self.tensors[name]
        values = torch.frombuffer(bytearray(b"".join(self.pieces(name))), dtype=HEADER_DTYPES[tensor.dtype])
        return values.reshape(tensor.shape)


def write_exchanged(source: SafetensorsFile, tensors: Mapping[str, Tensor], out: Path) -> None:
    """Write `source` to `out` with these tensors of it exchanged for others of the same shapes.

    Where no type changes, the header stays as it is to the last byte. Otherwise the tensors are laid out anew, wide
    types first, so that every tensor is aligned to the width of its numbers. Metadata stays in either case.
    """
    changed = {
        name: StoredTensor(_NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())
        for name, tensor in tensors.items()
    }
    is_same = all(
        (stored.dtype, stored.num_bytes) == (source.tensors[name].dtype, source.tensors[name].num_bytes)
        for name, stored in changed.items()
    )
    entries = {name: changed.get(name, stored) for name, stored in source.tensors.items()}
    if not is_same:
        entries = dict(sorted(entries.items(), key=lambda item: -item[1].itemsize))  # stable
    with open(out, "wb") as file:
        file.write(source.raw_header if is_same else _header(entries, source.metadata))
        for name in entries:
            if name in tensors:
                file.write(tensor_bytes(tensors[name]))
            else:
                _copy(source, name, file)


def _copy(source: SafetensorsFile, name: str, file: BinaryIO) -> None:
    for piece in source.pieces(name):
        file.write(piece)


def _header(entries: Mapping[str, StoredTensor], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {_METADATA: metadata}
    end = 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.num_bytes],
        }
        end += entry.num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def tensor_bytes(tensor: Tensor) -> bytes:
    """The numbers of a tensor as a file holds them, little-endian."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def first_difference(source: SafetensorsFile, written: SafetensorsFile, expected: Mapping[str, Tensor]) -> str | None:
    """What in `written` is not as in `source` with `expected` in place of its own; None where all bytes are right."""
    if source.metadata != written.metadata:
        return "the metadata"
    if source.tensors.keys() != written.tensors.keys():
        return sorted(source.tensors.keys() ^ written.tensors.keys())[0]
    for name, there in written.tensors.items():
        before = source.tensors[name]
        if name in expected:
            is_right = (
                (there.dtype, there.shape) == (_NAMES[expected[name].dtype], before.shape)
                and tensor_bytes(expected[name]) == b"".join(written.pieces(name))
            )  # fmt: skip
        else:
            is_right = (there.dtype, there.shape, there.num_bytes) == (before.dtype, before.shape, before.num_bytes)
            is_right = is_right and all(a == b for a, b in zip(source.pieces(name), written.pieces(name), strict=True))
        if not is_right:
            return name
    return None
