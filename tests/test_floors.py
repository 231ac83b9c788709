"""The house stands: imports go down only, modules stay small, names say what things are, train/ holds only choices."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "latentvae"
FLOORS = [  # units on one floor do not know each other
    {"errors"},
    {"files"},
    {"images", "config", "imported", "kernels", "keyed", "progress"},
    {"model"},
    {"losses", "data", "checkpoint"},
    {"autoencoders"},
    {"latents", "evaluation", "export", "convert"},
    {"training"},
    {"recipe"},
    {"assembly"},
    {"demo", "info", "dry_run"},
    {"cli", "__init__", "__main__"},
]
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "misc", "manager", "common", "tools"}
MAX_LINES = 300
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """`latentvae.losses.terms` => `losses`; the package itself is its `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(path: Path) -> Iterator[str]:
    """Every module of ours that `path` imports anywhere, inside functions and type-checking blocks too."""
    known = {module_name(module) for module in MODULES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: write the whole name instead of a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from {whole if whole in known else str(node.module)}
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def ours(path: Path) -> list[str]:
    return [name for name in imported(path) if name.split(".")[0] == "latentvae"]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_module_has_a_floor_and_imports_go_down(path):
    unit = unit_of(module_name(path))
    assert unit in FLOOR_OF, f"{unit} stands on no floor: add it to FLOORS, and to the layout in README.md"
    for name in ours(path):
        target = unit_of(name)
        same_unit = target == unit or {unit, target} <= {"cli", "__init__", "__main__"}
        assert same_unit or FLOOR_OF[target] < FLOOR_OF[unit], f"{path.relative_to(ROOT)} imports {name}, not below it"


def test_no_cycles():
    graph = {module_name(path): set(ours(path)) - {module_name(path)} for path in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_modules_are_small_and_well_named(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    assert not FORBIDDEN_NAMES & set(module_name(path).split("."))


def test_every_module_says_what_it_is():
    silent = [
        module_name(path)
        for path in MODULES
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_only_one_model_file_imports_diffusers():
    importers = [
        path.name
        for path in sorted((PACKAGE / "model").glob("*.py"))
        if any(name.split(".")[0] == "diffusers" for name in imported(path))
    ]
    assert importers in ([], ["autoencoder.py"])


def test_train_holds_choices_only():
    train = ROOT / "train"
    assert not list(train.rglob("__init__.py"))
    assert [path.name for path in train.rglob("*.py")] in ([], ["train.py"])
    script = train / "train.py"
    if script.exists():
        text = script.read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(text)))
        assert len(text.splitlines()) <= 40
        assert not [node.name for node in nodes if isinstance(node, ast.ClassDef)]
        assert {node.name for node in nodes if isinstance(node, ast.FunctionDef)} <= {"main"}


def test_tests_mirror_the_package():
    """A folder of tests is a folder of the package."""
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith("_")}
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert folders <= packages | {"train", "benchmarks"}
