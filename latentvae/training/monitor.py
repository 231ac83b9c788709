"""Watches the logged figures of a run for the ways in which autoencoders and their discriminators go wrong.

It sees the rows of metrics.jsonl and nothing else, so its whole state is rebuilt from that file when a run is resumed
or described.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

PATIENCE = 3  # log intervals in a row: one bad interval is noise
VALIDATION_PATIENCE = 2  # validations in a row with unused channels: the first may come before they are learned
MAX_ACCURACY = 0.95  # of the discriminator: nearly every patch is told rightly, its slope says little
MAX_LOGIT_GAP = 4.0  # real minus fake: twice the 2 at which the hinge loss stops asking for more (margins at 1 and -1)
BLIND_ACCURACY = 0.05  # around one half, where a coin lies
BLIND_GRACE = 0.05  # of the run: a discriminator that has just begun is no better than a coin
GROWTH = 0.1  # of the generator's term over PATIENCE intervals, in logits; hinge puts its margin at 1
CLAMPED = 0.95  # of adaptive_max: no step lies above 1, so at least half of them lie above 0.9
INACTIVE_SHARE = 0.25  # of the channels; a latent of 4 channels that uses 3 has a quarter less than was paid for
MIN_KL = 0.01  # nats per element; posterior means of variance 0.01, Burda's bound of an active unit, cost half of this
MAX_PSNR_DROP = 1.0  # dB below the best; validations of a sound run differ by tenths
MAX_CLIPPING = 100.0  # gradient norm by its clip: nothing but the direction is left of such a step

Row = Mapping[str, Any]  # of numbers, but for the events between them


class CollapseMonitor:
    """`observe` takes the rows of a run one by one and returns what has just gone wrong, each with the remedy.

    A warning of one kind comes once, and again only after that kind has recovered.

    Args:
        settings: the resolved recipe as nested dicts.

    Attributes:
        standing: kind => the warning, of all that have not recovered.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.loss: Mapping[str, Any] = settings.get("loss") or {}
        self.training: Mapping[str, Any] = settings.get("training") or {}
        self.standing: dict[str, str] = {}
        self._in_a_row: dict[str, int] = {}
        self._generator: deque[float] = deque(maxlen=PATIENCE + 1)  # its adversarial term, of the last intervals
        self._best_psnr: float | None = None
        self._checks: dict[str, tuple[int, Callable[[Row], str | None]]] = {
            "discriminator too strong": (PATIENCE, self._strong),
            "discriminator blind": (PATIENCE, self._blind),
            "adaptive weight at its bound": (PATIENCE, self._clamped),
            "no information in the latents": (PATIENCE, self._no_information),
            "autoencoder gradient": (PATIENCE, lambda row: self._clipped(row, "autoencoder")),
            "discriminator gradient": (PATIENCE, lambda row: self._clipped(row, "discriminator")),
            "unused channels": (VALIDATION_PATIENCE, self._unused),
            "PSNR falls": (1, self._falling),
        }

    @classmethod
    def replayed(cls, settings: Mapping[str, Any], rows: Iterable[Row]) -> Self:
        """As it stood after these rows."""
        monitor = cls(settings)
        for row in rows:
            monitor.observe(row)
        return monitor

    def observe(self, row: Row) -> list[str]:
        """Warnings that this row of metrics.jsonl gives rise to, one line each.

        A kind whose figures are not in the row stays as it was.
        """
        fresh = []
        for kind, (patience, check) in self._checks.items():
            try:
                found = check(row)
            except KeyError:
                continue
            if found is None:
                self._in_a_row.pop(kind, None)
                self.standing.pop(kind, None)
                continue
            self._in_a_row[kind] = self._in_a_row.get(kind, 0) + 1
            if self._in_a_row[kind] >= patience and kind not in self.standing:
                self.standing[kind] = f"{kind}: {found}"
                fresh.append(self.standing[kind])
        return fresh

    # Each check gives None where all is well, or what is wrong and the remedy; KeyError where the row does not say.

    def _strong(self, row: Row) -> str | None:
        accuracy = row["discriminator_accuracy"]
        gap = row["discriminator_real_logits"] - row["discriminator_fake_logits"]
        if row["images_seen"] <= (self.loss.get("adversarial_start") or 0):
            return None  # it warms up alone: nobody answers it yet
        if accuracy <= MAX_ACCURACY and gap <= MAX_LOGIT_GAP:
            return None
        return (
            f"it tells {accuracy:.0%} of the patches rightly, with logits {gap:.1f} apart, so its gradient hardly "
            "guides the decoder: lower training.discriminator_learning_rate or loss.adversarial_weight, or set "
            "loss.discriminator_start later"
        )

    def _blind(self, row: Row) -> str | None:
        accuracy, generator = row["discriminator_accuracy"], row["adversarial"]
        self._generator.append(generator)
        begins = (self.loss.get("discriminator_start") or 0) + BLIND_GRACE * self.training.get("total_images", 0)
        grows = len(self._generator) > 1 and generator - self._generator[0] > GROWTH
        if abs(accuracy - 0.5) > BLIND_ACCURACY or row["images_seen"] < begins or not grows:
            return None
        return (
            f"it tells only {accuracy:.0%} of the patches rightly while the adversarial term grows to "
            f"{generator:.3g}, so it pushes the decoder nowhere: raise training.discriminator_learning_rate, lower "
            "loss.adversarial_weight, or set loss.adversarial_start later"
        )

    def _clamped(self, row: Row) -> str | None:
        weight, bound = row["adaptive_weight"], self.loss["adaptive_max"]
        if weight < CLAMPED * bound:
            return None
        return (
            f"it lies at loss.adaptive_max={bound:g} in most steps, so the balance is no longer adaptive: raise "
            "loss.adaptive_max, or choose loss.adversarial_balance=constant and a weight of your own"
        )

    def _no_information(self, row: Row) -> str | None:
        value = row["kl"]
        if value >= MIN_KL or not self.loss["kl_weight"]:
            return None
        return (
            f"the KL term is {value:.2g} nats per element, so the posterior is the prior whatever the image: lower "
            f"loss.kl_weight ({self.loss['kl_weight']:g}), or let it rise slowly with loss.kl_schedule=linear, or "
            "allow loss.free_bits"
        )

    def _clipped(self, row: Row, network: str) -> str | None:
        norm, bound = row[f"{network}_grad_norm"], self.training["max_grad_norm"]
        if norm <= MAX_CLIPPING * bound:
            return None
        rate = "learning_rate" if network == "autoencoder" else "discriminator_learning_rate"
        return (
            f"its norm of {norm:.3g} is cut to training.max_grad_norm={bound:g} in every step: lower training.{rate}, "
            "set training.warmup_images, or raise training.max_grad_norm where the loss is sound"
        )

    def _unused(self, row: Row) -> str | None:
        active, channels = row["validation_active_channels"], row["validation_latent_channels"]
        if active > (1 - INACTIVE_SHARE) * channels:
            return None
        return (
            f"only {active:.0f} of {channels:.0f} latent channels tell the images apart: lower loss.kl_weight, let "
            "it rise slowly with loss.kl_schedule=linear, allow loss.free_bits, or build a model with fewer channels"
        )

    def _falling(self, row: Row) -> str | None:
        psnr = row["validation_psnr"]
        best = self._best_psnr = max(psnr, self._best_psnr if self._best_psnr is not None else psnr)
        if psnr >= best - MAX_PSNR_DROP:
            return None
        adversarial = self.loss.get("adversarial_weight") and row["images_seen"] > (
            self.loss.get("adversarial_start") or 0
        )
        remedy = "lower loss.adversarial_weight or " if adversarial else "lower "
        return (
            f"{psnr:.2f} dB is {best - psnr:.1f} dB below the best validation: {remedy}training.learning_rate, and go "
            "on from an earlier checkpoint; RUN/best holds the better model"
        )
