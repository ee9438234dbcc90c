"""One self-contained text a plan: constants, argument numbers, ring fields, the cell, and the kernel files."""

from __future__ import annotations

import functools
from importlib import resources

from flashrnn_core.cuda import emit
from flashrnn_core.cuda.plan import BLOCK, CLUSTER, ELEMENTS, GLOBAL, Plan

# Files of kernels/, in order.
ROOMS = ("element", "frame", "matmul", "reduce", "stream", "exchange", "ring", "serve")


@functools.cache
def pointers(backward: bool, old_states: tuple[int, ...], stream: bool = False) -> tuple[str, ...]:
    """Names of the kernel's first arguments: addresses, 64 bits each; 0 for a tensor that is not there."""
    names = ["WX", "R", "BIAS", "RESETS", "LENGTHS", "LAST", "VECTORS", *(["PACKED"] if stream else [])]
    if not backward:
        return (*names, "STATES", "OUT", "SAVED")
    old = [f"{name}{k}" for k in old_states for name in ("OLD", "INITIAL")]
    return (*names, "REC", *old, "DOUT", "DLAST", "DPRE", "DSTATES")


@functools.cache
def arguments(backward: bool, old_states: tuple[int, ...], stream: bool = False) -> tuple[str, ...]:
    """Names of the kernel's arguments in order, 64 bits each: `pointers`, then numbers; `X_B` is the stride of dim B of
    tensor X, in elements. kernels/ring.cuh takes the strides S, B, N of STATES and DLAST as neighbours.
    """
    names = ["B", "T", "N", "TILES", "R_G", "R_N", "R_D", "WX_B", "WX_T", "WX_G", "WX_N", "BIAS_KIND"]
    names += ["RESETS_B", "RESETS_T", "LENGTHS_BYTES", "LAST_S", "LAST_B", "DONE"]
    names += ["R_P", "VECTOR_WORDS"] if stream else []
    if not backward:
        names += ["STATES_S", "STATES_B", "STATES_N", "OUT_S", "OUT_B", "OUT_T"]
        return (*pointers(backward, old_states, stream), *names)
    names += ["CLIP", "REC_B", "REC_T", "REC_G", "REC_N"]
    for k in old_states:
        names += [f"OLD{k}_B", f"OLD{k}_T", f"OLD{k}_N", f"INITIAL{k}_B", f"INITIAL{k}_N"]
    names += ["DOUT_S", "DOUT_B", "DOUT_T", "DOUT_N", "DLAST_S", "DLAST_B", "DLAST_N", "DPRE_B", "DPRE_T", "DPRE_G"]
    return (*pointers(backward, old_states, stream), *names)


