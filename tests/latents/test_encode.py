"""encode_dataset: what comes out, and what is refused."""

import copy
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
from latentvae.images import PixelFormat, crop, decode, resize, to_model
from latentvae.latents.dataset import LatentDataset
from latentvae.latents.encode import EncodeConfig, encode_dataset
from latentvae.latents.store import LatentStore, open_shard
from latentvae.latents.verify import verify_store
from tests.latents.stores import SETTINGS, contents, tiny_vae

ROOT = Path(__file__).parents[2]


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
        "from latentvae.latents.encode import encode_dataset\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))\n"
        "images = [{'key': f'{i}', 'image': np.zeros((8, 8, 3), np.uint8)} for i in range(400)]\n"
        "options = {'resolution': 8, 'batch_size': 100, 'unit_images': 400, 'num_workers': 1}\n"
        "print(encode_dataset(images, tiny_vae(), sys.argv[1], **(SETTINGS | options)))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "400 of 400 images encoded" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("store", "tensors"), [("moments", ["logvar", "mean"]), ("mean", ["mean"]), ("sample", ["sample"])]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_store_kinds(encode, tmp_path, store, tensors, dtype):
    encode(store=store, dtype={torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype])
    shard = open_shard(LatentStore(tmp_path / "store").paths("32x32", 0)[0])
    assert sorted(shard.tensors) == tensors
    assert all(tensor.shape == (3, 2, 16, 16) and tensor.dtype == dtype for tensor in shard.tensors.values())


def test_a_sample_belongs_to_its_key(encode, tmp_path):
    encode("one", store="sample", dtype="fp32", seed=1)
    encode("same", store="sample", dtype="fp32", seed=1, unit_images=7, batch_size=2)
    encode("other", store="sample", dtype="fp32", seed=2)
    one, same, other = (LatentDataset(tmp_path / name, posterior="sample") for name in ("one", "same", "other"))
    torch.testing.assert_close(one[5]["latents"], same[5]["latents"])
    assert not torch.allclose(one[5]["latents"], other[5]["latents"])


