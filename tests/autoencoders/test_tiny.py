"""Tiny autoencoders from published state dicts: what the published networks compute, strictly."""

import diffusers
import pytest
import torch

from latentvae.autoencoders.adapter import load_autoencoder
from latentvae.autoencoders.tiny import AutoencoderTinyPool, tiny_from_tensors
from latentvae.errors import UserError
from tests.autoencoders.taesd import decoder, encoder
from tests.model.pairs import enliven, noise_images, relative


def make_halves(pooled=False, width=8, latent_channels=5, **blocks):
    """The published encoder and decoder with lively weights."""
    first = encoder(width, latent_channels, pooled, blocks.get("encoder", (1, 3, 3, 3)))
    second = decoder(width, latent_channels, pooled, blocks.get("decoder", (3, 3, 3, 1)))
    return enliven(first, 1).eval(), enliven(second, 2).eval()


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("blocks", [{}, {"encoder": (1, 2, 1), "decoder": (2, 1, 1)}])
@torch.no_grad()
def test_computes_what_the_published_networks_compute(pooled, blocks):
    first, second = make_halves(pooled, **blocks)
    model = tiny_from_tensors(first.state_dict(), second.state_dict())
    assert type(model) is (AutoencoderTinyPool if pooled else diffusers.AutoencoderTiny)
    assert model.config.latent_channels == 5 and not model.training
    autoencoder = load_autoencoder(model)
    images = noise_images(2, 3, 32, 48)
    latents = first((images + 1) / 2)
    assert relative(autoencoder.moments(images), latents) <= 1e-5
    strong = 4 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))  # the clamp matters
    assert relative((autoencoder.decode(strong) + 1) / 2, second(strong)) <= 1e-5
    assert autoencoder.downsample_factor == 2 ** (len(blocks.get("encoder", "four")) - 1)


@torch.no_grad()
def test_the_pooled_branch_sees_the_whole_image():
    first, second = make_halves(pooled=True)
    model = tiny_from_tensors(first.state_dict(), second.state_dict())
    images = noise_images(1, 3, 64, 64)
    changed = images.clone()
    changed[..., :8, :8] = 1
    corner = model.encoder(changed)[..., -1, -1] - model.encoder(images)[..., -1, -1]
    assert corner.abs().max() > 1e-6


def test_weights_keep_their_precision():
    first, second = make_halves()
    state = {name: tensor.half() for name, tensor in first.state_dict().items()}
    half = tiny_from_tensors(state, {name: tensor.half() for name, tensor in second.state_dict().items()})
    assert half.dtype == torch.float16 and torch.equal(half.encoder.layers[0].weight, state["0.weight"])
    assert half.encoder.layers[0].weight.data_ptr() != state["0.weight"].data_ptr()
    assert tiny_from_tensors(state, second.state_dict()).dtype == torch.float32  # the one that holds both


@pytest.mark.parametrize(
    "half, change, message",
    [
        (0, lambda state: state.pop("3.conv.2.bias"), r"encoder\.layers\.3\.conv\.2\.bias is absent"),
        (1, lambda state: state.pop("7.weight"), r"layers\..* is .* where .* is expected: the layouts of"),
        (
            0,
            lambda state: state.update({"1.pool.0.weight": torch.zeros(32, 8, 1, 1)}),
            r"pool\.0\.weight is absent where \[32, 8",
        ),
        (0, lambda state: state.update({"2.bias": torch.zeros(8)}), r"layers\.2\.bias is \[8\] where absent"),
        (1, lambda state: state.update({"19.weight": torch.zeros(3, 9, 3, 3)}), r"is \[3, 9, 3, 3\] where"),
        (
            0,
            lambda state: state.update({"14.weight": torch.zeros(6, 8, 3, 3)}),
            "6 latent channels, the decoder takes 5",
        ),
        (0, lambda state: state.update({"conv_in.weight": torch.zeros(1)}), "begins with no layer's number"),
        (
            1,
            lambda state: state.update({"0.weight": torch.zeros(8, 5, 3, 3)}),
            r"\[8, 5, 3, 3\] where absent is expected",
        ),
        (1, lambda state: state.clear(), "fewer than two"),
    ],
)
def test_other_layouts_are_refused(half, change, message):
    states = [module.state_dict() for module in make_halves()]
    change(states[half])
    with pytest.raises(UserError, match=message) as caught:
        tiny_from_tensors(*states)
    assert "\n" not in str(caught.value)


def test_a_pooled_folder_is_not_mistaken_for_a_plain_one(tmp_path):
    """Plain diffusers would leave the branches out and only warn: it has to fail instead."""
    first, second = make_halves(pooled=True)
    model = tiny_from_tensors(first.state_dict(), second.state_dict())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="relu\\+pool"):
        diffusers.AutoencoderTiny.from_pretrained(tmp_path)
    assert load_autoencoder(tmp_path).class_name == "AutoencoderTinyPool"
    with pytest.raises(UserError, match=r"'relu\+pool'"):
        AutoencoderTinyPool(act_fn="relu")
