"""What the three packages and the files around them must agree on."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flashrnn_core.archs import ARCHS

ROOT = Path(__file__).parents[1]
# distribution: its import, and the packages of ours that it may import
PACKAGES = {
    "flashrnn-core": ("flashrnn_core", {"flashrnn_core"}),
    "flashrnn-torch": ("flashrnn", {"flashrnn", "flashrnn_core"}),
    "flashrnn-models": ("flashrnn_models", {"flashrnn_models", "flashrnn", "flashrnn_core"}),
}


def project(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("distribution", PACKAGES)
def test_one_version(distribution):
    version = project(ROOT)["version"]
    own = project(ROOT / "packages" / distribution)
    assert own["version"] == version
    assert importlib.import_module(PACKAGES[distribution][0]).__version__ == version
    siblings = [d for d in own["dependencies"] if d.startswith("flashrnn")]
    assert all(d.endswith(f"=={version}") for d in siblings), siblings


@pytest.mark.parametrize("distribution", PACKAGES)
def test_imports_point_one_way(distribution):
    name, allowed = PACKAGES[distribution]
    known = {name for name, _ in PACKAGES.values()}
    for path in (ROOT / "packages" / distribution / "src" / name).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            imported = {module.split(".")[0] for module in modules}
            assert imported & known <= allowed, f"{path}:{node.lineno}"


def test_ci_runs_the_command_of_the_readme():
    lines = [line.strip() for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()]
    command = next(line for line in lines if line.startswith("uvx"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"```console\n$ {command}\n```" in readme


def test_workflow_has_every_architecture():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    listed = re.search(r"arch: \[(.*)\]", workflow)[1].split(", ")
    assert listed == [arch.name for arch in ARCHS]


NOTHING_RAN = """
import pytest
def test_skipped():
    pytest.skip("always")
"""


def test_a_run_of_skipped_tests_alone_fails(tmp_path):
    (tmp_path / "test_nothing.py").write_text(NOTHING_RAN, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    command += [f"--confcutdir={ROOT}", "-c", str(ROOT / "pyproject.toml"), "-p", "conftest", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "1 skipped" in done.stdout, done.stdout + done.stderr
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
