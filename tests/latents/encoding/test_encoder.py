"""What the encoder makes of pixels: kinds, dtypes, rescue, padding, memory."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from latentvae.autoencoders.adapter import load_autoencoder
from latentvae.errors import UserError
from latentvae.images import PixelFormat, crop, decode, resize, to_model
from latentvae.latents.encoding.encoder import LatentEncoder
from latentvae.latents.reading.dataset import LatentDataset
from latentvae.latents.store.files import LatentStore, open_shard
from latentvae.model.autoencoder import AutoencoderKL
from tests.latents.stores import latents_of, tiny_vae


def index_rows(store):
    return [row for path in sorted(store.glob("shards/*/*.parquet")) for row in pq.read_table(path).to_pylist()]


def shard(store, unit=0, bucket="32x32"):
    layout = LatentStore(store)
    return open_shard(layout.folder / layout.read_record(bucket, unit).shards[bucket])


def encoder_of(vae, **changes):
    options = {"batch_size": 4, "precision": "fp32", "store": "moments", "dtype": "fp32", "seed": 0}
    return LatentEncoder(load_autoencoder(vae), PixelFormat(), device=torch.device("cpu"), **(options | changes))


def noise_images(count, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("store", "tensors"), [("moments", ["logvar", "mean"]), ("mean", ["mean"]), ("sample", ["sample"])]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_store_kinds(encode, tmp_path, store, tensors, dtype):
    encode(store=store, dtype={torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype])
    found = shard(tmp_path / "store").tensors
    assert sorted(found) == tensors
    assert all(tensor.shape == (3, 2, 16, 16) and tensor.dtype == dtype for tensor in found.values())


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


def test_the_mirrored_image_is_rescued_too(encode, tmp_path):
    image = np.full((32, 32, 3), 255, np.uint8)
    image[:, :5] = 0  # not its own mirror image
    vae, source = sensitive_to_white(2e4), [{"key": "0.png", "image": image}]
    options = {"source": source, "vae": vae, "dtype": "fp32", "hflip": True}
    assert encode(precision="fp16", **options).counts.rescued == 1
    encode("float32", **options)
    rescued, exact = (latents_of(tmp_path / name)["0.png"] for name in ("store", "float32"))
    for name in ("mean", "mean_hflip", "logvar_hflip"):
        torch.testing.assert_close(rescued[name], exact[name])
    assert (exact["mean"] - exact["mean_hflip"]).abs().max() > 0.01


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


def test_mirrored_images_are_encoded_beside_the_others(encode, vae, photographs, tmp_path):
    encode(hflip=True, dtype="fp32")
    layout = LatentStore(tmp_path / "store")
    found = shard(tmp_path / "store").tensors
    assert sorted(found) == ["logvar", "logvar_hflip", "mean", "mean_hflip"]
    rows = layout.read_unit_index(layout.read_record("32x32", 0)).to_pylist()
    for row in rows:
        array = decode(photographs / row["key"])
        scaled = resize(array, (row["scaled_width"], row["scaled_height"]))
        cut = crop(scaled, row["crop_top"], row["crop_left"], 32, 32)
        for name, pixels in (("mean", cut), ("mean_hflip", cut[:, ::-1])):
            images = to_model(torch.from_numpy(pixels.copy())[None], PixelFormat())
            with torch.no_grad():
                expected = vae.encode(images).latent_dist.mean[0]
            torch.testing.assert_close(found[name][row["row"]], expected, rtol=1e-4, atol=1e-5)


def test_the_noise_of_a_mirrored_sample_is_its_own(encode, tmp_path):
    encode("plain", store="sample", dtype="fp32")
    encode("both", store="sample", dtype="fp32", hflip=True)
    plain, both = (shard(tmp_path / name).tensors for name in ("plain", "both"))
    assert torch.equal(plain["sample"], both["sample"])
    assert not torch.allclose(both["sample"], both["sample_hflip"].flip(-1), atol=1e-2)


def relative(one, other):
    """Per row."""
    difference = (one - other).flatten(1).norm(dim=1)
    return difference / other.flatten(1).norm(dim=1)


def test_the_batch_size_changes_no_row_by_more_than_1e_5(shared_data):
    """The small f8c4 network on photographs: in float32 against batches of one; bf16 is as far from float32 at any."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset("f8c4-small").eval()
    paths = sorted(shared_data("bsds_test").glob("*.jpg"))[:7]
    images = torch.stack([torch.from_numpy(decode(path)[:128, :128].copy()) for path in paths])
    keys = [path.name for path in paths]

    def moments(precision, batch_size):
        encoder = encoder_of(vae, batch_size=batch_size, precision=precision)
        parts = [encoder(images[start : start + batch_size], keys[start : start + batch_size]) for start in
                 range(0, len(images), batch_size)]  # fmt: skip
        return torch.cat([torch.cat([part.tensors["mean"], part.tensors["logvar"]], 1) for part in parts])

    exact = moments("fp32", 1)
    for batch_size in (2, 3, 7, 16):
        assert relative(moments("fp32", batch_size), exact).max() <= 1e-5, batch_size
    alone = relative(moments("bf16", 1), exact)
    assert alone.max() > 1e-4
    for batch_size in (3, 7):
        together = relative(moments("bf16", batch_size), exact)
        assert together.mean() <= alone.mean() * 1.1 and together.max() <= alone.max() * 1.25, batch_size


def test_stored_latents_equal_vae_encode_within_the_rounding_of_fp16(encode, tmp_path):
    encode("exact", dtype="fp32")
    encode("stored")
    exact, stored = (shard(tmp_path / name).tensors for name in ("exact", "stored"))
    for name in ("mean", "logvar"):
        assert torch.equal(stored[name], exact[name].half())


class Forgetful:
    """An autoencoder whose device has room for `room` images."""

    def __init__(self, vae, room):
        self.adapter, self.room, self.sizes = load_autoencoder(vae), room, []

    def __getattr__(self, name):
        return getattr(self.adapter, name)

    def float(self):
        return self

    def to(self, device):
        return self

    def moments(self, images):
        self.sizes.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.adapter.moments(images)


def test_when_memory_runs_out_the_batch_is_halved_and_stays_so(vae, caplog):
    images, keys = noise_images(8), [f"{index}" for index in range(8)]
    expected = encoder_of(vae)(images, keys)
    short = Forgetful(vae, room=3)
    encoder = LatentEncoder(
        short, PixelFormat(), batch_size=8, precision="fp32", store="moments", dtype="fp32", seed=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    first, second = encoder(images, keys), encoder(images[:2], keys[:2])
    assert short.sizes == [8, 4, *[2] * 4, 2] and encoder.size_of("32x32") == 2 and encoder.size_of("64x64") == 8
    torch.testing.assert_close(first.tensors["mean"], expected.tensors["mean"], rtol=1e-5, atol=1e-6)
    assert torch.equal(second.tensors["mean"], first.tensors["mean"][:2])
    assert "out of memory with 4 images of 32x32; going on with 2" in caplog.text
    short.room = 0
    with pytest.raises(UserError, match="too small for one image of 32x32"):
        encoder(images, keys)


def test_two_batches_may_be_under_way(vae):
    images, keys = noise_images(8), [f"{index}" for index in range(8)]
    encoder = encoder_of(vae)
    one, other = encoder.start(images[:4], keys[:4]), encoder.start(images[4:], keys[4:])
    assert torch.equal(encoder.finish(one).tensors["mean"], encoder(images[:4], keys[:4]).tensors["mean"])
    assert torch.equal(encoder.finish(other).tensors["mean"], encoder(images[4:], keys[4:]).tensors["mean"])
