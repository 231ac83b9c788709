"""Mixtures, stages and aspect-ratio buckets: nothing but seed and position decides a pixel, whatever is combined."""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from latentvae.data import DataConfig, Stage, image_sizes, open_source, plan_summary, training_batches
from latentvae.errors import UserError
from tests.data.archives import folder_as_tar
from tests.data.batches import RGB, flat, steps

STAGES = ({"from_image": 0, "resolution": 32}, {"from_image": 40, "resolution": 64})
BUCKETS = {"max_aspect": 2, "multiple_of": 16}
SHAPES = ((96, 64), (64, 96), (80, 80), (90, 64), (128, 70), (70, 130))  # width, height


@pytest.fixture
def shapes(tmp_path):
    """Two folders, of 24 and of 18 noisy pictures in six sizes."""
    generator = np.random.default_rng(0)
    for name, count in (("many", 24), ("few", 18)):
        (tmp_path / name).mkdir()
        for index in range(count):
            width, height = SHAPES[index % len(SHAPES)]
            picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / name / f"{index:02d}.png")
    return tmp_path


FEATURES = {
    "repeats": {"repeats": (0.5, 2.5)},
    "curriculum": {"curriculum": STAGES},
    "buckets": {"aspect_buckets": BUCKETS},
    "all": {"repeats": (0.75, 2), "curriculum": STAGES, "aspect_buckets": BUCKETS},
}


def configured(folder, *, repeats=(1, 1), **fields):
    sources = [{"source": str(folder / name), "repeats": r} for name, r in zip(("many", "few"), repeats, strict=True)]
    return DataConfig(**{"sources": sources, "resolution": 64, "num_workers": 0, **fields})


