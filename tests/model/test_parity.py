"""The same numbers as diffusers' own class gives from the same weights."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.presets import PRESETS, preset_config
from tests.model.pairs import RELEASED, TINY, make_pair, noise_images, relative


def assert_same_outputs(ours, theirs, side):
    images = noise_images(2, ours.config.in_channels, side, side)
    with torch.no_grad():
        moments, expected_moments = ours.moments(images), theirs.encode(images).latent_dist.parameters
        latents = expected_moments.chunk(2, dim=1)[0]
        reconstructions, expected = ours.decode(latents).sample, theirs.decode(latents).sample
    assert relative(moments, expected_moments) <= 1e-5
    assert relative(reconstructions, expected) <= 1e-5
    assert expected.std() > 0.1 and expected_moments.std() > 0.1  # not a comparison of zeros


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations(name):
    assert_same_outputs(*make_pair(RELEASED[name]), side=32)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-tiny")])
def test_presets(name):
    ours, theirs = make_pair(preset_config(name))
    assert_same_outputs(ours, theirs, side=max(16, 2 * ours.downsample_factor))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_diffusers_weights_by_name_shape_and_order(name):
    with torch.device("meta"):
        ours, theirs = AutoencoderKL.from_preset(name), diffusers.AutoencoderKL(**preset_config(name))
    shapes = [[(key, tensor.shape) for key, tensor in vae.state_dict().items()] for vae in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRESETS if not name.endswith("-tiny")])
def test_wide_presets(name):
    assert_same_outputs(*make_pair(preset_config(name)), side=64)


@pytest.mark.parametrize("in_channels, out_channels", [(1, 1), (13, 13), (3, 1)])
def test_other_numbers_of_image_channels(in_channels, out_channels):
    ours, theirs = make_pair(TINY | {"in_channels": in_channels, "out_channels": out_channels})
    assert_same_outputs(ours, theirs, side=16)
    assert ours.decode(torch.zeros(1, 4, 8, 8)).sample.shape == (1, out_channels, 16, 16)


def test_odd_sizes_and_channels_last():
    ours, theirs = make_pair(TINY)
    images = noise_images(1, 3, 18, 27)
    with torch.no_grad():
        expected = theirs(images).sample
        assert relative(ours(images).sample, expected) <= 1e-5
        last = ours.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last)).sample
    assert relative(last, expected) <= 1e-4  # the sums run in another order


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [TINY, RELEASED["flux1"]], ids=["attention", "flux1"])
def test_gradients(config, checkpointing):
    ours, theirs = make_pair(config)
    if checkpointing:
        ours.train().enable_gradient_checkpointing()
        assert ours.is_gradient_checkpointing
    images = noise_images(2, 3, 16, 16)
    for vae in (ours, theirs):
        latents = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(3))
        (vae.decode(latents).sample - images).abs().mean().backward()
    expected = dict(theirs.named_parameters())
    assert all(parameter.grad is not None for parameter in ours.parameters())
    # Whole-model norm as well as tensor by tensor; a key's bias has no gradient but rounding, softmax ignores it.
    flat = [torch.cat([p.grad.flatten() for p in vae.parameters()]) for vae in (ours, theirs)]
    assert relative(*flat) <= 1e-4
    for name, parameter in ours.named_parameters():
        if not name.endswith("to_k.bias"):
            assert relative(parameter.grad, expected[name].grad) <= 1e-4, name


def test_gradient_checkpointing_runs_every_stage_again():
    vae = make_pair(TINY)[0].train()
    vae.enable_gradient_checkpointing()
    runs = []
    for network in (vae.encoder, vae.decoder):
        for stage in network.children():
            for block in stage if isinstance(stage, torch.nn.ModuleList) else [stage]:
                if hasattr(block, "resnets"):
                    block.resnets[0].register_forward_hook(lambda module, *_: runs.append(module))
    vae(noise_images(1, 3, 16, 16)).sample.sum().backward()
    assert runs and all(runs.count(module) == 2 for module in runs)


def test_old_folder_with_deprecated_attention_names(tmp_path):
    theirs = make_pair(TINY)[1]
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, tensor in load_file(file).items():
        for new, old in old_names.items():
            name = name.replace(f".{new}.", f".{old}.")
        weights[name] = tensor
    assert any(".proj_attn." in name for name in weights)
    save_file(weights, file, metadata={"format": "pt"})
    assert_same_outputs(AutoencoderKL.from_pretrained(tmp_path), theirs, side=16)
    assert_same_outputs(AutoencoderKL.from_pretrained(tmp_path), diffusers.AutoencoderKL.from_pretrained(tmp_path), 16)
