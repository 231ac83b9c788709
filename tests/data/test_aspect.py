"""Which bucket an image is nearest to, and where the images of a bucket go that fills no batch."""

from fractions import Fraction

import numpy as np

from latentvae.data.aspect import AspectBuckets, assign, merge
from latentvae.images import AspectRatios, sizes_of_area


def test_the_sizes_of_buckets_have_about_one_area():
    buckets = AspectBuckets()
    assert buckets.sizes(256) == ((192, 320), (224, 288), (256, 256), (288, 224), (320, 192))
    assert set(buckets.sizes(256)) < set(sizes_of_area(256**2, 32, 3))
    assert AspectBuckets(max_aspect=1).sizes(256) == ((256, 256),)
    assert AspectBuckets(multiple_of=64).sizes(256) == ((192, 320), (256, 256), (320, 192))


def test_a_bucket_has_the_nearest_shape_at_another_resolution():
    buckets = AspectBuckets()
    at_128 = [buckets.size_at(number, 256, 128) for number in range(5)]
    assert at_128 == [(96, 160), (128, 128), (128, 128), (128, 128), (160, 96)]
    assert [buckets.size_at(number, 256, 256) for number in range(5)] == list(buckets.sizes(256))


def test_the_nearest_is_nearest_in_the_logarithm_of_the_ratio():
    sizes = ((32, 64), (64, 64), (64, 32))
    images = np.array(
        [[100, 100], [100, 140], [100, 142], [140, 100], [142, 100], [9, 900], [900, 9], [-1, -1], [0, 5]]
    )
    assert assign(images, sizes).tolist() == [1, 1, 0, 1, 2, 0, 2, 1, 1]
    generator = np.random.default_rng(0)
    many = generator.integers(1, 5000, (2000, 2))
    ratios = AspectRatios(AspectBuckets(max_aspect=4).sizes(512))
    assert ratios.nearest_of(many[:, 0], many[:, 1]).tolist() == [ratios.nearest(w, h) for w, h in many.tolist()]
    logs = np.log([width / height for width, height in AspectBuckets(max_aspect=4).sizes(512)])
    distances = np.abs(np.log(many[:, :1] / many[:, 1:]) - logs)
    found = ratios.nearest_of(many[:, 0], many[:, 1])
    assert np.allclose(distances[np.arange(2000), found], distances.min(1))


def test_a_bucket_that_fills_no_batch_goes_to_the_nearest_that_does():
    sizes = AspectBuckets().sizes(256)
    rates = [Fraction(3), Fraction("7.5"), Fraction(9), Fraction(8), Fraction(0)]
    assert merge(rates, sizes, 8) == [2, 2, 2, 3, 3]
    assert merge(rates, sizes, 9) == [2, 2, 2, 2, 2]
    assert merge(rates, sizes, 3) == [0, 1, 2, 3, 3]
    assert merge(rates, sizes, 100) == [2, 2, 2, 2, 2]  # none is full: the fullest
