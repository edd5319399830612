"""The common beginning of all C sources of :mod:`~pyro_avrnn.engine.native`, and the compiler.

A product takes its right factor packed: panels of two vectors of columns, row after row. A tile
of the result then stays in registers while both factors are read in order.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_HEAD = """\
#include <math.h>
#include <string.h>
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef REAL V __attribute__((vector_size(BYTES), aligned(4), may_alias));
#define L (BYTES / (long)sizeof(REAL))
#define PANEL (2 * L)
#define EACH _Pragma("GCC ivdep")
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

static void pack(long K, long N, const REAL *b, long sk, long sn, REAL *p) {
  for (long n = 0; n < N; n += PANEL)
    for (long k = 0; k < K; k++)
      for (long j = 0; j < PANEL; j++)
        p[n * K + k * PANEL + j] = n + j < N ? b[k * sk + (n + j) * sn] : 0;
}
"""

#: functions that a compiler turns into vector code, right to two units in the last place
_SINGLE = """\
static inline float exp_(float x) {
  float y = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
  float n = rintf(y * 1.44269504f);
  float r = fmaf(n, -0.693145751953125f, y);
  r = fmaf(n, -1.428606765330187e-6f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r) + 1.0f;
  int whole = (int)n, half = whole >> 1;
  int first = (half + 127) << 23, second = (whole - half + 127) << 23;
  float one, two;
  memcpy(&one, &first, 4);
  memcpy(&two, &second, 4);
  return x != x ? x : p * one * two;
}
static inline float log1p_(float e) { /* 0 <= e <= 1 */
  float s = e / (2.0f + e), q = s * s, p = 1.0f / 15;
  p = fmaf(p, q, 1.0f / 13);
  p = fmaf(p, q, 1.0f / 11);
  p = fmaf(p, q, 1.0f / 9);
  p = fmaf(p, q, 1.0f / 7);
  p = fmaf(p, q, 1.0f / 5);
  p = fmaf(p, q, 1.0f / 3);
  return 2.0f * s * fmaf(p, q, 1.0f);
}
static inline float tanh_(float x) {
  float a = fabsf(x), e = exp_(-2.0f * a), q = x * x, p = -5.70498872745e-3f;
  p = fmaf(p, q, 2.06390887954e-2f);
  p = fmaf(p, q, -5.37397155531e-2f);
  p = fmaf(p, q, 1.33314422036e-1f);
  p = fmaf(p, q, -3.33332819422e-1f);
  float m = a < 0.625f ? fmaf(p * q, a, a) : (1.0f - e) / (1.0f + e);
  return x < 0 ? -m : m;
}
"""
_DOUBLE = """\
static inline double exp_(double x) { return exp(x); }
static inline double log1p_(double x) { return log1p(x); }
static inline double tanh_(double x) { return tanh(x); }
"""
_SHARED = """\
static inline REAL sigmoid_(REAL x) { return 1 / (1 + exp_(-x)); }
static inline REAL softplus_(REAL x) { return MAX(x, 0) + log1p_(exp_(-(x < 0 ? -x : x))); }
"""


def _tile(rows: int) -> str:
    """C source of the product of a given number of rows with one panel."""
    names = [(i, j) for i in range(rows) for j in range(2)]
    load = "; ".join(f"c{i}_{j} = *(V *)(c + {i} * ldc + {j} * L)" for i, j in names)
    zero = "; ".join(f"c{i}_{j} = (V){{0}}" for i, j in names)
    store = "; ".join(f"*(V *)(c + {i} * ldc + {j} * L) = c{i}_{j}" for i, j in names)
    line = "{{ REAL x = a[{0} * lda + k]; c{0}_0 += x * b0; c{0}_1 += x * b1; }}"
    return f"""\
