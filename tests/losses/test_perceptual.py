import copy
import functools
import pickle
import socket
import warnings
from urllib.error import URLError

import lpips
import pytest
import torch
from torch import nn

from latentvae.errors import UserError
from latentvae.losses import perceptual as module
from latentvae.losses.perceptual import MINIMUM_SIZE, WEIGHTS, Perceptual


@functools.cache
def random_lpips(net: str) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips asks torchvision with arguments that it deprecated
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval().requires_grad_(False)


@pytest.fixture
def random_backbones(monkeypatch):
    """LPIPS with a random backbone: everything but the meaning of the distance, and no file."""

    monkeypatch.setattr(module, "_load_lpips", lambda net: copy.deepcopy(random_lpips(net)))


def pair(channels=3, size=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, channels, size, size, generator=generator, dtype=torch.float64).to(dtype) * 2 - 1


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_equals_the_lpips_package(random_backbones, net):
    perceptual = Perceptual(net)
    images, reconstructions = pair(size=64)
    expected = random_lpips(net)(images, reconstructions).flatten()
    torch.testing.assert_close(perceptual(images, reconstructions), expected, rtol=1e-5, atol=1e-6)


def test_real_weights_see_like_a_person(lpips_home):
    """A slight shift in brightness must cost less than a blur of the same squared error."""
    perceptual = Perceptual("squeeze")
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    images = (0.4 * torch.sin(x * 1.3) * torch.cos(y * 0.9)).expand(1, 3, 64, 64)
    blurred = nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    shifted = images + (images - blurred).square().mean().sqrt()
    assert perceptual(images, shifted).item() < 0.3 * perceptual(images, blurred).item()
    expected = perceptual._held[0](images, blurred).flatten()  # the package's own forward
    torch.testing.assert_close(perceptual(images, blurred), expected, rtol=1e-5, atol=1e-6)


def test_identical_images_give_zero_and_finite_gradients(random_backbones):
    perceptual = Perceptual("squeeze")
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), -torch.ones(3, 32, 32)])
    reconstructions = images.clone().requires_grad_()
    distance = perceptual(images, reconstructions)
    assert distance.tolist() == [0.0, 0.0, 0.0]
    distance.sum().backward()
    assert reconstructions.grad.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1e-25])
def test_vanished_features_give_finite_gradients(value):
    """Where all features of a position are 0, or so small that their squares are, their length has no derivative."""
    features = torch.full((1, 4, 2, 2), value, requires_grad=True)
    (module._unit_length(features) - 1).square().sum().backward()
    assert features.grad.isfinite().all()


def test_the_gradient_reaches_the_reconstruction_only(random_backbones):
    perceptual = Perceptual("squeeze")
    images, reconstructions = (x.requires_grad_() for x in pair())
    perceptual(images, reconstructions).sum().backward()
    assert reconstructions.grad.abs().sum() > 0 and images.grad is None
    assert all(not p.requires_grad for p in perceptual._held[0].parameters())


def test_always_in_eval_mode(random_backbones):
    parent = nn.Sequential(Perceptual("squeeze")).train()
    perceptual = parent[0]
    assert not any(m.training for m in (*perceptual.modules(), *perceptual._held[0].modules()))
    perceptual.train(True)
    assert not perceptual.training
    images, reconstructions = pair()
    assert torch.equal(perceptual(images, reconstructions), perceptual(images, reconstructions))


def test_no_checkpoint_and_no_optimizer_can_hold_it(random_backbones):
    parent = nn.Sequential(Perceptual("squeeze"))
    assert parent.state_dict() == {} and list(parent.parameters()) == [] and list(parent.buffers()) == []
    parent.load_state_dict({}, strict=True)


@pytest.mark.parametrize(("scale", "shift"), [(3, 0), (127.5, 127.5), (1, 0.1)])
def test_images_of_another_range_are_refused(random_backbones, scale, shift):
    images = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32) * scale + shift
    with pytest.raises(ValueError, match=r"takes \[-1, 1\]"):
        Perceptual("squeeze")(images, images)


def test_an_overshooting_reconstruction_is_judged_as_it_will_be_seen(random_backbones):
    perceptual = Perceptual("squeeze")
    images, reconstructions = pair()
    overshooting = (reconstructions * 2).requires_grad_()
    distance = perceptual(images, overshooting)
    assert torch.equal(distance, perceptual(images, overshooting.clamp(-1, 1)))
    distance.sum().backward()
    outside = overshooting.detach().abs() > 1
    assert overshooting.grad[outside].abs().sum() == 0 and overshooting.grad[~outside].abs().sum() > 0


