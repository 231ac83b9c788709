"""The hash stands for the fields, and a difference is named."""

import pytest

from latentvae.errors import UserError
from latentvae.latents.store.fingerprint import differences, fingerprint, plain, require_same


def test_the_order_of_fields_and_tuples_do_not_matter():
    one = {"a": 1, "policy": {"background": (255, 255, 255)}}
    other = plain({"policy": {"background": [255, 255, 255]}, "a": 1})
    assert fingerprint(one) == fingerprint(other) and differences(one, other) == []
    assert fingerprint(one) != fingerprint({**one, "a": 2})


def test_every_difference_is_named():
    there = {"buckets": ["32x32"], "policy": {"icc": "srgb"}, "seed": None}
    here = {"buckets": ["48x48"], "policy": {"icc": "ignore"}, "seed": None, "new": None}
    assert differences(there, here) == [
        "resolution is 32x32 there and 48x48 here",
        "new is absent there and None here",
        "policy.icc is srgb there and ignore here",
    ]
    with pytest.raises(UserError, match=r"^S was made with other settings: resolution is .*; do this$"):
        require_same(there, here, "S", "do this")
    require_same(there, there, "S", "do this")
