"""LPIPS as a training loss: always in eval mode, in float32 or wider, on inputs of the range it was made for."""

import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from latentvae.errors import UserError, one_line
from latentvae.losses.terms import widened

PerceptualNet = Literal["vgg", "alex", "squeeze"]

WEIGHTS: dict[str, str] = {  # ImageNet backbones, named by torchvision; the end of each name is the start of its sha256
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
WEIGHTS_URL = "https://download.pytorch.org/models/"
MINIMUM_SIZE: dict[str, int] = {"vgg": 16, "alex": 31, "squeeze": 17}  # pixels; smaller ones vanish in the pooling
RANGE_TOLERANCE = 1e-3  # rounding of images converted in half precision; a wrong range is off by 1 or more
CONNECT_SECONDS = 20.0


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Let no connection wait for ever: torch.hub sets no timeout of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _obtain_weights(net: str) -> Path:
    """The backbone's file in torch's cache, downloaded if it is not there; UserError where that fails."""
    name = WEIGHTS[net]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _network_timeout(CONNECT_SECONDS):
            prefix = path.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(WEIGHTS_URL + name, str(path), hash_prefix=prefix, progress=False)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the hash of what came is wrong
        reason = one_line(error) or type(error).__name__
        raise UserError(
            f"LPIPS-{net} needs {name}, which is not in {path.parent} and could not be downloaded ({reason}): "
            f"put {WEIGHTS_URL}{name} there (TORCH_HOME moves the folder), or set loss.perceptual=none"
            + ("" if net == "squeeze" else " or squeeze (a file of 5 MB)")
        ) from error
    return path


def _load_lpips(net: str) -> nn.Module:
    path = _obtain_weights(net)
    import lpips  # brings torchvision: seconds that only a run with this loss should pay

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips asks torchvision with arguments that it deprecated
            network: nn.Module = lpips.LPIPS(net=net, verbose=False)
    except Exception as error:
        raise UserError(
            f"LPIPS-{net} cannot be built from {path} ({type(error).__name__}: {one_line(error)[:200]}): "
            "if the file is damaged, delete it so that it is fetched again"
        ) from error
    return network.eval().requires_grad_(False)


def check_size(net: PerceptualNet, side: int) -> None:
    """Raise a UserError where images of this shorter side, in pixels, are too small for the backbone."""
    if side < MINIMUM_SIZE[net]:
        raise UserError(
            f"images have {side} pixels a side; LPIPS-{net} needs {MINIMUM_SIZE[net]}: raise data.resolution (and "
            "validation.resolution) or set loss.perceptual=none"
        )


def _unit_length(features: Tensor) -> Tensor:
    """Feature vectors scaled to length 1, as lpips does, but with a finite gradient where that length is 0."""
    length = features.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt()
    return features / (length + 1e-10)  # (B, c, h, w)


class Perceptual(nn.Module):
    """LPIPS distance per image (Zhang et al. 2018, version 0.1 of the `lpips` package).

    The backbone is kept out of the module tree on purpose: it moves with `.to()`, but no optimizer, state dict,
    DistributedDataParallel or `.train()` can reach it.

    Images must lie in [-1, 1]. Reconstructions may overshoot and are clamped: LPIPS then judges the picture that will
    be seen, which is clamped too, and is never fed a range it was not made for. A clamped value gets no gradient from
    here, as the distance does not depend on it; the pixel term pulls it back.

    Raises UserError where the weights cannot be had, or where `channels` cannot be shown to an RGB network.
    """

    def __init__(
        self, net: PerceptualNet = "vgg", *, channels: int = 3, bands: Sequence[Sequence[int]] | None = None
    ) -> None:
        """`bands`: triplets of channel indices, each shown as R, G, B; the distance is the mean over the triplets."""
        super().__init__()
        if bands is None:
            if channels not in (1, 3):
                raise UserError(
                    f"loss.perceptual={net} compares RGB pictures, but images have {channels} channels: name triplets "
                    "in loss.perceptual_bands, for example [[3, 2, 1]], or set loss.perceptual=none"
                )
            bands = [[0, 1, 2]] if channels == 3 else [[0, 0, 0]]
        for triplet in bands:
            if len(triplet) != 3 or not all(0 <= band < channels for band in triplet):
                raise UserError(
                    f"loss.perceptual_bands has {list(triplet)}; each entry must be three of 0..{channels - 1}, "
                    "the indices of the image channels"
                )
        self.net: PerceptualNet = net
        self.channels = channels
        self.bands = [band for triplet in bands for band in triplet]
        self._held = [_load_lpips(net)]  # in a list: see the class docstring
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: dropout in LPIPS would make the loss a random one."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._held[0]._apply(fn, recurse)
        return self

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """images [-1, 1] and reconstructions, both (B, C, H, W) => (B,), >= 0, and 0 for identical images.

        Raises ValueError for images outside [-1, 1], UserError for images too small for the backbone.
        """
        self._check(images, reconstructions)
        images, reconstructions = widened(images), widened(reconstructions).clamp(-1, 1)
        dtype = torch.promote_types(images.dtype, reconstructions.dtype)
        network: Any = self._widened_network(dtype)  # its parts are typed as Tensor or Module
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                target = [_unit_length(f) for f in self._features(network, images.to(dtype))]
            features = self._features(network, reconstructions.to(dtype))
            distance = torch.zeros((), dtype=dtype, device=images.device)
            for layer, a, b in zip(network.lins, target, features, strict=True):
                distance = distance + layer((a - _unit_length(b)).square()).mean((1, 2, 3))  # (B * triplets,)
        return distance.view(len(images), -1).mean(1)  # (B,)

    def _features(self, network: Any, images: Tensor) -> Sequence[Tensor]:
        b, _, h, w = images.shape
        if self.bands != [0, 1, 2] or self.channels != 3:
            images = images[:, self.bands].reshape(b * len(self.bands) // 3, 3, h, w)
        features: Sequence[Tensor] = network.net(network.scaling_layer(images))
        return features

    def _widened_network(self, dtype: torch.dtype) -> nn.Module:
        """The backbone in the dtype of the loss: float64 when the run is in float64."""
        network = self._held[0]
        current = next(network.parameters()).dtype
        if torch.promote_types(current, torch.float32) != current:
            raise TypeError(f"the perceptual network was cast to {current}; keep it in float32 or wider")
        return network if current == dtype else network.to(dtype)

    def _check(self, images: Tensor, reconstructions: Tensor) -> None:
        if images.shape != reconstructions.shape or images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"images {tuple(images.shape)} and reconstructions {tuple(reconstructions.shape)} must both be "
                f"(B, {self.channels}, H, W)"
            )
        check_size(self.net, min(images.shape[2:]))
        low, high = torch.stack(images.detach().aminmax()).tolist()  # one wait for the device
        if low < -1 - RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:  # NaN passes: the non-finite guard names it better
            raise ValueError(
                f"images lie in [{low:.4g}, {high:.4g}]; LPIPS takes [-1, 1]: convert them with images.to_model"
            )
