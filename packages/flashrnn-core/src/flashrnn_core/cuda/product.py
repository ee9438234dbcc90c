"""dR and db of all steps in one pass over dpre (kernels/product.cuh): for 16-bit elements and several heads, where a
library's matmul would want a copy of dpre in another order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from flashrnn_core.cuda import launch, source
from flashrnn_core.cuda.plan import ELEMENTS

M_TILE, P_TILE = 256, 64  # of a block, as in kernels/product.cuh
THREADS, SHARED_BYTES = 256, 4 * 32 * (M_TILE + P_TILE) * 2
INTEGERS = ("G", "N", "D", "slices", "recurrent")
SIZES = np.dtype([("rows", np.int64), *((name, np.int32) for name in INTEGERS)], align=True)  # struct Sizes


def text(element: str) -> str:
    """The translation unit for "bfloat16" or "float16"."""
    return source.unit({}, {"ELEMENT": ELEMENTS[element]}, source.file("element.cuh"), source.file("product.cuh"))


class Product:
    """The two kernels on one device. `launch` is asynchronous, on the stream given."""

    def __init__(self, element: str, device: int):
        from cuda.bindings import driver

        from flashrnn_core.cuda.compile import load

        capability, self._multiprocessors = launch.device_properties(device)
        launch._enter_context(device)
        arch = launch.arch_of(capability)
        assert arch is not None, "a backend of this device supports the problem"
        self._object = load(text(element), *launch.code_for(arch, capability))
        self._multiply, self._add = (
            driver.CUfunction(int(self._object.get_kernel(name).handle)) for name in ("multiply", "add")
        )
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        kernel, handle = driver.CUkernel(int(self._multiply)), launch._check(driver.cuDeviceGet(device))
        launch._check(driver.cuKernelSetAttribute(attribute, SHARED_BYTES, kernel, handle))
        self._device = device

    def _tiles(self, G: int, N: int, D: int) -> int:
        return N * -(-G * D // M_TILE) * -(-D // P_TILE)

    def _slices(self, rows: int, G: int, N: int, D: int) -> int:
        return max(1, min(self._multiprocessors // self._tiles(G, N, D), rows // 256))

    def floats(self, rows: int, G: int, N: int, D: int) -> int:
        """Size of the memory that `launch` wants for partial sums, of 4 bytes each."""
        return self._slices(rows, G, N, D) * G * N * D * (D + 1)

    def launch(self, pointers: Sequence[int], sizes: tuple[int, ...], recurrent: Sequence[int], stream: int) -> None:
        """Pointers to dpre [rows G N D], the h that met R [rows N D], memory of `floats`, dR [Gr N D P] and
        db [G N D] in float32; sizes: rows, G, N, D, of which D is a multiple of 8. `recurrent`: numbers of the gates
        that have a part in R.
        """
        from cuda.bindings import driver

        dpre, met, memory, dR, db = pointers
        rows, G, N, D = sizes
        slices = self._slices(rows, G, N, D)
        struct = np.array([(*sizes, slices, sum(1 << gate for gate in recurrent))], SIZES)
        bias = memory + slices * G * N * D * D * 4
        launch._enter_context(self._device)
        first = (self._tiles(G, N, D), slices), SHARED_BYTES, (dpre, met, memory, bias)
        second = (-(-G * N * D * D // THREADS), 1), 0, (memory, bias, dR, db)
        for function, (grid, shared, arguments) in ((self._multiply, first), (self._add, second)):
            values = np.array(arguments, np.uint64)
            places = values.ctypes.data + 8 * np.arange(len(arguments), dtype=np.uint64)
            places = np.append(places, np.uint64(struct.ctypes.data))
            where = int(places.ctypes.data)
            launch._check(driver.cuLaunchKernel(function, *grid, 1, THREADS, 1, 1, shared, stream, where, 0))


@functools.cache
def product_for(element: str, device: int) -> Product:
    """The kernels of an element on a device, compiled at most once a process."""
    return Product(element, device)
