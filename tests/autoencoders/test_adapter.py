"""Every class behind one interface: as diffusers computes it, from memory and from disk, whole and strict."""

import copy
import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentvae.autoencoders.adapter import ADAPTERS, ImageAutoencoder, load_autoencoder
from latentvae.checkpoint import model_hashes
from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL
from tests.autoencoders.zoo import MODELS, factor, make_model
from tests.model.pairs import noise_images, relative

WEIGHTS = "diffusion_pytorch_model.safetensors"
OTHERS = ["flux2", "asymmetric", "tiny", "tiny-pool", "dc", "qwen-image", "wan", "wan2.2"]  # not AutoencoderKL
DETERMINISTIC = {"tiny", "tiny-pool", "dc"}
VIDEO = {"qwen-image", "wan", "wan2.2"}


def their_moments(model, images):
    """What diffusers' own `encode` gives."""
    if any(word in type(model).__name__ for word in ("Wan", "Qwen")):
        return model.encode(images[:, :, None]).latent_dist.parameters[:, :, 0]
    encoded = model.encode(images)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.parameters
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent


def their_images(model, raw):
    """What diffusers' own `decode` gives."""
    if any(word in type(model).__name__ for word in ("Wan", "Qwen")):
        return model.decode(raw[:, :, None]).sample[:, :, 0]
    return model.decode(raw).sample


def images_for(name, batch=2):
    side = 4 * factor(name)
    return noise_images(batch, 3, side, side + 2 * factor(name))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_computes_what_diffusers_computes(name):
    model = make_model(name)
    autoencoder = load_autoencoder(copy.deepcopy(model))
    assert isinstance(autoencoder, ImageAutoencoder) and autoencoder.class_name == MODELS[name][0]
    assert autoencoder.downsample_factor == factor(name) and autoencoder.in_channels == 3
    assert autoencoder.size_multiple == factor(name) * (2 if name == "flux2" else 1)
    assert autoencoder.has_posterior == (name not in DETERMINISTIC)

    images = images_for(name)
    moments = autoencoder.moments(images)
    assert relative(moments, their_moments(model, images)) <= 1e-5
    channels = autoencoder.latent_channels
    height, width = images.shape[-2] // factor(name), images.shape[-1] // factor(name)
    assert moments.shape == (2, channels * (2 if autoencoder.has_posterior else 1), height, width)

    raw = moments[:, :channels]
    decoded = autoencoder.decode(raw)
    expected = their_images(model, raw)
    assert decoded.shape == images.shape
    # Video classes clamp what they decode; here nothing is.
    assert relative(decoded.clamp(-1, 1) if name in VIDEO else decoded, expected) <= 1e-5
    assert relative(decoded, images) > 0.1  # random weights: it is not the input that came back

    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert relative(autoencoder.moments(channels_last), moments) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen-image", "wan"])
def test_video_classes_do_not_clamp(name):
    autoencoder = load_autoencoder(make_model(name))
    raw = 50 * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        autoencoder.module.decoder.conv_out.weight.mul_(50)
    assert autoencoder.decode(raw).abs().max() > 1


@pytest.mark.parametrize("name", ["sd1", "flux2", "tiny", "dc", "qwen-image", "wan2.2"])
@torch.no_grad()
def test_images_stay_whole_whatever_the_switches_say(name):
    model = make_model(name)
    autoencoder = load_autoencoder(model)
    module = autoencoder.module
    images = images_for(name, 2)
    whole = autoencoder.moments(images)
    raw = whole[:, : autoencoder.latent_channels]
    decoded = autoencoder.decode(raw)
    for attribute in ("tile_sample_min_size", "tile_sample_min_height", "tile_sample_min_width"):
        if hasattr(module, attribute):
            setattr(module, attribute, 2 * factor(name))
    module.use_tiling = module.use_slicing = True
    assert torch.equal(autoencoder.moments(images), whole)
    assert torch.equal(autoencoder.decode(raw), decoded)
    assert module.use_tiling and module.use_slicing  # the caller's


@pytest.mark.parametrize("name", ["sd1", "sdxl-statistics", *OTHERS])
@torch.no_grad()
def test_a_saved_folder_is_the_same_model(name, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path / "vae")
    given, loaded = load_autoencoder(model), load_autoencoder(tmp_path / "vae")
    assert given.name is None and loaded.name == str(tmp_path / "vae") and not loaded.module.training
    assert loaded.config["_class_name"] == json.loads((tmp_path / "vae" / "config.json").read_text())["_class_name"]
    assert json.loads(json.dumps(loaded.config)) == loaded.config
    assert (loaded.encoder_hash, loaded.decoder_hash) == (given.encoder_hash, given.decoder_hash)
    assert loaded.scaling == given.scaling and loaded.class_name == given.class_name
    images = images_for(name)
    assert torch.equal(loaded.moments(images), given.moments(images))
    assert load_autoencoder(tmp_path, subfolder="vae").encoder_hash == given.encoder_hash
    assert load_autoencoder(loaded) is loaded


