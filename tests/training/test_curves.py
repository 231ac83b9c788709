"""The picture of a run: what is drawn of it, from runs of any length."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from latentvae.training.curves import _series, _smoothed, draw_run, pixels_of, plot_run
from latentvae.training.run_dir import RunDirectory
from latentvae.training.wording import changes_planned, duration, progress_line, short_images, size

SETTINGS = {
    "model": {"preset": "f8c4"},
    "data": {"curriculum": [{"from_image": 0, "resolution": 128}, {"from_image": 600, "resolution": 256}]},
    "loss": {"adversarial_weight": 0.5, "discriminator_start": 300, "adversarial_start": 400},
    "training": {"total_images": 1000, "decoder_only_start": 900},
}


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.begin(json.dumps(SETTINGS))
    return run


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes if ax.get_visible()]


def texts(figure):
    return " ".join(text.get_text() for text in figure.texts)


def test_each_figure_that_was_logged_has_its_panel(run):
    for images in range(0, 800, 8):
        run.append_metrics({"images_seen": images, "reconstruction": 0.5, "kl": 1.0, "learning_rate": 1e-4})
    run.append_metrics({"images_seen": 400, "validation_psnr": 20.0, "validation_channel_std": [1.0]})
    run.append_metrics({"images_seen": 160, "event": "resumed"})
    figure = draw_run(run)
    assert titles(figure) == [
        "Validation PSNR (dB)",
        "Reconstruction loss",
        "KL (nats per latent element)",
        "Learning rate",
    ]
    told = texts(figure)
    assert "792 of 1,000 images" in told and "resumed" in told and "256 px from 600" in told
    assert "decoder only" not in told  # that lies ahead
    low, high = figure.axes[1].get_ylim()
    assert low < 0.5 < high
    left, right = figure.axes[1].get_xlim()
    assert left <= 0 and 792 < right < 850


def test_the_png_is_the_figure(run):
    run.append_metrics({"images_seen": 4, "reconstruction": 0.5})
    picture = np.asarray(Image.open(plot_run(run)).convert("RGB"))
    assert np.array_equal(picture, pixels_of(draw_run(run)))
    assert picture.std() > 1 and picture.shape[1] > picture.shape[0]
    assert not list(run.path.glob("*.tmp-*"))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"images_seen": 4}],
        [{"images_seen": 0, "reconstruction": 0.0}],
        [{"images_seen": 4, "reconstruction": 1.0}, {"images_seen": 4, "validation_psnr": 100.0}],
        [{"images_seen": 4, "reconstruction": math.nan}, {"images_seen": 8, "reconstruction": math.inf}],
        [{"images_seen": 10**10 + n, "reconstruction": 10.0 ** (n % 9 - 4), "kl": -1.0} for n in range(50)],
        [{"images_seen": 8, "reconstruction": 1.0}, {"images_seen": 4, "reconstruction": None}],
    ],
    ids=["none", "bare", "zero", "single", "not finite", "wide", "odd"],
)
def test_short_and_odd_runs_are_drawn_without_a_warning(run, rows, recwarn):
    for row in rows:
        run.append_metrics(row)
    assert pixels_of(draw_run(run)).ndim == 3
    assert [str(warning.message) for warning in recwarn] == []


def test_a_run_without_a_recipe_is_drawn(tmp_path):
    (tmp_path / "bare").mkdir()
    figure = draw_run(RunDirectory(tmp_path / "bare"))
    assert titles(figure) == [] and "nothing is logged yet" in texts(figure)


def test_a_series_is_sorted_and_finite():
    rows = [{"images_seen": 8, "a": 2}, {"images_seen": 4, "a": 1.0}, {"images_seen": 6, "a": math.nan}, {"b": 3}]
    x, y = _series([row | {"images_seen": row.get("images_seen", 1)} for row in rows], "a")
    assert x.tolist() == [4, 8] and y.tolist() == [1, 2]


def test_smoothing_keeps_a_level_line_and_takes_noise_away():
    noise = np.random.default_rng(0).normal(size=1000)
    assert np.allclose(_smoothed(np.full(100, 3.0)), 3.0)
    assert _smoothed(5 + noise)[100:].std() < 0.3 and abs(_smoothed(5 + noise).mean() - 5) < 0.1
    assert _smoothed(np.array([7.0, 1.0, 1.0]))[0] == 7.0  # the first value is its own
    step = _smoothed(np.repeat([0.0, 1.0], 500))
    assert step[499 - 40] == 0 and step[500 + 40] == 1 and 0.4 < step[500] < 0.6  # it neither lags nor leads


def test_a_recipes_changes_are_told_in_their_order():
    told = [(change.images, change.what) for change in changes_planned(SETTINGS)]
    assert told == [(300, "discriminator trains"), (400, "adversarial term"), (600, "256 px"), (900, "decoder only")]
    without = SETTINGS | {"loss": SETTINGS["loss"] | {"adversarial_weight": 0.0}}
    assert [change.images for change in changes_planned(without)] == [600, 900]
    assert changes_planned({}) == []


def test_figures_are_written_for_a_reader():
    assert [short_images(n) for n in (0, 950, 12_800, 2_500_000)] == ["0", "950", "12.8k", "2.5M"]
    told = ["5 s", "1 min", "5 min", "2 h 05 min", "1 d 00 h", "1 d 04 h"]
    assert [duration(s) for s in (5, 59.6, 300, 7500, 86_390, 100_000)] == told
    assert [size(n) for n in (0, 900, 1536, 3.2 * 2**30)] == ["0 bytes", "900 bytes", "1.5 KiB", "3.2 GiB"]
    assert progress_line(50, 100, 0.5) == "50 of 100 images (50.0%), 2 min left"
    assert progress_line(100, 100, 0.5) == "100 of 100 images (100.0%)"


def test_changes_at_one_time_share_a_mark(run):
    """The recipe finetune_eq lets the autoencoder train and feel the discriminator from the same image on."""
    settings = SETTINGS | {"loss": SETTINGS["loss"] | {"autoencoder_start": 400}}
    run.begin(json.dumps(settings))
    for images in (8, 800):
        run.append_metrics({"images_seen": images, "validation_equivariance_error": 0.1})
    figure = draw_run(run)
    assert titles(figure) == ["Validation equivariance error"]
    (ax,) = (ax for ax in figure.axes if ax.get_visible())
    assert {text.get_position()[0]: text.get_text() for text in ax.texts} == {300: "1", 400: "2 3", 600: "4"}


def test_a_run_that_is_bounded_by_time_is_not_shown_as_a_share_of_its_images(run):
    run.append_metrics({"images_seen": 8, "reconstruction": 0.5})
    assert "8 of 1,000 images (0.8%)" in texts(draw_run(run))
    run.begin(json.dumps(SETTINGS | {"training": SETTINGS["training"] | {"max_minutes": 3}}))
    assert "8 images" in texts(draw_run(run)) and "%" not in texts(draw_run(run))


def test_a_folder_with_dollar_signs_is_drawn(tmp_path):
    run = RunDirectory(tmp_path / "a$b_{c$d")
    run.begin(json.dumps(SETTINGS))
    assert pixels_of(draw_run(run)).ndim == 3
