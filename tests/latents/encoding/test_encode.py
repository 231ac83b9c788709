"""encode_dataset: what comes out, and what is refused."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentvae.checkpoint import load_model, save_model
from latentvae.errors import UserError
from latentvae.files import temporary_path
from latentvae.images import PixelFormat, crop, decode, resize, to_model
from latentvae.latents.encoding import engine
from latentvae.latents.encoding.encode import encode_dataset
from latentvae.latents.operating.verify import verify_store
from latentvae.latents.reading.dataset import LatentDataset
from latentvae.latents.store.files import LatentStore
from latentvae.latents.store.lease import Leases
from latentvae.latents.store.leftovers import remove_temporary
from tests.latents.stores import SETTINGS, contents, pack, tiny_vae

ROOT = Path(__file__).parents[3]


def index_rows(store):
    return [row for path in sorted(store.glob("shards/*/*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_latents_are_those_of_the_model_on_the_resized_centre(encode, vae, photographs, tmp_path):
    report = encode(dtype="fp32")
    assert (report.counts.ok, report.counts.inputs, report.units, report.units_encoded) == (12, 12, 4, 4)
    assert "12 of 12 images encoded" in str(report)
    dataset = LatentDataset(tmp_path / "store", normalize=False)
    for item in (dataset[0], dataset[7]):
        array = decode(photographs / item["key"])  # 72 x 96
        scaled = resize(array, (43, 32))
        pixels = to_model(torch.from_numpy(crop(scaled, 0, 5, 32, 32).copy()), PixelFormat())
        with torch.no_grad():
            expected = vae.encode(pixels).latent_dist.mode()[0]
        torch.testing.assert_close(item["latents"], expected, rtol=1e-5, atol=1e-6)
        assert item["original_size"] == (72, 96)
        assert item["crop_top_left"] == (0, 5)


def test_every_input_is_in_one_row_and_bad_images_say_why(encode, photographs, tmp_path, shared_data):
    clean = encode("clean")
    bad = shared_data("bad_images")
    names = ["Pillow__truncated_jpeg.jpg", "sharp__truncated.png", "image__bad_bmp_Bad_badbitcount.bmp"]
    for name in names:
        (photographs / name).write_bytes((bad / name).read_bytes())
    (photographs / "nothing.png").write_bytes(b"")
    Image.new("RGB", (40, 8)).save(photographs / "tiny.png")
    report = encode()
    rows = {row["key"]: row for row in index_rows(tmp_path / "store")}
    assert len(rows) == report.counts.inputs == 17
    assert report.counts.ok == 12 and report.counts.error == 4 and report.counts.skipped == 1
    assert {key for key, _ in report.problems} == {*names, "nothing.png"}
    for key, row in rows.items():
        assert (row["row"] >= 0) == (row["status"] == "ok") == (row["error"] is None), key
        assert row["source_hash"].startswith("sha256:")
    assert "smaller than 32x32" in rows["tiny.png"]["error"]
    assert verify_store(tmp_path / "store").is_whole

    before, after = (LatentDataset(tmp_path / name, normalize=False) for name in ("clean", "store"))
    assert sorted(before.keys) == sorted(after.keys) and clean.counts.ok == 12
    for index, key in enumerate(before.keys):
        assert torch.equal(before[index]["latents"], after[after.keys.index(key)]["latents"]), key

    with pytest.raises(UserError, match=r"4 images could not be encoded \(strict\)"):
        encode(strict=True)


def test_a_unit_without_a_readable_image_is_committed_empty(encode, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no image")
    report = encode(source=folder)
    assert report.counts.error == 1 and report.counts.ok == 0
    assert verify_store(tmp_path / "store").is_whole
    with pytest.raises(UserError, match="holds no latents"):
        LatentDataset(tmp_path / "store")


def test_small_images_can_be_enlarged(encode, photographs, tmp_path):
    Image.new("RGB", (40, 8), "red").save(photographs / "tiny.png")
    assert encode(small="upscale").counts.skipped == 0
    row = next(row for row in index_rows(tmp_path / "store") if row["key"] == "tiny.png")
    assert (row["scaled_width"], row["scaled_height"], row["crop_left"]) == (160, 32, 64)


def test_padding_a_tail_changes_nothing(encode, tmp_path):
    """In units of 5 and batches of 4 each unit ends in a batch of 1; the rows equal those of full batches."""
    encode("tails", unit_images=5, batch_size=4, dtype="fp32")
    encode("full", unit_images=12, batch_size=4, dtype="fp32")
    tails, full = (LatentDataset(tmp_path / name) for name in ("tails", "full"))
    assert tails.keys == full.keys
    for index in range(12):
        assert torch.equal(tails[index]["latents"], full[index]["latents"])


def test_worker_processes_give_the_same_bytes(encode, tmp_path):
    encode("here")
    encode("workers", num_workers=2)
    assert contents(tmp_path / "here") == contents(tmp_path / "workers")


@pytest.mark.skipif(os.name == "nt", reason="no resource limits")
def test_large_batches_of_workers_need_few_open_files(tmp_path):
    """A tensor on its way from a worker is an open file; a login shell allows 1024, and here it is 128."""
    script = (
        "import resource, sys\nimport numpy as np\nfrom tests.latents.stores import SETTINGS, tiny_vae\n"
        "from latentvae.latents.encoding.encode import encode_dataset\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))\n"
        "images = [{'key': f'{i}', 'image': np.zeros((8, 8, 3), np.uint8)} for i in range(400)]\n"
        "options = {'resolution': 8, 'batch_size': 100, 'unit_images': 400, 'num_workers': 1}\n"
        "print(encode_dataset(images, tiny_vae(), sys.argv[1], **(SETTINGS | options)))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "400 of 400 images encoded" in done.stdout, done.stderr[-2000:]


def test_gray_16_bit_images_stay_gray_16_bit(tmp_path):
    folder = tmp_path / "gray"
    folder.mkdir()
    for index in range(3):
        ramp = np.linspace(index * 1000, 65535, 48 * 48, dtype=np.uint16).reshape(48, 48)
        Image.fromarray(ramp).save(folder / f"{index}.png")
    pixels = PixelFormat(channels=1, dtype="uint16")
    vae = tiny_vae(channels=1)
    report = encode_dataset(folder, vae, tmp_path / "store", pixels=pixels, **SETTINGS)
    assert report.counts.ok == 3
    manifest = LatentStore(tmp_path / "store").read_manifest()
    assert manifest.fields["pixels"] == {"channels": 1, "dtype": "uint16", "range": [0.0, 65535.0]}
    same = PixelFormat(channels=1, dtype="uint16", range=(0, 65535))  # said instead of left to the dtype
    assert encode_dataset(folder, vae, tmp_path / "store", pixels=same, **SETTINGS).units_encoded == 0
    with pytest.raises(UserError, match="images have 3 channels, and the model takes 1"):
        encode_dataset(folder, vae, tmp_path / "rgb", pixels=PixelFormat(channels=3), **SETTINGS)


def test_an_output_that_is_something_else_is_refused(encode, tmp_path, photographs):
    with pytest.raises(UserError, match=r"not empty and not a latent store"):
        encode(out=photographs)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        encode(out="file")


@pytest.mark.parametrize("out", ["s3://bucket/store", Path("hf://datasets/owner/store")])
def test_an_output_that_is_a_url_is_refused(vae, photographs, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="written to a folder of this machine"):
        encode_dataset(photographs, vae, out, **SETTINGS)
    assert contents(tmp_path) == before


def test_a_store_among_the_archives_it_is_made_of_is_refused(encode, photographs, tmp_path):
    (tmp_path / "tars").mkdir()
    pack(photographs, tmp_path / "tars" / "a.tar")
    with pytest.raises(UserError, match="whose archives it would be among"):
        encode(tmp_path / "tars" / "store", source=tmp_path / "tars")
    assert encode("beside", source=tmp_path / "tars").counts.ok == 12
    for _ in range(2):  # what is in a folder of images is no image
        assert encode(photographs / "store").counts.inputs == 12


def test_a_disk_that_has_no_room_for_a_lease_is_one_line(encode, monkeypatch):
    published = Leases._publish

    def full(leases, path, token):
        if path.name == "u000002.lease":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return published(leases, path, token)

    with monkeypatch.context() as patched:
        patched.setattr(Leases, "_publish", full)
        with pytest.raises(UserError, match=r"cannot write to .*: No space left on device; what is committed stays"):
            encode()
    assert encode().counts.ok == 12


def test_temporary_files_of_who_claims_a_unit_at_this_moment_are_left(encode, monkeypatch, tmp_path):
    encode()
    store, looked = LatentStore(tmp_path / "store"), Leases.live_tokens
    other, written = Leases(store.leases), []

    def live_tokens(leases):
        tokens = looked(leases)
        lease = other.claim(f"u{len(written):06d}")  # just after this process looked
        written.append(temporary_path(store.shards / "32x32" / "u000000.parquet", lease.token))
        written[-1].touch()
        return tokens

    monkeypatch.setattr(Leases, "live_tokens", live_tokens)
    mine = Leases(store.leases)
    remove_temporary(store, mine)
    assert written and all(path.exists() for path in written)
    mine.close()
    other.close()


def test_who_finishes_records_a_plan_file_whose_writer_was_killed(encode, monkeypatch, tmp_path):
    def killed(encoder, launch, progress):
        engine.encode_here(encoder, launch, progress)
        store = encoder.opened.store
        manifest = store.read_manifest()
        assert list(manifest.plan) == ["plan-0000.parquet"]
        store.write_manifest(manifest.model_copy(update={"plan": {}}))

    monkeypatch.setattr("latentvae.latents.encoding.encode.encode_here", killed)
    encode()
    manifest = LatentStore(tmp_path / "store").read_manifest()
    assert manifest.complete and list(manifest.plan) == ["plan-0000.parquet"]
    assert verify_store(tmp_path / "store").is_whole


def test_a_damaged_record_is_refused_with_the_way_out(encode, tmp_path):
    encode()
    record = tmp_path / "store" / "shards" / "32x32" / "u000001.json"
    record.write_text("{")
    with pytest.raises(UserError, match=r"u000001\.json is damaged: .*; remove it and run encode again"):
        encode()
    record.unlink()
    assert encode().units_encoded == 1 and verify_store(tmp_path / "store").is_whole


def test_a_model_folder_is_loaded_and_named(encode, vae, tmp_path):
    save_model(vae, tmp_path / "model")
    encode(vae=str(tmp_path / "model"))
    assert LatentStore(tmp_path / "store").read_manifest().vae.name == str(tmp_path / "model")
    encode("loaded", vae=load_model(tmp_path / "model"))
    assert LatentStore(tmp_path / "loaded").read_manifest().vae.name == str(tmp_path / "model")
    assert encode(vae=vae).units_encoded == 0  # the same weights, not the same path, are the same model


def test_plain_lines_say_what_it_will_take(encode, caplog):
    with caplog.at_level(logging.INFO, logger="latentvae"):
        encode()
    assert "12 images in 4 units to encode (0 units are there), fp16 moments of 32x32" in caplog.text
    assert "MB of disk" in caplog.text
