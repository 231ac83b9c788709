"""PSNR against closed forms."""

import math

import pytest
import torch

from latentvae.evaluation.metrics import psnr


def test_psnr_of_a_known_difference():
    images = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    reconstructions = images.clone()
    reconstructions[0] += 1  # mean squared error 1
    reconstructions[1] -= 10  # 100
    expected = [20 * math.log10(255), 20 * math.log10(25.5)]
    assert psnr(images, reconstructions).tolist() == pytest.approx(expected, abs=1e-12)


def test_psnr_is_infinite_for_equal_images_and_symmetric():
    a, b = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    assert psnr(a, a, data_range=1).isinf().all()
    assert torch.equal(psnr(a, b, data_range=1), psnr(b, a, data_range=1))


def test_psnr_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        psnr(torch.zeros(2, 3), torch.zeros(1, 3))
