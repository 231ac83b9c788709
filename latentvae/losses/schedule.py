"""How the weight of the KL term changes over a run."""

from latentvae.losses.config import LossConfig


def kl_weight_at(config: LossConfig, images_seen: int) -> float:
    """Weight of the KL term on the batch that follows `images_seen` images, in [0, kl_weight].

    linear: from 0 to kl_weight within kl_warmup_images (Bowman et al. 2016 warm it up too). cyclical: in every
    kl_cycle_images from 0 to kl_weight within the part kl_ramp, then constant (Fu et al. 2019, eq. 6 and 7).

    Raises:
        ValueError: the schedule is a share of the run that `LossConfig.resolved` has not been asked for.
    """
    if config.kl_schedule == "constant":
        return config.kl_weight
    length = config.kl_warmup_images if config.kl_schedule == "linear" else config.kl_cycle_images
    if length is None:
        raise ValueError("the images of the KL schedule are open: call LossConfig.resolved(total_images)")
    if config.kl_schedule == "linear":
        return config.kl_weight * min(images_seen / length, 1.0)
    return config.kl_weight * min(images_seen % length / length / config.kl_ramp, 1.0)
