"""Statistics in the commit records are exact, and add up."""

import numpy as np
import torch

from latentvae.latents.store.files import LatentStore, open_shard
from latentvae.latents.store.records import Counts, channel_sums, merge_sums


def test_sums_of_a_shard_against_numpy():
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(5, 3, 4, 6, generator=generator).half() for name in ("mean", "logvar")}
    sums = channel_sums(tensors)
    mean, logvar = (tensors[name].double().numpy() for name in ("mean", "logvar"))
    assert sums.count == 5 * 4 * 6
    np.testing.assert_allclose(sums.total, mean.sum((0, 2, 3)))
    np.testing.assert_allclose(sums.squares, (mean**2).sum((0, 2, 3)))
    np.testing.assert_allclose(sums.variance, np.exp(logvar).sum((0, 2, 3)))
    assert sums.minimum == mean.min((0, 2, 3)).tolist() and sums.maximum == mean.max((0, 2, 3)).tolist()


def test_sums_of_parts_are_the_sums_of_the_whole():
    values = torch.randn(7, 2, 3, 3, dtype=torch.float32)
    parts = [channel_sums({"mean": part}) for part in (values[:3], values[3:3], values[3:])]
    whole = channel_sums({"mean": values})
    merged = merge_sums(parts)
    assert (merged.count, merged.minimum, merged.maximum) == (whole.count, whole.minimum, whole.maximum)
    np.testing.assert_allclose(merged.total, whole.total)
    assert merged.variance is None
    assert parts[1].count == 0 and parts[1].minimum is None


def test_every_file_has_the_permissions_of_the_others(encode, tmp_path):
    encode()
    assert len({path.stat().st_mode for path in (tmp_path / "store").rglob("*") if path.is_file()}) == 1


def test_the_manifest_has_the_statistics_of_all_shards(encode, tmp_path):
    encode()
    layout = LatentStore(tmp_path / "store")
    shards = [layout.folder / layout.read_record("32x32", unit).shards["32x32"] for unit in range(4)]
    means = torch.cat([open_shard(path).tensors["mean"] for path in shards])
    manifest = layout.read_manifest()
    assert manifest.complete and manifest.totals == Counts(inputs=12, ok=12)
    np.testing.assert_allclose(manifest.statistics.total, means.double().sum((0, 2, 3)).tolist(), rtol=1e-12)
    assert manifest.statistics.count == 12 * 16 * 16
