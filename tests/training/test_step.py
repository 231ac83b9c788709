import pytest
import torch
import torch.nn.functional as F

from latentvae.keyed import keyed_noise
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.step import AutoencoderStep


def autoencoder(dtype=torch.float32, **changes) -> AutoencoderKL:
    torch.manual_seed(0)
    small = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    }
    return AutoencoderKL.from_preset("f8c4-tiny", **(small | changes)).to(dtype)


def batch(dtype=torch.float32, num_images=2):
    images = torch.rand(num_images, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 - 1
    return images, torch.stack([keyed_noise((4, 8, 8), index) for index in range(num_images)])


@pytest.mark.parametrize("has_quant_convs", [True, False])
def test_the_step_is_encode_sample_decode(has_quant_convs):
    vae = autoencoder(torch.float64, use_quant_conv=has_quant_convs, use_post_quant_conv=has_quant_convs)
    images, noise = batch(torch.float64)
    output = AutoencoderStep(vae)(images, noise)
    distribution = vae.encode(images).latent_dist
    expected = vae.decode(distribution.mean + distribution.std * noise.double()).sample
    torch.testing.assert_close(output.reconstructions, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.moments, vae.moments(images), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vae.decoder.conv_out(output.features), expected, rtol=1e-12, atol=1e-12)
    assert not output.features.requires_grad


def test_zero_noise_decodes_the_mode():
    vae = autoencoder()
    images, noise = batch()
    expected = vae.decode(vae.encode(images).latent_dist.mode()).sample
    torch.testing.assert_close(AutoencoderStep(vae)(images, noise * 0).reconstructions, expected)


def test_noise_that_would_broadcast_is_refused():
    images, noise = batch()
    with pytest.raises(ValueError, match="noise"):
        AutoencoderStep(autoencoder())(images, noise[:, :1])


def test_moments_are_float32_under_autocast():
    images, noise = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = AutoencoderStep(autoencoder())(images, noise)
    assert output.moments.dtype == torch.float32 and output.reconstructions.dtype == torch.bfloat16


@pytest.mark.parametrize("train_encoder", [True, False])
def test_every_trainable_parameter_moves_and_every_frozen_one_stays(train_encoder):
    vae = autoencoder()
    frozen = () if train_encoder else ("encoder.", "quant_conv.")
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in vae.parameters() if p.requires_grad], lr=1e-3)
    images, noise = batch()
    output = AutoencoderStep(vae, train_encoder)(images, noise)
    assert output.moments.requires_grad == train_encoder
    F.l1_loss(output.reconstructions, images).backward()
    optimizer.step()
    for name, parameter in vae.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name
        assert (parameter.grad is None) == (not parameter.requires_grad), name


def test_a_frozen_encoder_keeps_no_activations():
    vae, (images, noise) = autoencoder(), batch()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        AutoencoderStep(vae)(images, noise)
        whole = len(kept)
        kept.clear()
        AutoencoderStep(vae, train_encoder=False)(images, noise)
    assert len(kept) < 0.6 * whole


def test_no_graph_under_no_grad():
    images, noise = batch()
    with torch.no_grad():
        assert not AutoencoderStep(autoencoder())(images, noise).reconstructions.requires_grad