class OneWhite:
    """Four images: the third is white, the others are black."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"key": f"{index}.png", "image": np.full((32, 32, 3), 255 if index == 2 else 0, np.uint8)}


def sensitive_to_white(weight):
    """The first convolution gives 0 for black (-1 in three channels) and 6 * weight for white."""
    vae = tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight.zero_()
        vae.encoder.conv_in.weight[:, :, 1, 1] = weight
        vae.encoder.conv_in.bias.fill_(3 * weight)
    return vae


def test_what_overflows_in_reduced_precision_is_rescued_in_float32(encode, tmp_path):
    vae = sensitive_to_white(2e4)  # 1.2e5: more than fp16's 65504
    report = encode(source=OneWhite(), vae=vae, precision="fp16", dtype="fp32", unit_images=4)
    rows = {row["key"]: row for row in index_rows(tmp_path / "store")}
    assert report.counts.ok == 4 and report.counts.rescued == 1
    assert rows["2.png"]["notes"] == "not finite in fp16, encoded again in float32"
    encode("float32", source=OneWhite(), vae=vae, dtype="fp32", unit_images=4)
    rescued, exact = (LatentDataset(tmp_path / name) for name in ("store", "float32"))
    index = exact.keys.index("2.png")
    torch.testing.assert_close(rescued[index]["latents"], exact[index]["latents"])


def test_what_is_not_finite_in_float32_either_is_an_error_row(encode, tmp_path):
    vae = sensitive_to_white(2.0**126)  # 5e38: more than float32 and bfloat16 hold
    report = encode(source=OneWhite(), vae=vae, precision="bf16", unit_images=4)
    assert report.counts.error == 1 and report.counts.rescued == 0
    assert report.problems == [("2.png", "the encoder's output is not finite, in float32 too")]
    latents = [item["latents"] for item in LatentDataset(tmp_path / "store").__getitems__([0, 1, 2])]
    assert torch.isfinite(torch.stack(latents)).all()


def test_what_fp16_cannot_hold_is_an_error_row_that_names_the_way_out(encode, tmp_path):
    vae = tiny_vae()
    with torch.no_grad():
        vae.quant_conv.weight.mul_(1e7)
    report = encode(vae=vae)
    assert report.counts.error == 12
    assert "more than fp16 holds (65504): store with --dtype bf16 or fp32" in report.problems[0][1]
    assert encode("wide", vae=vae, dtype="bf16").counts.ok == 12


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
        encode_dataset(folder, vae, tmp_path / "rgb", pixels=PixelFormat(), **SETTINGS)


def changed(vae, part):
    other = copy.deepcopy(vae)
    with torch.no_grad():
        next(getattr(other, part).parameters()).view(-1)[0] += 1
    return other


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"resolution": 48}, "resolution is 32x32 there and 48x48 here"),
        ({"filter": "lanczos"}, "filter is bicubic there and lanczos here"),
        ({"dtype": "fp32"}, "dtype is fp16 there and fp32 here"),
        ({"store": "mean"}, "store kind is moments there and mean here"),
        ({"precision": "bf16"}, "precision is fp32 there and bf16 here"),
        ({"small": "upscale"}, "small is skip there and upscale here"),
        ({"policy": {"animation": "refuse"}}, "policy.animation is first there and refuse here"),
    ],
)
def test_another_setting_is_refused_by_name(encode, tmp_path, options, field):
    encode()
    before = contents(tmp_path / "store")
    with pytest.raises(UserError) as refusal:
        encode(**options)
    assert field in str(refusal.value) and "\n" not in str(refusal.value)
    assert contents(tmp_path / "store") == before


def test_another_encoder_is_refused_and_another_decoder_is_noted(encode, vae, tmp_path):
    encode()
    before = contents(tmp_path / "store")
    with pytest.raises(UserError, match=r"the encoder \(weights or architecture\) is \w{24}\.\.\. there"):
        encode(vae=changed(vae, "encoder"))
    with pytest.raises(UserError, match=r"the encoder \(weights or architecture\)"):
        LatentDataset(tmp_path / "store", vae=changed(vae, "encoder"))
    report = encode(vae=changed(vae, "decoder"))
    assert report.units_encoded == 0 and "the decoder differs" in report.notes[0]
    LatentDataset(tmp_path / "store", vae=changed(vae, "decoder"))
    after = contents(tmp_path / "store")
    assert [name for name in after if after[name] != before[name]] == ["manifest.json"]


def test_other_scaling_is_noted_and_read(encode, vae, tmp_path):
    encode()
    raw = LatentDataset(tmp_path / "store", normalize=False)[0]["latents"]
    torch.testing.assert_close(LatentDataset(tmp_path / "store")[0]["latents"], (raw - 0.25) * 0.5)
    report = encode(vae=tiny_vae(scaling_factor=2.0))
    assert "scaling_factor is 0.5 there and 2.0 here" in report.notes[0]
    torch.testing.assert_close(LatentDataset(tmp_path / "store")[0]["latents"], (raw - 0.25) * 2.0)


def test_new_images_make_new_units_and_touch_no_old_file(encode, photographs, tmp_path):
    encode()
    before = contents(tmp_path / "store")
    for index in range(4):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(photographs / f"new_{index}.png")
    report = encode()
    assert report.counts.ok == 16 and report.units_encoded == 2 and "4 images are new" in report.notes[0]
    after = contents(tmp_path / "store")
    assert [name for name in before if after[name] != before[name]] == ["manifest.json"]
    assert "plan/plan-0001.parquet" in after and len(LatentDataset(tmp_path / "store")) == 16
    assert verify_store(tmp_path / "store").is_whole


def test_a_touched_image_is_accepted_and_an_edited_one_refused(encode, photographs):
    encode()
    image = photographs / "class_1" / "image_01.png"
    os.utime(image, ns=(1, 1))
    assert encode().units_encoded == 0
    Image.new("RGB", (96, 72)).save(image)
    with pytest.raises(UserError, match=r"class_1/image_01\.png has changed since it was encoded"):
        encode()


def test_images_that_went_away_keep_their_latents(encode, photographs):
    encode()
    (photographs / "class_1" / "image_01.png").unlink()
    report = encode()
    assert report.counts.ok == 12 and "1 planned images are no longer in" in report.notes[0]


def test_other_images_are_not_mixed_in(encode, tmp_path):
    encode()
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(folder / "x.png")
    with pytest.raises(UserError, match="none of its keys is in"):
        encode(source=folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 33}, r"--resolution is 33; it must be a multiple of 2, .*: 32 and 34 would do"),
        ({"batch_size": 0}, r"batch_size is 0"),
        ({"hflip": True}, r"unknown option hflip"),
        ({"device": "cuda:77"}, r"device 'cuda:77' cannot be used here"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(encode, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        encode(**options)
    assert not (tmp_path / "store").exists()


def test_an_output_that_is_something_else_is_refused(encode, tmp_path, photographs):
    with pytest.raises(UserError, match=r"not empty and not a latent store"):
        encode(out=photographs)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        encode(out="file")


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


def test_config_and_keywords_are_the_same_fields(encode, tmp_path):
    encode("a", config=EncodeConfig(dtype="bf16", resolution=48))
    fields = LatentStore(tmp_path / "a").read_manifest().fields
    assert (fields["dtype"], fields["buckets"]) == ("bf16", ["32x32"])  # the fixture's keyword wins
