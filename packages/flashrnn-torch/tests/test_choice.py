"""What `auto` chooses on an H100, which need not be there: plans and the model of their time know it by numbers."""

from dataclasses import replace

import pytest
import torch

from flashrnn import ops
from flashrnn.backends import BACKENDS, choose, cuda_fused, triton
from flashrnn_core import Problem, get_cell
from flashrnn_core.cuda import launch
from flashrnn_core.triton.plan import Gpu

CUDA = torch.device("cuda", 7)  # no other test's plans are of this device


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    monkeypatch.setattr(launch, "device_properties", lambda device: ((9, 0), 132))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton, "_gpu", lambda device: Gpu(232448, 132))
    monkeypatch.setattr(triton, "_finds_compiler", lambda: True)
    monkeypatch.delenv("FLASHRNN_ARCH", raising=False)


def chosen(name, B, N, D, dtype="bfloat16", **options):
    return choose("auto", Problem(get_cell(name), B, 1024, N, D, dtype, dtype, **options), CUDA)


@pytest.mark.parametrize("hidden_only", [False, True])
def test_what_was_measured(hidden_only):
    """A vector that stays on the chip; large batches share R among teams; what no chip holds is streamed."""
    for name in ("lstm", "gru", "slstm"):
        for B, N, D in ((16, 6, 128), (16, 3, 256), (1, 1, 512), (16, 1, 512), (16, 1, 768)):
            assert chosen(name, B, N, D, hidden_only=hidden_only) == "cuda_fused", (name, B, N, D)
    for B, D in ((64, 2048), (16, 4096), (1, 16384)):
        assert chosen("lstm", B, 1, D, hidden_only=hidden_only) == "cuda", (B, D)
    assert chosen("lstm", 256, 1, 768, hidden_only=hidden_only) == "cuda_fused"  # R stays on the chip: both may take it
    assert chosen("lstm", 256, 1, 1024, hidden_only=hidden_only) == ("cuda_fused" if hidden_only else "cuda")


def test_small_heads_learn_faster_where_the_backward_finds_R_h_itself():
    """Of a backward of the others, much goes to memory besides the scan; triton's has R twice where it is small."""
    for name in ("lstm", "gru", "slstm", "elman"):
        for B, N, D in ((1, 24, 32), (16, 24, 32), (128, 12, 64), (256, 12, 64)):
            assert chosen(name, B, N, D) == "triton", (name, B, N, D)
    for B, N, D in ((1, 24, 16), (16, 12, 64), (64, 12, 64)):
        assert chosen("lstm", B, N, D, hidden_only=True) == "cuda_fused", (B, N, D)


def test_triton_only_where_it_asks_for_nothing_more(monkeypatch):
    """No R h of all steps in memory, no compiler, no driver for a trace."""
    assert chosen("lstm", 512, 6, 128) != "triton"
    assert chosen("lstm", 16, 24, 32) == "triton"
    monkeypatch.setattr(triton, "_finds_compiler", lambda: False)
    assert chosen("lstm", 16, 24, 32) == "cuda_fused"

    def no_driver(device):
        raise RuntimeError("Found no NVIDIA driver")

    monkeypatch.setattr(triton, "_finds_compiler", lambda: True)
    monkeypatch.setattr(triton, "_gpu", no_driver)
    assert chosen("lstm", 16, 24, 33) == "cuda_fused"


def test_triton_not_even_alone_where_it_finds_no_compiler(monkeypatch):
    """Of states in float64 the CUDA backends run nothing; nor does Triton run more tiles than a grid has."""
    problem = Problem(get_cell("lstm"), 16, 8, 24, 32, "bfloat16", "float64")
    assert choose("auto", problem, CUDA) == "triton"
    assert choose("auto", replace(problem, D=128, B=512), CUDA) == "triton"
    assert choose("auto", replace(problem, B=2**20), CUDA) == "vanilla"
    monkeypatch.setattr(triton, "_finds_compiler", lambda: False)
    assert choose("auto", problem, CUDA) == "vanilla"


@pytest.mark.parametrize("D", [64, 300, 8512, 16384])
@pytest.mark.parametrize("cut", [False, True])
def test_small_and_large_chips_have_an_answer(D, cut, monkeypatch):
    """Parts of a GPU with few multiprocessors, heads of more blocks than there are."""
    for multiprocessors in (14, 16, 132):
        monkeypatch.setattr(launch, "device_properties", lambda device, n=multiprocessors: ((9, 0), n))
        launch.plan_for.cache_clear(), cuda_fused._plan.cache_clear()
        assert chosen("lstm", 3, 2, D, cut=cut) in ("cuda_fused", "cuda", "vanilla")
    launch.plan_for.cache_clear(), cuda_fused._plan.cache_clear()


@pytest.mark.parametrize(("N", "D"), [(12, 64), (24, 64), (8, 48), (1, 768)])
def test_a_compiled_call_saves_what_its_trace_was_told(N, D):
    """A trace knows no B: where another would choose a backend that saves m otherwise, the trace's runs."""
    differ = False
    for B in (1, 16, 32, 256):
        problem = Problem(get_cell("slstm"), B, 64, N, D, "bfloat16", "bfloat16")
        name, traced = ops._chosen("auto", problem, CUDA, False), ops._traced("auto", problem, CUDA)
        assert ops._saves(name, problem) == ops._saves(traced, problem)
        assert BACKENDS[name].supports(problem, CUDA) is None
        differ |= ops._saves(choose("auto", problem, CUDA), problem) != ops._saves(traced, problem)
    assert differ == (D < 768)
    ops._chosen.cache_clear()


def test_without_a_gpu():
    for dtype in ("float32", "float64", "bfloat16"):
        problem = Problem(get_cell("lstm"), 2, 3, 2, 8, dtype, dtype)
        assert choose("auto", problem, torch.device("cpu")) == "vanilla"


@pytest.mark.parametrize("D", [24, 768, 4096])
def test_an_empty_batch_has_a_backend(D):
    assert chosen("lstm", 0, 1, D) != "vanilla"
