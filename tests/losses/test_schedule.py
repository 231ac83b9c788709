import pytest

from latentvae.losses.config import LossConfig
from latentvae.losses.objective import Objective
from latentvae.losses.schedule import kl_weight_at


def test_constant():
    assert [kl_weight_at(LossConfig(kl_weight=0.5), n) for n in (0, 10**9)] == [0.5, 0.5]


def test_linear_rises_once():
    config = LossConfig(kl_weight=0.5, kl_schedule="linear", kl_warmup_images=100)
    assert [kl_weight_at(config, n) for n in (0, 50, 100, 1000)] == [0.0, 0.25, 0.5, 0.5]


def test_cyclical_rises_in_every_cycle():
    config = LossConfig(kl_weight=0.5, kl_schedule="cyclical", kl_cycle_images=100, kl_ramp=0.5)
    expected = [0.0, 0.25, 0.5, 0.5, 0.0, 0.25, 0.5]
    assert [kl_weight_at(config, n) for n in (0, 25, 50, 99, 100, 125, 375)] == pytest.approx(expected)
    whole = config.model_copy(update={"kl_ramp": 1.0})
    assert [kl_weight_at(whole, n) for n in (50, 99)] == pytest.approx([0.25, 0.495])


def test_open_shares_of_the_run_are_refused_and_resolved():
    for schedule, middle in (("linear", 50), ("cyclical", 1000 // 4 + 62)):  # 10 percent; four cycles, half of each
        config = LossConfig(perceptual="none", kl_weight=1.0, kl_schedule=schedule)
        for fails in (lambda c: kl_weight_at(c, 0), Objective):
            with pytest.raises(ValueError, match="resolved"):
                fails(config)
        assert kl_weight_at(config.resolved(1000), middle) == pytest.approx(0.5, abs=0.01)
