"""The project's checks, each in its own environment made by uv. `uvx nox -l` lists them."""

import importlib.util
import os
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
PACKAGES = ROOT / "packages"
WHEELS = ("flashrnn-core", "flashrnn-torch", "flashrnn-models")  # each needs the ones before it


def _archs():
    """`ARCHS` read from its file: the package need not be installed where nox runs."""
    path = PACKAGES / "flashrnn-core/src/flashrnn_core/archs.py"
    spec = importlib.util.spec_from_file_location("archs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ARCHS


def _sync(session, *groups):
    """Install the three packages, editable, and the named dependency groups: nothing else stays."""
    session.run_install(
        "uv",
        "sync",
        "--all-packages",
        f"--python={session.virtualenv.location}",
        *(f"--group={group}" for group in groups),
        env={"UV_PROJECT_ENVIRONMENT": session.virtualenv.location},
    )


@nox.session
def tests(session):
    """All tests that need no GPU, with the examples of the docs and docstrings."""
    _sync(session, "test")
    arguments = session.posargs or ["-n", str(min(os.cpu_count() or 1, 8)), "-m", "not gpu"]
    session.run("pytest", *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session(name="triton-interpreter")
def triton_interpreter(session):
    """The triton backend in Triton's interpreter, which needs no GPU and cannot share a process with its compiler."""
    _sync(session, "test")
    path = "packages/flashrnn-torch/tests/test_triton_interpreted.py"
    arguments = session.posargs or ["-n", str(min(os.cpu_count() or 1, 8)), path]
    session.run("pytest", *arguments, env={"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"})


@nox.session
def lint(session):
    """Ruff, its formatter, and the types of the three packages."""
    _sync(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session
def docs(session):
    """The documentation as HTML in docs/_build; a warning is an error."""
    _sync(session, "docs")
    session.run("sphinx-build", "-W", "--keep-going", "-n", "-b", "html", "docs", "docs/_build/html")


TINY_CALL = {
    "flashrnn-core": """
import sys, numpy as np
from flashrnn_core import get_cell, reference
states, last = reference.forward(get_cell("gru"), np.ones((2, 5, 3, 3, 8)), np.ones((3, 3, 8, 8)), np.ones((4, 3, 8)))
assert states.shape == (1, 2, 5, 3, 8) and np.array_equal(states[:, :, -1:], last)
assert not {"torch", "triton"} & set(sys.modules)
""",
    "flashrnn-torch": """
import torch
from flashrnn import flashrnn
states, last = flashrnn(torch.randn(2, 5, 4, 3, 8), torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8), function="slstm")
assert states.shape == (4, 2, 5, 3, 8) and torch.equal(states[:, :, -1:], last)
""",
    "flashrnn-models": """
import torch
from flashrnn_models import LanguageModel
model = LanguageModel(vocab_size=50, features=16, num_blocks=2, num_heads=2)
logits, state = model(torch.zeros(3, 7, dtype=torch.long))
assert logits.shape == (3, 7, 50)
""",
}


@nox.session
def wheels(session):
    """Build the three wheels; install each, with what it needs, in a clean environment and call it."""
    folder = Path(session.create_tmp())
    session.run_install("uv", "build", "--all-packages", "--clear", f"--out-dir={folder / 'dist'}")
    for count, name in enumerate(WHEELS, start=1):
        built = [next((folder / "dist").glob(f"{w.replace('-', '_')}-*.whl")) for w in WHEELS[:count]]
        python = folder / name
        session.run_install("uv", "venv", "--clear", f"--python={session.virtualenv.location}", str(python))
        session.run_install("uv", "pip", "install", f"--python={python}", *map(str, built))
        # -I: neither the checkout nor PYTHONPATH is seen
        session.run(str(python / "bin/python"), "-I", "-c", TINY_CALL[name], external=True)
    session.run(str(folder / "flashrnn-models/bin/flashrnn-train"), "--help", silent=True, external=True)


FIND_CAPABILITY = """
import torch
print(*(torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)))
"""


def _add_arch_session(arch):
    @nox.session(name=f"tests-{arch.name}", default=False)
    def arch_tests(session):
        _sync(session, "test")
        found = session.run("python", "-c", FIND_CAPABILITY, silent=True).split()
        capability = tuple(map(int, found[-2:]))
        env = {"FLASHRNN_ARCH": arch.name}
        if capability >= arch.capability:
            session.run("pytest", "-m", "gpu", *session.posargs, env=env)
        else:
            session.warn(
                f"NO GPU THAT RUNS {arch.name} CODE HERE (found compute capability {capability[0]}.{capability[1]}): "
                "its GPU tests do NOT run; only what can be checked without one."
            )
        session.run("pytest", "-n", "2", "-m", "arch and not gpu", *session.posargs, env=env)

    arch_tests.__doc__ = f"{arch.name}: its GPU tests, if such a GPU is here, and what can be checked without one."


for _arch in _archs():
    _add_arch_session(_arch)
