"""safetensors files with some tensors exchanged: the rest is the same to the last bit, whatever it is."""

import json
import struct
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentvae.errors import UserError
from latentvae.export.insertion import SafetensorsFile, first_difference, tensor_bytes, write_exchanged

METADATA = {"format": "pt", "modelspec.title": "größe ✓", "modelspec.hash_sha256": "0xabc"}


@pytest.fixture
def whole(tmp_path):
    """A file with numbers of many types, an empty tensor, one number, and NaN."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.half": torch.randn(3, 5, generator=generator).half(),
        "a.single": torch.randn(7, generator=generator),
        "b.bfloat": torch.randn(2, 2, generator=generator).bfloat16(),
        "b.double": torch.tensor([float("nan"), 1.0], dtype=torch.float64),
        "c.bytes": torch.arange(3, dtype=torch.uint8),
        "c.eight": torch.randn(5, generator=generator).to(torch.float8_e4m3fn),
        "c.empty": torch.zeros(0, 4),
        "c.one": torch.tensor(7, dtype=torch.int64),
        "d.single": torch.randn(3, generator=generator),  # not aligned where 7 halves come before it
    }
    save_file(tensors, tmp_path / "whole.safetensors", metadata=METADATA)
    return SafetensorsFile.read(tmp_path / "whole.safetensors")


def raw(file, name):
    return b"".join(file.pieces(name))


def test_the_same_types_keep_every_other_byte_of_the_file(whole, tmp_path):
    new = {"a.half": torch.full((3, 5), 2.0).half(), "b.bfloat": torch.full((2, 2), -1.0).bfloat16()}
    write_exchanged(whole, new, tmp_path / "out.safetensors")
    before, after = whole.path.read_bytes(), (tmp_path / "out.safetensors").read_bytes()
    inside = {
        place
        for name in new
        for place in range(whole.tensors[name].start, whole.tensors[name].start + whole.tensors[name].num_bytes)
    }
    assert len(before) == len(after)
    assert {place for place, (a, b) in enumerate(zip(before, after, strict=True)) if a != b} <= inside
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in new.items())
    back = {name: whole.load(name) for name in new}
    write_exchanged(SafetensorsFile.read(tmp_path / "out.safetensors"), back, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_types_move_what_follows_and_nothing_else(whole, tmp_path, dtype):
    new = {"a.half": torch.full((3, 5), 2.0, dtype=dtype), "a.single": torch.full((7,), 3.0, dtype=dtype)}
    write_exchanged(whole, new, tmp_path / "out.safetensors")
    written = SafetensorsFile.read(tmp_path / "out.safetensors")  # safetensors itself finds no gap and no overlap
    assert written.metadata == METADATA and written.tensors.keys() == whole.tensors.keys()
    data = len(written.raw_header)
    assert data % 8 == 0
    for name, tensor in written.tensors.items():
        assert (tensor.start - data) % tensor.itemsize == 0
        expected = tensor_bytes(new[name]) if name in new else raw(whole, name)
        assert raw(written, name) == expected and tensor.shape == whole.tensors[name].shape
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata() == METADATA and torch.equal(file.get_tensor("a.half"), new["a.half"])
    assert first_difference(whole, written, new) is None


def test_a_difference_is_found_and_named(whole, tmp_path):
    new = {"a.half": torch.full((3, 5), 2.0).half()}
    out = tmp_path / "out.safetensors"
    write_exchanged(whole, new, out)
    for name in ("a.half", "b.double", "c.one"):
        content = bytearray(out.read_bytes())
        content[whole.tensors[name].start] ^= 1
        (tmp_path / "flipped.safetensors").write_bytes(content)
        assert first_difference(whole, SafetensorsFile.read(tmp_path / "flipped.safetensors"), new) == name
    tensors = load_file(out)
    save_file(tensors, tmp_path / "bare.safetensors")
    assert first_difference(whole, SafetensorsFile.read(tmp_path / "bare.safetensors"), new) == "the metadata"
    tensors.pop("c.one")
    save_file(tensors, tmp_path / "less.safetensors", metadata=METADATA)
    assert first_difference(whole, SafetensorsFile.read(tmp_path / "less.safetensors"), new) == "c.one"


def test_memory_does_not_grow_with_the_file(tmp_path):
    save_file({"large": torch.ones(40 * 2**20), "x": torch.zeros(4)}, tmp_path / "whole.safetensors")  # 160 MiB
    whole = SafetensorsFile.read(tmp_path / "whole.safetensors")
    new = {"x": torch.ones(4)}
    tracemalloc.start()
    write_exchanged(whole, new, tmp_path / "out.safetensors")
    assert first_difference(whole, SafetensorsFile.read(tmp_path / "out.safetensors"), new) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20


def test_files_that_are_none(whole, tmp_path):
    content = whole.path.read_bytes()
    text = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}).encode()
    for number, damaged in enumerate(
        [
            b"",
            content[:7],
            content[:40],
            content[:-1],
            content + b"0",
            struct.pack("<Q", len(text)) + text,
            b"\x80\x02" * 99,
        ]
    ):
        path = tmp_path / f"damaged{number}.safetensors"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"damaged{number}.safetensors cannot be read as safetensors") as caught:
            SafetensorsFile.read(path)
        assert "\n" not in str(caught.value)
