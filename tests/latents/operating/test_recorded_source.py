"""How a source was opened is in the manifest: whoever reads it again for captions or for `--deep` opens it so too."""

import pyarrow as pa
import pyarrow.parquet as pq

from latentvae.latents.encoding.encode import encode_dataset
from latentvae.latents.operating.hand_over import export_store
from latentvae.latents.operating.verify import verify_store
from latentvae.latents.reading.dataset import LatentDataset
from latentvae.latents.store.files import LatentStore
from tests.latents.stores import SETTINGS


def test_columns_that_were_named_are_found_again(photographs, vae, tmp_path):
    files = sorted(path for path in photographs.rglob("*.*") if path.is_file())
    columns = {
        "number": [f"no-{index}" for index in range(len(files))],
        "picture": [path.read_bytes() for path in files],
        "thumbnail": [path.read_bytes() for path in files],
        "caption": [f"photograph {index}" for index in range(len(files))],
    }
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    options = {"key_column": "number", "image_column": "picture"}
    encode_dataset(tmp_path / "set.parquet", vae, tmp_path / "store", **(SETTINGS | options))
    assert LatentStore(tmp_path / "store").read_manifest().source_options == options
    dataset = LatentDataset(tmp_path / "store", captions=True)
    for item in dataset.__getitems__(range(len(dataset))):
        assert item["caption"] == f"photograph {item['key'].removeprefix('no-')}"
    report = verify_store(tmp_path / "store", deep=5, vae=vae, progress=False)
    assert report.is_whole, report
    export_store(tmp_path / "store", tmp_path / "out", format="parquet", captions=True, progress=False)
    (table,) = (pq.read_table(path) for path in (tmp_path / "out").rglob("*.parquet"))
    assert sorted(table["caption"].to_pylist()) == sorted(columns["caption"])