def text(plan: Plan, aligned: bool) -> str:
    """The translation unit. `aligned`: every row of every field starts at 16 bytes, so the ring may copy 16 at once."""
    cell, problem = plan.problem.cell, plan.problem
    states = len(cell.states)
    macros = {"EXCHANGE": plan.exchange, "BACKWARD": int(plan.backward), "STREAM": plan.STREAM}
    macros |= {"SPLIT": plan.SPLIT, "STAGED": plan.STAGED}
    narrow = problem.dtype if not plan.wide else problem.state_dtype
    constants = {
        "ELEMENT": ELEMENTS[plan.element],
        "STATE": ELEMENTS[problem.state_dtype],
        "KIND16": ELEMENTS[narrow],
        "D": problem.D,
        "G": len(cell.gates),
        "GR": len(cell.recurrent_gates),
        "S": states,
        "INPUT_MASK": _mask(cell.input_gates),
        "RECURRENT_MASK": _mask(cell.recurrent_gates),
        "SAVED_MASK": _mask(plan.saved),
        "OLD_MASK": _mask(plan.old),
        "ROW_BLOCKS": plan.row_blocks,
        "WORDS": 2 if plan.wide else 1,
        "SHOWN": 1 if problem.hidden_only else states,
        "SAVED": len(plan.saved),
        "CHUNKS": plan.CHUNKS,
        "CHUNKS_A_LANE": plan.CHUNKS_A_LANE,
        "FIELDS16": sum(size == 2 for *_, size in plan.fields),
        "FIELDS32": sum(size == 4 for *_, size in plan.fields),
        "FIELD_WX": _first(plan, "wx"),
        "FIELD_REC": _first(plan, "rec"),
        "FIELD_DOUT": _first(plan, "dout"),
    }
    constants |= {
        name: getattr(plan, name)
        for name in [
            "C",
            "U",
            "NT",
            "KS",
            "KR",
            "STAGES",
            "PARTS",
            "POLL",
            "SMALL",
            "KM",
            "NX",
            "SLOTS",
            "HELD",
            "LATE",
            "SUB",
            "MT",
            "SENT",
            "UB",
            "TILES",
            "WARPS",
            "TEAMS",
            "RECOMPUTE",
            "JOBS",
            "K_STEPS",
            "KW",
            "VECTOR",
            "TILE_BYTES",
            "AHEAD",
            "BEHIND",
        ]
    }
    constants |= {f"SHARED_{part}": offset for part, offset in plan.layout.items() if part != "total"}
    flags = {
        "RESETS": problem.resets,
        "LENGTHS": problem.lengths,
        "REVERSE": problem.reverse,
        "CUT": problem.cut,
        "CLIP": problem.clip is not None,
        "SERVED": bool(plan.SERVED),
        "ALIGNED": aligned,
    }
    names = arguments(plan.backward, plan.old, bool(plan.STREAM))
    words = emit.EXACT_WORDS if plan.element == "float32" else emit.WORDS
    return unit(
        macros,
        constants | flags,
        f"enum {{ {', '.join('A_' + n for n in names)} }};",
        f"struct Args {{ long long v[{len(names)}]; }};",
        '#line 1 "fields"',
        _fields(plan),
        _wgmma(plan) if plan.STAGED else "",
        emit.backward(cell, words, bool(plan.STAGED)) if plan.backward else emit.forward(cell, words),
        emit.prepared_transfer(cell, bool(plan.STAGED)) if plan.backward else "",
        *(file(f"{room}.cuh") for room in (*ROOMS, "backward" if plan.backward else "forward")),
        file("staged.cuh") if plan.STAGED else "",
        file("scan.cuh"),
    )


def unit(macros: dict[str, int], constants: dict[str, int], *texts: str) -> str:
    """A translation unit: macros, constants (a bool is one in C++ too), ptx.cuh, then the texts."""
    macros = {
        "EXCHANGE_BLOCK": BLOCK,
        "EXCHANGE_CLUSTER": CLUSTER,
        "EXCHANGE_GLOBAL": GLOBAL,
        "EXCHANGE": BLOCK,
        "SPLIT": 1,
        "STAGED": 0,
    } | macros
    constants = dict(zip(("BF16", "F16", "TF32", "F32"), ELEMENTS.values(), strict=True)) | constants
    return "\n".join(
        [
            "#pragma nv_diag_suppress 177  // declared but never referenced: a plan needs a part of the whole",
            *(f"#define {name} {value}" for name, value in macros.items()),
            *(f"constexpr {type(value).__name__} {name} = {str(value).lower()};" for name, value in constants.items()),
            file("ptx.cuh"),
            *texts,
        ]
    )


def _mask(numbers: tuple[int, ...]) -> int:
    return sum(1 << n for n in numbers)


