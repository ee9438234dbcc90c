"""What README and docs say in words, against the code. Their examples run as doctests, their tables are generated."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import pytest

from flashrnn import FlashRNNConfig
from flashrnn.backends import BACKENDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STATES = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (.*) \|$", README.split("## Status")[1], flags=re.MULTILINE))


def test_readme_lists_every_backend():
    assert set(STATES) == set(BACKENDS)


TABLES = {"benchmarks.md": ("h100.json", "h100_again.json"), "triton.md": ("triton_h100.json",)}


@pytest.mark.parametrize("page", TABLES)
def test_tables_are_what_report_makes_of_the_results(page, tmp_path, monkeypatch):
    benchmarks = ROOT / "packages/flashrnn-torch/benchmarks"
    monkeypatch.setattr(sys, "argv", ["report.py", *(str(benchmarks / "results" / name) for name in TABLES[page])])
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    copy = tmp_path / page
    copy.write_text(text, encoding="utf-8")
    sys.argv += ["--page", str(copy)]
    runpy.run_path(str(benchmarks / "report.py"), run_name="__main__")
    assert copy.read_text(encoding="utf-8") == text


def test_switching_names_every_option():
    text = (ROOT / "docs/switching.md").read_text(encoding="utf-8")
    assert [f.name for f in dataclasses.fields(FlashRNNConfig) if f"`{f.name}" not in text] == []


@pytest.mark.parametrize(
    "option", [{"constants": {"a": 1.0}}, {"dtype_acc": "float16"}, {"dtype_r": "float32"}, {"initial_val": 1.0}]
)
def test_option_said_to_raise_does(option):
    with pytest.raises(ValueError, match=f"FlashRNNConfig.{next(iter(option))}"):
        FlashRNNConfig(**option)


@pytest.mark.parametrize("option", ["num_gates_r", "num_states", "simple_agg", "_internal_input_shape"])
def test_option_of_the_old_kernels_is_no_argument(option):
    with pytest.raises(TypeError, match=option):
        FlashRNNConfig(**{option: 1})
