"""Archives with bits turned: an error that names the file, an error of that image, or what is stored for that image."""

import numpy as np
import pytest

from latentvae.data import open_captions, open_source
from latentvae.errors import UserError
from tests.data.archives import png, write_parquet, write_tar

NAMES = [*(f"{index}.png" for index in range(8)), "x" * 200 + ".png"]
IMAGES = {name: png(10 * index, (20, 20)) for index, name in enumerate(NAMES)}


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_turned_bits_never_give_another_image(tmp_path, kind):
    path = tmp_path / f"s.{kind}"
    if kind == "tar":
        write_tar(path, IMAGES | {"1.txt": b"one", "2.json": b'{"a": 1}'})
    else:
        write_parquet(path, image=list(IMAGES.values()), key=NAMES, text=["t"] * len(NAMES))
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    outcomes = {"told": 0, "image error": 0, "as stored": 0}
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(generator.integers(1, 5)):
            data[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
        path.write_bytes(data)
        try:
            source = open_source(path)
            entries = source.entries()
            contents = source.fetch(list(entries))
            open_captions(source).get(entries.keys)
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["told"] += 1
            continue
        for entry, content in zip(entries, contents, strict=True):
            if isinstance(content, Exception):
                outcomes["image error"] += 1
                continue
            outcomes["as stored"] += 1
            original = IMAGES.get(entry.key.removeprefix("s.tar/"))
            if original is not None:  # else a bit of the name itself was turned
                assert content == original or content not in IMAGES.values()
    assert outcomes["told"] > 50 and outcomes["as stored"] > 500
