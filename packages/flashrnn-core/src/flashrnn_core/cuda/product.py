"""dR and db of all steps in one pass over dpre (kernels/product.cuh): for 16-bit elements and several heads, where a
library's matmul would want a copy of dpre in another order.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import numpy as np

from flashrnn_core.cuda import launch, source
from flashrnn_core.cuda.plan import ELEMENTS

M_TILE, P_TILE = 256, 64  # of a block, as in kernels/product.cuh
THREADS, SHARED_BYTES = 256, 4 * 32 * (M_TILE + P_TILE) * 2
INTEGERS = ("G", "N", "D", "slices", "T", "first", "shift", "recurrent")
SIZES = np.dtype([("rows", np.int64), *((name, np.int32) for name in INTEGERS)], align=True)  # struct Sizes


def text(element: str) -> str:
    """The translation unit for "bfloat16" or "float16"."""
    return source.unit({}, {"ELEMENT": ELEMENTS[element]}, source.file("element.cuh"), source.file("product.cuh"))


class Product:
    """The two kernels on one device."""

    def __init__(self, element: str, device: int):
        from cuda.bindings import driver

        from flashrnn_core.cuda.compile import load

        _, self.multiprocessors = launch.device_properties(device)
        self.device = device
        launch._enter_context(device)
        self._object = load(text(element), *launch.target_of(device))
        self.multiply, self.add = (
            driver.CUfunction(int(self._object.get_kernel(name).handle)) for name in ("multiply", "add")
        )
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        kernel, handle = driver.CUkernel(int(self.multiply)), launch._check(driver.cuDeviceGet(device))
        launch._check(driver.cuKernelSetAttribute(attribute, SHARED_BYTES, kernel, handle))


class Call:
    """Launches for one size: B, T, G, N, D, of which D is a multiple of 8. `recurrent`: numbers of the gates that have
    a part in R. `shift`: of rows of h, from a step's to that which it met, -1 or 1, where the first step of a sequence
    (the last one) has no such row and is left out; 0 leaves out none. `floats`: of the memory that a launch wants for
    partial sums, of 4 bytes each.
    """

    def __init__(self, product: Product, B: int, T: int, G: int, N: int, D: int, recurrent: Sequence[int], shift: int):
        from cuda.bindings import driver

        rows, tiles = B * T, N * -(-G * D // M_TILE) * -(-D // P_TILE)
        slices = max(1, min(product.multiprocessors // tiles, rows // 256))
        self.floats = slices * G * N * D * (D + 1)
        self._bias = slices * G * N * D * D * 4  # where in it sums of db start
        self._product, self._driver, self._lock = product, driver, threading.Lock()
        first = {-1: 0, 0: -1, 1: T - 1}[shift]
        self._sizes = np.array([(rows, G, N, D, slices, T, first, shift, sum(1 << g for g in recurrent))], SIZES)
        self._pointers = np.zeros(6, np.uint64)  # dpre, h, memory, memory of db, dR, db
        sizes, at = self._sizes.ctypes.data, self._pointers.ctypes.data + 8 * np.arange(6, dtype=np.uint64)
        self._arguments = [np.array([*at[part], sizes], np.uint64) for part in (slice(0, 4), slice(2, 6))]
        self._addresses = [int(x.ctypes.data) for x in self._arguments]
        self._grid, self._blocks = (tiles, slices), -(-G * N * D * D // THREADS)

    def launch(self, pointers: Sequence[int], stream: int) -> None:
        """Asynchronous, on the stream. Pointers to dpre [B T G N D], h [B T N D], memory of `floats`, dR [Gr N D P] and
        db [G N D] in float32.
        """
        dpre, h, memory, dR, db = pointers
        product, driver = self._product, self._driver
        launch._enter_context(product.device)
        with self._lock:  # the driver copies what it is given, and lets other threads run meanwhile
            self._pointers[:] = dpre, h, memory, memory + self._bias, dR, db
            multiplied, added = self._addresses
            launch._check(
                driver.cuLaunchKernel(
                    product.multiply, *self._grid, 1, THREADS, 1, 1, SHARED_BYTES, stream, multiplied, 0
                )
            )
            launch._check(driver.cuLaunchKernel(product.add, self._blocks, 1, 1, THREADS, 1, 1, 0, stream, added, 0))


@functools.cache
def begin(element: str, device: int) -> None:
    """Let a thread compile what `product_for` of the same arguments will want; once a process."""
    from flashrnn_core.cuda import compile as compiling

    compiling.begin(text(element), *launch.target_of(device))


@functools.cache
def product_for(element: str, device: int) -> Product:
    """The kernels of an element on a device, compiled at most once a process."""
    return Product(element, device)


@functools.lru_cache(maxsize=4096)
def call_for(
    element: str, device: int, sizes: tuple[int, int, int, int, int], recurrent: tuple[int, ...], shift: int
) -> Call:
    """The launches for sizes (B, T, G, N, D), see `Call`."""
    return Call(product_for(element, device), *sizes, recurrent, shift)
