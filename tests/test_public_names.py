"""The public names: what they are, and that they cost nothing until used."""

import importlib
import subprocess
import sys
import types

import pytest

import latentvae

PUBLIC = [
    "AutoencoderKL",
    "BucketBatchSampler",
    "LatentDataset",
    "LatentIterableDataset",
    "MixedLatentDataset",
    "PixelFormat",
    "Recipe",
    "Trainer",
    "UserError",
    "build",
    "convert_model",
    "decode_store",
    "encode_dataset",
    "export_model",
    "export_single_file",
    "export_store",
    "load_autoencoder",
    "load_model",
    "load_recipe",
    "open_captions",
    "open_source",
    "save_model",
    "store_statistics",
    "verify_store",
]


def test_the_list_is_deliberate():
    assert sorted(latentvae._HOMES) == PUBLIC
    assert set(PUBLIC) <= set(dir(latentvae))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_is_the_one_of_its_module(name):
    value = getattr(latentvae, name)
    assert value is getattr(importlib.import_module(latentvae._HOMES[name]), name)
    assert not isinstance(value, types.ModuleType)
    assert value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"public names: .*AutoencoderKL"):
        _ = latentvae.Autoencoder


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, latentvae, latentvae.cli; print([m for m in ('torch', 'diffusers', 'numpy') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_version_is_the_installed_one():
    assert latentvae.__version__ == importlib.metadata.version("latentvae")