static inline void tile_{rows}(long K, const REAL *a, long lda, const REAL *p, REAL *c, long ldc,
                              int add) {{
  V {", ".join(f"c{i}_{j}" for i, j in names)};
  if (add) {{ {load}; }} else {{ {zero}; }}
  for (long k = 0; k < K; k++, p += PANEL) {{
    V b0 = *(V *)p, b1 = *(V *)(p + L);
    {" ".join(map(line.format, range(rows)))}
  }}
  {store};
}}
"""


_WIDE = range(7, 13)  # rows of a tile for which only AVX-512 has the registers


def _gemm() -> str:
    """``gemm``: c += a b, or c = a b; the columns of c are padded to whole panels."""
    tile = "tile_{0}(K, a + m * lda, lda, p + n * K, c + m * ldc + n, ldc, add)"
    case = "case {0}: " + tile + "; break;"
    return f"""{"".join(map(_tile, range(1, 7)))}
#if BYTES == 64
{"".join(map(_tile, _WIDE))}
#endif
static void gemm(long M, long N, long K, const REAL *a, long lda, const REAL *p, REAL *c, long ldc,
                 int add) {{
  for (long n = 0; n < N; n += PANEL) {{
    long m = 0;
#if BYTES == 64
    for (; m + 12 <= M; m += 12) {tile.format(12)};
#else
    for (; m + 6 <= M; m += 6) {tile.format(6)};
#endif
    switch (M - m) {{
      {" ".join(map(case.format, range(1, 7)))}
#if BYTES == 64
      {" ".join(map(case.format, _WIDE[:-1]))}
#endif
    }}
  }}
}}
"""


_GRAM = """\
/* c = a' b, or c += a' b, over K rows of both; s is room for the pieces that it is made of */
#define ROWS 256
#define LEAD (ROWS + 8)
static void gram(long M, long N, long K, const REAL *a, long ak, long am, const REAL *b, long bk,
                 long bn, REAL *s, REAL *c, long ldc, int add) {
  for (long k = 0; k < K; k += ROWS) {
    long rows = MIN(ROWS, K - k);
    for (long j = 0; j < rows; j++)
      for (long m = 0; m < M; m++) s[m * LEAD + j] = a[(k + j) * ak + m * am];
    pack(rows, N, b + k * bk, bk, bn, s + M * LEAD);
    gemm(M, N, rows, s, LEAD, s + M * LEAD, c, ldc, add || k > 0);
  }
}
"""
GRAM_ROWS, GRAM_LEAD = 256, 264  #: as above: room is ``M * GRAM_LEAD + GRAM_ROWS * columns``


def prelude(double: bool) -> str:
    """C source of types, functions and matrix products."""
    real = "double" if double else "float"
    functions = _DOUBLE if double else _SINGLE
    return f"#define REAL {real}\n{_HEAD}{functions}{_SHARED}{_gemm()}{_GRAM}"


@cache
def built(source: str) -> ctypes.CDLL:
    """Compile C source to a shared library, or find it in the cache.

    Raises:
        OSError, subprocess.CalledProcessError: there is no compiler, or it fails.
    """
    arm = platform.machine().lower() in ("arm64", "aarch64")
    command = [
        *os.environ.get("CC", "cc").split(),
        *("-O3", "-mcpu=native" if arm else "-march=native", "-std=gnu11", "-fPIC", "-shared"),
        *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    ]
    about = [*command, platform.node(), platform.processor(), _processor(), source]
    name = hashlib.sha256("\0".join(about).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyro-avrnn"
    path = folder / f"{name}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            text, made = Path(place) / "scan.c", Path(place) / "scan.so"
            text.write_text(source)
            whole = [*command, str(text), "-o", str(made), "-lm"]
            subprocess.run(whole, check=True, capture_output=True, text=True)
            made.replace(path)
    return ctypes.CDLL(str(path))


@cache
def _processor() -> str:
    """The model of the processor: a cache may be shared by several machines."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(errors="replace").splitlines() if about.exists() else []
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