@pytest.mark.parametrize("feature", FEATURES)
def test_workers_processes_micro_batches_and_resume_change_no_pixel(shapes, feature):
    config = configured(shapes, **FEATURES[feature])
    source = config.open(RGB)
    reference = flat(steps(source, config, batch=6, micro=6, count=14))
    assert sorted(reference) == list(range(84))
    assert flat(steps(source, config, batch=6, micro=6, count=14, seed=2)) != reference
    workers = config.model_copy(update={"num_workers": 2})
    assert flat(steps(source, workers, batch=6, micro=2, count=14)) == reference
    for ranks in (2, 3):
        split: dict = {}
        for rank in range(ranks):
            part = flat(steps(source, config, batch=6, micro=1, count=14, rank=rank, ranks=ranks))
            assert not set(part) & set(split)
            split |= part
        assert split == reference
    for start in (6, 36, 42, 66):  # before, at and after the change of stage
        resumed = flat(steps(source, config, batch=6, count=(84 - start) // 6, start=start, ranks=1))
        assert resumed == {position: taken for position, taken in reference.items() if position >= start}
    opened_anew = config.open(RGB)
    assert flat(steps(opened_anew, config, batch=6, count=2, start=30)).items() <= reference.items()


# --- curriculum ---


def test_a_stage_changes_the_size_and_nothing_else(shapes):
    config, plain = configured(shapes, curriculum=STAGES), configured(shapes)
    source = config.open(RGB)
    taken, usual = steps(source, config, count=8, batch=8, micro=8), steps(source, plain, count=8, batch=8, micro=8)
    sides = [{tuple(batch.images.shape[1:3]) for batch in step} for step in taken]
    assert sides == [{(32, 32)}] * 5 + [{(64, 64)}] * 3  # the step that begins at image 40 is the first of stage 2
    assert [batch.keys for step in taken for batch in step] == [batch.keys for step in usual for batch in step]
    assert flat(taken[5:]) == flat(usual[5:])
    small = plain.model_copy(update={"resolution": 32})
    assert flat(taken[:5]) == flat(steps(source, small, count=5, batch=8))


def test_a_step_belongs_to_one_stage(shapes):
    """Also on the process whose part of the step lies after the change."""
    config = configured(shapes, curriculum=STAGES)
    source = config.open(RGB)
    for rank in (0, 1):
        sides = [
            {batch.images.shape[1] for batch in step}
            for step in steps(source, config, batch=16, micro=2, ranks=2, rank=rank, count=4)
        ]
        assert sides == [{32}, {32}, {32}, {64}]  # the third step holds the images 32 to 47


def test_which_stage_it_is():
    config = DataConfig(resolution=64, curriculum=STAGES)
    assert [config.resolution_at(seen) for seen in (0, 39, 40, 10**9)] == [32, 32, 64, 64]
    assert config.resolutions == (32, 64) and config.image_sizes == ((32, 32), (64, 64))
    assert DataConfig(resolution=64).resolution_at(5) == 64
    for stages, reason in (
        ([Stage(from_image=8, resolution=64)], "the first must be 0"),
        ([*STAGES, {"from_image": 40, "resolution": 64}], "each later"),
        ([{"from_image": 0, "resolution": 32}], "resolution is 64 and the last stage of curriculum has 32"),
    ):
        with pytest.raises(ValidationError, match=reason):
            DataConfig(resolution=64, curriculum=stages)


# --- aspect-ratio buckets ---


def test_every_step_has_one_size_and_every_image_its_own(shapes):
    config = configured(shapes, aspect_buckets=BUCKETS)
    source = config.open(RGB)
    sizes = config.image_sizes
    assert (64, 64) in sizes and all(w % 16 == h % 16 == 0 and 0.7 * 64**2 < w * h <= 64**2 for w, h in sizes)
    seen: dict = {}
    for step in steps(source, config, batch=4, micro=2, count=84):
        (shape,) = {tuple(batch.images.shape[1:3]) for batch in step}
        for batch in step:
            for key in batch.keys:
                seen.setdefault(key, []).append(shape[::-1])
    assert set(seen) == set(source.entries().keys) and {len(set(own)) for own in seen.values()} == {1}
    counts = [len(own) for own in seen.values()]
    assert sum(counts) == 336 and min(counts) >= 6 and max(counts) <= 10  # 8 epochs, up to the batches under way
    for key, own in seen.items():
        width, height = SHAPES[int(key[-6:-4]) % len(SHAPES)]
        nearest = min(sizes, key=lambda size: abs(np.log(size[0] / size[1] * height / width)))
        assert own[0] == nearest, key


def test_a_cut_covers_its_bucket_without_stretching():
    from latentvae.data.augment import augment

    y, x = np.mgrid[0:120, 0:200]
    picture = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)  # red says the column, green the row
    config = DataConfig(resolution=64, horizontal_flip=False)
    for index in range(100):
        part = augment(picture, config, 0, 0, str(index), size=(80, 48)).astype(int)
        assert part.shape == (48, 80, 3)
        across, down = (part[20, 70, 0] - part[20, 10, 0]) / 60, (part[40, 30, 1] - part[8, 30, 1]) / 32
        assert abs(across - down) < 0.08 and 120 / (48 * 1.5) - 0.1 < across < 120 / 48 + 0.1
    center = config.model_copy(update={"crop": "center"})
    part = augment(picture, center, 0, 0, "a", size=(48, 48)).astype(int)
    assert abs(part[24, 24, 0] - 100) <= 3 and abs(part[24, 24, 1] - 60) <= 3 and part[24, 0, 0] > 38


def test_sizes_follow_the_stage(shapes):
    fine = {"max_aspect": 2, "multiple_of": 8}
    config = configured(shapes, curriculum=STAGES, aspect_buckets=fine)
    source = config.open(RGB)
    early, late = (steps(source, config, batch=4, count=30, start=start) for start in (0, 400))
    small, large = ({tuple(batch.images.shape[1:3]) for step in part for batch in step} for part in (early[:10], late))
    assert all(height * width <= 32**2 for height, width in small) and len(small) > 1
    assert all(0.7 * 64**2 < height * width <= 64**2 for height, width in large) and len(large) > 2
    usual = steps(source, configured(shapes, aspect_buckets=fine), batch=4, count=30)
    assert [batch.keys for step in early for batch in step] == [batch.keys for step in usual for batch in step]


def test_small_buckets_join_the_nearest_that_fills_a_batch(shapes, tmp_path):
    config = configured(shapes, aspect_buckets=BUCKETS)
    source = config.open(RGB)
    for index in range(2):
        Image.new("RGB", (200, 60), (index, 0, 0)).save(shapes / "many" / f"wide{index}.png")
    wide = config.open(RGB)
    text = plan_summary(config, wide, global_batch_size=4, progress=False)[-1]
    assert text.startswith("buckets     ") and "fill no batch" not in text
    merged = plan_summary(config, source, global_batch_size=12, progress=False)[-1]
    assert "from buckets that fill no batch of 12" in merged
    for batch in (4, 12, 30, 100):
        for step in steps(wide, config, batch=batch, micro=5, count=6):
            assert len({tuple(part.images.shape) for part in step}) == 1
    ((all_merged,),) = steps(wide, config, batch=100, micro=100, count=1)
    assert len(set(all_merged.keys)) == 44  # one bucket is left, with an epoch of 44 images


def test_an_unreadable_image_is_replaced_from_its_bucket(shapes):
    broken = shapes / "many" / "00.png"
    content = broken.read_bytes()
    broken.write_bytes(content[:-200])  # its header is whole, its data is not
    (shapes / "many" / "zz.png").write_bytes(b"no image")  # without a size
    config = configured(shapes, aspect_buckets=BUCKETS)
    source = config.open(RGB)
    assert image_sizes(source, progress=False)[[0, 24]].tolist() == [[96, 64], [-1, -1]]
    told = set()
    for step in steps(source, config, batch=4, micro=1, count=60):
        assert len({tuple(batch.images.shape) for batch in step}) == 1
        for batch in step:
            told |= {key for key, _ in batch.unreadable}
            assert not {"0/00.png", "0/zz.png"} & set(batch.keys)
            (key,) = batch.keys
            if ("0/00.png" in {bad for bad, _ in batch.unreadable}) and len(batch.unreadable) == 1:
                assert int(key[-6:-4]) % 6 in (0, 3, 4)  # the three that are wider than high
    assert told == {"0/00.png", "0/zz.png"}
    assert "1 of unknown size" in plan_summary(config, source, progress=False)[-1]


def test_sizes_are_those_of_the_decoded_images(shapes, photographs):
    Image.new("RGB", (30, 20)).save(photographs / "turned.jpg", exif=_turned())
    sources = [photographs, folder_as_tar(photographs, shapes / "p.tar")]
    for path in sources:
        source = open_source(path)
        expected = [source.read(index).shape[1::-1] for index in range(len(source))]
        assert (20, 30) in expected
        sizes = image_sizes(source, progress=False)
        assert sizes.tolist() == [list(size) for size in expected] and sizes.dtype == np.int32
        assert np.array_equal(image_sizes(source, num_workers=2, progress=False), sizes)
        parts = [image_sizes(source, rows=rows, progress=False) for rows in (range(5), range(5, len(source)))]
        assert np.array_equal(np.concatenate(parts), sizes)
    arrays = open_source([{"key": "a", "image": np.zeros((40, 30, 3), np.uint8)}, {"key": "b", "image": b"no"}])
    assert image_sizes(arrays, progress=False).tolist() == [[30, 40], [-1, -1]]


def _turned():
    exif = Image.Exif()
    exif[274] = 6
    return exif


def test_sizes_that_are_given_are_not_read_again(shapes):
    config = configured(shapes, aspect_buckets=BUCKETS)
    source = config.open(RGB)
    options = {"seed": 1, "start_image": 0, "global_batch_size": 4, "micro_batch_size": 4}
    sizes = image_sizes(source, progress=False)
    batches = training_batches(source, config, RGB, **options, sizes=sizes)
    given = [next(batches) for _ in range(5)]
    assert flat(given) == flat(steps(source, config, batch=4, count=5))
    square = training_batches(source, config, RGB, **options, sizes=np.full_like(sizes, 50))
    assert {tuple(batch.images.shape[1:3]) for _ in range(9) for batch in next(square)} == {(64, 64)}
    with pytest.raises(ValueError, match="42 entries"):
        training_batches(source, config, RGB, **options, sizes=sizes[:5])


def test_buckets_that_cannot_be_are_refused(shapes):
    with pytest.raises(ValidationError, match=r"the resolution 40 is no multiple of aspect_buckets\.multiple_of 16"):
        configured(shapes, resolution=40, aspect_buckets=BUCKETS)
    with pytest.raises(ValidationError, match="the resolution 24 is no multiple"):
        configured(shapes, aspect_buckets=BUCKETS, curriculum=({"from_image": 0, "resolution": 24}, STAGES[1]))
    config = configured(shapes, aspect_buckets=BUCKETS)
    with pytest.raises(UserError, match="image 6, which is no multiple of global_batch_size 4"):
        steps(config.open(RGB), config, batch=4, start=6)


def test_what_training_will_see_is_summed_up(shapes):
    config = configured(shapes, repeats=(1, 2.5), curriculum=STAGES, aspect_buckets=BUCKETS)
    lines = plan_summary(config, config.open(RGB), indices=range(1, 42), global_batch_size=4, progress=False)
    many, few = shapes / "many", shapes / "few"
    assert lines[0] == f"images      23 in {many}, 18 in {few} x 2.5: 68 an epoch"
    assert lines[1] == "curriculum  32 px from image 0, 64 px from image 40"
    assert lines[2].startswith("buckets     ")
    counts = [int(part.split()[1]) for part in lines[2].removeprefix("buckets     ").split(", ")]
    assert sum(counts) == 41 and counts == sorted(counts, reverse=True)
