"""Element-wise updates as machine code: one C function a rule, compiled when it is first needed and kept.

One call updates a whole list of tensors in one pass over memory, with no temporaries and a few microseconds of
overhead. The system's C compiler takes a fraction of a second; where there is none, PyTorch runs the same update
(`hasten.optim.kernels`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from hasten.cache import cache_root

# Elements that one thread takes at a time, also what sums are first summed over: results do not depend on threads.
BLOCK = 16384
# Elements of a row that share one scale in 8-bit storage.
QUANTUM = 256
# Between the random numbers of two tensors of one update.
SALT = 0x85EBCA6B

_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-std=gnu11")
# `-fopenmp` only at compile time: its functions are then found in the OpenMP runtime that PyTorch has loaded, so that
# both share one pool of threads. The later tries are for compilers and systems where that does not work.
_TRIES = (("-march=native", "-fopenmp"), ("-march=native",), ())

_HEAD = """
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
typedef {real} T;
#define SQRT(x) sqrt{suffix}(x)
#define FABS(x) fabs{suffix}(x)
#define FLOOR(x) floor{suffix}(x)
typedef union {{ uint32_t bits; float value; }} word;

static inline uint32_t mix(uint32_t x) {{
    x ^= x >> 16; x *= 0x21f0aaadu; x ^= x >> 15; x *= 0x735a2d97u; x ^= x >> 15; return x;
}}
static inline float from_bf16(uint16_t x) {{ word w; w.bits = (uint32_t)x << 16; return w.value; }}
static inline uint16_t to_bf16(float x) {{
    word w; w.value = x;
    const uint32_t rounded = (w.bits + 0x7fffu + ((w.bits >> 16) & 1u)) >> 16;
    return x != x ? 0x7fc0 : (uint16_t)rounded;
}}
static inline uint16_t to_bf16_random(float x, uint32_t random) {{
    word w; w.value = x;
    const uint32_t raised = (w.bits + (random & 0xffffu)) >> 16;
    return (w.bits & 0x7f800000u) == 0x7f800000u ? to_bf16(x) : (uint16_t)raised;
}}
static inline T from_signed(int8_t code, T scale) {{
    const T c = (T)code * (T)(1.0 / 127); return c * FABS(c) * scale;
}}
/* A number in [0, 1) that depends on a value and a seed, not on where it stands: shards draw what the whole does. */
static inline T uniform(T x, uint32_t seed) {{
    word w; w.value = (float)x; return (T)(mix(w.bits ^ seed) >> 8) * (T)(1.0 / 16777216);
}}
static inline int8_t to_signed(T x, T inverse, uint32_t seed) {{
    const T a = FABS(x * inverse), low = FLOOR(SQRT(a) * (T)127);
    const T chance = (a * (T)16129 - low * low) / (low + low + (T)1);
    const T q = uniform(x, seed) < chance ? low + (T)1 : low, most = q > (T)127 ? (T)127 : q;
    return (int8_t)(x < (T)0 ? -most : most);
}}
static inline T from_unsigned(uint8_t code, T scale) {{
    const T c = (T)code * (T)(1.0 / 255); return c * c * (c * c) * scale;
}}
static inline uint8_t to_unsigned(T x, T inverse, uint32_t seed) {{
    const T a = x * inverse, low = FLOOR(SQRT(SQRT(a)) * (T)255), next = low + (T)1;
    const T under = low * low * (low * low), over = next * next * (next * next);
    const T chance = (a * (T)4228250625.0 - under) / (over - under);
    const T q = uniform(x, seed) < chance ? next : low, most = q > (T)255 ? (T)255 : q;
    return (uint8_t)(x > (T)0 && most < (T)1 ? (T)1 : most);
}}
"""

_RUN = """
void run(int64_t num, const int64_t *shape, void *const *pointers, const double *scalars, int64_t stride,
         double *sums, uint32_t seed, int threads) {{
    int64_t *first = malloc((num + 1) * sizeof(int64_t));
    first[0] = 0;
    for (int64_t k = 0; k < num; ++k) {{
        const int64_t rows = shape[3 * k], columns = shape[3 * k + 1];
        const int64_t step = columns > 0 && columns < {block} ? {block} / columns : 1;
        const int64_t wide = {by_rows} ? (rows + step - 1) / step : (rows * columns + {block} - 1) / {block};
        first[k + 1] = first[k] + (columns > 0 ? wide : 0);
    }}
    const int64_t total = first[num];
    double *parts = {num_sums} ? malloc(total * {num_sums} * sizeof(double) + 8) : 0;
    #pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t b = 0; b < total; ++b) {{
        int64_t low = 0, high = num;
        while (high - low > 1) {{
            const int64_t middle = (low + high) / 2;
            if (first[middle] <= b) low = middle; else high = middle;
        }}
        while (first[low + 1] <= b) ++low;
        const int64_t rows = shape[3 * low], columns = shape[3 * low + 1], inside = b - first[low];
        block(pointers + low, num, scalars + low * stride, inside, rows, columns, shape[3 * low + 2],
              parts + b * {num_sums}, mix(seed + (uint32_t)low * 0x9e3779b9u));
    }}
    if ({num_sums}) {{
        for (int64_t k = 0; k < num; ++k)
            for (int64_t j = 0; j < {num_sums}; ++j) {{
                double sum = 0;
                for (int64_t b = first[k]; b < first[k + 1]; ++b) sum += parts[b * {num_sums} + j];
                sums[k * {num_sums} + j] = sum;
            }}
        free(parts);
    }}
    free(first);
}}
"""

# How a tensor is stored -> C type. 8-bit storage has a second pointer, to the scales.
_TYPES = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "uint16_t",
    "stochastic": "uint16_t",
    "kahan": "uint16_t",
    "signed8": "int8_t",
    "unsigned8": "uint8_t",
}
_TWO_POINTERS = ("kahan", "signed8", "unsigned8")


def source(
    lines: Sequence[str],
    results: Mapping[str, str],
    storage: Mapping[str, str],
    scalars: Sequence[str],
    *,
    by_row: Sequence[str] = (),
    by_column: Sequence[str] = (),
) -> str:
    """Return the C program of an update.

    Args:
        lines, results: from `hasten.optim.tracing.trace`.
        storage: how each tensor is stored, a key of `_TYPES`; in the order of the pointers.
        scalars: names, in the order of the numbers that a call passes.
        by_row, by_column: names of tensors with one element for each row, or for each column of every matrix.
    """
    real = "double" if "float64" in storage.values() else "float"
    sums = [name for name in results if name not in storage]
    written = [name for name in storage if name in results]
    packed = [name for name in storage if storage[name] in ("signed8", "unsigned8")]
    body: list[str] = []
    place = 0
    for name, kind in storage.items():
        access = "" if name in written else "const "
        body.append(f"{access}{_TYPES[kind]} *restrict at_{name} = at[{place} * num];")
        place += 1
        if kind in _TWO_POINTERS:
            second = "uint16_t" if kind == "kahan" else "float"
            body.append(f"{second} *restrict more_{name} = at[{place} * num];")
            place += 1
    body += [f"const T in_{name} = (T)s[{number}];" for number, name in enumerate(scalars)]
    body += [f"double sum_{name} = 0;" for name in sums]
    loop = [f"const T in_{name} = {_load(name, kind)};" for name, kind in storage.items() if name not in by_row]
    loop += lines
    loop += [_store(name, storage[name], results[name]) for name in written]
    loop += [f"sum_{name} += (double)({results[name]});" for name in sums]
    reduction = f" reduction(+:{', '.join(f'sum_{name}' for name in sums)})" if sums else ""
    by_rows = bool(packed or by_row or by_column)
    if by_rows:
        head = [f"const T in_{name} = (T)at_{name}[row];" for name in by_row]
        # The columns of this row's matrix, so that they too are counted by i.
        head += [
            f"const {_TYPES[storage[n]]} *across_{n} = at_{n} + (row / height - row) * columns;" for n in by_column
        ]
        for name in by_column:
            loop = [line.replace(f"at_{name}[i]", f"across_{name}[i]") for line in loop]
        places = {name: place for place, name in enumerate(storage)}
        changed = [(name, storage[name], places[name]) for name in packed if name in written]
        body += _by_rows(loop, [*head, *_scales(packed)], changed, reduction)
    else:
        body += [
            f"const int64_t begin = inside * {BLOCK}, size = rows * columns;",
            f"const int64_t end = begin + {BLOCK} < size ? begin + {BLOCK} : size;",
            f"#pragma omp simd{reduction}",
            "for (int64_t i = begin; i < end; ++i) {",
            *loop,
            "}",
        ]
    body += [f"part[{number}] = sum_{name};" for number, name in enumerate(sums)]
    top = _HEAD.format(real=real, suffix="" if real == "double" else "f")
    run = _RUN.format(block=BLOCK, by_rows=int(by_rows), num_sums=len(sums))
    declared = (
        "static void block(void *const *at, int64_t num, const double *s, int64_t inside, int64_t rows, "
        "int64_t columns, int64_t height, double *part, uint32_t seed) {"
    )
    return "\n".join([top, declared, *body, "}", run])


def _load(name: str, kind: str) -> str:
    return {
        "bfloat16": f"from_bf16(at_{name}[i])",
        "stochastic": f"from_bf16(at_{name}[i])",
        "kahan": f"from_bf16(at_{name}[i]) + from_bf16(more_{name}[i])",
        "signed8": f"from_signed(at_{name}[i], scale_{name})",
        "unsigned8": f"from_unsigned(at_{name}[i], scale_{name})",
    }.get(kind, f"(T)at_{name}[i]")


def _store(name: str, kind: str, value: str) -> str:
    return {
        "bfloat16": f"at_{name}[i] = to_bf16({value});",
        "stochastic": f"at_{name}[i] = to_bf16_random({value}, mix(seed + (uint32_t)i));",
        "kahan": f"at_{name}[i] = to_bf16({value}); more_{name}[i] = to_bf16({value} - from_bf16(at_{name}[i]));",
        "signed8": f"new_{name}[i - base] = {value};",
        "unsigned8": f"new_{name}[i - base] = {value};",
    }.get(kind, f"at_{name}[i] = {value};")


def _scales(packed: Sequence[str]) -> list[str]:
    return [f"const T scale_{name} = more_{name}[row * quanta + q];" for name in packed]


def _by_rows(
    loop: Sequence[str], head: Sequence[str], changed: Sequence[tuple[str, str, int]], reduction: str
) -> list[str]:
    """Return the loop over quanta of rows: unpack, update, find the largest value, pack.

    Args:
        loop: statements for each element.
        head: statements for each quantum.
        changed: name, storage and place of the tensors that are packed again.
        reduction: clause of the loop over elements.
    """
    lines = [
        f"const int64_t step = columns < {BLOCK} ? {BLOCK} / columns : 1;",
        f"const int64_t quanta = (columns + {QUANTUM - 1}) / {QUANTUM};",
        "const int64_t stop = (inside + 1) * step < rows ? (inside + 1) * step : rows;",
        "for (int64_t row = inside * step; row < stop; ++row)",
        "for (int64_t q = 0; q < quanta; ++q) {",
        f"const int64_t base = row * columns + q * {QUANTUM};",
        f"const int64_t left = columns - q * {QUANTUM}, width = left < {QUANTUM} ? left : {QUANTUM};",
        *head,
        *(f"T new_{name}[{QUANTUM}];" for name, _, _ in changed),
        f"#pragma omp simd{reduction}",
        "for (int64_t i = base; i < base + width; ++i) {",
        *loop,
        "}",
    ]
    for name, kind, place in changed:
        lines += [
            f"T top_{name} = 0;",
            f"#pragma omp simd reduction(max:top_{name})",
            "for (int64_t j = 0; j < width; ++j) "
            f"top_{name} = FABS(new_{name}[j]) > top_{name} ? FABS(new_{name}[j]) : top_{name};",
            f"more_{name}[row * quanta + q] = top_{name};",
            f"const T inverse_{name} = top_{name} > (T)0 ? (T)1 / top_{name} : (T)0;",
            "#pragma omp simd",
            f"for (int64_t j = 0; j < width; ++j) at_{name}[base + j] = "
            f"to_{kind[:-1]}(new_{name}[j], inverse_{name}, seed + {place * SALT & 0xFFFFFFFF}u);",
        ]
    return [*lines, "}"]


@functools.cache
def compiler() -> str | None:
    """Return the C compiler of this system; None where there is none."""
    return next(
        (found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None
    )


@functools.cache
def load(program: str) -> ctypes._CFuncPointer | None:
    """Return the function ``run`` of a C program; None where it cannot be compiled.

    The library is kept under `hasten.cache.cache_root`, named by a hash of the program, the compiler and the processor,
    in a folder that only this user can write.
    """
    command = compiler()
    if command is None:
        return None
    identity = "\n".join([program, command, platform.platform(), _processor(), *_FLAGS])
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    folder = _own_folder()
    for number, extra in enumerate(_TRIES):
        library = folder / f"{name}-{number}.so"
        if not library.exists() and not _compile(command, program, extra, library):
            continue
        try:
            function = ctypes.CDLL(str(library)).run
        except OSError:
            continue
        function.restype = None
        function.argtypes = [
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.c_int,
        ]
        return function
    return None


def _compile(command: str, program: str, extra: Sequence[str], library: Path) -> bool:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        text, made = Path(folder) / "update.c", Path(folder) / "update.so"
        text.write_text(program, encoding="utf-8")
        # `-fopenmp` is kept away from the linker; see `_TRIES`.
        objects = Path(folder) / "update.o"
        flags = [flag for flag in _FLAGS if flag != "-shared"]
        steps = (
            [command, *flags, *extra, "-c", str(text), "-o", str(objects)],
            [command, "-shared", "-o", str(made), str(objects), "-lm"],
        )
        try:
            for step in steps:
                subprocess.run(step, check=True, capture_output=True, timeout=120)
            made.replace(library)  # Whole or not at all: another process may be compiling the same.
        except (OSError, subprocess.SubprocessError):
            return False
    return True


@functools.cache
def _own_folder() -> Path:
    """Return a folder for compiled code that nobody else can write to."""
    folder = cache_root() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if os.access(folder, os.W_OK) and (os.name != "posix" or _is_private(status)):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="hasten-kernels-"))


def _is_private(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _processor() -> str:
    """Return what tells processors apart for ``-march=native``."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(wanted)}))