def test_a_nan_is_left_to_the_non_finite_guard(random_backbones):
    images, reconstructions = pair()
    reconstructions[1, 0, 3, 3] = torch.nan
    distance = Perceptual("squeeze")(images, reconstructions)
    assert distance.isnan().tolist() == [False, True, False]


def test_dtypes(random_backbones):
    perceptual = Perceptual("squeeze")
    images, reconstructions = pair()
    expected = perceptual(images, reconstructions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(perceptual(images, reconstructions), expected)
    assert perceptual(images.bfloat16(), reconstructions.bfloat16()).dtype == torch.float32
    wide = perceptual(images.double(), reconstructions.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="float32 or wider"):
        perceptual.to(torch.bfloat16)(images, reconstructions)


def test_gradcheck_in_float64(random_backbones):
    perceptual = Perceptual("squeeze")
    images, reconstructions = (x[:1] for x in pair(size=17, dtype=torch.float64))
    reconstructions.requires_grad_()
    perceptual(images, reconstructions).sum().backward()
    direction = torch.randn(reconstructions.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    step = 1e-6 * direction * (reconstructions.detach().abs() < 0.9)
    with torch.no_grad():
        slope = perceptual(images, reconstructions + step) - perceptual(images, reconstructions - step)
    assert (reconstructions.grad * step).sum().item() * 2 == pytest.approx(slope.item(), rel=1e-4)


def test_gray_is_repeated(random_backbones):
    images, reconstructions = pair(channels=1)
    expected = Perceptual("squeeze")(images.expand(-1, 3, -1, -1), reconstructions.expand(-1, 3, -1, -1))
    torch.testing.assert_close(Perceptual("squeeze", channels=1)(images, reconstructions), expected)


def test_bands_are_averaged_over_the_triplets(random_backbones):
    images, reconstructions = pair(channels=5)
    distance = Perceptual("squeeze", channels=5, bands=[[3, 2, 1], [4, 4, 0]])(images, reconstructions)
    rgb = Perceptual("squeeze")
    each = [rgb(images[:, bands], reconstructions[:, bands]) for bands in ([3, 2, 1], [4, 4, 0])]
    torch.testing.assert_close(distance, (each[0] + each[1]) / 2)


@pytest.mark.parametrize(("channels", "bands"), [(13, None), (2, None), (4, [[0, 1, 4]]), (4, [[0, 1]])])
def test_channels_that_cannot_be_shown_are_refused(random_backbones, channels, bands):
    with pytest.raises(UserError, match=r"loss\.perceptual_bands"):
        Perceptual("squeeze", channels=channels, bands=bands)


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_images_too_small_are_refused(random_backbones, net):
    perceptual = Perceptual(net)
    size = MINIMUM_SIZE[net]
    assert perceptual(*(x[:1] for x in pair(size=size))).shape == (1,)
    with pytest.raises(UserError, match=r"data\.resolution"):
        perceptual(*pair(size=size - 1))


def test_other_shapes_are_refused(random_backbones):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        Perceptual("squeeze")(*pair(channels=1))


def test_copies(random_backbones):
    perceptual = Perceptual("squeeze")
    images, reconstructions = pair()
    for other in (copy.deepcopy(perceptual), pickle.loads(pickle.dumps(perceptual))):
        assert torch.equal(other(images, reconstructions), perceptual(images, reconstructions))


@pytest.mark.parametrize("net", ["vgg", "squeeze"])
def test_absent_weights_are_told_in_one_line(monkeypatch, tmp_path, net):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    waits = []

    def offline(*_, **__):
        waits.append(socket.getdefaulttimeout())
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(UserError) as caught:
        Perceptual(net)
    message = str(caught.value)
    assert "\n" not in message and "no route to host" in message
    folder = tmp_path / "hub" / "checkpoints"
    for part in (WEIGHTS[net], str(folder), "TORCH_HOME", "loss.perceptual=none"):
        assert part in message
    assert waits and waits[0] is not None and socket.getdefaulttimeout() is None
    assert list(folder.iterdir()) == []


def test_weights_in_place_are_not_asked_for(monkeypatch, lpips_home):
    def offline(*_, **__):
        raise AssertionError("no network is needed")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    Perceptual("squeeze")


def test_nothing_is_printed(lpips_home, capsys, recwarn):
    Perceptual("squeeze")
    assert capsys.readouterr() == ("", "") and len(recwarn) == 0


def test_damaged_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / WEIGHTS["squeeze"]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a download")
    with pytest.raises(UserError) as caught:
        Perceptual("squeeze")
    assert str(file) in str(caught.value) and "delete it" in str(caught.value)
