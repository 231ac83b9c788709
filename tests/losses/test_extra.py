import pytest
import torch
from torch import Tensor, nn

from latentvae.errors import UserError
from latentvae.losses.config import ExtraTerm, LossConfig
from latentvae.losses.extra import load_terms
from latentvae.losses.objective import Objective

HERE = "python:tests.losses.test_extra:"


class Brightness:
    """Squared difference of mean brightness plus that of the latents from 0."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, images: Tensor, reconstructions: Tensor, moments: Tensor) -> Tensor:
        difference = images.flatten(1).mean(1) - reconstructions.flatten(1).mean(1)
        return self.factor * difference.square() + moments.chunk(2, 1)[0].square().flatten(1).mean(1)


class Alignment(nn.Module):
    """A module with random weights of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Dropout(0.5))

    def forward(self, images: Tensor, reconstructions: Tensor, moments: Tensor) -> Tensor:
        return (self.layer(images) - self.layer(reconstructions)).square().mean((1, 2, 3))


class Scalar(Brightness):
    def __call__(self, images, reconstructions, moments):
        return super().__call__(images, reconstructions, moments).mean()


class Count(Brightness):
    def __call__(self, images, reconstructions, moments):
        return torch.ones(len(images), dtype=torch.long)


class Number(Brightness):
    def __call__(self, images, reconstructions, moments):
        return 3.0


class Detached(Brightness):
    @torch.no_grad()
    def __call__(self, images, reconstructions, moments):
        return super().__call__(images, reconstructions, moments)


class Silent:
    pass


class kl(Brightness):
    """Named as a term of ours."""


NOT_A_CLASS = 3


def tensors():
    generator = torch.Generator().manual_seed(0)
    images, reconstructions = torch.rand(2, 2, 3, 8, 12, generator=generator) * 2 - 1
    return images, reconstructions.requires_grad_(), torch.randn(2, 8, 4, 6, generator=generator).requires_grad_()


def load(name, **arguments):
    return load_terms([ExtraTerm(term=HERE + name, weight=2.0, arguments=arguments)])[0]


def test_a_class_is_made_with_its_arguments_and_reaches_both_outputs():
    term = load("Brightness", factor=3.0)
    assert (term.name, term.weight) == ("Brightness", 2.0)
    images, reconstructions, moments = tensors()
    value = term(images, reconstructions, moments)
    torch.testing.assert_close(value, Brightness(3.0)(images, reconstructions, moments))
    value.sum().backward()
    assert reconstructions.grad.abs().sum() > 0 and moments.grad.abs().sum() > 0


def test_a_module_is_frozen_and_in_eval_mode_and_the_same_on_every_process():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = load("Alignment", channels=4).compute
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    second = load("Alignment", channels=4).compute
    assert not any(p.requires_grad for p in first.parameters())
    assert not any(module.training for module in first.modules())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    images, reconstructions, moments = tensors()
    load("Alignment", channels=4)(images, reconstructions, moments).sum().backward()
    assert reconstructions.grad.abs().sum() > 0


def test_two_of_one_class_are_told_apart():
    terms = load_terms([ExtraTerm(term=HERE + "Brightness")] * 3)
    assert [term.name for term in terms] == ["Brightness", "Brightness#2", "Brightness#3"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Scalar", r"Scalar gave a torch.float32 tensor \(\); .*tensor \(2,\)"),
        ("Count", r"Count gave a torch.int64 tensor \(2,\)"),
        ("Number", "Number gave a float"),
        ("Detached", "Detached gave a value without a gradient"),
    ],
)
def test_a_term_that_gives_something_else_is_named(name, says):
    with pytest.raises(UserError, match=says):
        load(name)(*tensors())


def test_a_term_of_frozen_moments_may_have_no_gradient():
    images, reconstructions, moments = tensors()
    assert load("Detached")(images, reconstructions, moments.detach()).shape == (2,)


@pytest.mark.parametrize(
    ("term", "says"),
    [
        ("tests.losses.test_extra:Brightness", "write it as python:module:Class"),
        ("python:tests.losses.test_extra", "write it as python:module:Class"),
        ("python:no_such_module:Class", "No module named 'no_such_module'; install .* PYTHONPATH"),
        (HERE + "Missing", "test_extra has no .Missing"),
        (HERE + "NOT_A_CLASS", "is a int; a class is needed"),
        (HERE + "Silent", "made a Silent, which cannot be called"),
        (HERE + "kl", "a term of ours: rename"),
    ],
)
def test_a_term_that_cannot_be_had_is_told_in_one_line(term, says):
    with pytest.raises(UserError, match=says) as caught:
        load_terms([ExtraTerm(term=term)])
    assert "\n" not in str(caught.value)


def test_wrong_arguments_are_named():
    with pytest.raises(
        UserError, match=r"Brightness takes \(factor: float = 1.0\).*unexpected keyword argument 'fctor'"
    ):
        load("Brightness", fctor=1.0)
    with pytest.raises(UserError, match="missing a required argument: 'channels'"):
        load("Alignment")


def test_from_config_loads_them():
    config = LossConfig(perceptual="none", extra=[{"term": HERE + "Brightness", "arguments": {"factor": 2.0}}])
    objective = Objective.from_config(config, latent_scale=0.5)
    assert [term.name for term in objective.extra] == ["Brightness"] and objective.latent_scale == 0.5
    with pytest.raises(ValueError, match="1 terms, 0 are given"):
        Objective(config)
