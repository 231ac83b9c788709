"""What is measured before an encoding: the kind of store, and the batch sizes."""

import logging
import math

import pytest
import torch
from PIL import Image

from latentvae.autoencoders.adapter import load_autoencoder
from latentvae.data.entries import EntryTable
from latentvae.data.sources import open_source
from latentvae.errors import UserError
from latentvae.images import DecodePolicy, PixelFormat
from latentvae.latents.encoding import measure
from latentvae.latents.encoding.encoder import LatentEncoder
from latentvae.latents.encoding.measure import calibrate, measured_batch_sizes, measured_kind, rounding_rms, sampled
from latentvae.latents.encoding.preprocess import UnitImages
from latentvae.latents.store.buckets import bucket_rule, square_rule
from latentvae.latents.store.files import LatentStore
from latentvae.latents.store.plan import hash_order
from tests.latents.stores import contents, tiny_vae


def with_logvar(value):
    """A model whose posterior has the same log variance everywhere."""
    vae = tiny_vae()
    with torch.no_grad():
        vae.quant_conv.weight[2:] = 0
        vae.quant_conv.bias[2:] = value
    return vae


def encoder_of(vae, **changes):
    options = {"batch_size": 4, "precision": "fp32", "store": "moments", "dtype": "fp16", "seed": 0}
    return LatentEncoder(load_autoencoder(vae), PixelFormat(), device=torch.device("cpu"), **(options | changes))


