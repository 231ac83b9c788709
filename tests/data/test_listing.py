"""Lists of paths: what they name, and what is said of a line that names nothing."""

import json
import os

import fsspec
import pytest

from latentvae.data import open_source
from latentvae.errors import UserError
from latentvae.images import ImageError
from tests.data.archives import png


@pytest.fixture
def pictures(tmp_path):
    for index, name in enumerate(("a.png", "deep/b.png", "odd.bin")):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(png(index))
    (tmp_path / "lists").mkdir()
    return tmp_path / "set"


def test_text_list(pictures):
    lists = pictures.parent / "lists"
    lines = ["", "# a comment", "../set/deep/b.png", f"  {pictures / 'a.png'}  ", "../set/odd.bin", "../set/absent.png"]
    (lists / "l.txt").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    source = open_source(lists / "l.txt")
    root = str(pictures).lstrip("/")
    assert sorted(source.entries().keys) == sorted(["set/deep/b.png", f"{root}/a.png", "set/odd.bin", "set/absent.png"])
    assert source.entries().keys == sorted(source.entries().keys) and not source.is_sequential
    found = {entry.key: entry for entry in source.entries()}
    assert found["set/deep/b.png"].num_bytes == len(png(1)) and found["set/absent.png"].num_bytes is None
    contents = dict(zip(source.entries().keys, source.fetch(source.entries()), strict=True))
    assert contents["set/deep/b.png"] == png(1) and contents["set/odd.bin"] == png(2)
    assert contents[f"{root}/a.png"] == png(0) and isinstance(contents["set/absent.png"], FileNotFoundError)
    with pytest.raises(ImageError, match="No such file"):
        source.read(source.entries().keys.index("set/absent.png"))


def test_json_lines(pictures):
    rows = [
        {"path": "a.png", "caption": "one"},
        {"file_name": "deep/b.png", "key": "mine"},
        {"image": "odd.bin", "key": 3},
    ]
    (pictures / "l.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    source = open_source(pictures / "l.jsonl")
    assert source.entries().keys == ["3", "a.png", "mine"]
    assert source.fetch(source.entries()) == [png(2), png(0), png(1)]
    assert os.path.samefile(source.entries()[1].uri, pictures / "a.png")


def test_a_list_may_name_urls(tmp_path):
    fsspec.filesystem("memory").pipe("/pictures/a.png", png(4))
    (tmp_path / "l.txt").write_text("memory://pictures/a.png\nmemory://pictures/b.png\n")
    source = open_source(tmp_path / "l.txt")
    assert source.entries().keys == ["pictures/a.png", "pictures/b.png"] and source.read(0)[0, 0, 0] == 4
    assert isinstance(source.fetch(source.entries())[1], FileNotFoundError)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("l.jsonl", '{"path": "a"}\n{"path": ', "line 2: is not JSON"),
        ("l.jsonl", '{"path": "a"}\n\n[1]', "line 3: is not a JSON object"),
        ("l.jsonl", '{"paths": "a"}', "line 1: a path is needed in one of path, file_name, image"),
        ("l.jsonl", '{"path": "a", "key": [1]}', "the key is"),
        ("l.txt", "a.png\nb/../a.png\n", "the key 'a.png' twice"),
        ("l.txt", "../..\n", "names no file"),
        ("l.txt", "# nothing\n", "no images in"),
        ("l.txt", b"\xff\xfe", "UTF-8"),
        ("l.jsonl", "[" * 100_000, "line 1: is not JSON"),
    ],
)
def test_bad_lists_are_told(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words) as caught:
        open_source(tmp_path / name).entries()
    assert "\n" not in str(caught.value) and name in str(caught.value)
