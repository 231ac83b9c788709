import pytest
import torch

from latentvae.errors import UserError
from latentvae.losses.structural import GAUSSIAN, WINDOW, _WindowMeans, check_window, ssim


def pictures(height=37, width=52, channels=3, dtype=torch.float64):
    """Two images [-1, 1] and two distorted ones: noise on the first, less contrast on the second."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 9, width), indexing="ij")
    smooth = torch.stack([torch.sin(x * (i + 1) + y) for i in range(channels)]).to(torch.float64)
    images = torch.stack([smooth, smooth.flip(-1)]) * 0.9
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    distorted = torch.stack([images[0] + 0.2 * noise[0], images[1] * 0.6 + 0.1]).clamp(-1, 1)
    return images.to(dtype), distorted.to(dtype)


@pytest.mark.parametrize("channels", [1, 3])
def test_equals_scikit_image_on_pictures_as_they_are_shown(channels):
    metrics = pytest.importorskip("skimage.metrics")
    images, distorted = pictures(channels=channels)
    expected = [
        metrics.structural_similarity(
            (a.numpy() + 1) / 2,
            (b.numpy() + 1) / 2,
            data_range=1.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(images, distorted, strict=True)
    ]
    assert ssim(images, distorted).tolist() == pytest.approx(expected, abs=1e-12)
    assert ssim(images.float(), distorted.float()).tolist() == pytest.approx(expected, abs=2e-5)


def test_identical_images_give_one_and_flat_ones_the_brightness_alone():
    images, _ = pictures()
    torch.testing.assert_close(ssim(images, images), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
    a, b, c1 = 0.5, 1.25, 4e-4  # on [0, 2]; (0.01 * 2)^2
    flat = ssim(torch.full((1, 3, 16, 20), a - 1.0), torch.full((1, 3, 16, 20), b - 1.0))
    assert flat.item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), rel=1e-4)


def test_opposite_structure_is_below_zero_and_never_below_minus_one():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 24, 24, generator=generator, dtype=torch.float64) * 2 - 1
    value = ssim(images, -images)
    assert (value < -0.8).all() and (value >= -1).all()


def test_the_window_is_the_one_of_wang():
    assert WINDOW == 11 and sum(GAUSSIAN) == pytest.approx(1.0, abs=1e-15)
    torch.testing.assert_close(torch.tensor(GAUSSIAN[:5]), torch.tensor(GAUSSIAN[:5:-1]))
    impulse = torch.zeros(1, 21, 21, dtype=torch.float64)
    impulse[0, 10, 10] = 1
    weights = torch.tensor(GAUSSIAN, dtype=torch.float64)
    torch.testing.assert_close(_WindowMeans.apply(impulse)[0], torch.outer(weights, weights))


def test_its_backward_is_the_transposed_sum():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 12, 14, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(_WindowMeans.apply, x) and torch.autograd.gradgradcheck(_WindowMeans.apply, x)
    images, distorted = (x[:1, :1, :13, :14].clone() for x in pictures())
    distorted.requires_grad_()
    assert torch.autograd.gradcheck(lambda y: ssim(images, y), distorted)


def test_the_gradient_leads_back_to_the_image():
    images, distorted = pictures(dtype=torch.float32)
    distorted.requires_grad_()
    ssim(images, distorted).sum().backward()
    gradient = distorted.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    with torch.no_grad():
        step = distorted + 0.05 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True)
    assert (ssim(images, step) > ssim(images, distorted)).all()
    flat = torch.zeros(1, 3, 16, 16, requires_grad=True)
    ssim(torch.zeros(1, 3, 16, 16), flat).sum().backward()
    assert flat.grad.isfinite().all()


def test_size_and_neighbours_change_nothing():
    images, distorted = pictures()
    torch.testing.assert_close(
        ssim(images.repeat(3, 1, 1, 1), distorted.repeat(3, 1, 1, 1)), ssim(images, distorted).repeat(3)
    )
    pair = (torch.full((1, 3, 1, 1), -0.3), torch.full((1, 3, 1, 1), 0.2))
    values = [ssim(*(x.expand(1, 3, *size) for x in pair)).item() for size in ((11, 11), (24, 64), (128, 128))]
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)


def test_half_precision_is_computed_in_float32():
    images, distorted = pictures(dtype=torch.float32)
    expected = ssim(images, distorted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssim(images, distorted), expected)
    assert ssim(images.bfloat16(), distorted.bfloat16()).dtype == torch.float32
    assert ssim(images.double(), distorted.double()).dtype == torch.float64


def test_images_smaller_than_the_window_are_refused():
    check_window(11)
    assert ssim(torch.zeros(1, 3, 11, 30), torch.zeros(1, 3, 11, 30)).shape == (1,)
    with pytest.raises(UserError, match=r"10 pixels a side; SSIM .* 11: raise data.resolution or set loss.ssim_weight"):
        check_window(10)
    with pytest.raises(UserError, match="10 pixels"):
        ssim(torch.zeros(1, 3, 30, 10), torch.zeros(1, 3, 30, 10))
    with pytest.raises(ValueError, match="reconstructions"):
        ssim(torch.zeros(1, 1, 16, 16), torch.zeros(1, 3, 16, 16))
