"""What cuda_fused and cuda launch with, seen by a driver that only looks: the plans of an H100, tensors of the CPU."""

import ctypes
import functools
import gc
import threading
import types
import weakref
from dataclasses import replace

import pytest
import torch
from problems import Case, build

pytest.importorskip("cuda.core")

from flashrnn import gradients
from flashrnn.backends import cuda, cuda_fused
from flashrnn_core import get_cell
from flashrnn_core.cuda import compile as compiling
from flashrnn_core.cuda import emit, launch, product, source
from flashrnn_core.cuda.plan import ELEMENTS, GLOBAL

MODULES = {"cuda_fused": cuda_fused, "cuda": cuda}
SCAN, PACK = 1, 2  # handles
STREAM = 7


class Driver:
    """What it was asked to do, in order: ("set", pointer, words), or a kernel's handle, blocks, arguments by name."""

    def __init__(self):
        self.seen, self.names, self.compiled = [], (), []

    def load(self, kernels):
        def load(*given):
            self.compiled.append(("load", *given))
            return types.SimpleNamespace(get_kernel=kernels.__getitem__)

        return load

    def fill(self, pointer, value, words, stream):
        assert (value, stream) == (0xFFFFFFFF, STREAM)
        self.seen.append(("set", pointer, words))
        return (0,)

    def launch(self, config, function, parameters, extra):
        assert int(config.hStream) == STREAM
        (struct,) = (ctypes.c_int64 * 1).from_address(parameters)
        values = (ctypes.c_int64 * len(self.names)).from_address(struct)
        self.seen.append((int(function), config.gridDimX, dict(zip(self.names, values, strict=True))))
        return (0,)


