"""Files and folders that are whole or absent, with the permissions of the umask."""

import os

import pytest
import torch
from safetensors.torch import save_file

from latentvae.errors import UserError
from latentvae.files import atomic_file, atomic_folder, check_writable, write_json


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "new"


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path):
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "weights").write_text("old")
    with pytest.raises(UserError, match="exists already"), atomic_folder(tmp_path / "model"):
        pass
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model", overwrite=True) as temporary:
        (temporary / "weights").write_text("new")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "old"
    with atomic_folder(tmp_path / "model", overwrite=True) as temporary:
        (temporary / "weights").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "new"


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX")
def test_permissions_are_those_of_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "a.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
        with atomic_folder(tmp_path / "folder") as temporary:
            save_file({"x": torch.zeros(1)}, temporary / "a.safetensors")
    finally:
        os.umask(previous)
    for file in (tmp_path / "a.safetensors", tmp_path / "folder" / "a.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o640


def test_json_refuses_what_no_reader_takes(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"psnr": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        check_writable(tmp_path / "file" / "run")
