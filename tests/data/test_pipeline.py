"""Training order and augmentation are functions of seed, position and key; nothing else may change a pixel."""

import os
import re
import signal
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from latentvae.data.augment import augment
from latentvae.data.pipeline import (
    DataConfig,
    TrainingImages,
    UnreadableImages,
    split_by_key,
    training_batches,
    validation_batches,
    validation_indices,
)
from latentvae.data.sources import open_source
from latentvae.errors import UserError
from latentvae.images import PixelFormat, center_crop, resize_shorter_side
from latentvae.keyed import permutation, uniforms
from tests.data.batches import SMALL, flat, steps

RGB = PixelFormat()
GRAY16 = PixelFormat(channels=1, dtype="uint16")


def broken_set(count=12, broken=(2, 5, 7)):
    source = [{"key": f"k{i:02d}", "image": np.full((40, 40, 3), i, np.uint8)} for i in range(count)]
    for index in broken:
        source[index]["image"] = b"no image"
    return open_source(source)


class DyingSource:
    """Kills the process that reads it, as a crash in a decoder would."""

    name = "dying"

    def __init__(self, source):
        self.source = source
        self.parent = os.getpid()

    def __len__(self):
        return len(self.source)

    def entries(self):
        return self.source.entries()

    def read(self, index):
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.read(index)


class ChangingKeys:
    """Breaks the promise that keys stay."""

    def __init__(self):
        self.fetches = 0

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.fetches += 1
        return {"key": f"{index}{'new' if self.fetches > 4 else ''}", "image": np.zeros((40, 40, 3), np.uint8)}


# --- order ---


def test_an_epoch_is_every_image_once_and_the_next_another_order(photographs):
    source = open_source(photographs)
    taken = flat(steps(source, count=6, batch=4))  # 24 images, two epochs of 12
    keys = [taken[position][0] for position in range(24)]
    everything = sorted(entry.key for entry in source.entries())
    assert sorted(keys[:12]) == everything and sorted(keys[12:]) == everything and keys[:12] != keys[12:]
    assert flat(steps(source, count=3, seed=2))[0] != taken[0]


def test_permutation_is_one_and_stays_what_it_was():
    order = permutation(0, 0, 1000)
    assert sorted(order) == list(range(1000)) and not np.array_equal(order, permutation(0, 1, 1000))
    # written down: a resumed run of another year must go on with the same order
    assert permutation(7, 3, 8).tolist() == [2, 1, 4, 6, 0, 7, 3, 5]
    assert uniforms("augment", 1, 2, "a/b.jpg") == (
        0.07463908188779833,
        0.8423787203729907,
        0.7908170505948386,
        0.36039238850933375,
    )


def test_the_order_and_the_cuts_stay_what_they_were():
    """Written down when there were neither repeats nor buckets: a run that began then goes on with the same images."""
    y, x = np.mgrid[0:60, 0:80]
    picture = np.stack([3 * x, 3 * y, np.zeros_like(x)], -1).astype(np.uint8)
    source = open_source([{"key": f"k{i:02d}", "image": b"no" if i in (2, 5) else picture} for i in range(12)])
    indices = [0, 1, 2, 3, 4, 5, 6, 8, 9, 11]
    batches = [batch for step in steps(source, seed=7, batch=4, count=8, indices=indices) for batch in step]
    keys = " ".join(key[1:] for batch in batches for key in batch.keys)
    assert keys == ("08 11 06 04 03 00 09 09 04 01 03 09 03 04 06 01 00 11 08 01 11 03 09 08 06 00 08 01 04 04 00 01")
    middles = [image[16, 16, :2].tolist() for batch in batches for image in batch.images]
    expected = [
        [95, 77],
        [86, 105],
        [164, 73],
        [79, 87],
        [81, 91],
        [68, 113],
        [146, 91],
        [146, 91],
        [79, 87],
        [112, 74],
    ]
    assert np.abs(np.array(middles[:10]) - expected).max() <= 1  # another Pillow may round otherwise
    center = SMALL.model_copy(update={"crop": "center"})
    ((batch,),) = steps(source, center, seed=7, start=20, batch=4, count=1)
    assert batch.keys == ["k10", "k07", "k11", "k09"]
    middles = [image[16, 16, :2].tolist() for image in batch.images]
    assert np.abs(np.array(middles) - [[119, 91], [119, 91], [119, 91], [113, 91]]).max() <= 1


