"""The fine-tuning recipes say what they are, hold the values of their sources, and run on a tiny starting model."""

import pytest

from latentvae import cli
from latentvae.assembly import build
from latentvae.checkpoint import load_model, save_model
from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.recipe import load_recipe, require_given, shipped_recipes
from tests.model.pairs import RELEASED, enliven

NAMES = ("finetune_decoder", "finetune_small", "finetune_eq")
SMALL = (  # what makes a recipe run on a CPU in seconds; the choices that it stands for stay
    "data.resolution=32",
    "data.num_workers=0",
    "loss.perceptual=squeeze",
    "loss.discriminator.base_channels=8",
    "loss.discriminator.num_layers=1",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "training.warmup_images=4",
    "training.trackers=[]",
    "validation.max_images=2",
    "validation.fraction=0.25",
)


def comment(name):
    """The first lines of a recipe, as one text."""
    lines = shipped_recipes()[name].read_text(encoding="utf-8").splitlines()
    first = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:first])


def tiny_start(folder):
    narrow = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 2, "layers_per_block": 1}
    return save_model(enliven(AutoencoderKL(**RELEASED["sd1"] | narrow)), folder / "start")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_explains_itself(name):
    text = comment(name)
    assert f"--recipe {name} --set model.start_from=MODEL --set data.source=IMAGES --out RUN" in text
    assert "Sources of the values:" in text and "Time, memory and the score" in text


@pytest.mark.parametrize("name", NAMES)
def test_starts_and_lengths_fit_each_other(name):
    recipe = load_recipe(name, ["model.start_from=owner/model"])
    training, loss = recipe.training, recipe.loss.resolved(recipe.training.total_images)
    assert training.total_images % training.global_batch_size == 0
    assert training.save_every_images % training.global_batch_size == 0
    assert training.validate_every_images % training.global_batch_size == 0
    assert loss.autoencoder_start % training.global_batch_size == 0
    assert max(loss.autoencoder_start, training.warmup_images) < 0.1 * training.total_images
    assert training.lora is None and training.parameter_dtype == "float32"


def test_decoder_holds_the_card_s_values():
    recipe = load_recipe("finetune_decoder", ["model.start_from=owner/model"])
    assert (recipe.loss.reconstruction, recipe.loss.perceptual, recipe.loss.perceptual_weight) == ("l2", "vgg", 0.1)
    assert recipe.training.trainable == "decoder" and recipe.training.global_batch_size == 192
    assert not recipe.loss.has_adversarial and recipe.training.ema_decay > 0


def test_small_fits_a_small_gpu_and_a_small_set():
    recipe = load_recipe("finetune_small", ["model.start_from=owner/model"])
    training = recipe.training
    assert training.trainable == "decoder" and training.micro_batch_size == "auto" and training.gradient_checkpointing
    assert 1e-6 <= training.learning_rate <= 1e-5 and training.global_batch_size <= 16
    assert recipe.validation.fraction * 5000 == recipe.validation.max_images and training.best_metric != "none"
    assert not recipe.loss.has_adversarial


def test_eq_holds_the_paper_s_transforms_in_a_quarter_of_the_steps():
    recipe = load_recipe("finetune_eq", ["model.start_from=owner/model"])
    loss = recipe.loss
    assert (loss.equivariance, loss.equivariance_scales, loss.equivariance_rotation) == (0.25, (8, 31), True)
    assert loss.anchor_weight == 0 and recipe.training.trainable == "all"
    assert loss.discriminator_start == 0 and loss.adversarial_start == loss.autoencoder_start > 0


@pytest.mark.parametrize("name", NAMES)
def test_without_a_starting_model_the_error_names_the_field(name):
    with pytest.raises(UserError, match=r"model\.start_from") as caught:
        require_given(load_recipe(name, [*SMALL, "data.source=images"]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_a_tiny_model(photographs, lpips_home, tmp_path, name):
    source = tiny_start(tmp_path)
    starts = ["loss.adversarial_start=8", "loss.autoencoder_start=8"] if name == "finetune_eq" else []
    settings = [*SMALL, *starts, "training.total_images=16", f"model.start_from={source}", f"data.source={photographs}"]
    if name == "finetune_small":
        settings.append("training.micro_batch_size=auto")
    result = build(load_recipe(name, settings), tmp_path / "run", progress=False).train()
    old, new = load_model(source), load_model(result.model_folder)
    changed = {n for n, p in old.named_parameters() if not (p == new.get_parameter(n)).all()}
    parts = {parameter.split(".")[0] for parameter in changed}
    expected = {"decoder", "post_quant_conv"} | ({"encoder", "quant_conv"} if name == "finetune_eq" else set())
    assert parts == expected and new.config.scaling_factor == 0.18215
    assert result.metrics["lpips"] > 0


def test_the_command_tells_how_many_images_a_forward_takes(photographs, tmp_path, capsys, caplog):
    """Before the run that is not known yet, where micro_batch_size is auto."""
    settings = [*SMALL, "loss.perceptual=none", "training.best_metric=psnr", "training.total_images=4"]
    settings += ["training.micro_batch_size=auto", f"model.start_from={tiny_start(tmp_path)}"]
    command = ["train", "--recipe", "finetune_small", "--out", str(tmp_path / "run"), "--set"]
    command += " --set ".join([*settings, f"data.source={photographs}"]).split(" ")
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--dry-run"])
    assert "measured when the run starts" in capsys.readouterr().out
    with caplog.at_level("INFO", "latentvae"), pytest.raises(SystemExit, match="0"):
        cli.main(command)
    assert "4 images a step = 1 processes x 1 forwards x 4 images" in caplog.text
