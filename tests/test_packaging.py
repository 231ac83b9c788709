"""What is installed: the wheel carries the recipes, the typing marker and the licence, and nothing of the tests."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower()


def test_nothing_splits_torch_and_torchvision():
    """A CPU-only torch beside the registry's torchvision does not import, so neither has an upper bound or an index."""
    wanted = {name_of(requirement): requirement for requirement in PROJECT["project"]["dependencies"]}
    assert wanted["torchvision"] == "torchvision"
    assert re.fullmatch(r"torch>=[\d.]+", wanted["torch"])
    assert "uv" not in PROJECT["tool"]


def test_every_import_is_a_dependency():
    """Third-party imports of the package are in `dependencies`; inside functions those of the extras will do."""
    import ast

    packages = {"PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image", "pydantic_core": "pydantic"}
    always = {name_of(requirement) for requirement in PROJECT["project"]["dependencies"]} | {"latentvae"}
    inside = always | {
        name_of(requirement) for extra in ("data", "demo", "lora", "ray") for requirement in EXTRAS[extra]
    }
    for path in (ROOT / "latentvae").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [str(node.module)]
            else:
                continue
            allowed = always if node in tree.body else inside
            for module in modules:
                top = module.split(".")[0]
                if top not in sys.stdlib_module_names:
                    assert packages.get(top, top) in allowed, f"{path.name} imports {top}, which is no dependency"


def test_folders_that_the_wheel_carries_are_not_empty():
    """git keeps no empty folder, and without it neither a wheel nor an editable install can be built."""
    for folder in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]:
        assert [path for path in (ROOT / folder).iterdir() if path.is_file()], f"{folder} is empty"


def test_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert text.rstrip().endswith("limitations under the License.")


@pytest.mark.slow
def test_wheel_carries_what_is_needed_outside_a_clone(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    for recipe in (ROOT / "train" / "recipes").glob("*.yaml"):
        assert f"latentvae/recipes/{recipe.name}" in names
    for settings in (ROOT / "train" / "accelerate").glob("*.yaml"):
        assert f"latentvae/accelerate/{settings.name}" in names
    assert "latentvae/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "train/", "benchmarks/"))]

    code = "import latentvae, latentvae.recipe as r; print(latentvae.__file__); r.load_recipe('smoke_cpu')"
    result = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "installed") in result.stdout
