"""From a problem on a device to a launch on the caller's stream. Raw pointers and strides; no framework."""

from __future__ import annotations

import ctypes
import functools
import operator
import os
import struct
import threading
from collections.abc import Sequence

from flashrnn_core.archs import ARCHS, Arch
from flashrnn_core.contract import Problem
from flashrnn_core.cuda import source, streamed
from flashrnn_core.cuda.fused import fewer_registers, make_plan
from flashrnn_core.cuda.plan import CLUSTER, GLOBAL, Plan


@functools.cache
def device_properties(device: int) -> tuple[tuple[int, int], int]:
    """(compute capability, multiprocessors) of a CUDA device. Raises RuntimeError without a driver or device."""
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute
    try:
        _check(driver.cuInit(0))
        handle = _check(driver.cuDeviceGet(device))
    except RuntimeError as error:
        raise RuntimeError(
            f"the CUDA driver or CUDA device {device} is not there ({error}): kernels can be compiled, but not run; "
            "backend='vanilla' of flashrnn and flashrnn_core.reference run without a GPU"
        ) from error
    major, minor, count = (
        int(_check(driver.cuDeviceGetAttribute(a, handle)))
        for a in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        )
    )
    return (major, minor), count


def arch_of(capability: tuple[int, int]) -> Arch | None:
    """The newest architecture of `ARCHS` whose code runs there; `$FLASHRNN_ARCH` names an older one to use instead."""
    chosen = os.environ.get("FLASHRNN_ARCH")
    runs = [a for a in ARCHS if a.capability <= capability and (chosen is None or a.name == chosen)]
    return runs[-1] if runs else None


def code_for(arch: Arch, capability: tuple[int, int]) -> tuple[str, str]:
    """NVRTC's target and architecture: machine code where the GPU is just that, else PTX, for the driver to compile."""
    number = f"{arch.capability[0]}{arch.capability[1]}"
    if arch.capability != capability:
        return "ptx", f"compute_{number}"
    return "cubin", f"sm_{number}" + ("a" if capability >= (9, 0) else "")


def target_of(device: int) -> tuple[str, str]:
    """`code_for` a device for which there is a plan."""
    return code_for(_arch(device), device_properties(device)[0])


def _arch(device: int) -> Arch:
    arch = arch_of(device_properties(device)[0])
    assert arch is not None, "a plan exists"
    return arch


@functools.lru_cache(maxsize=4096)
def plan_for(
    problem: Problem, backward: bool, element: str, saved: tuple[int, ...], device: int, make=make_plan
) -> Plan | str:
    """The plan of a problem on a device, or the reason why there is none. `make`: of `fused` or of `streamed`."""
    capability, multiprocessors = device_properties(device)
    arch = arch_of(capability)
    if arch is None:
        return (
            f"compute capability {capability[0]}.{capability[1]} is older than 8.0, or FLASHRNN_ARCH is newer than it"
        )
    runs = arch._replace(wgmma=arch.wgmma and arch.capability == capability)
    return make(problem, backward, runs, multiprocessors, element, saved)


def less_in_registers(plan: Plan, arch: Arch) -> Plan | None:
    """`fewer_registers` of the plan's kind."""
    return streamed.fewer_registers(plan, arch) if isinstance(plan, streamed.Streamed) else fewer_registers(plan, arch)


class Kernel:
    """A compiled plan on one device. `Call` launches it."""

    def __init__(self, plan: Plan, aligned: bool, device: int):
        from cuda.bindings import driver

        from flashrnn_core.cuda.compile import load

        _, self._multiprocessors = device_properties(device)
        self.device = device
        _enter_context(device)
        target, code = target_of(device)
        arch = _arch(device)
        while True:  # the plan foresees what fits the registers, the compiler has the last word
            self._object = load(source.text(plan, aligned), target, code)
            compiled = self._object.get_kernel("scan")
            less = less_in_registers(plan, arch)
            if compiled.attributes.local_size_bytes == 0 or less is None:
                break
            plan = less
        self.plan = plan
        kernel = driver.CUkernel(int(compiled.handle))
        handle = _check(driver.cuDeviceGet(device))
        attribute = driver.CUfunction_attribute
        shared = plan.layout["total"]
        _check(
            driver.cuKernelSetAttribute(
                attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared, kernel, handle
            )
        )
        if plan.exchange == CLUSTER and plan.C > 8:
            allowed = attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            _check(driver.cuKernelSetAttribute(allowed, 1, kernel, handle))
        self.function = driver.CUfunction(int(kernel))
        self._most: int | None = None  # groups at once, where the driver was asked
        if plan.SPLIT > 1:  # blocks wait for each other: no more of them than the chip holds
            config = _configuration(plan.C, plan.WARPS * plan.TEAMS * 32, shared, [_cluster(plan.SPLIT)])
            clusters = int(_check(driver.cuOccupancyMaxActiveClusters(self.function, config)))
            self._most = clusters * plan.SPLIT // plan.C
            if self._most == 0:
                raise RuntimeError(f"this GPU holds {clusters} clusters of {plan.SPLIT} blocks, {plan} wants more")
        kind = plan.backward, plan.old, bool(plan.STREAM)
        self.pointers, self.arguments = source.pointers(*kind), source.arguments(*kind)
        self.packing = driver.CUfunction(int(self._object.get_kernel("pack").handle)) if plan.packed_bytes else None

    def groups(self, items: int) -> int:
        """Of blocks, launched for `items` (heads x batch tiles)."""
        groups = self.plan.groups(items, self._multiprocessors)
        return groups if self._most is None else min(groups, self._most)

    def configuration(self, items: int):
        """The CUlaunchConfig for `items` (heads x batch tiles)."""
        from cuda.bindings import driver

        attributes = []
        cluster = self.plan.C if self.plan.exchange == CLUSTER else self.plan.SPLIT
        if cluster > 1:
            attributes.append(_cluster(cluster))
        if self.plan.exchange == GLOBAL:
            a = driver.CUlaunchAttribute()
            a.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            a.value.cooperative = 1
            attributes.append(a)
        blocks = self.groups(items) * self.plan.C
        threads = self.plan.TEAMS * self.plan.WARPS * 32
        return _configuration(blocks, threads, self.plan.layout["total"], attributes)

    def packing_configuration(self):
        """The CUlaunchConfig of `packing`, the kernel that writes R to PACKED."""
        return _configuration(8 * self._multiprocessors, 256, 0, [])

    def vector_words(self, items: int) -> int:
        """Words of 4 bytes, all bits set, that the argument VECTORS must point to; 0: none."""
        waits = self.plan.exchange == GLOBAL and not self.plan.idle
        teams, counter = self.groups(items) * self.plan.TEAMS, 32 if self.plan.STAGED else 0
        return teams * (4 * self.plan.VECTOR + counter) if waits else 0


