"""Keyed choices of a reader: normal, fair, and decided by (seed, epoch, key) alone."""

import math
import pickle

import numpy as np
import pytest

from latentvae.latents.reading.draws import KeyedNormals, is_mirrored, item_digests, key_words, shuffled

KEYS = [f"folder/{index}.png" for index in range(400)]


def drawn(keys=KEYS, seed=0, epoch=0, size=1000):
    out = np.empty((len(keys), size), np.float32)
    KeyedNormals().fill(item_digests(keys, seed, epoch), out)
    return out


def test_noise_depends_on_seed_epoch_and_key_and_on_nothing_else():
    all_at_once = drawn()
    normals = KeyedNormals()
    alone = np.empty((1, 1000), np.float32)
    for place in (7, 3, 7):
        normals.fill(item_digests([KEYS[place]], 0, 0), alone)
        assert np.array_equal(alone[0], all_at_once[place])
    assert not np.array_equal(drawn(seed=1), all_at_once)
    assert not np.array_equal(drawn(epoch=1), all_at_once)
    assert len({row.tobytes() for row in all_at_once}) == len(KEYS)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_odd_sizes(size):
    assert np.isfinite(drawn(size=size)).all()
    assert np.unique(drawn(size=size)).size == len(KEYS) * size


def test_noise_is_standard_normal():
    """Moments within five standard errors, and the empirical distribution within the bound of Massart 1990."""
    values = drawn(size=2500).astype(np.float64).ravel()
    count = values.size  # a million
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((values**power).mean() - expected) < 5 * math.sqrt(variance / count)
    ordered = np.sort(values)
    normal = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in ordered[::100]])
    distance = np.abs(normal - np.arange(0, count, 100) / count).max()
    assert distance < math.sqrt(math.log(2 / 1e-6) / (2 * count)) + 1e-4
    assert 4.2 < np.abs(values).max() < 6.7
    halves = values.reshape(len(KEYS), 2, -1)  # the cosines and the sines
    assert abs(np.corrcoef(halves[:, 0].ravel(), halves[:, 1].ravel())[0, 1]) < 5 / math.sqrt(count / 2)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / math.sqrt(count)


def test_normals_can_be_sent_to_another_process():
    normals = pickle.loads(pickle.dumps(KeyedNormals()))
    out = np.empty((1, 10), np.float32)
    normals.fill(item_digests(KEYS[:1], 0, 0), out)
    assert np.array_equal(out, drawn(KEYS[:1], size=10))


def test_half_is_mirrored_by_key():
    digests = item_digests(KEYS * 10, 0, 0)
    mirrored = is_mirrored(digests)
    assert np.array_equal(mirrored[:400], mirrored[400:800])
    assert abs(mirrored[:400].mean() - 0.5) < 0.125  # five standard errors
    assert not np.array_equal(is_mirrored(item_digests(KEYS, 0, 1)), mirrored[:400])


def test_shuffling_follows_keys_and_not_positions():
    words = key_words(KEYS)
    order = shuffled(words, 0, 5)
    assert sorted(order.tolist()) == list(range(400))
    by_key = [KEYS[place] for place in order]
    backwards = KEYS[::-1]
    assert [backwards[place] for place in shuffled(key_words(backwards), 0, 5)] == by_key
    fewer = [key for key in KEYS if not key.endswith("7.png")]
    assert [fewer[place] for place in shuffled(key_words(fewer), 0, 5)] == [k for k in by_key if k in set(fewer)]
    assert not np.array_equal(shuffled(words, 1, 5), order) and not np.array_equal(shuffled(words, 0, 6), order)


def test_orders_of_epochs_are_unrelated():
    words = key_words(KEYS)
    ranks = [np.argsort(shuffled(words, 0, epoch)) for epoch in range(2)]
    assert abs(np.corrcoef(*ranks)[0, 1]) < 5 / math.sqrt(len(KEYS))
