"""Sources: what is found, in which order, and what is said when something is wrong."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from latentvae.data import FolderSource, ImageSource, PythonSource, open_source
from latentvae.errors import UserError
from latentvae.images import ImageError, PixelFormat, save_image

GRAY16 = PixelFormat(channels=1, dtype="uint16")


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value, 0, 0)).save(path, format="PNG")


def items(count=4):
    return [{"key": f"k{index}", "image": np.full((4, 5, 3), index, np.uint8)} for index in reversed(range(count))]


def gray_scans():
    """A source that `python:module:function` can name."""
    for index in range(3):
        yield {"key": f"scan/{index}.tif", "image": np.full((6, 7, 1), 1000 * index, np.uint16), "caption": "unused"}


class Lazy:
    """A map-style source that counts what is fetched."""

    def __init__(self):
        self.fetched = []

    def __len__(self):
        return 3

    def keys(self):
        return ["c", "a", "b"]

    def __getitem__(self, index):
        self.fetched.append(index)
        if index == 2:
            raise OSError("disk gone")
        return {"key": self.keys()[index], "image": Image.new("RGB", (4, 4), (index, 0, 0))}


def test_folder_is_searched_in_depth_and_sorted_by_key(tmp_path):
    for name in ("b/x.PNG", "a/deep/er/y.jpg", "z.jpeg", "a/y.webp", "b.tif"):
        write(tmp_path / name)
    for name in (".hidden.png", ".cache/x.png", "notes.txt", "b/x.npy", "b/x.eps"):
        write(tmp_path / name)
    source = open_source(tmp_path)
    keys = [entry.key for entry in source.entries()]
    assert keys == ["a/deep/er/y.jpg", "a/y.webp", "b.tif", "b/x.PNG", "z.jpeg"] and len(source) == 5
    entry = source.entries()[3]
    status = os.stat(tmp_path / "b" / "x.PNG")
    assert (entry.num_bytes, entry.mtime_ns) == (status.st_size, status.st_mtime_ns) and entry.uri == str(
        tmp_path / "b/x.PNG"
    )
    assert source.read(0).shape == (6, 8, 3)
    assert open_source(str(tmp_path)).entries() == source.entries()
    assert open_source(source) is source


def test_links_are_followed_and_loops_end(tmp_path):
    write(tmp_path / "set" / "a.png")
    write(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "set" / "pipe.png")  # opening it would wait for ever
    assert [entry.key for entry in open_source(tmp_path / "set").entries()] == ["a.png", "link/b.png"]


def test_folder_errors_are_one_line(tmp_path):
    write(tmp_path / "image.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").touch()
    for folder, words in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "image.png", "is not a folder"),
        (tmp_path / "empty", "no images in"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            open_source(folder).entries()
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_a_file_that_cannot_be_looked_at_is_told_and_one_that_went_away_is_left_out(tmp_path, monkeypatch, error):
    write(tmp_path / "a.png")
    write(tmp_path / "b.png")

    class Entry:
        """A directory entry of a.png whose status cannot be had."""

        name, path = "a.png", str(tmp_path / "a.png")

        def stat(self):
            raise error

        def is_symlink(self):
            return False

    scandir = os.scandir
    monkeypatch.setattr(
        "latentvae.data.folder.os.scandir",
        lambda folder: [Entry() if entry.name == "a.png" else entry for entry in scandir(folder)],
    )
    if isinstance(error, FileNotFoundError):
        assert [entry.key for entry in open_source(tmp_path).entries()] == ["b.png"]
    else:
        with pytest.raises(UserError, match=r"cannot look at .*a\.png: Permission denied"):
            open_source(tmp_path).entries()


def test_an_unreadable_file_is_an_image_error(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:150])
    source = open_source(tmp_path)
    assert source.read(0).shape == (6, 8, 3)
    with pytest.raises(ImageError):
        source.read(1)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError, match="No such file"):
        source.read(0)


def test_folder_of_16_bit_gray_and_of_many_bands(tmp_path):
    scan = np.random.default_rng(0).integers(0, 65536, (9, 11, 1), dtype=np.uint16)
    save_image(scan, tmp_path / "gray" / "scan.png", GRAY16)
    array = open_source(tmp_path / "gray", GRAY16).read(0)
    assert array.dtype == np.uint16 and np.array_equal(array, scan)
    bands = PixelFormat(channels=13, dtype="float32", range=(0, 1))
    cube = np.random.default_rng(0).random((5, 4, 13), dtype=np.float32)
    save_image(cube, tmp_path / "bands" / "tile.npy", bands)
    assert np.array_equal(open_source(tmp_path / "bands", bands).read(0), cube)


def test_python_list_keeps_its_order():
    source = open_source(items())
    assert source.entries().keys == ["k3", "k2", "k1", "k0"] and source.is_sequential
    assert [int(source.read(index).mean()) for index in range(4)] == [3, 2, 1, 0]
    entry = source.entries()[1]
    assert entry.num_bytes is None and entry.offset == 1 and entry.uri == "python object list"
    assert (source.fetch([entry])[0] == 2).all()


def test_an_iterator_is_read_once_and_when_it_is_needed():
    taken = []

    def generate():
        for item in items(3):
            taken.append(item["key"])
            yield item

    for given, expected in ((generate, []), (generate(), [])):
        source = open_source(given)
        assert taken == expected
        assert source.entries().keys == ["k2", "k1", "k0"] and (source.read(0) == 2).all()
        assert taken == ["k2", "k1", "k0"]
        taken.clear()


def test_python_function_by_name_and_in_person():
    for given in (f"python:{__name__}:gray_scans", gray_scans, gray_scans()):
        source = open_source(given, GRAY16)
        assert [entry.key for entry in source.entries()] == ["scan/0.tif", "scan/1.tif", "scan/2.tif"]
        assert source.read(2).dtype == np.uint16 and (source.read(2) == 2000).all()
    assert open_source(f"python:{__name__}:gray_scans", GRAY16).name == f"python:{__name__}:gray_scans"


def test_map_style_object_is_read_lazily():
    lazy = Lazy()
    source = open_source(lazy)
    assert source.entries().keys == ["c", "a", "b"] and lazy.fetched == []
    assert (source.read(1)[..., 0] == 1).all() and lazy.fetched == [1]
    with pytest.raises(ImageError, match="OSError: disk gone"):
        source.read(2)


def test_images_may_be_paths_bytes_and_pil(tmp_path):
    write(tmp_path / "a.png", 9)
    data = (tmp_path / "a.png").read_bytes()
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), data, Image.open(tmp_path / "a.png")):
        assert (open_source([{"key": "a", "image": image}]).read(0) == (9, 0, 0)).all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([{"key": "a", "image": 1}, {"key": "a", "image": 2}], "'a' twice"),
        ([], "no images"),
        ([{"image": 1}], "'key' and 'image'"),
        ([np.zeros((4, 4, 3))], "is a ndarray"),
        ([{"key": 7, "image": 1}], "non-empty string"),
        ({"a": 1}, "is needed"),
        (5, "is needed"),
        ("python:nowhere_at_all:f", "install the module"),
        ("python:json:absent", "has no 'absent'"),
        ("python:json", "python:module:function"),
    ],
)
def test_python_source_errors(given, words):
    with pytest.raises(UserError, match=words) as caught:
        open_source(given).entries()
    assert "\n" not in str(caught.value)


def test_arrays_must_be_of_the_declared_format():
    source = open_source(
        [
            {"key": "a", "image": np.zeros((4, 4, 3), np.float32)},
            {"key": "b", "image": np.zeros((4, 4, 1), np.uint8)},
            {"key": "c", "image": object()},
        ]
    )
    for index, words in enumerate(("float32 array; uint8", "1 channels; 3", "is a object")):
        with pytest.raises(ImageError, match=words):
            source.read(index)


def test_sources_can_be_sent_to_spawned_workers(tmp_path):
    write(tmp_path / "a.png", 5)
    for source in (FolderSource(tmp_path), PythonSource(items())):
        copy = pickle.loads(pickle.dumps(source))
        assert copy.entries() == source.entries() and np.array_equal(copy.read(0), source.read(0))
        again = pickle.loads(pickle.dumps(source))  # listed by now
        assert again.entries() == source.entries() and np.array_equal(again.read(0), source.read(0))


def test_a_source_of_the_users_own_is_taken_as_it_is(tmp_path):
    write(tmp_path / "a.png", 5)

    class Own:
        """All that ImageSource asks for, and nothing else."""

        name, is_sequential = "own", False

        def __init__(self):
            self.folder = FolderSource(tmp_path)

        def __len__(self):
            return len(self.folder)

        def __getattr__(self, name):
            return getattr(self.__dict__["folder"], name)

    own = Own()
    assert isinstance(own, ImageSource) and open_source(own) is own
    with pytest.raises(UserError, match="no use for key_column"):
        open_source(own, key_column="id")


def test_fetch_works_from_the_entries_alone(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.png", ord(name))
    entries = open_source(tmp_path).entries()
    fresh = FolderSource(tmp_path)
    (tmp_path / "b.png").unlink()
    contents = fresh.fetch([entries[2], entries[1], entries[0]])
    assert contents[0] == (tmp_path / "c.png").read_bytes() and contents[2] == (tmp_path / "a.png").read_bytes()
    assert isinstance(contents[1], FileNotFoundError)
    assert fresh._entries is None  # nothing was listed for it
    assert (fresh.decode(contents[0])[..., 0] == ord("c")).all()


def test_constructors_do_not_list(tmp_path, monkeypatch):
    write(tmp_path / "a.png")
    monkeypatch.setattr("latentvae.data.folder.walk", lambda folder: pytest.fail("listed"))
    assert FolderSource(tmp_path).name == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.zip", "zip cannot be read"),
        ("a.png", "is not a folder but an image"),
        ("a", "a file without extension cannot be read"),
        ("a.tar.gz", "is compressed"),
        ("a.tgz", "is compressed"),
        ("absent.tar", "does not exist"),
        ("absent-{0..3}.tar", "does not exist"),
        ("absent*.parquet", "does not exist"),
        ("a.zip::a.png", "mixes"),
        ("::", "names nothing"),
        ("", "names nothing"),
    ],
)
def test_what_is_no_source_is_refused_in_one_line(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    for file in ("a.zip", "a.png", "a", "a.tar.gz", "a.tgz"):
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UserError, match=words) as caught:
        open_source(name)
    assert "\n" not in str(caught.value)


def test_options_that_a_kind_does_not_have_are_refused(tmp_path):
    write(tmp_path / "a.png")
    for option in ({"key_column": "id"}, {"image_column": "picture"}, {"split": "train"}, {"streaming": True}):
        with pytest.raises(UserError, match=next(iter(option))):
            open_source(tmp_path, **option)
        with pytest.raises(UserError, match=next(iter(option))):
            open_source(items(), **option)


def test_a_file_name_that_is_no_unicode_is_named(tmp_path):
    write(tmp_path / "a.png")
    try:
        os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    with pytest.raises(UserError, match="not valid Unicode"):
        open_source(tmp_path).entries()
