"""What the tests of several processes share."""

import pytest

from latentvae.latents.encoding.encode import encode_dataset
from tests.latents.stores import COUNT, SETTINGS, Slow, contents, tiny_vae, write_pictures


@pytest.fixture
def pictures(tmp_path):
    """A folder of COUNT small pictures."""
    write_pictures(tmp_path / "pictures", COUNT)
    return tmp_path / "pictures"


@pytest.fixture
def undisturbed(pictures, tmp_path):
    """The files of their store, encoded by one process."""
    encode_dataset(Slow(pictures), tiny_vae(), tmp_path / "undisturbed", **SETTINGS)
    return contents(tmp_path / "undisturbed")
