import pytest
import torch
import torch.nn.functional as F

from latentvae.keyed import keyed_noise
from latentvae.losses.likelihood import LearnedLogvar
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.perturbation import Transform, draw_latent_noise
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


@pytest.mark.parametrize("frozen", [(), ("encoder.", "quant_conv."), ("decoder.", "post_quant_conv."), ("encoder.",)])
def test_every_trainable_parameter_moves_and_every_frozen_one_stays(frozen):
    vae = autoencoder()
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in vae.parameters() if p.requires_grad], lr=1e-3)
    images, noise = batch()
    output = AutoencoderStep(vae)(images, noise)
    assert output.moments.requires_grad == ("quant_conv." not in frozen)
    F.l1_loss(output.reconstructions, images).backward()
    optimizer.step()
    for name, parameter in vae.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name
        assert (parameter.grad is None) == (not parameter.requires_grad), name


def num_kept(vae, images, noise):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        AutoencoderStep(vae)(images, noise)
    return len(kept)


def test_a_frozen_encoder_keeps_no_activations_and_is_seen_at_each_call():
    vae, (images, noise) = autoencoder(), batch()
    whole = num_kept(vae, images, noise)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    assert num_kept(vae, images, noise) < 0.6 * whole
    modes = []
    vae.encoder.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    assert not AutoencoderStep(vae)(images, noise).moments.requires_grad
    vae.quant_conv.requires_grad_(True)
    assert AutoencoderStep(vae)(images, noise).moments.requires_grad
    assert modes == [False, True]  # without, gradient checkpointing has nothing to do in it


def test_the_decoder_gets_the_sample_turned_and_then_mixed_with_noise():
    vae = autoencoder(torch.float64)
    images, noise = batch(torch.float64)
    transform = Transform(scale=16, turns=1)
    mixed = draw_latent_noise(2.0, (4, 4, 4), seed=0, positions=[5, 6])
    output = AutoencoderStep(vae)(images, noise, transform, mixed)
    distribution = vae.encode(images).latent_dist
    latents = transform.latents(distribution.mean + distribution.std * noise.double())
    share = mixed.share.double().view(2, 1, 1, 1)
    expected = vae.decode((1 - share) * latents + mixed.noise.double()).sample
    torch.testing.assert_close(output.reconstructions, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.moments, vae.moments(images), rtol=1e-12, atol=1e-12)
    assert output.reconstructions.shape == (2, 3, 8, 8)


def test_the_log_variance_of_the_likelihood_comes_with_its_gradient():
    images, noise = batch()
    likelihood = LearnedLogvar()
    assert AutoencoderStep(autoencoder())(images, noise).logvar is None
    output = AutoencoderStep(autoencoder(), likelihood)(images, noise)
    output.logvar.backward()
    assert output.logvar.shape == () and likelihood.logvar.grad == 1


def test_no_graph_under_no_grad():
    images, noise = batch()
    with torch.no_grad():
        assert not AutoencoderStep(autoencoder())(images, noise).reconstructions.requires_grad