def test_workers_processes_micro_batches_and_resume_change_no_pixel(photographs):
    source = open_source(photographs)
    reference = flat(steps(source, count=4))
    assert sorted(reference) == list(range(32))
    for workers in (1, 2):
        config = SMALL.model_copy(update={"num_workers": workers})
        assert flat(steps(source, config, count=4)) == reference
    split: dict = {}
    for rank in range(4):
        part = flat(steps(source, count=4, rank=rank, ranks=4, micro=1))
        assert not set(part) & set(split)
        split.update(part)
    assert split == reference
    assert flat(steps(source, count=2)) | flat(steps(source, count=2, start=16)) == reference
    resumed = flat(steps(source, count=5, start=3, batch=5, micro=100))  # even where no step boundary was
    assert all(reference[position] == resumed[position] for position in range(3, 28))


def test_steps_have_the_declared_shape(photographs):
    (step,) = steps(open_source(photographs), count=1, batch=12, micro=5, rank=1, ranks=2)
    assert [batch.images.shape for batch in step] == [(3, 32, 32, 3)] * 2  # the largest divisor of 6 not above 5
    assert [batch.positions for batch in step] == [[6, 7, 8], [9, 10, 11]]
    assert all(batch.images.dtype == torch.uint8 and batch.unreadable == [] for batch in step)
    with pytest.raises(UserError, match="multiple of the 2 processes"):
        steps(open_source(photographs), batch=3, ranks=2)


def test_indices_limit_the_set(photographs):
    source = open_source(photographs)
    train, held_out = split_by_key([entry.key for entry in source.entries()], 0.3)
    assert sorted(train + held_out) == list(range(12)) and held_out
    seen = {key for key, _ in flat(steps(source, count=6, indices=train)).values()}
    assert seen == {source.entries()[index].key for index in train}
    with pytest.raises(UserError, match="left to train on"):
        steps(source, indices=[])


def test_split_is_stable_when_the_set_grows():
    keys = [f"class/{index}.jpg" for index in range(3000)]
    _, held_out = split_by_key(keys, 0.1)
    assert 240 < len(held_out) < 360
    assert split_by_key(keys[:1000], 0.1)[1] == [index for index in held_out if index < 1000]
    assert set(held_out) < set(split_by_key(keys, 0.2)[1])
    assert split_by_key(keys, 0.0) == (list(range(3000)), [])
    with pytest.raises(UserError, match="fraction"):
        split_by_key(keys, 1.0)


def test_global_random_state_is_left_alone(photographs):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    steps(open_source(photographs), SMALL.model_copy(update={"num_workers": 1}), count=1)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


# --- augmentation ---


def test_random_crops_are_parts_of_the_picture_at_the_drawn_scale():
    y, x = np.mgrid[0:120, 0:160]
    picture = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)  # red says the column, green the row
    config = DataConfig(resolution=64, max_resize=1.5)
    widths, flips, tops, lefts = [], 0, [], []
    for index in range(300):
        part = augment(picture, config, 0, 0, f"{index}.png").astype(int)
        assert part.shape == (64, 64, 3)
        columns, rows = part[32, :, 0], part[:, 32, 1]
        flips += columns[0] > columns[-1]
        widths.append((rows[-4] - rows[4]) / 56 * 64)  # source rows that the 64 pixels show
        tops.append(rows.min())
        lefts.append(columns.min())
    assert 120 / 1.5 - 3 < min(widths) < 85 and 115 < max(widths) <= 123  # from 1.5 x 64 down to 64 on the shorter side
    assert 110 < flips < 190 and min(tops) <= 1 and max(tops) > 25 and min(lefts) <= 1 and max(lefts) > 60
    unflipped = augment(picture, config.model_copy(update={"horizontal_flip": False}), 0, 0, "1.png").astype(int)
    assert unflipped[32, 0, 0] < unflipped[32, -1, 0]


def test_augmentation_differs_by_seed_epoch_and_key():
    picture = np.random.default_rng(0).integers(0, 256, (100, 140, 3), dtype=np.uint8)
    cases = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    results = [augment(picture, SMALL, *case).tobytes() for case in cases]
    assert len(set(results)) == 4 and results[0] == augment(picture, SMALL, *cases[0]).tobytes()


