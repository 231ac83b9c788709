"""The same store through Ray: actors that come, wait, fail and die."""

import os
import signal
import sys
import time
from collections import Counter

import pytest
import torch

from latentvae.errors import UserError
from latentvae.latents.encoding.encode import encode_dataset
from latentvae.latents.encoding.ray_actors import Crew, Places
from latentvae.latents.encoding.settings import EncodeConfig
from latentvae.latents.operating.verify import verify_store
from tests.latents.stores import COUNT, SETTINGS, Slow, contents, records_of, rows_of, start, tiny_vae

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def two_cpus():
    """A Ray of two CPUs, whose workers find the tests."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def cluster(two_cpus):
    """Both CPUs are free before a test, and again after it, however it ended: no run keeps a place."""
    wait_until_free(two_cpus)
    yield two_cpus
    wait_until_free(two_cpus)


def wait_until_free(ray, seconds=120):
    deadline = time.monotonic() + seconds
    while ray.available_resources().get("CPU", 0) < 2:
        assert time.monotonic() < deadline, f"an actor still has its place: {ray.available_resources()}"
        time.sleep(0.1)


def encode(source, out, **options):
    return encode_dataset(source, tiny_vae(), out, engine="ray", **(SETTINGS | options))


def test_without_ray_the_extra_is_named(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs Ray: pip install latentvae\[ray\]"):
        encode(pictures, tmp_path / "store")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_no_cluster_is_one_line(pictures, tmp_path, address):
    assert not pytest.importorskip("ray").is_initialized()
    with pytest.raises(UserError, match=rf"no Ray cluster at {address}: .*Connection refused") as refusal:
        encode(pictures, tmp_path / "store", ray_address=address)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("option", [{"ray_address": "auto"}, {"ray_actors": 2}])
def test_rays_options_are_for_ray(pictures, tmp_path, option):
    with pytest.raises(UserError, match="give --engine ray too"):
        encode_dataset(pictures, tiny_vae(), tmp_path / "store", **(SETTINGS | option))


@pytest.mark.parametrize(
    ("resources", "largest", "options", "threads", "expected"),
    [
        ({"CPU": 64.0, "GPU": 8.0}, 64, {"num_workers": 8}, 32, Places(8, 8, 1)),
        ({"CPU": 16.0, "GPU": 8.0}, 16, {"num_workers": 8}, 8, Places(8, 2, 1)),
        ({"CPU": 64.0, "GPU": 8.0}, 64, {"num_workers": 0, "ray_actors": 3}, 8, Places(3, 1, 1)),
        ({"CPU": 64.0, "GPU": 8.0}, 32, {"device": "cpu"}, 8, Places(8, 8, 0)),
        ({"CPU": 16.0}, 4, {}, 8, Places(4, 4, 0)),
        ({"CPU": 2.0}, 2, {}, 4, Places(1, 2, 0)),
        ({}, 0, {}, 1, Places(1, 1, 0)),
    ],
)
def test_there_are_as_many_actors_as_the_cluster_has_room_for(resources, largest, options, threads, expected):
    config = EncodeConfig(engine="ray", **options)
    assert Places.of(resources, largest, config, threads) == expected


def test_actors_write_the_bytes_that_one_process_writes(cluster, pictures, undisturbed, tmp_path):
    store = tmp_path / "store"
    report = encode(Slow(pictures), store)
    assert (report.units_encoded, report.images_encoded, report.counts.ok) == (20, COUNT, COUNT)
    assert contents(store) == undisturbed and len(rows_of(store)) == COUNT
    assert verify_store(store).is_whole
    report = encode(Slow(pictures), store)
    assert (report.units_encoded, report.images_encoded, report.counts.ok) == (0, 0, COUNT)
    assert contents(store) == undisturbed


def test_a_folder_with_workers_and_a_relative_path(cluster, pictures, tmp_path, monkeypatch):
    encode_dataset(pictures, tiny_vae(), tmp_path / "undisturbed", **SETTINGS)
    monkeypatch.chdir(tmp_path)
    encode("pictures", "store", num_workers=1, unit_images=COUNT)
    local = encode_dataset("pictures", tiny_vae(), "local", **(SETTINGS | {"unit_images": COUNT}))
    assert local.counts.ok == COUNT
    assert contents(tmp_path / "store") == contents(tmp_path / "local")


def test_a_python_string_is_imported_by_the_actors(cluster, tmp_path):
    assert encode("python:tests.latents.stores:three_squares", tmp_path / "store").counts.ok == 3
    assert sorted(rows_of(tmp_path / "store")) == ["0", "1", "2"]


class KillsActors:
    """Looks at what is committed as the driver does, and kills an actor that holds a unit, a few times."""

    def __init__(self, store, times):
        self.store, self.left, self.killed = store, times, Counter()

    def __call__(self, finished):
        def look(crew, seconds):
            done = len(list(self.store.glob("shards/*/u*.json")))
            if self.left and done >= 2 * (sum(self.killed.values()) + 1):
                leases = [path.read_text() for path in self.store.glob("leases/u*.lease")]
                pids = [int(text.split('"pid": ')[1].split(",")[0]) for text in leases]
                alive = [pid for pid in pids if pid != os.getpid() and pid not in self.killed]
                if alive:  # the leases of the dead stay until they are taken over
                    os.kill(alive[0], signal.SIGKILL)
                    self.killed[alive[0]] += 1
                    self.left -= 1
            return finished(crew, min(seconds, 0.05))

        return look


def test_lost_actors_are_replaced_and_their_units_done_again(cluster, pictures, undisturbed, tmp_path, monkeypatch):
    store = tmp_path / "store"
    kills = KillsActors(store, times=3)
    monkeypatch.setattr(Crew, "finished", kills(Crew.finished))
    report = encode(Slow(pictures, 0.05), store)
    assert sum(kills.killed.values()) == 3, "there must be actors to lose"
    assert report.counts.ok == COUNT and report.units_encoded == 20
    assert contents(store) == undisturbed and len(rows_of(store)) == COUNT
    assert verify_store(store).is_whole


def test_a_unit_that_kills_every_actor_ends_the_run_in_one_line(cluster, pictures, undisturbed, tmp_path):
    store, key = tmp_path / "store", "part_0/00007.jpg"
    with pytest.raises(UserError, match=r"3 actors of Ray died while encoding unit .*--num-workers 1") as refusal:
        encode(Slow(pictures, deadly=(key,)), store)
    assert "\n" not in str(refusal.value)
    report = encode(Slow(pictures, deadly=(key,)), store, num_workers=1)
    assert report.counts.error == 1 and rows_of(store)[key]["status"] == "error"
    assert len(rows_of(store)) == COUNT
    encode(Slow(pictures), store, retry_errors=True)
    assert contents(store) == undisturbed


def test_the_error_of_an_actor_is_one_line(cluster, pictures, tmp_path):
    class Changing(Slow):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"key": "another"}

    with pytest.raises(UserError, match=r"had the key .* and now 'another'; a key must stay") as refusal:
        encode(Changing(pictures), tmp_path / "store")
    assert "\n" not in str(refusal.value)
    assert encode(Slow(pictures), tmp_path / "store").counts.ok == COUNT


def test_an_actor_that_finds_no_place_holds_up_nobody(cluster, pictures, undisturbed, tmp_path):
    report = encode(Slow(pictures), tmp_path / "store", ray_actors=5)
    assert report.counts.ok == COUNT and contents(tmp_path / "store") == undisturbed


def test_actors_and_a_process_outside_share_a_store(cluster, pictures, undisturbed, tmp_path):
    store = tmp_path / "store"
    other = start(Slow(pictures, 0.05), store)
    report = encode(Slow(pictures, 0.05), store)
    other.join(100)
    assert other.exitcode == 0 and report.counts.ok == COUNT
    assert contents(store) == undisturbed


def test_threads_are_the_drivers(cluster, pictures, tmp_path):
    """They are in the commit records, because they change the last bits."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        report = encode(pictures, tmp_path / "store")
        assert report.counts.ok == COUNT
    finally:
        torch.set_num_threads(before)
    assert {record.environment["threads"] for record in records_of(tmp_path / "store").values()} == {2}
