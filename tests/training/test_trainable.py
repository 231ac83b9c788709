"""Which parameters train: all, the decoder, or what regular expressions name."""

import pytest
import torch

from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.optim import make_optimizer
from latentvae.training.step import AutoencoderStep
from latentvae.training.trainable import select_trainable
from tests.model.pairs import TINY, enliven, noise_images


@pytest.fixture
def vae():
    return enliven(AutoencoderKL(**TINY))


def trained(vae):
    return [name for name, parameter in vae.named_parameters() if parameter.requires_grad]


def test_all_undoes_whatever_was_frozen(vae):
    vae.requires_grad_(False)
    assert select_trainable(vae, "all") == trained(vae) == [name for name, _ in vae.named_parameters()]


def test_decoder_leaves_what_makes_latents(vae):
    names = select_trainable(vae, "decoder")
    assert names == trained(vae)
    frozen = [name for name, _ in vae.named_parameters() if name not in names]
    assert names and all(name.startswith(("decoder.", "post_quant_conv.")) for name in names)
    assert frozen and all(name.startswith(("encoder.", "quant_conv.")) for name in frozen)
    assert "post_quant_conv.weight" in names and "quant_conv.weight" in frozen


def test_decoder_of_a_model_without_quant_convs():
    vae = AutoencoderKL(**TINY | {"use_quant_conv": False, "use_post_quant_conv": False})
    assert {name.split(".")[0] for name in select_trainable(vae, "decoder")} == {"decoder"}


def test_regular_expressions_match_whole_names(vae):
    names = select_trainable(vae, (r"decoder\.conv_out\..*", r".*\.to_q\.weight"))
    assert names == trained(vae)
    assert {"decoder.conv_out.weight", "decoder.conv_out.bias"} < set(names)
    assert all(name.startswith("decoder.conv_out.") or name.endswith("to_q.weight") for name in names)
    with pytest.raises(UserError, match=r"near names: decoder\.conv_in\.bias, decoder\.conv_in\.weight"):
        select_trainable(vae, [r"decoder\.conv_in\."])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((r"decoder\.conv_aut\..*",), r"matches the whole name of no parameter; near names: .*decoder\.conv_out"),
        (("conv_out",), r"'conv_out'.*near names: .*coder\.conv_out"),
        (("decoder.*", r"nothing_like_it"), "'nothing_like_it'"),
        (("decoder.(",), r"'decoder\.\(', which is not a regular expression"),
        ((), "empty list"),
        ("encoder", "give all, decoder or a list"),
    ],
)
def test_what_cannot_be_meant_is_refused(vae, given, message):
    before = trained(vae)
    with pytest.raises(UserError, match=message) as caught:
        select_trainable(vae, given)
    assert "\n" not in str(caught.value)
    assert trained(vae) == before


def test_only_the_chosen_are_updated(vae):
    names = select_trainable(vae, (r"decoder\.(conv_in|mid_block)\..*", "post_quant_conv.bias"))
    before = {name: parameter.detach().clone() for name, parameter in vae.named_parameters()}
    optimizer = make_optimizer(vae.named_parameters(), learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    output = AutoencoderStep(vae)(noise_images(2, 3, 16, 16), torch.zeros(2, 4, 8, 8))
    output.reconstructions.square().mean().backward()
    optimizer.step()
    changed = [name for name, parameter in vae.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == names