def _wgmma(plan: Plan) -> str:
    """`multiply_kept`, `multiply_rest`: a k-step of 64 rows, of R in registers or in shared memory, and NT tiles."""
    sums, kind = plan.NT * 4, {"bfloat16": "bf16", "float16": "f16"}[plan.element]
    outputs = ", ".join(f'"+f"(c[{i // 4}][{i % 4}])' for i in range(sums))

    def function(name: str, argument: str, operand: str, inputs: str, count: int, flags: str) -> str:
        registers = ", ".join(f"%{i}" for i in range(sums))
        return (
            f"DEVICE void {name}(float (&c)[NT][4], {argument}, unsigned long long b) {{\n"
            f'    asm volatile("{{\\n.reg .pred p;\\nsetp.eq.u32 p, 0, 0;\\n'
            f"wgmma.mma_async.sync.aligned.m64n{plan.NT * 8}k16.f32.{kind}.{kind} {{{registers}}}, {operand}, "
            f'%{sums + count}, p, {flags};\\n}}" : {outputs} : {inputs}, "l"(b));\n}}'
        )

    four = ", ".join(f"%{sums + i}" for i in range(4))
    words = ", ".join(f'"r"(a[{i}])' for i in range(4))
    return "\n".join(
        [
            function("multiply_kept", "const unsigned (&a)[4]", f"{{{four}}}", words, 4, "1, 1, 0"),
            function("multiply_rest", "unsigned long long a", f"%{sums}", '"l"(a)', 1, "1, 1, 0, 0"),
        ]
    )


def _first(plan: Plan, kind: str) -> int:
    return next((i for i, (name, *_) in enumerate(plan.fields) if name == kind), 0)


def _fields(plan: Plan) -> str:
    """`field(a, f)`: where field f of the ring is; `initial_field`: where it is before the first step. Which arguments
    say so is looked up: code for each field, wherever a lane asks for one of its own, is long to compile.
    """
    names = arguments(plan.backward, plan.old, bool(plan.STREAM))
    assert len(names) <= 256, "a byte says which"

    def place(pointer: str, k: int = 0, of: str = "B") -> str:
        strides = [f"{pointer}_{dim}" if f"{pointer}_{dim}" in names else f"{pointer}_B" for dim in ("B", "T", "N", of)]
        return f"{sum(n << 8 * i for i, n in enumerate([*map(names.index, [pointer, *strides]), k])):#x}ull"

    places, initial, old = [], [], []
    for f, (kind, k, _) in enumerate(plan.fields):
        if kind == "old":
            places.append(place(f"OLD{k}"))
            old.append(f"if (k == {k}) return {f};")
        else:
            places.append(place(kind.upper(), k, "S" if kind == "dout" else "G"))
        initial.append(place(f"INITIAL{k}") if kind == "old" else "0ull")
    mask = _mask(tuple(f for f, (kind, *_) in enumerate(plan.fields) if kind == "old"))
    places += ["0ull"] * 2  # of chunks beyond CHUNKS, of which a lane has less than 32: read, and not used
    return "\n".join(
        [
            "struct Field { const char* p; i64 b, t, n; };  // strides in elements",
            "// Bytes: numbers of the arguments pointer, strides of B, T, N, and of S or G; then which of these.",
            f"constexpr __constant__ u64 PLACES[] = {{{', '.join(places)}}};",
            f"constexpr __constant__ u64 INITIAL_PLACES[] = {{{', '.join(initial)}}};",
            "DEVICE Field field_at(const Args& a, u64 place, int bytes) {",
            "const auto v = [&](int i) { return a.v[place >> 8 * i & 255]; };",
            "return {(const char*)v(0) + (i64)(place >> 40) * v(4) * bytes, v(1), v(2), v(3)};",
            "}",
            "DEVICE Field field(const Args& a, int f) { return field_at(a, PLACES[f], f < FIELDS16 ? 2 : 4); }",
            "DEVICE Field initial_field(const Args& a, int f) { return field_at(a, INITIAL_PLACES[f], 0); }",
            f"DEVICE constexpr bool is_old(int f) {{ return {mask}ull >> f & 1; }}",
            "DEVICE constexpr int old_field(int k) { " + " ".join(old) + " return 0; }",
        ]
    )


@functools.cache
def file(name: str) -> str:
    """A file of kernels/, with the place that messages name."""
    return f'#line 1 "{name}"\n' + resources.files("flashrnn_core.cuda").joinpath("kernels", name).read_text()