def _cluster(size: int):
    from cuda.bindings import driver

    a = driver.CUlaunchAttribute()
    a.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    a.value.clusterDim.x, a.value.clusterDim.y, a.value.clusterDim.z = size, 1, 1
    return a


def _configuration(blocks: int, threads: int, shared_bytes: int, attributes: list):
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


_KEPT: list[Kernel] = []  # for good: launches on their way and CUDA graphs need the code, and do not say until when


@functools.cache
def kernel_for(plan: Plan, aligned: bool, device: int) -> Kernel:
    """The kernel of a plan on a device, made once a process; of threads that ask at the same time each makes one."""
    kernel = Kernel(plan, aligned, device)
    _KEPT.append(kernel)
    return kernel


@functools.lru_cache(maxsize=4096)
def begin(plan: Plan, aligned: bool, device: int) -> None:
    """Let a thread compile what `kernel_for` of the same arguments will want; once a process."""
    from flashrnn_core.cuda import compile as compiling

    compiling.begin(source.text(plan, aligned), *target_of(device))


class Call:
    """Launches of a kernel on tensors of one layout: what stays is prepared, a launch gives pointers and a stream.

    `arguments`: by name as in `source.arguments`, but for pointers, N, TILES, VECTOR_WORDS, DONE. `pointers`: their
    names, in the order in which a launch gives them; those that the kernel does not take are left out.
    """

    def __init__(self, kernel: Kernel, heads: int, tiles: int, arguments: dict[str, int], pointers: Sequence[str]):
        from cuda.bindings import driver

        self.kernel, self._driver, self._lock = kernel, driver, threading.Lock()
        items, packed = heads * tiles, -(-heads * kernel.plan.packed_bytes // 256) * 256
        self._packed_bytes, self._vector_words = packed, kernel.vector_words(items)
        self.workspace_bytes = packed + 4 * self._vector_words  # that a launch takes, of any content
        if packed >= 2**36:  # 64 GiB, which the packing kernel counts in 32 bits, of 16 bytes
            raise RuntimeError(f"R takes {packed} bytes in the order of the kernel; at most 2**36 - 1 are supported")
        known = arguments | dict.fromkeys(kernel.pointers, 0) | {"N": heads, "TILES": tiles}
        known |= {"VECTOR_WORDS": self._vector_words, "DONE": 0}
        self._values = (ctypes.c_int64 * len(kernel.arguments))(*[known[name] for name in kernel.arguments])
        self._done = kernel.arguments.index("DONE")
        given = ("PACKED", "VECTORS", *pointers)
        self._in_order = operator.itemgetter(*[given.index(name) for name in kernel.pointers])
        self._write = struct.Struct(f"{len(kernel.pointers)}Q").pack_into
        self._parameters = ctypes.c_void_p(ctypes.addressof(self._values))  # one, a struct
        self._address = ctypes.addressof(self._parameters)
        self._config = kernel.configuration(items)
        self._packing = kernel.packing_configuration() if packed else None

    def launch(self, addresses: Sequence[int], workspace: int, stream: int, done: int = 0) -> None:
        """Asynchronous, on the stream. `addresses`: 0 for a tensor that is not there; `workspace`: 0 if of 0 bytes.
        `done`: steps of launches of the same kernel before this one, of the same heads and batch, which have left the
        workspace as this one wants it; 0: it has any content.
        """
        driver, kernel, vectors = self._driver, self.kernel, workspace + self._packed_bytes
        _enter_context(kernel.device)
        with self._lock:  # the driver copies what it is given, and lets other threads run meanwhile
            self._write(self._values, 0, *self._in_order((workspace, vectors, *addresses)))
            self._values[self._done] = done
            if done == 0 and self._packing is not None:  # which sets the vectors too
                self._packing.hStream = stream
                _check(driver.cuLaunchKernelEx(self._packing, kernel.packing, self._address, 0))
            elif done == 0 and self._vector_words:
                _check(driver.cuMemsetD32Async(vectors, 0xFFFFFFFF, self._vector_words, stream))
            self._config.hStream = stream
            _check(driver.cuLaunchKernelEx(self._config, kernel.function, self._address, 0))


_THREAD = threading.local()


def _enter_context(device: int) -> None:
    """A thread that has not touched CUDA has no context: give it the device's primary one."""
    if getattr(_THREAD, "entered", False):
        return
    from cuda.bindings import driver

    if not int(_check(driver.cuCtxGetCurrent())):
        _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(device))))))
    _THREAD.entered = True


def _check(result):
    if int(result[0]) != 0:
        raise RuntimeError(f"CUDA driver: {result[0].name}")
    return result[1] if len(result) > 1 else None
