"""What continuous integration and pre-commit call exists, and they call the same things."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW, HOOKS = ROOT / ".github" / "workflows" / "ci.yml", ROOT / ".pre-commit-config.yaml"
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def steps(job):
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"][job]["steps"]


def made(text):
    return re.findall(r"\bmake ([a-z-]+)", text)


def test_the_workflow_runs_what_ci_run_runs():
    on_linux = [target for step in steps("linux") for target in made(step.get("run", ""))]
    everywhere = [target for step in steps("other-systems") for target in made(step.get("run", ""))]
    assert on_linux == made((ROOT / ".ci" / "run").read_text(encoding="utf-8")) and set(on_linux) <= TARGETS
    assert everywhere == ["test"]


@pytest.mark.parametrize("job", ["linux", "other-systems"])
def test_actions_are_pinned_to_a_major_version(job):
    actions = [step["uses"] for step in steps(job) if "uses" in step]
    assert actions and all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in actions)


def test_the_hooks_call_targets_of_the_makefile():
    (repository,) = yaml.safe_load(HOOKS.read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"
    called = [made(hook["entry"]) for hook in repository["hooks"]]
    assert called == [["lint"], ["test"]] and {"lint", "test"} <= TARGETS


def test_the_variables_that_the_workflow_sets_are_those_of_the_makefile():
    """Windows has .venv/Scripts where others have .venv/bin."""
    defined = set(re.findall(r"^([A-Z]+) [?:]=", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    given = set(re.findall(r"\b([A-Z]+)=", WORKFLOW.read_text(encoding="utf-8")))
    assert given == {"PYTHON", "BIN"} and given <= defined
