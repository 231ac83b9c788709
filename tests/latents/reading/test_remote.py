"""Stores behind URLs: downloaded once, checked, kept within a limit, and read as local ones are."""

import http.server
import multiprocessing
import os
import threading
from functools import partial
from pathlib import Path

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader

from latentvae.errors import UserError
from latentvae.latents.reading.dataset import LatentDataset
from latentvae.latents.reading.iterable import LatentIterableDataset
from latentvae.latents.reading.readable import ReadableStore
from latentvae.latents.reading.remote import RemoteFiles, default_cache
from tests.latents.written import rewrite_unit, write_store

LONG_AGO = 1_000_000_000


@pytest.fixture
def made(tmp_path):
    return write_store(tmp_path / "store")


@pytest.fixture
def served(tmp_path):
    """(URL of tmp_path, paths that were asked for) of a plain web server."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            if self.command == "GET":
                asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def in_memory(made):
    """The store in fsspec's memory file system."""
    system = fsspec.filesystem("memory")
    system.put(str(made.folder), "/remote/store", recursive=True)
    yield "memory://remote/store"
    system.rm("/remote", recursive=True)


def same_items(dataset, made):
    local = LatentDataset(made.folder)
    assert dataset.keys == local.keys == made.keys
    for mine, theirs in zip(dataset.__getitems__(range(17)), local.__getitems__(range(17)), strict=True):
        assert torch.equal(mine["latents"], theirs["latents"])
        assert {**mine, "latents": 0} == {**theirs, "latents": 0}


def shards_in(cache: Path):
    return sorted(path.name for path in cache.glob("*.safetensors"))


def test_memory(in_memory, made, tmp_path):
    same_items(LatentDataset(in_memory, cache_dir=tmp_path / "cache"), made)
    streamed = LatentIterableDataset(in_memory, cache_dir=tmp_path / "cache")
    assert sorted(item["key"] for item in streamed) == sorted(made.keys)


def test_file_url(made, tmp_path):
    same_items(LatentDataset(made.folder.as_uri(), cache_dir=tmp_path / "cache"), made)


def test_http_downloads_every_file_once(made, served, tmp_path):
    url, asked = served
    dataset = LatentDataset(f"{url}/store/", cache_dir=tmp_path / "cache")
    assert not [path for path in asked if path.endswith(".safetensors")]  # shards come when they are touched
    dataset[0]
    assert len([path for path in asked if path.endswith(".safetensors")]) == 1
    same_items(dataset, made)
    same_items(LatentDataset(f"{url}/store", cache_dir=tmp_path / "cache"), made)
    for suffix in (".safetensors", ".parquet"):
        files = [path for path in asked if "/shards/" in path and path.endswith(suffix)]
        assert len(files) == len(set(files)) == len(list(made.folder.glob(f"shards/*/*{suffix}")))


def test_workers_share_the_downloads(made, served, tmp_path):
    url, asked = served
    dataset = LatentDataset(f"{url}/store", cache_dir=tmp_path / "cache")
    loader = DataLoader(dataset, batch_size=1, num_workers=3, shuffle=True)
    assert sorted(batch["key"][0] for batch in loader) == sorted(made.keys)
    files = [path for path in asked if path.endswith(".safetensors")]
    assert len(files) == len(set(files)) == 6


def _download(url, cache, barrier):
    store = ReadableStore(url, cache_dir=cache)
    barrier.wait()
    for number in range(len(store.shards)):
        store.shard(number)