def test_centre_crop_and_small_images():
    picture = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    config = DataConfig(resolution=32, crop="center", horizontal_flip=False)
    assert np.array_equal(augment(picture, config, 0, 0, "a"), center_crop(resize_shorter_side(picture, 32), 32))
    tiny = np.arange(10 * 14 * 3, dtype=np.uint8).reshape(10, 14, 3)
    assert augment(tiny, SMALL, 0, 0, "a").shape == (32, 32, 3)
    source = open_source([{"key": "big", "image": picture}, {"key": "tiny", "image": tiny}])
    taken = steps(source, SMALL.model_copy(update={"small": "skip"}), count=1)[0]
    assert {key for batch in taken for key in batch.keys} == {"big"}
    assert {pair for batch in taken for pair in batch.unreadable} == {
        ("tiny", "is 14x10: smaller than the resolution 32 (data.small is skip)")
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_16_bit_gray_stays_16_bit_gray(tmp_path, workers):
    generator = np.random.default_rng(0)
    for index in range(4):
        scan = generator.integers(256 * index, 65536, (48, 64), dtype=np.uint16)
        Image.fromarray(scan).save(tmp_path / f"{index}.png")
    source = open_source(tmp_path, GRAY16)
    config = DataConfig(resolution=32, num_workers=workers, dtype="uint16")
    assert config.pixels(1) == GRAY16
    batch = steps(source, config, GRAY16, count=1)[0][0]
    assert batch.images.dtype == torch.uint16 and batch.images.shape == (4, 32, 32, 1)
    values = batch.images.numpy()
    assert len(np.unique(values)) > 3000 and len(np.unique(values % 257)) > 200  # not 8 bits stretched to 16
    assert next(validation_batches(source, config, GRAY16, resolution=32, batch_size=4)).images.dtype == torch.uint16
    with pytest.raises(UserError, match="same pixel format"):
        steps(source, config, RGB, count=1)


def test_config_checks_its_pixel_format():
    with pytest.raises(ValidationError, match="pixel_range"):
        DataConfig(dtype="float32")
    assert DataConfig(dtype="float32", pixel_range=(0, 1)).pixels(13).channels == 13


# --- unreadable images ---


def test_unreadable_images_are_replaced_the_same_way_everywhere():
    source = broken_set()
    reference = steps(source, count=3)
    pairs = {pair for step in reference for batch in step for pair in batch.unreadable}
    assert {key for key, _ in pairs} == {"k02", "k05", "k07"} and all("identify" in reason for _, reason in pairs)
    taken = flat(reference)
    assert sorted(taken) == list(range(24)) and not {"k02", "k05", "k07"} & {key for key, _ in taken.values()}
    workers = SMALL.model_copy(update={"num_workers": 2})
    assert flat(steps(source, workers, count=3)) == taken
    assert flat(steps(source, count=3, rank=0, ranks=2)) | flat(steps(source, count=3, rank=1, ranks=2)) == taken
    assert flat(steps(source, count=2, start=8)).items() <= taken.items()
    # the readable ones are where they are without the broken ones
    whole = flat(steps(broken_set(broken=()), count=3))
    assert sum(whole[position] == taken[position] for position in taken) == sum(
        key not in ("k02", "k05", "k07") for key, _ in whole.values()
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_the_limit_of_unreadable_images_stops_the_run(workers):
    config = SMALL.model_copy(update={"max_unreadable": 2, "num_workers": workers})
    with pytest.raises(
        UserError, match=r"3 unreadable images, more than data.max_unreadable = 2: k0\d is not an image"
    ):
        steps(broken_set(), config, count=3)
    assert len(steps(broken_set(broken=(2, 5)), config, count=3)) == 3
    with pytest.raises(UserError, match=r"unreadable|no readable"):
        steps(broken_set(broken=range(12)), config, count=1)


def test_a_set_without_a_readable_image_ends_in_an_error():
    with pytest.raises(UserError, match="no readable image was found in python object list: k0"):
        steps(broken_set(3, broken=range(3)), count=1)
    batches = list(validation_batches(broken_set(3, broken=range(3)), SMALL, RGB, resolution=32, batch_size=2))
    assert [(batch.keys, len(batch.unreadable)) for batch in batches] == [
        ([], 3)
    ]  # `validate` knows the others' shares


def test_one_readable_image_among_many_is_found():
    taken = flat(steps(broken_set(12, broken=range(11)), count=1))
    assert {key for key, _ in taken.values()} == {"k11"}


def test_unreadable_images_are_counted_once_and_written(tmp_path):
    unreadable = UnreadableImages(2)
    assert unreadable.add([("a", "is broken"), ("a", "is broken"), ("b", 'has "quotes", commas')]) == [
        ("a", "is broken"),
        ("b", 'has "quotes", commas'),
    ]
    assert unreadable.add([("a", "again")]) == [] and unreadable.count == 2
    unreadable.write_csv(tmp_path / "unreadable.csv")
    assert (tmp_path / "unreadable.csv").read_text() == 'key,reason\na,is broken\nb,"has ""quotes"", commas"\n'
    with pytest.raises(UserError, match="3 unreadable images"):
        unreadable.add([("\udcff.png", "has a name that is not UTF-8")])
    unreadable.write_csv(tmp_path / "unreadable.csv")
    assert "\\udcff.png,has a name" in (tmp_path / "unreadable.csv").read_text()


# --- workers ---


def test_a_dead_worker_is_told_in_one_line(photographs):
    source = DyingSource(open_source(photographs))
    with pytest.raises(UserError, match=r"worker process that reads images died: .*data.num_workers") as caught:
        steps(source, SMALL.model_copy(update={"num_workers": 1}), count=1)
    assert "\n" not in str(caught.value)


def test_a_users_mistake_inside_a_worker_stays_one_line():
    source = open_source(ChangingKeys())
    with pytest.raises(UserError, match="a key must stay") as caught:
        steps(source, SMALL.model_copy(update={"num_workers": 1}), count=1)
    assert "\n" not in str(caught.value)


def test_workers_outlive_the_signals_of_a_scheduler_and_end_with_the_iterator(photographs):
    import multiprocessing

    config = SMALL.model_copy(update={"num_workers": 1})
    batches = training_batches(
        open_source(photographs), config, RGB, seed=0, start_image=0, global_batch_size=2, micro_batch_size=2
    )
    others = set(multiprocessing.active_children())
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    assert worker.pid is not None
    for name in ("SIGTERM", "SIGINT"):
        os.kill(worker.pid, getattr(signal, name))
    assert len(list(islice(batches, 30))) == 30 and worker.is_alive()
    batches.close()
    worker.join(10)
    assert not worker.is_alive()


EXIT_SCRIPT = """
import sys
from latentvae.data import DataConfig, open_source, training_batches
from latentvae.images import PixelFormat

config = DataConfig(resolution=16, num_workers=1)
options = {"seed": 0, "start_image": 0, "global_batch_size": 2, "micro_batch_size": 2}
batches = training_batches(open_source(sys.argv[1]), config, PixelFormat(), **options)
next(batches)
raise RuntimeError("planted")
"""


def test_an_error_while_workers_run_ends_the_program(photographs):
    result = subprocess.run(
        [sys.executable, "-c", EXIT_SCRIPT, str(photographs)], capture_output=True, text=True, timeout=50
    )
    assert result.returncode == 1 and result.stderr.strip().endswith("RuntimeError: planted")


def test_spawned_workers_give_the_same(photographs):
    """macOS and Windows start workers afresh: everything they need must survive a pickle."""
    import pickle

    dataset = TrainingImages(open_source(photographs), SMALL, 3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy[5].image, dataset[5].image) and copy[5].key == dataset[5].key


# --- validation ---


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_is_every_image_once_over_processes(photographs, workers):
    source = open_source(photographs)
    config = SMALL.model_copy(update={"num_workers": workers})
    options = {"resolution": 24, "batch_size": 4}
    batches = list(validation_batches(source, config, RGB, **options))
    assert [batch.images.shape for batch in batches] == [(4, 24, 24, 3)] * 3
    assert sorted(key for batch in batches for key in batch.keys) == [entry.key for entry in source.entries()]
    assert len({re.split("/", key)[0] for key in batches[0].keys}) > 1  # not one class after the other
    parts = [list(validation_batches(source, config, RGB, **options, process_index=r, num_processes=2)) for r in (0, 1)]
    assert flat(parts) == flat([batches])
    index = [entry.key for entry in source.entries()].index(batches[0].keys[0])
    expected = center_crop(resize_shorter_side(source.read(index), 24), 24)
    assert np.array_equal(batches[0].images[0].numpy(), expected)
    assert (
        flat([list(validation_batches(source, config, RGB, **options, max_images=5))]).items()
        <= flat([batches]).items()
    )


def test_the_choice_of_validation_images_can_be_made_once(photographs):
    source = open_source(photographs)
    options = {"resolution": 24, "batch_size": 4}
    chosen = validation_indices(source, [0, 3, 5, 7, 8, 10], 5)
    assert len(chosen) == 5 and set(chosen) < {0, 3, 5, 7, 8, 10}
    assert chosen == [index for index in validation_indices(source) if index in (0, 3, 5, 7, 8, 10)][:5]
    batches = list(validation_batches(source, SMALL, RGB, **options, chosen=chosen))
    assert [key for batch in batches for key in batch.keys] == [source.entries()[index].key for index in chosen]
    anew = list(validation_batches(source, SMALL, RGB, **options, indices=[0, 3, 5, 7, 8, 10], max_images=5))
    assert flat([anew]) == flat([batches])


def test_validation_leaves_unreadable_images_out_and_reports_each():
    for broken in ((2, 5, 7), (0,), (11,), tuple(range(1, 12))):
        batches = list(validation_batches(broken_set(broken=broken), SMALL, RGB, resolution=32, batch_size=2))
        good, bad = 12 - len(broken), sorted(f"k{index:02d}" for index in broken)
        assert [len(batch.keys) for batch in batches] == [2] * (good // 2) + [1] * (good % 2)
        assert sorted(key for batch in batches for key, _ in batch.unreadable) == bad
