"""What decides the bytes of a store is refused by name when it differs; what cannot be done is said at once."""

import copy

import pytest
import torch
from diffusers import AutoencoderTiny

from latentvae.errors import UserError
from latentvae.latents.encoding.encode import EncodeConfig
from latentvae.latents.reading.dataset import LatentDataset
from latentvae.latents.store.files import LatentStore
from tests.latents.stores import contents, tiny_vae


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
        ({"hflip": True}, "hflip is False there and True here"),
        (
            {"resolution": None, "buckets": "area=4096,step=16"},
            "resolution is 32x32 there and area=4096,step=16,max-ra",
        ),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 33}, r"--resolution is 33; this model takes multiples of 2: 32 and 34 would do"),
        ({"batch_size": 0}, r"batch_size must be 1 or more, or auto"),
        ({"unit_images": 0}, r"unit_images is 0"),
        ({"mirror": True}, r"unknown option mirror"),
        ({"buckets": "sdxl"}, r"give --resolution or --buckets, not both"),
        ({"resolution": None, "buckets": "sd15"}, r"'sd15' is not known"),
        ({"device": "cuda:77"}, r"device 'cuda:77' cannot be used here"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(encode, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        encode(**options)
    assert not (tmp_path / "store").exists()


def test_config_and_keywords_are_the_same_fields(encode, tmp_path):
    encode("a", config=EncodeConfig(dtype="bf16", resolution=48))
    fields = LatentStore(tmp_path / "a").read_manifest().fields
    assert (fields["dtype"], fields["buckets"]) == ("bf16", "32x32")  # the fixture's keyword wins


def test_a_model_without_a_posterior_keeps_its_latents_as_the_mean(encode, tmp_path):
    channels = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    vae = AutoencoderTiny(**channels, **blocks).eval()
    with pytest.raises(UserError, match=r"--store is moments; a AutoencoderTiny has no posterior, only --store mean"):
        encode(vae=vae, store="moments")
    encode(vae=vae, store="auto")
    manifest = LatentStore(tmp_path / "store").read_manifest()
    assert (manifest.store, manifest.vae.class_name, manifest.latent_channels) == ("mean", "AutoencoderTiny", 4)
    assert encode(vae=vae).units_encoded == 0
    item = LatentDataset(tmp_path / "store", normalize=False)[0]
    assert item["latents"].shape == (4, 4, 4)