def images_of(folder):
    return UnitImages(open_source(folder), square_rule(32, 2, 2, "skip"), DecodePolicy(), "bicubic")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_rounding_error_is_that_of_the_dtype(dtype):
    wide = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.9 + 0.05
    rounded = wide.to({"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]).double()
    told = rounding_rms(wide.float(), dtype).double().square().mean().sqrt()
    assert told == pytest.approx((wide - rounded).square().mean().sqrt().item(), rel=0.02)


def test_rounding_error_at_known_values():
    found = rounding_rms(torch.tensor([1.0, 1.99, -4.0, 0.0]), "fp16") * math.sqrt(12)
    expected = [2**-10, 2**-10, 4 * 2**-10, 2**-24]  # fp16: 10 bits of mantissa, subnormals are multiples of 2^-24
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("logvar", "dtype", "kind"), [(-30, "fp16", "mean"), (-30, "fp32", "moments"), (0, "fp16", "moments")]
)
def test_the_mean_alone_is_kept_where_the_posterior_is_below_rounding(photographs, caplog, logvar, dtype, kind):
    """exp(-15) is 3e-7: below fp16's rounding of latents around 1 (1e-4), above fp32's (2e-8)."""
    caplog.set_level(logging.INFO, "latentvae")
    encoder = encoder_of(with_logvar(logvar), dtype=dtype)
    found = calibrate(images_of(photographs), encoder, 0)
    assert found.num_images == found.num_sampled == 12
    assert found.posterior_std == pytest.approx(math.exp(logvar / 2), rel=1e-5)
    assert found.std_over_rounding == pytest.approx(found.posterior_std / found.rounding_error, rel=0.5)
    assert (found.std_over_rounding >= 1) == (kind == "moments")
    assert measured_kind(images_of(photographs), encoder, 0) == kind
    assert f"--store auto keeps {kind}" in caplog.text
    per_image = 2 * 16 * 16 * {"fp16": 2, "fp32": 4}[dtype]
    assert found.latent_bytes == {"moments": 2 * per_image, "mean": per_image, "sample": per_image}
    assert f"mean {per_image / 1024:.1f} KiB" in caplog.text


def test_a_reduced_precision_is_compared_with_float32(photographs):
    images = images_of(photographs)
    assert calibrate(images, encoder_of(tiny_vae()), 0).deviation is None
    found = calibrate(images, encoder_of(tiny_vae(), precision="bf16"), 0)
    assert 1e-4 < found.deviation < 0.05 and "bf16 differs from fp32" in found.lines()[-1]


def test_what_cannot_be_encoded_is_not_counted(photographs):
    (photographs / "claim.png").write_bytes(b"no image")
    Image.new("RGB", (20, 50)).save(photographs / "small.png")
    found = calibrate(images_of(photographs), encoder_of(tiny_vae()), 2)
    assert (found.num_images, found.num_sampled) == (12, 14)
    assert sorted(map(tuple, found.sizes.tolist())) == [(-1, -1), (20, 50)] + [(96, 72)] * 12


def test_nothing_to_measure_is_an_error_that_says_why(tmp_path):
    Image.new("RGB", (20, 50)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match=r"none of 1 images could be encoded \(20x50 is smaller than 32x32"):
        measured_kind(images_of(tmp_path), encoder_of(tiny_vae()), 0)


def test_the_measurement_ends_in_time(tmp_path, monkeypatch):
    for index in range(40):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(tmp_path / f"{index}.png")
    assert calibrate(images_of(tmp_path), encoder_of(tiny_vae()), 0).num_images == 40
    monkeypatch.setattr(measure, "MAX_SECONDS", 0.0)
    found = calibrate(images_of(tmp_path), encoder_of(tiny_vae()), 0)
    assert found.num_images == 16 and "16 of 40 images" in found.lines()[0]


def test_a_sample_is_spread_over_the_source_and_always_the_same(monkeypatch):
    keys = [f"{index:05d}" for index in range(2000)]
    table = EntryTable.from_columns(keys, "x.tar")
    found = sampled(table, 256)
    assert found.keys == [keys[index] for index in hash_order(table)[:256]]
    assert sampled(table, 5000).keys == [keys[index] for index in hash_order(table)]
    monkeypatch.setattr(measure, "CANDIDATES", 100)
    spread = [int(key) for key in sampled(table, 50).keys]
    assert len(set(spread)) == 50 and max(spread) > 1500 and min(spread) < 500


# --- batch sizes -----------------------------------------------------------------------------------------------------

BUCKETS = bucket_rule("area=4096,step=16,max-ratio=4", 2, 2, "skip").buckets  # of 3,072 to 4,096 pixels


def sizes_of(monkeypatch, seconds, limits, buckets=BUCKETS):
    asked = []

    def timed(encoder, bucket, size):
        asked.append((bucket.name, size))
        return seconds(bucket, size)

    monkeypatch.setattr(measure, "forward_seconds", timed)
    return measured_batch_sizes(encoder_of(tiny_vae()), buckets, limits), asked


def test_a_batch_is_doubled_while_it_pays(monkeypatch):
    """10 ms a forward and 1 ms an image: 8 images give 444/s, 64 give 865/s, 128 give 928/s, 256 give 962/s (+3.7%)."""
    found, asked = sizes_of(monkeypatch, lambda bucket, size: 0.010 + 0.001 * size, {"64x64": 1000})
    assert found == {"64x64": 128} and asked == [("64x64", 2**power) for power in range(9)]
    found, asked = sizes_of(monkeypatch, lambda bucket, size: 0.001 * size, {"64x64": 1000})
    assert found == {"64x64": 1} and len(asked) == 2


def test_a_batch_is_no_larger_than_what_there_is_to_encode(monkeypatch):
    found, _ = sizes_of(monkeypatch, lambda bucket, size: 0.010, {"64x64": 12})
    assert found == {"64x64": 8}


def test_a_batch_stays_where_memory_holds(monkeypatch):
    def timed(bucket, size):
        if size > 4:
            raise torch.OutOfMemoryError("too much")
        return 0.010

    assert sizes_of(monkeypatch, timed, {"64x64": 1000})[0] == {"64x64": 4}

    grown = iter([10 * 2**30 * 2**power for power in range(20)])
    monkeypatch.setattr(measure, "_peak_memory", lambda: next(grown))  # a CPU's memory is not asked for in vain
    monkeypatch.setattr(measure.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 50 * 2**30}))
    assert sizes_of(monkeypatch, lambda bucket, size: 0.010, {"64x64": 1000})[0] == {"64x64": 4}


def test_buckets_of_about_equal_area_share_a_measurement(monkeypatch):
    names = {bucket.name: bucket.width * bucket.height for bucket in BUCKETS}
    found, asked = sizes_of(monkeypatch, lambda bucket, size: 0.010, dict.fromkeys(names, 4))
    assert set(found) == set(names) and set(found.values()) == {4}
    measured = [names[name] for name in dict.fromkeys(name for name, _ in asked)]
    assert measured[0] == 4096 and len(measured) < len(names)
    assert all(other / one > 1.1 for one, other in zip(measured[1:], measured, strict=False))
    assert set(sizes_of(monkeypatch, lambda bucket, size: 0.010, {"64x64": 4})[0]) == {"64x64"}


def test_forwards_are_really_timed():
    assert 0 < measure.forward_seconds(encoder_of(tiny_vae()), BUCKETS[0], 2) < 5
    (size,) = measured_batch_sizes(encoder_of(tiny_vae()), BUCKETS, {BUCKETS[0].name: 4}).values()
    assert size in (1, 2, 4)


