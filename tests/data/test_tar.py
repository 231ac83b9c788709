"""Tar files: members at random by their headers, and damage that is never mistaken for the end."""

import io
import multiprocessing
import os
import pickle
import tarfile

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from latentvae.data import DataConfig, FolderSource, open_source, training_batches
from latentvae.data.tar import TarSource, _spans
from latentvae.errors import UserError
from latentvae.images import ImageError, PixelFormat
from tests.data.archives import folder_as_tar, png, write_tar

LONG = "d/" + "x" * 300 + ".png"
NAMES = ["b.png", "a.png", LONG, "ü/é ñ.png", "n/" * 60 + "y.png", "z.jpg"]


@pytest.fixture(params=[tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"])
def form(request):
    return request.param


def test_members_of_every_tar_format(tmp_path, form):
    names = [name for name in NAMES if form != tarfile.USTAR_FORMAT or (name.isascii() and len(name) < 150)]
    members = {name: png(index) for index, name in enumerate(names)} | {"a.txt": b"text"}
    path = write_tar(tmp_path / "s.tar", members, format=form, mtime=1.5)
    source = open_source(path)
    entries = source.entries()
    assert entries.keys == [f"s.tar/{name}" for name in names] and len(source) == len(names) and source.is_sequential
    assert {entry.uri for entry in entries} == {str(path)} and entries[0].mtime_ns == os.stat(path).st_mtime_ns
    data = path.read_bytes()
    for entry, name in zip(entries, names, strict=True):
        assert data[entry.offset : entry.offset + entry.num_bytes] == members[name]
    for order in (list(entries), list(entries)[::-1]):
        contents = TarSource([str(path)]).fetch(order)
        assert contents == [members[entry.key.removeprefix("s.tar/")] for entry in order]
    assert [int(source.read(index)[0, 0, 0]) for index in range(len(names))] == list(range(len(names)))


def test_names_are_made_safe_and_hidden_members_left_out(tmp_path):
    names = ["./a.png", "../../b.png", "/c.png", "._a.png", ".git/d.png", "d/.e.png", "f"]
    source = open_source(write_tar(tmp_path / "s.tar", {name: png() for name in names}))
    assert source.entries().keys == ["s.tar/a.png", "s.tar/b.png", "s.tar/c.png"]
    assert all(isinstance(content, bytes) for content in source.fetch(source.entries()))


def test_directories_links_and_sparse_members(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind, target in (
            ("d.png", tarfile.DIRTYPE, ""),
            ("hard.png", tarfile.LNKTYPE, "a.png"),
            ("soft.png", tarfile.SYMTYPE, "a.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
        info = tarfile.TarInfo("a.png")
        info.size = len(png(7))
        archive.addfile(info, io.BytesIO(png(7)))
    source = open_source(path)
    assert source.entries().keys == ["s.tar/hard.png", "s.tar/soft.png", "s.tar/a.png"]
    hard, soft, whole = source.fetch(source.entries())
    assert isinstance(hard, ImageError) and isinstance(soft, ImageError) and "is a link" in str(hard)
    assert whole == png(7)


def old_gnu_sparse(name: str, data: bytes, hole: int) -> bytes:
    """A member whose first `hole` bytes are not stored: a header of GNU tar's old sparse format."""
    info = tarfile.TarInfo(name)
    info.size = len(data) - hole
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (hole, len(data) - hole)
    header[483:495] = b"%011o\0" % len(data)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    stored = data[hole:]
    return bytes(header) + stored + b"\0" * (-len(stored) % 512)


def test_a_sparse_member_is_read_whole(tmp_path):
    cube = np.zeros((64, 64, 4), np.uint8)
    cube[-1] = 9
    stream = io.BytesIO()
    np.save(stream, cube)
    data = bytes(1024) + stream.getvalue()
    path = tmp_path / "s.tar"
    path.write_bytes(old_gnu_sparse("a.npy", data, 1024) + bytes(1024))
    source = TarSource([str(path)], PixelFormat(channels=4))
    assert source.fetch(source.entries()) == [data]


# --- damage and change ---


def pax(path, name, data, headers):
    """A tar of a member with headers of its own, and an honest one."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for member, content, own in ((name, data, headers), ("z.png", png(9), {})):
            info = tarfile.TarInfo(member)
            info.size, info.pax_headers = len(content), own
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("size", [10**7, 10**12, 2**62])
def test_a_sparse_member_takes_no_more_memory_than_its_tar(tmp_path, size):
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.png"}
    data = b"1\n0\n16\n".ljust(512, b"\0") + b"x" * 16
    path = pax(tmp_path / "s.tar", "GNUSparseFile.0/a.png", data, headers | {"GNU.sparse.realsize": str(size)})
    source = TarSource([str(path)])
    claimed, honest = source.fetch(source.entries())
    assert isinstance(claimed, ImageError) and f"is a sparse file of {size:,} bytes in a tar of" in str(claimed)
    assert honest == png(9)


@pytest.mark.parametrize("size", [-1536, -2048, -10_000])
def test_a_member_of_negative_size_does_not_lead_round_and_round(tmp_path, size):
    path = pax(tmp_path / "s.tar", "a.png", png(1), {"size": str(size)})
    with pytest.raises(UserError, match=r"s\.tar is damaged or cut off.*a member of negative size"):
        TarSource([str(path)]).entries()


def test_every_truncation_is_told(tmp_path):
    """Wherever an archive is cut: an error that names it, or (nothing but zeros is lost) all of its images."""
    whole = write_tar(tmp_path / "s.tar", {f"{index}.png": png(index) for index in range(4)}).read_bytes()
    end = 4 * 1024
    cut = tmp_path / "cut.tar"
    for size in [*range(0, end + 512, 128), end + 511]:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.tar is damaged or cut off: as a tar file only its first \d members"):
            open_source(cut).entries()
    cut.write_bytes(whole[: end + 512])
    assert len(open_source(cut)) == 4


def test_damage_in_the_middle_is_not_the_end(tmp_path):
    path = write_tar(tmp_path / "s.tar", {f"{index}.png": png(index) for index in range(4)})
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 150] ^= 0xFF  # the checksum of the third header
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"its first 2 members can be read \(no header at byte 2048\)"):
        open_source(path).entries()
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match="its first 0 members"):
        open_source(path).entries()


def test_a_compressed_tar_is_refused_whatever_its_name(tmp_path):
    for name, mode in (("a.tar.gz", "w:gz"), ("b.tar", "w:gz"), ("c.tar", "w:xz"), ("d.tar", "w:bz2")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.addfile(tarfile.TarInfo("a.png"))
        with pytest.raises(UserError, match="is compressed"):
            open_source(tmp_path / name).entries()


def test_a_member_that_moved_is_never_taken_for_another(tmp_path):
    path = tmp_path / "s.tar"
    members = {f"{index}.png": png(index) for index in range(6)}
    write_tar(path, members)
    entries = list(open_source(path).entries())
    os.remove(path)
    write_tar(path, dict(reversed(members.items())))  # the same sizes in another order
    contents = TarSource([str(path)]).fetch(entries)
    assert all(isinstance(content, ImageError) and "no longer at its place" in str(content) for content in contents)
    write_tar(path, {f"{index}.png": png(index, (9, 9)) for index in range(6)})
    for content, entry in zip(TarSource([str(path)]).fetch(entries), entries, strict=True):
        assert isinstance(content, ImageError) or content == png(int(entry.key[6]), (9, 9))
    path.write_bytes(path.read_bytes()[: entries[3].offset + 10])
    assert isinstance(TarSource([str(path)]).fetch(entries[3:4])[0], ImageError)
    source = TarSource([str(path)])
    os.remove(path)
    assert isinstance(source.fetch(entries[:1])[0], FileNotFoundError)


def test_keys_that_collide_are_refused(tmp_path):
    write_tar(tmp_path / "x" / "s.tar", {"a.png": png()})
    write_tar(tmp_path / "y" / "s.tar", {"a.png": png()})
    with pytest.raises(UserError, match=r"the key 's\.tar/a\.png' twice"):
        open_source(tmp_path).entries()
    write_tar(tmp_path / "t.tar", [("a.png", png(1)), ("a.png", png(2))])
    with pytest.raises(UserError, match=r"the key 't\.tar/a\.png' twice"):
        open_source(tmp_path / "t.tar").entries()
    with pytest.raises(UserError, match="no images in"):
        open_source(write_tar(tmp_path / "u.tar", {"a.txt": b""})).entries()


# --- many shards, near and far ---


def test_neighbours_are_read_together_and_in_bounded_pieces(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", {f"{index}.png": png(index) for index in range(50)})
    write_tar(tmp_path / "b.tar", {"0.png": png(99)})
    source = open_source(str(tmp_path / "*.tar"))
    reads = []
    read = source._files.read
    monkeypatch.setattr(source._files, "read", lambda *place: reads.append(place) or read(*place))
    assert source.fetch(source.entries()) == [*(png(index) for index in range(50)), png(99)]
    assert [(name, start) for name, start, _ in reads] == [(str(tmp_path / "a.tar"), 0), (str(tmp_path / "b.tar"), 0)]
    monkeypatch.setattr("latentvae.data.tar._MAX_READ", 10 * 1024)
    spans = list(_spans(source.entries()))
    assert [len(span) for span in spans] == [10, 10, 10, 10, 10, 1]
    assert len(list(_spans(list(source.entries())[::-1]))) == 51


@pytest.mark.parametrize(
    "pattern", ["*.tar", "shard-{0000..0002}.tar", "shard-000[0-2].tar", "", "shard-{0000,0001,0002}.tar"]
)
def test_shards_by_pattern_in_sorted_order(tmp_path, pattern):
    for number in (2, 0, 1):
        write_tar(tmp_path / f"shard-{number:04d}.tar", {"b.png": png(number), "a.png": png(number + 10)})
    source = open_source(f"{tmp_path}/{pattern}")
    assert source.entries().keys == [f"shard-{n:04d}.tar/{name}.png" for n in range(3) for name in "ba"]
    assert [int(source.read(index)[0, 0, 0]) for index in range(6)] == [0, 10, 1, 11, 2, 12]
    joined = "::".join(str(tmp_path / f"shard-{number:04d}.tar") for number in (1, 0))
    assert open_source(joined).entries().keys[0] == "shard-0001.tar/b.png"


def test_a_shard_that_braces_name_must_be_there(tmp_path):
    write_tar(tmp_path / "s-0.tar", {"a.png": png()})
    with pytest.raises(UserError, match=r"s-1\.tar does not exist"):
        open_source(f"{tmp_path}/s-{{0..1}}.tar")
    with pytest.raises(UserError, match="must count up"):
        open_source(f"{tmp_path}/s-{{3..1}}.tar")


def test_a_folder_of_tars_beside_images_is_a_folder_of_images(tmp_path):
    write_tar(tmp_path / "deep" / "s.tar", {"a.png": png()})
    assert isinstance(open_source(tmp_path), TarSource)
    (tmp_path / "b.png").write_bytes(png())
    assert isinstance(open_source(tmp_path), FolderSource) and open_source(tmp_path).entries().keys == ["b.png"]


def test_urls_are_read_by_ranges(tmp_path):
    local = {f"s-{number}.tar": {f"{index}.png": png(10 * number + index) for index in range(5)} for number in (0, 1)}
    system = fsspec.filesystem("memory")
    for name, members in local.items():
        system.pipe(f"/tars/{name}", write_tar(tmp_path / name, members).read_bytes())
    for pattern in ("memory://tars/*.tar", "memory://tars/s-{0..1}.tar", "memory://tars"):
        source = open_source(pattern)
        assert source.entries().keys == [f"{name}/{index}.png" for name in local for index in range(5)]
        assert source.fetch(source.entries()) == [data for members in local.values() for data in members.values()]
        assert pickle.loads(pickle.dumps(source)).read(7)[0, 0, 0] == 12
    system.pipe("/tars/s-1.tar", b"cut off")
    with pytest.raises(UserError, match=r"memory://.*s-1\.tar is damaged"):
        open_source("memory://tars").entries()
    with pytest.raises(UserError, match="cannot be read"):
        open_source("memory://absent/a.tar").entries()
    with pytest.raises(UserError, match="nothing://a"):
        open_source("nothing://a.tar").entries()
    system.rm("/tars", recursive=True)


def _reads(source, expected, queue):
    queue.put(all(source.read(index)[0, 0, 0] == value for index, value in expected))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.multiprocess)])
def test_processes_do_not_share_a_place_in_a_file(tmp_path, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    write_tar(tmp_path / "s.tar", {f"{index:03d}.png": png(index) for index in range(100)})
    source = open_source(tmp_path / "s.tar")
    assert source.read(0)[0, 0, 0] == 0  # opens the file before the others start
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    orders = [np.random.default_rng(seed).permutation(100).tolist() for seed in range(2)]
    workers = [
        context.Process(target=_reads, args=(source, [(index, index) for index in order], queue)) for order in orders
    ]
    for worker in workers:
        worker.start()
    assert all(source.read(index)[0, 0, 0] == index for index in range(99, -1, -1))
    assert [queue.get(timeout=60) for _ in workers] == [True, True]
    for worker in workers:
        worker.join(30)


# --- the same as from a folder ---


def test_training_from_a_tar_equals_training_from_the_folder(tmp_path, photographs):
    """Byte for byte: a folder named like the shard gives equal keys."""
    photographs.rename(tmp_path / "set.tar")
    (tmp_path / "folder").mkdir()
    (tmp_path / "set.tar").rename(tmp_path / "folder" / "set.tar")
    tar = folder_as_tar(tmp_path / "folder" / "set.tar", tmp_path / "set.tar")
    sources = open_source(tmp_path / "folder"), open_source(tar)
    assert sources[0].entries().keys == sources[1].entries().keys and len(sources[1]) == 12
    for workers in (0, 2):
        config = DataConfig(resolution=32, num_workers=workers)
        options = {"seed": 3, "start_image": 4, "global_batch_size": 8, "micro_batch_size": 4}
        streams = [training_batches(source, config, PixelFormat(), **options) for source in sources]
        for _ in range(4):
            for ours, theirs in zip(*(next(stream) for stream in streams), strict=True):
                assert ours.keys == theirs.keys and ours.positions == theirs.positions
                assert np.array_equal(ours.images.numpy(), theirs.images.numpy())


@pytest.mark.parametrize("name", ["bad_images", "pngsuite", "exif_orientation"])
@pytest.mark.parametrize("pixels", [PixelFormat(), PixelFormat(channels=1, dtype="uint16")], ids=["rgb8", "gray16"])
def test_hostile_files_give_the_same_through_tar_and_folder(shared_data, tmp_path, name, pixels):
    folder = shared_data(name)
    sources = FolderSource(folder, pixels), TarSource([str(folder_as_tar(folder, tmp_path / "s.tar"))], pixels)
    assert [f"s.tar/{key}" for key in sources[0].entries().keys] == sources[1].entries().keys
    contents = [source.fetch(source.entries()) for source in sources]
    assert contents[0] == contents[1]
    readable = 0
    for index in range(len(sources[0])):
        outcomes = []
        for source in sources:
            try:
                outcomes.append(source.read(index))
            except ImageError as error:
                outcomes.append(str(error))
        assert type(outcomes[0]) is type(outcomes[1])
        assert np.array_equal(outcomes[0], outcomes[1])
        readable += isinstance(outcomes[0], np.ndarray)
    assert readable > 0 or (name, pixels.channels) == ("exif_orientation", 1)  # colour is not made gray


def test_what_webdataset_writes_is_what_it_and_we_read(tmp_path):
    pictures = {f"{index:05d}": np.full((4, 5, 3), index, np.uint8) for index in range(8)}
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        for key, picture in pictures.items():
            writer.write({"__key__": key, "png": Image.fromarray(picture), "txt": f"number {key}", "cls": int(key)})
    source = open_source(tmp_path / "s.tar")
    assert source.entries().keys == [f"s.tar/{key}.png" for key in pictures]
    theirs = {
        sample["__key__"]: sample["png"]
        for sample in webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False)
    }
    for entry, content in zip(source.entries(), source.fetch(source.entries()), strict=True):
        assert content == theirs[entry.key[6:11]]
        assert np.array_equal(source.decode(content), pictures[entry.key[6:11]])


def test_13_bands_through_folder_and_tar(tmp_path):
    """Satellite tiles keep all their bands and bits, whatever holds them."""
    tifffile = pytest.importorskip("tifffile")
    pixels = PixelFormat(channels=13, dtype="uint16")
    cubes = [np.random.default_rng(seed).integers(0, 65536, (9, 7, 13), dtype=np.uint16) for seed in range(3)]
    (tmp_path / "tiles").mkdir()
    for index, cube in enumerate(cubes):
        options = {"photometric": "minisblack", "planarconfig": "contig", "compression": "deflate" if index else None}
        tifffile.imwrite(tmp_path / "tiles" / f"{index}.tif", cube, **options)
    tar = folder_as_tar(tmp_path / "tiles", tmp_path / "s.tar")
    for source in (open_source(tmp_path / "tiles", pixels), open_source(tar, pixels)):
        assert all(np.array_equal(source.read(index), cube) for index, cube in enumerate(cubes))
