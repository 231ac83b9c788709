"""What README.md tells people to type exists: every command, every option, every file; the cheap ones are run."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

from latentvae import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    text = "".join(block for language, block in BLOCKS if language == "bash").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def latentvae_commands() -> list[list[str]]:
    """The arguments after `latentvae` or `accelerate launch ... -m latentvae`."""
    commands = []
    for line in shell_lines():
        words = shlex.split(line, comments=True)
        if words[0] == "latentvae":
            commands.append(words[1:])
        elif words[:2] == ["accelerate", "launch"]:
            commands.append(words[words.index("latentvae") + 1 :])
    return commands


@pytest.mark.parametrize("words", latentvae_commands(), ids=" ".join)
def test_commands_parse(words):
    """Typer accepts command, arguments and options, without running anything."""
    command = typer.main.get_command(cli.app).commands[words[0]]
    context = command.make_context(words[0], list(words[1:]))
    assert context.params


def test_there_is_a_command_for_every_wish():
    assert {words[0] for words in latentvae_commands()} >= {"demo", "train", "encode", "decode", "export", "verify"}


@pytest.mark.parametrize("words", [words for words in latentvae_commands() if words[0] == "train"], ids=" ".join)
def test_recipes_and_fields_exist(words):
    from latentvae.recipe import load_recipe

    options = dict(zip(words, [*words[1:], ""], strict=True))
    overrides = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    load_recipe(options["--recipe"], overrides)


def test_settings_in_the_text_exist():
    from latentvae.recipe import load_recipe

    settings = [shlex.split(text)[1] for text in re.findall(r"`(--set [^`]+)`", README)]
    settings.remove("section.field=value")  # the form, not a field
    assert any("conv_out" in setting for setting in settings)  # in quotes for the shell, and for YAML in these
    for setting in settings:
        load_recipe(None, [setting])


def test_recipes_runs(capsys):
    cli.app(["recipes"], standalone_mode=False)
    listed = capsys.readouterr().out
    for words in latentvae_commands():
        if "--recipe" in words:
            assert words[words.index("--recipe") + 1] in listed


def test_python_blocks_use_names_that_exist():
    import importlib

    for language, block in BLOCKS:
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_to_files_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_layout_names_every_unit():
    """The layout has one line per module or folder of the package, and no line for what is not there."""
    layout = next(block for language, block in BLOCKS if not language and "errors.py" in block)
    named = set(re.findall(r"^  (\w+(?:\.py|/))", layout, re.MULTILINE))
    there = {path.name for path in (ROOT / "latentvae").glob("*.py") if not path.name.startswith("__")}
    there |= {f"{path.name}/" for path in (ROOT / "latentvae").iterdir() if (path / "__init__.py").exists()}
    assert named == there