def test_noise_has_the_declared_format():
    pixels = PixelFormat(channels=2, dtype="uint16", range=(5, 900))
    images = measure.noise_images(pixels, BUCKETS[0], 3)
    assert images.shape == (3, BUCKETS[0].height, BUCKETS[0].width, 2) and images.dtype == torch.uint16
    assert 5 <= images.int().min() < 20 and 880 < images.int().max() <= 900


# --- in an encoding --------------------------------------------------------------------------------------------------


def refuse(*_):
    raise AssertionError("measured again")


def test_auto_is_measured_once_and_recorded(encode, tmp_path, monkeypatch):
    encode(store="auto", batch_size="auto", vae=with_logvar(-30))
    manifest = LatentStore(tmp_path / "store").read_manifest()
    assert manifest.store == "mean" and manifest.batch_sizes.keys() == {"32x32"}
    assert manifest.batch_sizes["32x32"] in (1, 2)  # units of three
    before = contents(tmp_path / "store")
    for record in (tmp_path / "store").glob("shards/*/u000001.json"):
        record.unlink()
    for name in ("measured_kind", "measured_batch_sizes"):
        monkeypatch.setattr(f"latentvae.latents.encoding.encode.{name}", refuse)
    with pytest.raises(AssertionError):
        encode("other", store="auto")
    monkeypatch.setattr("latentvae.latents.encoding.encode.measured_batch_sizes", lambda encoder, buckets, limits: {})
    encode(store="auto", batch_size="auto", vae=with_logvar(-30))
    assert contents(tmp_path / "store") == before


def test_a_bucket_that_is_new_is_measured_and_the_others_are_not(encode, photographs, tmp_path, monkeypatch):
    asked = []

    def sizes(encoder, buckets, limits):
        asked.append(limits)
        return dict.fromkeys(limits, 2)

    monkeypatch.setattr("latentvae.latents.encoding.encode.measured_batch_sizes", sizes)
    options = {"resolution": None, "buckets": "area=4096,step=16", "small": "upscale", "batch_size": "auto"}
    encode(**options)
    Image.new("RGB", (72, 96)).save(photographs / "upright.png")
    report = encode(**options)
    assert asked == [{"80x48": 3}, {"48x80": 1}] and report.counts.ok == 13
    assert LatentStore(tmp_path / "store").read_manifest().batch_sizes == {"80x48": 2, "48x80": 2}


def test_units_of_several_buckets_need_all_sizes(encode, photographs, tmp_path, monkeypatch):
    asked = []

    def sizes(encoder, buckets, limits):
        asked.append(limits)
        return dict.fromkeys(limits, 2)

    monkeypatch.setattr("latentvae.latents.encoding.encode.measured_batch_sizes", sizes)
    source = [{"key": path.name, "image": path} for path in sorted(photographs.rglob("*.*"))]
    options = {"resolution": None, "buckets": "area=4096,step=16", "small": "upscale", "unit_images": 5}
    encode(source=source, batch_size="auto", **options)
    rule = bucket_rule("area=4096,step=16", 2, 2, "upscale")
    assert asked == [{bucket.name: 5 for bucket in rule.buckets}]


def test_a_number_wins_over_what_was_measured(encode, tmp_path, photographs, vae):
    from latentvae.latents.encoding.encode import EncodeJob
    from latentvae.latents.encoding.launch import Launch
    from latentvae.latents.encoding.settings import EncodeConfig

    def size(batch_size):
        config = EncodeConfig(resolution=32, batch_size=batch_size)
        launch = Launch(torch.device("cpu"))
        job = EncodeJob.resolve(photographs, vae, LatentStore(tmp_path / "none"), config, launch)
        return job.latent_encoder("mean", {"32x32": 4}).size_of("32x32")

    assert (size("auto"), size(3)) == (4, 3)
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="batch_size is 'many'"):
        encode(batch_size="many")
    assert encode(batch_size="2").units_encoded == 4


def test_images_that_the_encoder_cannot_take_are_not_counted(photographs):
    """A bias that is infinite: no precision helps, and the reason is told."""
    vae = tiny_vae()
    with torch.no_grad():
        vae.quant_conv.bias[0] = math.inf
    with pytest.raises(UserError, match=r"none of 12 images could be encoded .*not finite"):
        measured_kind(images_of(photographs), encoder_of(vae, precision="bf16"), 0)


def test_what_only_float32_holds_is_told(photographs):
    """A bias of 1e5 is more than fp16 holds (65,504)."""
    vae = tiny_vae()
    with torch.no_grad():
        vae.quant_conv.bias[0] = 1e5
    found = calibrate(images_of(photographs), encoder_of(vae, precision="fp16", dtype="fp32"), 0)
    assert found.num_images == found.num_rescued == 12 and "12 images not finite" in found.lines()[-1]
