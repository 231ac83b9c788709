"""What is shown of long work, with and without a terminal."""

import io
import logging
import re

import pytest
from rich.console import Console

from latentvae import progress
from latentvae.progress import ImageProgress

FIGURES = {"reconstruction": 0.0123, "psnr": 21.3, "lpips": 0.23}


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_terminal_of_any_width_shows_count_rate_and_time_left(monkeypatch, width):
    shown = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=shown, force_terminal=True, width=width))
    with ImageProgress("training", 1_000_000) as bar:
        bar._began -= 100
        bar.update(12_345, total=30_000, figures=FIGURES)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert re.search(r"12345/30000 images, 12\d\.\d/s, left +[-:\d]+", text)
    assert ("lpips 0.23" in text) == (width == 160)


def test_without_a_terminal_there_are_lines_now_and_then(caplog):
    caplog.set_level(logging.INFO, logger="latentvae")
    with ImageProgress("training", 100, start=10, seconds_between_lines=0) as bar:
        bar._began -= 10
        bar.update(60, figures=FIGURES)
    assert "training: 60/100 images, 5.0 images/s, 0.1 min left reconstruction 0.0123 psnr 21.3" in caplog.text


def test_nothing_is_shown_where_it_is_disabled(caplog):
    caplog.set_level(logging.INFO, logger="latentvae")
    with ImageProgress("training", 100, seconds_between_lines=0, enabled=False) as bar:
        bar.update(60)
    assert not caplog.text and bar.done == 60
