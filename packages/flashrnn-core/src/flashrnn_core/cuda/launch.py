"""From a problem on a device to a launch on the caller's stream. Raw pointers and strides; no framework."""

from __future__ import annotations

import functools
import os
import threading

import numpy as np

from flashrnn_core.archs import ARCHS, Arch
from flashrnn_core.contract import Problem
from flashrnn_core.cuda import source, streamed
from flashrnn_core.cuda.emit import old_states_used
from flashrnn_core.cuda.plan import CLUSTER, GLOBAL, Plan, fewer_registers, make_plan


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


@functools.lru_cache(maxsize=4096)
def plan_for(
    problem: Problem, backward: bool, element: str, saved: tuple[int, ...], device: int, make=make_plan
) -> Plan | str:
    """The plan of a problem on a device, or the reason why there is none. `make`: of `plan` or of `streamed`."""
    capability, multiprocessors = device_properties(device)
    arch = arch_of(capability)
    if arch is None:
        return (
            f"compute capability {capability[0]}.{capability[1]} is older than 8.0, or FLASHRNN_ARCH is newer than it"
        )
    return make(problem, backward, arch, multiprocessors, element, saved)


def less_in_registers(plan: Plan, arch: Arch) -> Plan | None:
    """`fewer_registers` of the plan's kind."""
    return streamed.fewer_registers(plan, arch) if isinstance(plan, streamed.Streamed) else fewer_registers(plan, arch)


class Kernel:
    """A compiled plan on one device. `launch` is asynchronous, on the stream given."""

    def __init__(self, plan: Plan, aligned: bool, device: int):
        from cuda.bindings import driver

        from flashrnn_core.cuda.compile import load

        capability, self._multiprocessors = device_properties(device)
        self._device, self._lock = device, threading.Lock()
        _enter_context(device)
        arch = arch_of(capability)
        assert arch is not None, "a plan exists"
        target, code = code_for(arch, capability)
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
        self._function = driver.CUfunction(int(kernel))
        self._names = source.arguments(plan.backward, old_states_used(plan.problem.cell), bool(plan.STREAM))
        self._config = driver.CUlaunchConfig()
        self._config.blockDimX, self._config.blockDimY, self._config.blockDimZ = plan.TEAMS * plan.WARPS * 32, 1, 1
        self._config.gridDimY = self._config.gridDimZ = 1
        self._config.sharedMemBytes = shared
        attributes = []
        if plan.exchange == CLUSTER:
            a = driver.CUlaunchAttribute()
            a.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            a.value.clusterDim.x, a.value.clusterDim.y, a.value.clusterDim.z = plan.C, 1, 1
            attributes.append(a)
        if plan.exchange == GLOBAL:
            a = driver.CUlaunchAttribute()
            a.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            a.value.cooperative = 1
            attributes.append(a)
        self._config.attrs, self._config.numAttrs = attributes, len(attributes)
        if plan.packed_bytes:
            self._pack = driver.CUfunction(int(self._object.get_kernel("pack").handle))
            self._packing = driver.CUlaunchConfig()
            self._packing.blockDimX, self._packing.blockDimY, self._packing.blockDimZ = 256, 1, 1
            self._packing.gridDimX, self._packing.gridDimY, self._packing.gridDimZ = 8 * self._multiprocessors, 1, 1
            self._packing.attrs, self._packing.numAttrs = [], 0

    def groups(self, items: int) -> int:
        """Groups of blocks launched: all items at once, but no more than can be resident where they wait in L2."""
        return min(items, self._multiprocessors // self.plan.C) if self.plan.exchange == GLOBAL else items

    def vectors(self, items: int) -> int:
        """Words of 4 bytes, all bits set, that the argument VECTORS must point to; 0: none."""
        waits = self.plan.exchange == GLOBAL and not self.plan.idle
        return self.groups(items) * self.plan.TEAMS * 4 * self.plan.VECTOR if waits else 0

    def packed(self, heads: int) -> int:
        """Bytes that the argument PACKED must point to, of any content."""
        return heads * self.plan.packed_bytes

    def pack(self, arguments: dict[str, int], stream: int) -> None:
        """Write R to PACKED, before any launch that reads it."""
        self._run(self._pack, self._packing, arguments, stream)

    def launch(self, arguments: dict[str, int], items: int, stream: int) -> None:
        """Launch for `items` (heads x batch tiles) on a stream; arguments by name as in `source.arguments`."""
        with self._lock:
            self._config.gridDimX = self.groups(items) * self.plan.C
            self._run(self._function, self._config, arguments, stream)

    def _run(self, function, config, arguments: dict[str, int], stream: int) -> None:
        from cuda.bindings import driver

        values = np.array([arguments[name] for name in self._names], np.int64)
        pointers = np.array([values.ctypes.data], np.uint64)
        _enter_context(self._device)
        config.hStream = stream
        _check(driver.cuLaunchKernelEx(config, function, int(pointers.ctypes.data), 0))


@functools.lru_cache(maxsize=4096)
def kernel_for(plan: Plan, aligned: bool, device: int) -> Kernel:
    """The kernel of a plan on a device, compiled at most once a process."""
    return Kernel(plan, aligned, device)


def _enter_context(device: int) -> None:
    """A thread that has not touched CUDA has no context: give it the device's primary one."""
    from cuda.bindings import driver

    if not int(_check(driver.cuCtxGetCurrent())):
        _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(device))))))


def _check(result):
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"CUDA driver: {error.name}")
    return values[0] if values else None
