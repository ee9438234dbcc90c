"""The cache of compiled kernels on disk, and what is said where no GPU is."""

import os
import subprocess
import sys
import time

import pytest

from flashrnn_core.cuda import launch

pytest.importorskip("cuda.core")

from flashrnn_core.cuda import compile as compiling

TEXT = 'extern "C" __global__ void scan(float* x) { *x = 1.f; }'


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """An empty cache, named by the override variable."""
    monkeypatch.setenv("FLASHRNN_CACHE_DIR", str(tmp_path / "kernels"))
    yield tmp_path / "kernels"
    compiling._cache.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    """Counts what NVRTC is asked for."""
    calls = []
    compile_text = compiling.compile_text
    monkeypatch.setattr(compiling, "compile_text", lambda *a: calls.append(a) or compile_text(*a))
    return calls


def entries(directory):
    return [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size > 500]


def test_a_second_load_compiles_nothing(directory, compiled):
    first = compiling.load(TEXT, "cubin", "sm_80")
    compiling._cache.cache_clear()
    assert bytes(compiling.load(TEXT, "cubin", "sm_80").code) == bytes(first.code)
    assert len(compiled) == 1
    compiling.load(TEXT, "cubin", "sm_90a")
    compiling.load(TEXT + "\n", "cubin", "sm_80")
    assert len(compiled) == 3
    assert len(entries(directory)) == 3


def test_where_a_cell_stands_compiles_nothing_again(directory, compiled):
    """A notebook's cell is of another file in each process."""
    for path in ("/tmp/kernel_1/cell.py", "/tmp/kernel_2/cell.py"):
        compiling.load(f'#line 7 "{path}"\n{TEXT}', "cubin", "sm_80")
    assert len(compiled) == 1


def test_what_was_begun_is_compiled_once(directory, compiled):
    """By a thread; `load` takes what that has made, once: after it there is the disk."""
    for _ in range(2):
        compiling.begin(TEXT, "cubin", "sm_80")
    code = bytes(compiling.load(TEXT, "cubin", "sm_80").code)
    assert code[:4] == b"\x7fELF"
    assert compiling._BEGUN == {}
    assert bytes(compiling.load(TEXT, "cubin", "sm_80").code) == code
    assert len(compiled) == len(entries(directory)) == 1


def test_what_was_begun_and_never_loaded_is_on_disk_alone(directory, compiled):
    compiling.begin(TEXT, "cubin", "sm_80")
    while compiling._BEGUN:
        time.sleep(0.01)
    assert len(compiled) == len(entries(directory)) == 1
    compiling.load(TEXT, "cubin", "sm_80")
    assert len(compiled) == 1


def test_what_was_begun_may_fail(directory, compiled):
    """The error is that of the `load`; the next one tries again."""
    compiling.begin("no C++", "cubin", "sm_80")
    for _ in range(2):
        with pytest.raises(Exception, match="NVRTC"):
            compiling.load("no C++", "cubin", "sm_80")
    assert len(compiled) in (2, 3)  # the first `load` may come before the thread is done
    assert compiling._BEGUN == {}


@pytest.mark.parametrize("damage", ["truncated", "emptied", "altered"])
def test_a_damaged_entry_is_compiled_again(directory, compiled, damage):
    code = bytes(compiling.load(TEXT, "cubin", "sm_80").code)
    (path,) = entries(directory)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "emptied": b"", "altered": whole[:-1] + b"?"}[damage])
    assert bytes(compiling.load(TEXT, "cubin", "sm_80").code) == code
    assert len(compiled) == 2
    assert bytes(compiling.load(TEXT, "cubin", "sm_80").code) == code
    assert len(compiled) == 2


def test_an_entry_that_cannot_be_read_is_compiled_again(directory, compiled, monkeypatch):
    compiling.load(TEXT, "cubin", "sm_80")

    def refuse(*given):
        raise PermissionError(13, "no")

    monkeypatch.setattr(type(compiling._cache(compiling.cache_directory())), "get", refuse)
    assert bytes(compiling.load(TEXT, "cubin", "sm_80").code)[:4] == b"\x7fELF"
    assert len(compiled) == 2


def test_places(monkeypatch, tmp_path):
    """The override, else XDG's, else the home directory's."""
    for name in ("FLASHRNN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert compiling.cache_directory() == tmp_path / "home/.cache/flashrnn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compiling.cache_directory() == tmp_path / "xdg/flashrnn"
    monkeypatch.setenv("FLASHRNN_CACHE_DIR", str(tmp_path / "own"))
    assert compiling.cache_directory() == tmp_path / "own"


def test_a_directory_that_cannot_be_written_is_done_without(monkeypatch, tmp_path, compiled):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("FLASHRNN_CACHE_DIR", str(tmp_path / "file"))
    for _ in range(2):
        assert bytes(compiling.load(TEXT, "cubin", "sm_80").code)[:4] == b"\x7fELF"
    assert len(compiled) == 2


RACE = f"""
import sys
from flashrnn_core.cuda.compile import load
print("ready", flush=True)
sys.stdin.readline()
for k in range(3):
    assert bytes(load({TEXT!r} + "//" * k, "cubin", "sm_80").code)[:4] == b"\\x7fELF"
"""


def test_eight_processes_race_on_a_cold_cache(directory):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    racers = [subprocess.Popen([sys.executable, "-c", RACE], env=environment, text=True, **pipes) for _ in range(8)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        _, errors = racer.communicate(timeout=100)
        assert racer.returncode == 0, errors
    assert len(entries(directory)) == 3


NO_GPU = "backend='vanilla' of flashrnn and flashrnn_core.reference run without a GPU"


def test_without_a_driver_or_device_the_error_names_what_runs(monkeypatch):
    from cuda.bindings import driver

    def no_library(flags):
        raise RuntimeError("libcuda.so.1 cannot be found")

    launch.device_properties.cache_clear()
    for init, words in ((no_library, "libcuda"), (lambda flags: (driver.CUresult(100),), "CUDA_ERROR_NO_DEVICE")):
        monkeypatch.setattr(driver, "cuInit", init)
        with pytest.raises(RuntimeError, match=rf"CUDA driver or CUDA device 0 is not there \(.*{words}.*{NO_GPU}"):
            launch.device_properties(0)
