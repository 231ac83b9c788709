"""Latents handed over to other trainers, read back with the libraries that will read them."""

import glob
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from latentvae.errors import UserError
from latentvae.keyed import keyed_noise
from latentvae.latents.operating.hand_over import export_store
from latentvae.latents.operating.hand_over_files import sample_names
from latentvae.latents.operating.sd_scripts import crop_ltrb
from latentvae.model.scaling import LatentScaling
from tests.latents import written
from tests.latents.stores import contents
from tests.latents.written import SCALING, write_store

SDXL = LatentScaling(scale=0.13025)


@pytest.fixture
def stride_8(monkeypatch):
    """The builder's latents are 1/2 of the images; those of sd-scripts are 1/8."""
    monkeypatch.setattr(written, "FACTOR", 8)


def expected(made, key, posterior="mode", view="", normalize=False, dtype=torch.float32, seed=0):
    stored = {name: tensor.float() for name, tensor in made.tensors[key].items()}
    if posterior == "moments":
        values = torch.cat([stored["mean" + view], stored["logvar" + view]])
    elif posterior == "sample" and "mean" in stored:
        mean, std = stored["mean" + view], torch.exp(0.5 * stored["logvar" + view])
        values = mean + std * keyed_noise(mean.shape, seed, *([view] if view else []), key)
    else:
        values = stored[("mean" if posterior == "mode" else "sample") + view]
    values = SCALING.normalize(values) if normalize else values
    return values.to(dtype).numpy()


def sizes_of(made, key):
    row = made.rows[key]
    width, height = map(int, row.bucket.split("x"))
    return {
        "key": key,
        "original_size": [row.height, row.width],
        "crop_top_left": [row.crop_top, row.crop_left],
        "target_size": [height, width],
    }


def webdataset_samples(folder):
    webdataset = pytest.importorskip("webdataset")
    files = sorted(glob.glob(f"{folder}/*.tar"))
    samples = list(webdataset.WebDataset(files, shardshuffle=False).decode())
    return files, {sample["json"]["key"]: sample for sample in samples}, len(samples)


# --- WebDataset ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, store_dtype, options",
    [
        ("moments", "fp16", {}),
        ("moments", "bf16", {"posterior": "moments"}),
        ("moments", "fp32", {"posterior": "sample", "seed": 7, "normalize": True}),
        ("moments", "fp32", {"dtype": "fp16"}),
        ("mean", "fp16", {"normalize": True, "dtype": "fp32"}),
        ("sample", "fp32", {}),
    ],
)
def test_tars_are_read_back_by_webdataset(tmp_path, kind, store_dtype, options):
    made = write_store(tmp_path / "store", store=kind, dtype=store_dtype, hflip=True)
    report = export_store(made.folder, tmp_path / "out", shard_images=4, progress=False, **options)
    files, samples, count = webdataset_samples(tmp_path / "out")
    assert set(samples) == set(made.keys) and count == len(made.keys) == report.num_images
    assert len(files) == report.num_files == 3 + 2 + 1 and report.num_bytes == sum(map(_size, files))
    posterior = options.get("posterior", "sample" if kind == "sample" else "mode")
    dtype = {"fp16": torch.float16}.get(options.get("dtype", store_dtype), torch.float32)
    given = {"posterior": posterior, "dtype": dtype, "seed": options.get("seed", 0)}
    for key, sample in samples.items():
        for name, view in (("latents.npy", ""), ("latents_hflip.npy", "_hflip")):
            wanted = expected(made, key, view=view, normalize=options.get("normalize", False), **given)
            assert sample[name].dtype == wanted.dtype and np.array_equal(sample[name], wanted)
        assert sample["json"] == sizes_of(made, key) and "txt" not in sample
    for file in files:  # one size of image per file
        with tarfile.open(file) as tar:
            shapes = {tuple(json.load(tar.extractfile(m))["target_size"]) for m in tar if m.name.endswith(".json")}
        assert len(shapes) == 1


def _size(path):
    with open(path, "rb") as file:
        return len(file.read())