@pytest.fixture
def driver(monkeypatch):
    from cuda.bindings import driver as bindings

    looks = Driver()
    looks.bindings = bindings
    for name, does in (
        ("cuCtxGetCurrent", lambda: (0, 1)),
        ("cuDeviceGet", lambda device: (0, 0)),
        ("cuKernelSetAttribute", lambda *given: (0,)),
        ("cuOccupancyMaxActiveClusters", lambda function, config: (0, 132 // config.attrs[0].value.clusterDim.x)),
        ("cuMemsetD32Async", looks.fill),
        ("cuLaunchKernelEx", looks.launch),
    ):
        monkeypatch.setattr(bindings, name, does)
    kernels = {
        name: types.SimpleNamespace(handle=handle, attributes=types.SimpleNamespace(local_size_bytes=0))
        for name, handle in (("scan", SCAN), ("pack", PACK))
    }
    monkeypatch.setattr(compiling, "begin", lambda *given: looks.compiled.append(("begin", *given)))
    monkeypatch.setattr(compiling, "load", looks.load(kernels))
    monkeypatch.setattr(launch, "device_properties", lambda device: ((9, 0), 132))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)  # as a CPU tensor's
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    caches = (cuda_fused._plan, cuda_fused._call, launch.plan_for, launch.kernel_for, launch.begin, product.begin)
    for cached in caches:
        cached.cache_clear()
    yield looks
    for cached in caches:
        cached.cache_clear()


def strides(name, x, dims):
    """Pointer and strides as arguments, of a tensor that may be absent."""
    if x is None:
        return {name: 0} | {f"{name}_{dim}": 0 for dim in dims if dim != " "}
    return {name: x.data_ptr()} | {f"{name}_{d}": s for d, s in zip(dims, x.stride(), strict=False) if d != " "}


def expected_of_both(case, tensors):
    Wx, lengths = tensors["Wx"], tensors["lengths"]
    arguments = strides("WX", Wx, "BTGN") | strides("RESETS", tensors["resets"], "BT") | strides("LENGTHS", lengths, "")
    arguments |= {"B": case.B, "T": case.T, "N": case.N, "LENGTHS_BYTES": 0 if lengths is None else 8}
    kinds = {
        torch.bfloat16: ELEMENTS["bfloat16"],
        torch.float16: ELEMENTS["float16"],
        torch.float32: ELEMENTS["float32"],
    }
    return arguments | {"BIAS": tensors["b"].data_ptr(), "BIAS_KIND": kinds[tensors["b"].dtype]}


def assert_launched(driver, expected, plan, case):
    """One launch, after what it needs: R packed, and memory of which all bits are set, which packing does too."""
    *before, (handle, blocks, arguments) = driver.seen
    assert handle == SCAN
    assert {name: arguments[name] for name in expected} == expected
    tiles = -(-case.B // plan.item_rows)
    groups = case.N * tiles if plan.exchange != GLOBAL else min(case.N * tiles, 132 // plan.C)
    assert (arguments["TILES"], blocks) == (tiles, groups * plan.C)
    if plan.packed_bytes:
        handle, _, packing = before.pop(0)
        assert handle == PACK
        assert packing == arguments
        assert arguments["VECTOR_WORDS"] == groups * (plan.TEAMS * 4 * plan.VECTOR + 32 * plan.STAGED)
        assert 0 < arguments["PACKED"] <= arguments["VECTORS"] - case.N * plan.packed_bytes
    elif plan.exchange == GLOBAL and not plan.idle:
        assert before.pop(0) == ("set", arguments["VECTORS"], groups * plan.TEAMS * 4 * plan.VECTOR)
    assert arguments["VECTORS"] % 16 == 0
    assert before == []
    driver.seen.clear()


CASES = {
    "block": ("cuda_fused", Case("gru", B=5, N=3, D=24, dtype="bfloat16", states="float32")),
    "cluster": ("cuda_fused", Case("lstm", D=64, dtype="bfloat16", states=None, resets=True, layout="time_major")),
    "global": ("cuda_fused", Case("slstm", N=1, D=640, dtype="float16", states="float16", lengths=True, clip=0.5)),
    "cut": ("cuda_fused", Case("lstm", D=640, dtype="float32", states="float32", resets=True, cut=True)),
    "teams": ("cuda", Case("lstm", B=256, T=2, N=1, D=768, dtype="bfloat16", states=None)),
    "streamed": ("cuda", Case("slstm", D=64, dtype="bfloat16", states="bfloat16", reverse=True, layout="spaced")),
}


@pytest.mark.parametrize("name", CASES)
def test_arguments(driver, name):
    """Pointers of this call's tensors, strides of their layout, whatever calls of the same layout were before."""
    backend, case = CASES[name]
    module, problem, cell = MODULES[backend], case.problem, case.problem.cell
    element = "float32" if case.dtype == "float32" else case.dtype
    make = cuda_fused.resident_plan if backend == "cuda_fused" else cuda.make_plan
    plans = [cuda_fused._plan(problem, backward, True, element, -1, make) for backward in (False, True)]
    for seed in (0, 1, 2):
        inputs = build(case.but(seed=seed))
        tensors = inputs.tensors
        driver.names = source.arguments(False, (), bool(plans[0].STREAM))
        out, last, saved = module.forward(problem, **tensors, record=True)
        expected = expected_of_both(case, tensors) | strides("R", tensors["R"], "GND")
        expected |= (
            strides("STATES", tensors["states"], "SB N") | strides("OUT", out, "SBT") | strides("LAST", last, "SB")
        )
        expected["SAVED"] = 0 if saved is None else saved.data_ptr()
        assert_launched(driver, expected, plans[0], case)

        driver.names = source.arguments(True, plans[1].old, bool(plans[1].STREAM))
        out = torch.zeros_like(out)
        saved = torch.zeros(0 if saved is None else saved.shape, dtype=out.dtype)
        dout, dlast = inputs.dstates, inputs.dlast_states.float()
        h = torch.zeros(case.B, case.T, case.N, case.D, dtype=tensors["Wx"].dtype)
        dpre, dstates = module.backward(problem, *tensors.values(), out, saved, dout, dlast, lambda *_, h=h: h)
        expected = expected_of_both(case, tensors) | strides("DOUT", dout, "SBTN") | strides("DLAST", dlast, "SB N")
        expected |= strides("DPRE", dpre, "BTG") | strides("LAST", dstates, "SB") | {"DSTATES": dstates.data_ptr()}
        del expected["LAST"]  # strides of dstates; the pointer has its own name
        kept, S = cuda_fused.saved_states(problem), len(cell.states)
        assert plans[1].old == (*emit.old_states_used(cell), *(S + k for k in kept))
        for k in plans[1].old:
            expected |= strides(f"OLD{k}", out[k] if k < S else saved[kept.index(k - S)], "BTN")
            if tensors["states"] is None or k >= S:
                expected |= strides(f"INITIAL{k}", None, "B N")
        expected["CLIP"] = 0 if case.clip is None else 0x3F000000  # 0.5 in float32
        assert_launched(driver, expected, plans[1], case)
    assert cuda_fused._call.cache_info().currsize == 2


@pytest.mark.parametrize("name", ["block", "streamed"])
def test_a_forward_begins_the_kernel_of_its_backward(driver, name):
    """One that records; it is the kernel that the backward loads, and begun before the forward waits for its own."""
    backend, case = CASES[name]
    module, inputs = MODULES[backend], build(case)
    driver.names = source.arguments(False, (), name == "streamed")
    module.forward(replace(case.problem, hidden_only=True), **inputs.tensors, record=False)
    assert [what for what, *_ in driver.compiled] == ["load"]
    driver.compiled.clear()
    out, _, saved = module.forward(case.problem, **inputs.tensors, record=True)
    old = emit.old_states_used(case.problem.cell)
    old = (*old, *(len(out) + k for k in cuda_fused.saved_states(case.problem)))
    driver.names = source.arguments(True, old, name == "streamed")
    h = torch.zeros(case.B, case.T, case.N, case.D, dtype=inputs.tensors["Wx"].dtype)
    saved = torch.zeros(0 if saved is None else saved.shape, dtype=out.dtype)
    given = (*inputs.tensors.values(), out, saved, inputs.dstates, inputs.dlast_states.float())
    module.backward(case.problem, *given, lambda start, stop: h[:, start:stop])
    begun, *of_dR, forward, loaded = driver.compiled
    assert (begun[0], forward[0], loaded[0]) == ("begin", "load", "load")
    assert begun[1:] == loaded[1:] != forward[1:]
    assert [(what, text) for what, text, *_ in of_dR] == [("begin", product.text(case.dtype))] * (case.N > 1)


def test_pieces_of_time(driver):
    """The last piece first; R is packed once, vectors are absent once, a piece's dstates are the next one's dlast."""
    case = Case("lstm", T=100, N=1, D=64, dtype="bfloat16", states="float32", resets=True)
    inputs = build(case)
    Wx, resets = inputs.tensors["Wx"], inputs.tensors["resets"]
    driver.names = source.arguments(True, emit.old_states_used(get_cell("lstm")), True)
    out, dout, dlast = torch.zeros(case.problem.output_shape("states")), inputs.dstates, inputs.dlast_states
    h = torch.zeros(case.B, case.T, 1, 64, dtype=torch.bfloat16)
    given = (*inputs.tensors.values(), out, torch.zeros(0), dout, dlast, lambda start, stop: h[:, start:stop])
    dpre, dstates = cuda.backward(case.problem, *given)
    assert [seen[0] for seen in driver.seen] == [PACK, SCAN, SCAN]
    scans = [seen[2] for seen in driver.seen if seen[0] == SCAN]
    for (start, stop), arguments in zip(reversed(gradients.pieces(case.problem)), scans, strict=True):
        assert arguments["T"] == stop - start
        for name, x in (("WX", Wx), ("RESETS", resets), ("DOUT", dout[0]), ("OLD1", out[1]), ("DPRE", dpre)):
            assert arguments[name] == x[:, start].data_ptr()
    assert scans[0]["DLAST"] == dlast.data_ptr()
    assert scans[1]["DLAST"] == scans[0]["DSTATES"]
    assert scans[1]["DSTATES"] == dstates.data_ptr()
    assert scans[0]["PACKED"] == scans[1]["PACKED"]
    assert scans[0]["VECTORS"] == scans[1]["VECTORS"]
    assert [arguments["DONE"] for arguments in scans] == [0, scans[0]["T"]]


def test_initial_states_in_any_layout(driver):
    """Their last dim apart too, in both directions: a kernel reads rows of units next to each other."""
    case = Case("lstm", B=3, T=7, N=2, D=16, dtype="bfloat16", states="float32")
    inputs = build(case)
    tensors = inputs.tensors | {"states": inputs.tensors["states"].transpose(-1, -3).contiguous().transpose(-1, -3)}
    names = {False: ("STATES", "STATES_B", "STATES_N"), True: ("INITIAL1", "INITIAL1_B", "INITIAL1_N")}
    backward, rows = False, []

    def look(config, function, parameters, extra):
        result = driver.launch(config, function, parameters, extra)
        at, B, N = (driver.seen[-1][2][name] for name in names[backward])
        at += 0 if backward else 4 * driver.seen[-1][2]["STATES_S"]  # c
        rows.append(
            [[(ctypes.c_float * 16).from_address(at + 4 * (b * B + n * N))[:] for n in (0, 1)] for b in (0, 1, 2)]
        )
        return result

    driver.bindings.cuLaunchKernelEx = look
    driver.names = source.arguments(False, ())
    out, _, _ = cuda_fused.forward(case.problem, **tensors, record=True)
    backward, driver.names = True, source.arguments(True, emit.old_states_used(get_cell("lstm")))
    h = torch.zeros(3, 7, 2, 16, dtype=torch.bfloat16)
    given = (*tensors.values(), torch.zeros_like(out), torch.zeros(0), inputs.dstates, inputs.dlast_states)
    cuda_fused.backward(case.problem, *given, lambda start, stop: h[:, start:stop])
    assert rows == [inputs.tensors["states"][1, :, 0].tolist()] * 2


def test_what_was_launched_stays_loaded(driver, monkeypatch):
    """Two threads whose first call is the same one make a kernel each, and no cache has both."""
    case = Case("lstm", B=3, T=7, N=2, D=16, dtype="bfloat16", states=None)
    both, loaded, load = threading.Barrier(2), [], compiling.load

    class Module:
        def __init__(self, *given):
            self.get_kernel = load(*given).get_kernel

    def slow(*given):
        both.wait()
        module = Module(*given)
        loaded.append(weakref.ref(module))
        return module

    monkeypatch.setattr(compiling, "load", slow)
    monkeypatch.setattr(driver.bindings, "cuLaunchKernelEx", lambda *given: (0,))
    tensors = build(case).tensors
    call = functools.partial(cuda_fused.forward, case.problem, **tensors, record=False)
    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert [module() is not None for module in loaded] == [True, True]


def test_a_copy_lives_until_its_last_launch(driver, monkeypatch):
    """Of cotangents whose last dim is not contiguous; a launch has no more than the address."""
    case = Case("lstm", T=100, N=1, D=64, dtype="bfloat16", states="float32")
    inputs, copies, alive = build(case), [], []
    rows = cuda_fused._rows

    def remember(x):
        copy = rows(x)
        if copy is not x:
            copies.append((weakref.ref(copy), copy.data_ptr()))
        return copy

    def look(config, function, parameters, extra):
        result = driver.launch(config, function, parameters, extra)
        copy, address = copies[0]
        if driver.seen[-1][0] == SCAN:
            alive.append(copy() is not None and address <= driver.seen[-1][2]["DOUT"])
        return result

    monkeypatch.setattr(cuda_fused, "_rows", remember)
    driver.bindings.cuLaunchKernelEx = look
    driver.names = source.arguments(True, emit.old_states_used(get_cell("lstm")), True)
    out, h = torch.zeros(case.problem.output_shape("states")), torch.zeros(case.B, 100, 1, 64, dtype=torch.bfloat16)
    dout = inputs.dstates.transpose(1, 4).contiguous().transpose(1, 4)
    given = (*inputs.tensors.values(), out, torch.zeros(0), dout, inputs.dlast_states)
    cuda.backward(case.problem, *given, lambda start, stop: h[:, start:stop])
    assert len(copies) == 1
    assert alive == [True, True]


@pytest.mark.parametrize("N", [1, 3])
def test_a_backward_reads_R_transposed(driver, N):
    """Rows of it: R[g,n,:,p] stands at p, whether it was copied or not."""
    case = Case("lstm", B=4, N=N, D=32, dtype="bfloat16", states=None)
    driver.names = source.arguments(True, emit.old_states_used(get_cell("lstm")))
    inputs = build(case)
    rows = {}

    def look(config, function, parameters, extra):
        result = driver.launch(config, function, parameters, extra)
        arguments = driver.seen[-1][2]
        for g, n, p in ((0, 0, 0), (3, N - 1, 31), (2, N // 2, 7)):
            place = arguments["R"] + 2 * (g * arguments["R_G"] + n * arguments["R_N"] + p * arguments["R_D"])
            rows[g, n, p] = (ctypes.c_int16 * 32).from_address(place)[:]
        return result

    driver.bindings.cuLaunchKernelEx = look
    out, h = torch.zeros(case.problem.output_shape("states")), torch.zeros(4, case.T, N, 32, dtype=torch.bfloat16)
    given = (*inputs.tensors.values(), out.bfloat16(), torch.zeros(0), inputs.dstates, inputs.dlast_states)
    cuda_fused.backward(case.problem, *given, lambda start, stop: h[:, start:stop])
    for (g, n, p), row in rows.items():
        assert row == inputs.tensors["R"][g, n, :, p].contiguous().view(torch.int16).tolist()
    assert len(rows) == 3


def test_another_layout_is_another_call(driver):
    """Rows that are no longer aligned take another kernel, other strides and another T the same one."""
    case = Case("lstm", B=4, N=2, D=32, dtype="bfloat16", states=None)
    driver.names = source.arguments(False, ())
    wide = torch.zeros(4, 9, 4, 2, 32, dtype=torch.bfloat16)
    tensors = build(case).tensors
    moved = torch.zeros(wide.numel() + 1, dtype=torch.bfloat16)[1:].view(wide.shape)
    for Wx in (wide, wide.transpose(0, 1).contiguous().transpose(0, 1), wide[:, 2:], moved):
        problem = case.but(T=Wx.shape[1]).problem
        cuda_fused.forward(problem, **tensors | {"Wx": Wx}, record=False)
        arguments = driver.seen[-1][2]
        assert arguments["T"] == Wx.shape[1]
        assert {key: arguments[key] for key in strides("WX", Wx, "BTGN")} == strides("WX", Wx, "BTGN")
    assert cuda_fused._call.cache_info().currsize == 4
    assert launch.kernel_for.cache_info().currsize == 2


def test_odd_rows_of_R_are_copied(driver):
    """The kernels read R two values of 16 bits at once: at even places, unless D is odd."""
    case = Case("lstm", B=4, N=2, D=32, dtype="bfloat16", states=None)
    driver.names = source.arguments(False, ())
    tensors = build(case).tensors
    even = torch.zeros(4, 2, 32, 34, dtype=torch.bfloat16)
    for R, copied in ((even[..., :32], False), (even[..., 1:33], True), (even[..., :32].transpose(2, 3), True)):
        cuda_fused.forward(case.problem, **tensors | {"R": R}, record=False)
        assert (driver.seen[-1][2]["R"] != R.data_ptr()) == copied
