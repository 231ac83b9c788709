"""Fixtures of the latent store's tests."""

import pytest
import torch

from latentvae.latents.encoding.encode import encode_dataset
from tests.latents.stores import SETTINGS, tiny_vae


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are too small to share: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def vae():
    return tiny_vae()


@pytest.fixture
def encode(photographs, vae, tmp_path):
    """Encode the twelve photographs at 32 px in units of 3, in this process; keywords change anything."""

    def run(out="store", *, source=photographs, vae=vae, **options):
        return encode_dataset(source, vae, tmp_path / out, **(SETTINGS | options))

    return run