def test_autoencoder_kl_is_ours_with_its_hashes():
    model = make_model("sd1")
    autoencoder = load_autoencoder(model)
    assert type(autoencoder.module) is AutoencoderKL
    assert autoencoder.module.encoder.conv_in.weight.data_ptr() == model.encoder.conv_in.weight.data_ptr()
    hashes = model_hashes(autoencoder.module)
    assert (autoencoder.encoder_hash, autoencoder.decoder_hash) == (hashes.encoder, hashes.decoder)
    assert load_autoencoder(autoencoder.module).module is autoencoder.module


@pytest.mark.parametrize("name", ["sd1", *OTHERS])
def test_hashes_follow_the_halves(name):
    """A changed weight changes the hash of its half alone; every parameter belongs to one of them."""
    before = load_autoencoder(make_model(name))
    names = [key for key, _ in before.module.named_parameters()]
    chosen = names[:: max(1, len(names) // 12)] + [key for key in names if "quant_conv" in key]
    for key in chosen:
        after = load_autoencoder(make_model(name))
        with torch.no_grad():
            after.module.get_parameter(key).view(-1)[0] += 1
        is_encoder = key.startswith(("encoder.", "quant_conv."))
        assert (after.encoder_hash != before.encoder_hash) == is_encoder, key
        assert (after.decoder_hash != before.decoder_hash) == (not is_encoder), key


def test_architecture_is_hashed_and_scaling_is_not():
    """Fields that move no weight but change what is computed; not statistics, which raw latents do not depend on."""
    changes = [("dc", "downsample_block_type", "conv"), ("tiny", "act_fn", "silu"), ("tiny", "upsample_fn", "bilinear")]
    for name, field, value in changes:
        before, after = (load_autoencoder(make_model(name)) for _ in range(2))
        after.config[field] = value
        halves = after.encoder_hash != before.encoder_hash, after.decoder_hash != before.decoder_hash
        assert halves == {"downsample_block_type": (True, False), "act_fn": (True, True)}.get(field, (False, True))
    before, after = (load_autoencoder(make_model("flux2")) for _ in range(2))
    after.module.bn.running_mean.add_(1)
    assert (after.encoder_hash, after.decoder_hash) == (before.encoder_hash, before.decoder_hash)
    assert after.scaling != before.scaling
    tiny, pooled = load_autoencoder(make_model("tiny")), load_autoencoder(make_model("tiny-pool"))
    assert tiny.encoder_hash != pooled.encoder_hash


def test_float_copies_only_where_needed():
    autoencoder = load_autoencoder(make_model("tiny"))
    assert autoencoder.float() is autoencoder and autoencoder.to("cpu") is autoencoder
    half = load_autoencoder(make_model("flux2").half())
    full = half.float()
    assert full is not half and half.module.dtype == torch.float16 and full.module.dtype == torch.float32
    assert full.encoder_hash != half.encoder_hash  # rounded weights in another type are another model
    assert full.module.bn.running_mean.dtype == torch.float32


@pytest.mark.parametrize("name", ["tiny", "flux2", "wan"])
def test_a_folder_that_does_not_fit_is_refused(name, tmp_path):
    make_model(name).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    key = next(key for key in weights if key.startswith("encoder.") and weights[key].ndim > 1)
    for change, message in [
        ({"surplus.weight": torch.zeros(1)}, "should not, surplus.weight"),
        ({key: torch.zeros(1, 2, 3, 4)}, "cannot be loaded"),
    ]:
        save_file(weights | change, tmp_path / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(UserError, match=message) as caught:
            load_autoencoder(tmp_path)
        assert "\n" not in str(caught.value)
    save_file({name: tensor for name, tensor in weights.items() if name != key}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match="lacks"):
        load_autoencoder(tmp_path)


def test_pickles_and_other_classes_are_refused(tmp_path):
    model = make_model("tiny")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(UserError, match="a pickle"):
        load_autoencoder(tmp_path / "pickled")
    model.save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    with pytest.raises(UserError, match=r"class VQModel: only .*AutoencoderDC.*are supported"):
        load_autoencoder(tmp_path / "other")
    with pytest.raises(UserError, match="class Linear was given; supported are AutoencoderKL, "):
        load_autoencoder(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="subfolder is for a model that is loaded"):
        load_autoencoder(model, subfolder="vae")
    with pytest.raises(UserError, match="no model at"):
        load_autoencoder(tmp_path / "absent")


@pytest.mark.parametrize("name", ["qwen-image", "wan"])
def test_sequences_of_frames_are_refused(name):
    autoencoder = load_autoencoder(make_model(name))
    with pytest.raises(UserError, match="single frames"):
        autoencoder.moments(torch.zeros(1, 3, 5, 16, 16))
    with pytest.raises(UserError, match="single frames"):
        autoencoder.decode(torch.zeros(1, 4, 2, 4, 4))


def test_every_supported_class_is_tested():
    assert {class_name for class_name, _ in MODELS.values()} == set(ADAPTERS)
    assert all(hasattr(diffusers, name) for name in ADAPTERS if name != "AutoencoderTinyPool")