def test_processes_wait_for_each_others_downloads(made, served, tmp_path):
    url, asked = served
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    arguments = (f"{url}/store", tmp_path / "cache", barrier)
    processes = [context.Process(target=_download, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    files = [path for path in asked if path.endswith(".safetensors")]
    assert len(files) == len(set(files)) == 6


def test_a_store_that_is_not_there(served, tmp_path):
    url, _ = served
    with pytest.raises(UserError, match=f"{url}/nothing is not a latent store: it has no manifest.json"):
        LatentDataset(f"{url}/nothing", cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match="memory://nothing is not a latent store"):
        LatentDataset("memory://nothing", cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match="nosuchprotocol"):
        LatentDataset("nosuchprotocol://x/y", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("kind", ["file", "http", "memory"])
def test_an_unfinished_store(tmp_path, served, kind):
    made = write_store(tmp_path / "unfinished", leave_out=[1], complete=False)
    if kind == "memory":
        fsspec.filesystem("memory").put(str(made.folder), "/unfinished", recursive=True)
    url = {"file": made.folder.as_uri(), "http": f"{served[0]}/unfinished", "memory": "memory://unfinished"}[kind]
    with pytest.raises(UserError, match=rf"{url} is not complete \(1 of 4 units"):
        LatentDataset(url, cache_dir=tmp_path / "cache")
    assert LatentDataset(url, cache_dir=tmp_path / "cache", partial=True).keys == made.keys
    if kind == "memory":
        fsspec.filesystem("memory").rm("/unfinished", recursive=True)


def test_damage_is_told_with_the_url(made, tmp_path):
    url, cache = made.folder.as_uri(), tmp_path / "cache"
    shard = next(made.folder.glob("shards/48x32/u000002-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    dataset = LatentDataset(url, cache_dir=cache)
    with pytest.raises(UserError, match=f"{shard.name} is damaged: .* run latentvae verify"):
        dataset[8]
    assert shards_in(cache) == [] and not list(cache.glob(".*tmp*"))
    shard.write_bytes(bytes(content[:-5]))
    with pytest.raises(UserError, match="is damaged"):
        dataset[8]
    plan = next(made.folder.glob("plan/*"))
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{url}/plan/plan-0000.parquet is damaged"):
        LatentDataset(url, cache_dir=cache)


def test_a_damaged_record_is_told_with_the_url(made, tmp_path):
    record = made.folder / "shards/32x32/u000001.json"
    record.write_text('{"unit": 1}', encoding="utf-8")
    url = made.folder.as_uri()
    with pytest.raises(UserError, match=f"{url}/shards/32x32/u000001.json is damaged"):
        LatentDataset(url, cache_dir=tmp_path / "cache")


def test_a_truncated_cached_file_is_downloaded_again(made, tmp_path):
    url, cache = made.folder.as_uri(), tmp_path / "cache"
    LatentDataset(url, cache_dir=cache)[0]
    for path in cache.glob("*.safetensors"):
        path.write_bytes(b"x")
    same_items(LatentDataset(url, cache_dir=cache), made)


def test_a_store_that_changed(made, tmp_path):
    url = made.folder.as_uri()
    dataset = LatentDataset(url, cache_dir=tmp_path / "cache")
    shard = made.store.read_record("32x32", 0).shards["32x32"]
    new = {
        key: {name: value + 1 for name, value in made.tensors[key].items()}
        for key in made.units[0]
        if key in made.tensors
    }
    rewrite_unit(made, 0, new)
    (made.folder / shard).unlink()
    with pytest.raises(UserError, match="the store changed since it was opened: open it again"):
        dataset[0]
    again = LatentDataset(url, cache_dir=tmp_path / "cache", normalize=False)
    assert torch.equal(again[0]["latents"], new[again.keys[0]]["mean"])


def test_the_least_recently_used_go_first(made, tmp_path):
    url, cache = made.folder.as_uri(), tmp_path / "cache"
    files = RemoteFiles(url, cache)
    store = ReadableStore(url, cache_dir=cache)
    paths = [files.use(place.name, place.file, Path) for place in store.shards[:3]]
    sizes = [path.stat().st_size for path in paths]
    for age, path in enumerate(paths):
        os.utime(path, (LONG_AGO + age, LONG_AGO + age))
    files.use(store.shards[0].name, store.shards[0].file, Path)  # used again: now the second is the oldest
    limited = RemoteFiles(url, cache, max_cache_bytes=sum(sizes[:1] + sizes[2:]) + store.shards[3].file.num_bytes)
    fourth = limited.use(store.shards[3].name, store.shards[3].file, Path)
    left = {path.name for path in cache.glob("*.safetensors")}
    assert left == {paths[0].name, paths[2].name, fourth.name}

    smallest = LatentDataset(url, cache_dir=cache, max_cache_bytes=1)
    same_items(smallest, made)  # each shard goes as the next one comes, and stays mapped
    assert len(shards_in(cache)) == 1
    with pytest.raises(UserError, match="max_cache_bytes is 0"):
        LatentDataset(url, cache_dir=cache, max_cache_bytes=0)


def test_a_file_is_not_removed_while_it_is_read(made, tmp_path):
    url, cache = made.folder.as_uri(), tmp_path / "cache"
    store = ReadableStore(url, cache_dir=cache)
    tight = RemoteFiles(url, cache, max_cache_bytes=1)
    first, second = store.shards[:2]

    def read(path):
        tight.use(second.name, second.file, lambda other: other.stat())  # has no room but that of the first
        return path.stat().st_size

    assert tight.use(first.name, first.file, read) == first.file.num_bytes
    assert len(shards_in(cache)) == 2
    tight.use(store.shards[2].name, store.shards[2].file, lambda path: None)
    assert len(shards_in(cache)) == 1


def test_the_cache_is_the_users(monkeypatch, tmp_path, made):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert default_cache() == tmp_path / "user" / "latentvae" / "stores"
    same_items(LatentDataset(made.folder.as_uri()), made)
    assert len(shards_in(default_cache())) == 6
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "latentvae" / "stores"
