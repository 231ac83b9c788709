"""The dry run: its figures are those of the encoding that follows, and it leaves nothing behind."""

import tarfile

import pytest
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors import safe_open

from latentvae.errors import UserError
from latentvae.latents.encoding import launch, placements
from latentvae.latents.encoding.estimate import plan_dataset
from latentvae.latents.encoding.placements import SizeSample, placed
from latentvae.latents.store.buckets import square_rule
from latentvae.latents.store.files import LatentStore
from tests.latents.stores import contents, tiny_vae

SETTINGS = {"resolution": 32, "unit_images": 3, "batch_size": 2, "num_workers": 0, "device": "cpu"}
PER_IMAGE = 2 * 2 * 16 * 16 * 2  # bytes: mean and logvar, two channels of 16x16, two bytes each


@pytest.fixture
def plan(photographs, vae, tmp_path):
    """The plan of the twelve photographs, 72x96 pixels each, in units of 3; keywords change anything."""

    def planned(out="store", *, source=photographs, vae=vae, **options):
        return plan_dataset(source, vae, out and tmp_path / out, **(SETTINGS | options))

    return planned


def tensor_bytes(store):
    total = 0
    for path in store.glob("shards/*/*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in list(file.keys()))
    return total


def test_a_plan_says_what_the_encoding_then_does(plan, encode, tmp_path):
    before = contents(tmp_path)
    told = plan()
    assert contents(tmp_path) == before and not (tmp_path / "store").exists()
    assert (told.num_images, told.num_units, told.images_left, told.units_left) == (12, 4, 12, 4)
    assert told.placements.buckets == {"32x32": 1.0} and told.sizes.is_whole
    report = encode()
    manifest = LatentStore(tmp_path / "store").read_manifest()
    assert told.manifest.fingerprint == manifest.fingerprint and told.num_units == report.units
    assert told.disk["moments", "fp16"] == tensor_bytes(tmp_path / "store") == 12 * PER_IMAGE
    assert told.disk["mean", "fp32"] == told.disk["moments", "bf16"] == 12 * PER_IMAGE
    assert told.images_per_second > 0 and told.seconds == 12 / told.images_per_second


def test_a_plan_fits_on_a_screen_and_names_everything(plan, tmp_path):
    text = str(plan(precision="bf16", store="auto", batch_size="auto", hflip=True))
    lines = text.splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 100
    for part in ("12 images in 4 units", "AutoencoderKL", "32x32", "100.0%", "moments", "bf16", "images/s", "kB"):
        assert part in " ".join(text.split())
    for part in ("bf16 differs from fp32", "posterior std", "nothing is done yet"):
        assert part in " ".join(text.split())
    assert plan().manifest.fingerprint in str(plan())
    assert "a new one" in str(plan(out=None))


def test_mirrored_images_take_as_much_again(plan):
    assert plan(hflip=True).disk["moments", "fp16"] == 2 * 12 * PER_IMAGE


def test_what_is_done_is_not_left(plan, encode, photographs, tmp_path):
    encode()
    told = plan()
    assert (told.images_left, told.units_left, told.growth, told.seconds) == (0, 0, [], 0)
    next((tmp_path / "store").glob("shards/*/u000002.json")).unlink()
    (photographs / "class_0" / "image_00.jpg").unlink()
    Image.new("RGB", (40, 50)).save(photographs / "class_0" / "new.png")
    before = contents(tmp_path)
    told = plan()
    assert contents(tmp_path) == before
    assert (told.num_images, told.num_units, told.images_left, told.units_left) == (13, 5, 4, 2)
    assert told.growth == ["1 images new in the source", "1 images no longer in the source"]
    assert "4 images in 2 units are left; 1 images new in the source" in " ".join(str(told).split())
    report = encode()
    assert report.units_encoded == 2 and report.images_encoded == 4


def test_edited_images_and_errors_are_left(plan, encode, photographs):
    (photographs / "claim.png").write_bytes(b"no image")
    encode()
    assert plan().units_left == 0
    assert plan(retry_errors=True).units_left == 1
    Image.new("RGB", (50, 60)).save(photographs / "class_1" / "image_01.png")
    told = plan()
    assert told.units_left == 1 and told.growth[0].startswith("1 images changed on disk")


def test_a_plan_refuses_what_the_encoding_refuses(plan, encode, tmp_path, photographs):
    encode()
    with pytest.raises(UserError, match="dtype is fp16 there and fp32 here"):
        plan(dtype="fp32")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(folder / "x.png")
    with pytest.raises(UserError, match="none of its keys is in"):
        plan(source=folder)
    with pytest.raises(UserError, match="is not empty and not a latent store"):
        plan("elsewhere")
    with pytest.raises(UserError, match="takes multiples of 2"):
        plan("new", resolution=33)
    with pytest.raises(UserError, match="96x72 is smaller than 128x128"):
        plan("new", resolution=128, store="auto")


def test_the_kind_that_is_measured_is_the_one_planned(plan, encode, tmp_path):
    assert plan(store="auto").manifest.store == "moments"
    encode(store="auto")
    assert plan(store="auto", vae=tiny_vae()).units_left == 0  # recorded, whatever would be measured now


def test_sizes_decide_buckets_crops_and_what_is_left_out(plan, photographs):
    """72x96 photographs: 12 of them, 2 upright ones, one too small, one that only claims to be an image."""
    for index in range(2):
        Image.new("RGB", (72, 96)).save(photographs / f"upright_{index}.png")
    Image.new("RGB", (30, 20)).save(photographs / "small.png")
    (photographs / "claim.png").write_bytes(b"no image")
    options = {"resolution": None, "buckets": "area=4096,step=16,max-ratio=2"}
    found = plan(**options).placements
    assert found.buckets == {"80x48": 12 / 16, "48x80": 2 / 16}
    assert (found.skipped, found.unreadable, found.upscaled, found.kept_small) == (1 / 16, 1 / 16, 0, 0)
    assert found.cropped == 14 / 16  # 96x72 to 80x60, of which 80x48 are kept
    assert found.area_lost == pytest.approx(1 - 48 / 60) and found.positions == 40 * 24
    found = plan(**options, small="upscale").placements
    assert found.upscaled == 1 / 16 and found.skipped == 0 and found.buckets["80x48"] == 13 / 16
    found = plan(**options, small="keep").placements
    assert found.kept_small == 1 / 16 and found.buckets["16x16"] == 1 / 16
    assert "6.2% left out" in str(plan(**options))


def test_shares_are_of_all_that_were_looked_at():
    import numpy as np

    sizes = np.array([(64, 64)] * 6 + [(128, 64)] * 2 + [(-1, -1), (8, 8)])
    found = placed(SizeSample(sizes, False), square_rule(64, 8, 8, "skip"))
    assert found.buckets == {"64x64": pytest.approx(0.8)} and found.encoded == pytest.approx(0.8)
    assert (found.skipped, found.unreadable, found.cropped) == (0.1, 0.1, 0.2)
    assert found.area_lost == pytest.approx(2 * 0.5 / 8) and found.positions == 64
    nothing = placed(SizeSample(np.array([(-1, -1)]), True), square_rule(64, 8, 8, "skip"))
    assert nothing.buckets == {} and nothing.unreadable == 1 and nothing.encoded == 0


def test_of_a_large_folder_a_sample_of_headers_is_read(plan, monkeypatch):
    monkeypatch.setattr(placements, "PROBED", 5)
    told = plan()
    assert len(told.sizes.sizes) == 5 and not told.sizes.is_whole and "of 5 images, a sample" in str(told)
    told = plan(resolution=None, buckets="area=4096,step=16")  # the plan itself reads all headers
    assert len(told.sizes.sizes) == 12 and told.sizes.is_whole


def test_archives_are_sampled_by_reading(plan, photographs, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for path in sorted(photographs.rglob("*.*")):
            tar.add(path, path.name)
    told = plan(source=tmp_path / "images.tar", resolution=None, buckets="area=4096,step=16,max-ratio=2")
    assert told.sizes.is_whole and told.placements.buckets == {"80x48": 1.0}
    assert told.num_units == 4 and told.sizes.sizes.tolist() == [[96, 72]] * 12


def test_all_too_small_is_told_and_takes_no_disk(plan):
    told = plan(resolution=256)
    assert told.placements.skipped == 1 and told.disk["moments", "fp16"] == 0 and told.seconds == 0
    assert "100.0% left out" in str(told) and "none of 12 images could be encoded" in str(told)


def test_a_model_without_a_posterior_has_one_choice(plan):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=2,
    )  # fmt: skip
    told = plan(vae=tiny)
    assert told.manifest.store == "mean" and {kind for kind, _ in told.disk} == {"mean"}
    assert told.calibration.posterior_std is None and "posterior std" not in str(told)


def test_under_a_launcher_the_process_that_plans_waits_for_no_other(plan, monkeypatch):
    def joined(*arguments, **options):
        raise AssertionError("it waits for processes that have ended already")

    monkeypatch.setattr(launch, "PartialState", joined)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert plan(device=None).num_images == 12
