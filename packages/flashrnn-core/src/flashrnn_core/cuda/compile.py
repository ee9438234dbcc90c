"""From text to kernel: this process, then the disk, then NVRTC through cuda.core. Needs no nvcc, g++ or CUDA_HOME.

The disk cache is `$FLASHRNN_CACHE_DIR`, else `$XDG_CACHE_HOME/flashrnn`, else `~/.cache/flashrnn`. Entries appear by
atomic rename, so processes may race; each begins with its digest, so a truncated one is compiled again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cuda.core import ObjectCode, Program, ProgramOptions
from cuda.core.utils import FileStreamProgramCache, make_program_cache_key


def cache_directory() -> Path:
    """Where compiled kernels are kept."""
    chosen = os.environ.get("FLASHRNN_CACHE_DIR")
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashrnn"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "flashrnn"


def compile_text(text: str, target: str, arch: str, log=None) -> bytes:
    """NVRTC's output: `target` "cubin" for arch "sm_90a", or "ptx" for "compute_80". No GPU needed for a cubin.

    `log`: a text stream for ptxas' report of registers and spills. Raises cuda.core's NVRTCError, with the compiler's
    messages; those about a cell point at its Python line.
    """
    report = {} if log is None else {"ptxas_options": "-v", "no_cache": True}  # NVRTC's own, which knows no reports
    options = ProgramOptions(arch=arch, std="c++17", **report)
    return bytes(Program(text, "c++", options).compile(target, logs=log).code)


_BEGUN: dict[tuple[str, str, str], Future[bytes]] = {}  # until `load` asks, or the disk has them
os.register_at_fork(after_in_child=_BEGUN.clear)  # where there is no thread that would end them


def begin(text: str, target: str, arch: str) -> None:
    """Start what a `load` of the same arguments is to wait for, in a thread: NVRTC compiles several texts side by side.
    It touches no GPU, so that a CUDA graph may be captured meanwhile. A process that ends before, ends when it is done.
    """
    key = text, target, arch
    if key in _BEGUN:
        return
    executor = ThreadPoolExecutor(1, "flashrnn-compile")
    with contextlib.suppress(RuntimeError):  # the interpreter is about to end
        _BEGUN[key] = begun = executor.submit(_binary, *key)
        if _cache(cache_directory()) is not None:
            begun.add_done_callback(lambda _: _BEGUN.pop(key, None))
    executor.shutdown(wait=False)


def load(text: str, target: str, arch: str) -> ObjectCode:
    """The compiled text: what was begun, or from the disk cache where it is there and whole."""
    begun = _BEGUN.pop((text, target, arch), None)
    code = begun.result() if begun else _binary(text, target, arch)
    return (ObjectCode.from_cubin if target == "cubin" else ObjectCode.from_ptx)(code)


def _binary(text: str, target: str, arch: str) -> bytes:
    unplaced = re.sub(r"^#line .*$", "", text, flags=re.MULTILINE)  # where a cell stands does not change what it is
    options = ProgramOptions(arch=arch, std="c++17")
    key = make_program_cache_key(code=unplaced, code_type="c++", options=options, target_type=target)
    cache = _cache(cache_directory())
    entry = None
    if cache is not None:
        with contextlib.suppress(OSError):  # an entry that cannot be read
            entry = cache.get(key)
    if entry is None or hashlib.sha256(entry[32:]).digest() != entry[:32]:
        code = compile_text(text, target, arch)
        entry = hashlib.sha256(code).digest() + code
        if cache is not None:
            with contextlib.suppress(OSError):  # a full disk costs the next process its compilation, not this one
                cache[key] = entry
    return entry[32:]


@functools.cache
def _cache(directory: Path) -> FileStreamProgramCache | None:
    """None where the directory cannot be written: every process then compiles for itself."""
    try:
        return FileStreamProgramCache(directory, max_size_bytes=2**30)
    except OSError:
        return None
