"""The table of architectures, against the compiler that makes their code."""

import pytest

MACHINE_FLAGS = 48  # offset in an ELF file


def test_compiler_makes_code_for_the_architecture(arch):
    """NVRTC, which needs no GPU, knows `arch`, and the binary is for its compute capability."""
    core = pytest.importorskip("cuda.core")
    major, minor = arch.capability
    assert arch.name == f"sm{major}{minor}"
    options = core.ProgramOptions(arch=f"sm_{major}{minor}")
    binary = core.Program('extern "C" __global__ void empty() {}', "c++", options).compile("cubin").code
    assert binary[:4] == b"\x7fELF"
    assert binary[MACHINE_FLAGS + 1] == 10 * major + minor


def test_plan_limits_are_of_a_known_generation(arch):
    assert 99 * 1024 <= arch.shared_bytes <= 227 * 1024
    assert (arch.cluster > 1) == (arch.capability >= (9, 0))
