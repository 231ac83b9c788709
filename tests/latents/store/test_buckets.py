"""Every image goes into the bucket of the nearest shape, and is never enlarged unasked."""

import numpy as np
import pytest

from latentvae.errors import UserError
from latentvae.latents.store.buckets import bucket_rule, square_rule

FACTOR = 8


def sdxl(small="skip"):
    return bucket_rule("sdxl", FACTOR, FACTOR, small)


def test_the_published_sdxl_sizes():
    sizes = sdxl().sizes
    assert len(sizes) == len(set(sizes)) == 40
    assert {(1024, 1024), (832, 1216), (1216, 832), (2048, 512), (512, 2048), (1344, 768)} <= set(sizes)
    assert all(width % 64 == 0 and height % 64 == 0 for width, height in sizes)
    assert all(0.9 * 1024**2 < width * height <= 1024**2 + 64 * 512 for width, height in sizes)
    ratios = [width / height for width, height in sizes]
    assert ratios == sorted(ratios)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((3000, 2000), "1216x832"),
        ((2000, 3000), "832x1216"),
        ((1920, 1080), "1344x768"),
        ((1024, 1024), "1024x1024"),
        ((9000, 1000), "2048x512"),
        ((1000, 9000), "512x2048"),
    ],
)
def test_photographs_find_their_sdxl_bucket(size, bucket):
    rule = sdxl("upscale")
    assert rule.place(*size).bucket.name == bucket
    index = rule.nearest(np.array([size[0]]), np.array([size[1]]))
    assert rule.buckets[index[0]].name == bucket


def test_buckets_of_an_area():
    rule = bucket_rule("area=65536,step=32,max-ratio=2", FACTOR, FACTOR, "skip")
    assert (256, 256) in rule.sizes and rule.spec == "area=65536,step=32,max-ratio=2"
    for width, height in rule.sizes:
        assert width % 32 == height % 32 == 0 and 0.5 <= width / height <= 2
        assert 0.7 * 65536 < width * height <= 65536
        assert (height, width) in rule.sizes
    assert bucket_rule("area=65536", FACTOR, FACTOR, "skip").spec == "area=65536,step=64,max-ratio=4"


def test_a_placed_image_covers_its_bucket_and_is_cut_in_the_middle():
    random = np.random.default_rng(0)
    for small in ("keep", "upscale"):
        rule = sdxl(small)
        for width, height in random.integers(64, 4000, (500, 2)).tolist():
            place = rule.place(width, height)
            bucket = place.bucket
            assert place.scaled_width >= bucket.width and place.scaled_height >= bucket.height
            assert min(place.scaled_width - bucket.width, place.scaled_height - bucket.height) == 0
            assert abs(2 * place.crop_left + bucket.width - place.scaled_width) <= 1
            assert abs(2 * place.crop_top + bucket.height - place.scaled_height) <= 1
            assert abs(place.scaled_width / width - place.scaled_height / height) < 1 / min(width, height)
            if small == "keep":
                assert place.scaled_width <= width and place.scaled_height <= height, "enlarged"
                assert bucket.width % 64 == bucket.height % 64 == 0
            else:
                assert (bucket.width, bucket.height) in rule.sizes
            assert (bucket.latent_width, bucket.latent_height) == (bucket.width // 8, bucket.height // 8)


def test_small_images_are_left_out_unless_asked_otherwise():
    reason = sdxl().place(500, 400)
    assert "500x400 is smaller than 1152x896" in reason and "--small keep" in reason
    assert sdxl("keep").place(500, 400).bucket.name == "448x384"
    assert sdxl("keep").place(1100, 1100).bucket.name == "1024x1024"
    assert "too small" in sdxl("keep").place(300, 63)


def test_one_square():
    rule = square_rule(256, FACTOR, FACTOR, "skip")
    place = rule.place(481, 321)
    assert (place.bucket.name, place.scaled_width, place.scaled_height) == ("256x256", 384, 256)
    assert (place.crop_left, place.crop_top) == (64, 0)
    assert rule.place(256, 256).bucket.name == "256x256"
    assert "smaller than 256x256" in rule.place(255, 900)
    assert square_rule(256, FACTOR, FACTOR, "keep").place(255, 900).bucket.name == "248x248"
    assert rule.nearest(np.array([10, 9000]), np.array([9000, 10])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sd15", r"'sd15' is not known; write sdxl"),
        ("area=65536,stride=2", "'stride' is not known"),
        ("step=64", "write sdxl, or such as area=1048576"),
        ("area=many", "whole numbers"),
        ("area=100,step=64", "must hold a square of one step"),
        ("area=65536,max-ratio=0.5", "max-ratio be 1 to 100"),
        ("area=65536,step=36", "a step of 36 pixels; .* multiples of 8"),
    ],
)
def test_what_is_no_rule_is_said(text, message):
    with pytest.raises(UserError, match=message):
        bucket_rule(text, FACTOR, FACTOR, "skip")


def test_a_resolution_that_does_not_fit_the_model():
    with pytest.raises(UserError, match=r"--resolution is 33; this model takes multiples of 2: 32 and 34 would do"):
        square_rule(33, 2, 2, "skip")


def test_the_name_of_a_rule_is_the_whole_rule():
    """It is what the fingerprint holds, and what `verify --deep` makes the rule from again."""
    for ratio in ("1.3333334", "1.33333", "4", "2.0"):
        rule = bucket_rule(f"area=3072,step=8,max-ratio={ratio}", FACTOR, FACTOR, "skip")
        assert bucket_rule(rule.spec, FACTOR, FACTOR, "skip") == rule
    assert rule.spec == "area=3072,step=8,max-ratio=2"
    wide, narrow = (
        bucket_rule(f"area=3072,step=8,max-ratio={r}", FACTOR, FACTOR, "skip") for r in (1.3333334, 1.33333)
    )
    assert wide.sizes != narrow.sizes and wide.spec != narrow.spec