@pytest.mark.parametrize("format", ["webdataset", "parquet", "sd-scripts"])
def test_equal_work_gives_equal_bytes(tmp_path, format, stride_8):
    made = write_store(tmp_path / "store", scaling=SDXL, channels=4)
    for out in ("one", "two"):
        export_store(made.folder, tmp_path / out, format=format, progress=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_captions_and_labels_come_along_by_key(tmp_path):
    made = write_store(tmp_path / "store")
    captions = {key: {"caption": f"this is {key} é", "label": index} for index, key in enumerate(made.keys[:-2])}
    report = export_store(made.folder, tmp_path / "tars", captions=captions, progress=False)
    assert report.notes == ["note: 2 images have no caption"]
    _, samples, _ = webdataset_samples(tmp_path / "tars")
    for key, sample in samples.items():
        assert sample.get("txt") == captions.get(key, {}).get("caption")
        assert sample["json"].get("fields") == ({"label": captions[key]["label"]} if key in captions else None)
    export_store(made.folder, tmp_path / "tables", format="parquet", captions=captions, progress=False)
    rows = {row["key"]: row for row in pq.read_table(tmp_path / "tables" / "data").to_pylist()}
    for key in made.keys:
        assert rows[key]["caption"] == captions.get(key, {}).get("caption")
        assert json.loads(rows[key]["fields"] or "null") == (
            {"label": captions[key]["label"]} if key in captions else None
        )
    with pytest.raises(UserError, match=r"no image of .* has a caption"):
        export_store(made.folder, tmp_path / "none", captions={"other": "x"}, progress=False)


def test_captions_of_the_source_that_the_store_names(tmp_path, photographs):
    keys = sorted(path.relative_to(photographs).as_posix() for path in photographs.rglob("*.*") if path.is_file())
    for key in keys:
        (photographs / key).with_suffix(".txt").write_text(f"text of {key}")
    made = write_store(tmp_path / "store", units=[("32x32", keys)], source=str(photographs))
    export_store(made.folder, tmp_path / "out", captions=True, progress=False)
    _, samples, _ = webdataset_samples(tmp_path / "out")
    assert {key: sample["txt"] for key, sample in samples.items()} == {key: f"text of {key}" for key in keys}


def test_names_of_samples():
    assert sample_names(["a/b.jpg", "c.d/e.f.png"]) == ["a/b", "c.d/e_f"]
    assert sample_names(["a.jpg", "a.png"]) == ["a_jpg", "a_png"]
    assert sample_names(["a.jpg", "a_jpg"]) == ["a", "a_jpg"]
    assert sample_names(["a.b.c", "a_b.c", "a.b_c"]) == ["000000000_a_b_c", "000000001_a_b_c", "000000002_a_b_c"]
    assert sample_names(["../../x.png", ".hidden"]) == ["x", "_hidden"]


def test_odd_keys_survive_webdataset(tmp_path):
    keys = ["a.b.jpg", "dir.x/c.png", "é" * 90 + ".png", "x" * 300 + "/y.jpg", "no extension", "__odd__.png"]
    made = write_store(tmp_path / "store", units=[("32x32", keys)])
    export_store(made.folder, tmp_path / "out", progress=False)
    _, samples, _ = webdataset_samples(tmp_path / "out")
    assert set(samples) == set(keys)
    assert all(np.array_equal(samples[key]["latents.npy"], expected(made, key)) for key in keys)


# --- Parquet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store_dtype, posterior", [("fp16", "mode"), ("fp32", "moments"), ("bf16", "sample")])
def test_parquet_is_read_back_by_datasets_and_by_pyarrow(tmp_path, store_dtype, posterior, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from latentvae.latents.operating import hand_over_files

    monkeypatch.setattr(hand_over_files, "ROW_GROUP_BYTES", 3000)  # several row groups in these small files
    made = write_store(tmp_path / "store", dtype=store_dtype, hflip=True)
    options = {"format": "parquet", "posterior": posterior, "shard_images": 4, "progress": False}
    export_store(made.folder, tmp_path / "out", **options)
    datasets.disable_progress_bars()
    loaded = list(datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")))
    plain = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert max(pq.ParquetFile(file).num_row_groups for file in (tmp_path / "out" / "data").iterdir()) > 1
    dtype = torch.float16 if store_dtype == "fp16" else torch.float32
    for rows in (loaded, plain):
        assert sorted(row["key"] for row in rows) == sorted(made.keys)
        for row in rows:
            for name, view in (("latents", ""), ("latents_hflip", "_hflip")):
                array = np.frombuffer(row[name], row["dtype"]).reshape(row["shape"])
                assert np.array_equal(array, expected(made, row["key"], posterior, view, dtype=dtype))
            about = sizes_of(made, row["key"])
            assert [row["original_height"], row["original_width"]] == about["original_size"]
            assert [row["target_height"], row["target_width"]] == about["target_size"]
            assert [row["crop_top"], row["crop_left"]] == about["crop_top_left"]


def test_what_was_handed_over_says_what_it_is(tmp_path):
    made = write_store(tmp_path / "store")
    export_store(made.folder, tmp_path / "out", format="parquet", normalize=True, progress=False)
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert about["normalized"] and about["posterior"] == "mode" and about["num_images"] == 17
    assert LatentScaling.from_dict(about["scaling"]) == SCALING
    assert about["made_from"]["fingerprint"] == made.manifest.fingerprint
    assert sorted(about["files"]) == sorted(f"data/{path.name}" for path in (tmp_path / "out" / "data").iterdir())
    assert "numpy.frombuffer" in (tmp_path / "out" / "README.md").read_text()


# --- sd-scripts ------------------------------------------------------------------------------------------------------


def read_like_sd_scripts(folder, key, original_size, suffix, names=""):
    """library/strategy_base.py: the file is found by the image's path and size, and these entries are read from it."""
    stem = (folder / key).with_suffix("")
    path = f"{stem}_{original_size[0]:04d}x{original_size[1]:04d}{suffix}"
    with np.load(path) as npz:
        flipped = "latents_flipped" + names
        return (
            npz["latents" + names],
            npz["original_size" + names].tolist(),
            npz["crop_ltrb" + names].tolist(),
            npz.get(flipped),
        )


@pytest.mark.parametrize(
    "scaling, channels, family, suffix",
    [
        (SDXL, 4, None, "_sdxl.npz"),
        (LatentScaling(scale=0.18215), 4, None, "_sd.npz"),
        (SCALING, 4, "sdxl", "_sdxl.npz"),
        (LatentScaling(scale=0.3611, shift=0.1159), 16, None, "_flux.npz"),
        (LatentScaling(scale=1.5305, shift=0.0609), 16, None, "_sd3.npz"),
    ],
)
@pytest.mark.parametrize("hflip", [False, True])
def test_npz_files_are_found_and_read_by_the_rules_of_sd_scripts(
    tmp_path, stride_8, scaling, channels, family, suffix, hflip
):
    made = write_store(tmp_path / "store", scaling=scaling, channels=channels, hflip=hflip, dtype="fp16")
    options = {"format": "sd-scripts", "family": family, "seed": 5, "progress": False}
    report = export_store(made.folder, tmp_path / "out", **options)
    assert report.num_files == 17 and len(list((tmp_path / "out").rglob("*.npz"))) == 17
    for key in made.keys:
        row = made.rows[key]
        width, height = map(int, row.bucket.split("x"))
        names = f"_{height // 8}x{width // 8}" if channels == 16 else ""
        found = read_like_sd_scripts(tmp_path / "out", key, (row.width, row.height), suffix, names)
        latents, original_size, crop, flipped = found
        assert latents.dtype == np.float32 and latents.shape == (channels, height // 8, width // 8)
        assert np.array_equal(latents, expected(made, key, "sample", seed=5))  # raw, drawn
        assert original_size == [row.width, row.height] and len(crop) == 4
        assert (
            flipped is None if not hflip else np.array_equal(flipped, expected(made, key, "sample", "_hflip", seed=5))
        )


def test_the_crop_is_the_one_that_sd_scripts_keeps():
    def row(width, height):
        return written.IndexRow(key="k", row=0, status="ok", width=width, height=height)

    assert crop_ltrb(row(640, 640), 512, 512) == (0, 0, 512, 512)
    assert crop_ltrb(row(1000, 500), 512, 512) == (0, 128, 512, 384)  # as wide as the bucket, 256 high, centred
    assert crop_ltrb(row(500, 1000), 512, 512) == (128, 0, 384, 512)
    assert crop_ltrb(row(1000, 1000), 1216, 832) == (192, 0, 1024, 832)


def test_captions_lie_beside_the_npz_files(tmp_path, stride_8):
    made = write_store(
        tmp_path / "store", scaling=SDXL, channels=4, store="mean", units=[("32x32", ["a/x.png", "y.jpg"])]
    )
    captions = {"a/x.png": "one", "y.jpg": "two"}
    options = {"format": "sd-scripts", "captions": captions, "progress": False}
    export_store(made.folder, tmp_path / "out", **options)
    assert (tmp_path / "out" / "a" / "x.txt").read_text() == "one"
    row = made.rows["y.jpg"]
    found = read_like_sd_scripts(tmp_path / "out", "y.jpg", (row.width, row.height), "_sdxl.npz")
    assert np.array_equal(found[0], expected(made, "y.jpg", "mode"))


@pytest.mark.parametrize(
    "key, message",
    [("..", "leads out"), ("/a.png", "leads out"), ("a/../b", "leads out"), (".", "no name"), ("a\0b.png", "no name")],
)
def test_keys_that_are_no_names_beside_the_images_are_refused(tmp_path, stride_8, key, message):
    made = write_store(tmp_path / "store", store="mean", scaling=SDXL, channels=4, units=[("32x32", ["x.png", key])])
    with pytest.raises(UserError, match=message):
        export_store(made.folder, tmp_path / "out", format="sd-scripts", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_what_sd_scripts_cannot_tell_apart_is_refused(tmp_path, stride_8):
    keys = [f"{index}{suffix}" for index in range(40) for suffix in (".png", ".jpg")]
    made = write_store(tmp_path / "store", store="mean", scaling=SDXL, channels=4, units=[("32x32", keys)])
    stem = next(str(index) for index in range(40) if made.rows[f"{index}.png"].width == made.rows[f"{index}.jpg"].width)
    with pytest.raises(UserError, match=rf"{stem}\.png and {stem}\.jpg would both be {stem}_\d+x\d+_sdxl\.npz"):
        export_store(made.folder, tmp_path / "out", format="sd-scripts", progress=False)
    assert not (tmp_path / "out").exists()


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("moments", {"format": "tar"}, "format 'tar' is not for stores: use webdataset, parquet, sd-scripts"),
        ("moments", {"shard_images": 0}, "shard_images is 0"),
        ("mean", {"posterior": "sample"}, "posterior is sample; .* holds the mean of each image: choose mode"),
        ("sample", {"posterior": "mode"}, "holds the sample of each image: choose sample"),
        ("moments", {"posterior": "moments", "normalize": True}, "moments are handed over raw"),
        ("moments", {"dtype": "bf16"}, "dtype is bf16; it must be one of fp16, fp32"),
        ("moments", {"family": "sd"}, "family is for sd-scripts"),
        ("moments", {"format": "sd-scripts", "normalize": True}, "sd-scripts takes raw float32 latents"),
        (
            "moments",
            {"format": "sd-scripts"},
            "has scaling_factor 0.5, which no family of sd-scripts has: pass --family",
        ),
        ("moments", {"format": "sd-scripts", "family": "sdxl"}, "sdxl takes 4 channels at 1/8 .* has 2 at 1/2"),
        ("moments", {"format": "sd-scripts", "family": "sd9"}, "family is sd9; it must be one of sd, sdxl, sd3, flux"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, kind, options, message):
    made = write_store(tmp_path / "store", store=kind)
    with pytest.raises(UserError, match=message):
        export_store(made.folder, tmp_path / "out", progress=False, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
@pytest.mark.parametrize(
    "fields, message",
    [
        ("half \ud83d", "the caption of a.png is not valid Unicode"),
        ({"caption": ["one", "two"]}, "the caption of a.png is a list: text is needed"),
        ({"caption": 3}, "the caption of a.png is a int: text is needed"),
        ({"label": "half \ud83d"}, "the fields of a.png cannot be written as JSON"),
        ({"label": float("nan")}, "the fields of a.png cannot be written as JSON"),
    ],
)
def test_captions_that_cannot_be_written_are_told(tmp_path, format, fields, message):
    made = write_store(tmp_path / "store", units=[("32x32", ["a.png"])])
    with pytest.raises(UserError, match=message):
        export_store(made.folder, tmp_path / "out", format=format, captions={"a.png": fields}, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_incomplete_and_damaged_stores_and_folders_that_exist_are_refused(tmp_path):
    partial = write_store(tmp_path / "partial", complete=False, leave_out=[1])
    with pytest.raises(UserError, match=r"is not complete \(1 of 4 units are to be encoded\)"):
        export_store(partial.folder, tmp_path / "out", progress=False)
    made = write_store(tmp_path / "store")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already: choose another --out"):
        export_store(made.folder, tmp_path / "there", progress=False)
    shard = next(made.folder.glob("shards/*/u000002-*.safetensors"))
    shard.rename(shard.with_suffix(".gone"))
    with pytest.raises(UserError, match="the store changed since it was opened: open it again"):
        export_store(made.folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_values_beyond_half_precision_are_refused(tmp_path):
    tensors = {"a.png": {"mean": torch.full((2, 16, 16), 1e6)}}
    made = write_store(tmp_path / "store", store="mean", units=[("32x32", ["a.png"])], tensors=tensors)
    with pytest.raises(UserError, match=r"reach 1e\+06, more than fp16 holds: pass --dtype fp32"):
        export_store(made.folder, tmp_path / "out", dtype="fp16", progress=False)
    assert export_store(made.folder, tmp_path / "out", progress=False).num_images == 1
