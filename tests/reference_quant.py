#!/usr/bin/env python3
"""MXFP4, MXFP8 and NVFP4 code for code against an independent implementation: ml_dtypes casts the elements, numpy
follows the published scale rules (OCP MX as in microxcaling and torchao's FLOOR and RCEIL; NVFP4 as in
TransformerEngine). Skips loudly where a package is missing.
Run from the project's folder; CC names the compiler."""
import ctypes
import os
import subprocess
import sys
import tempfile

try:
    import numpy as np
    import ml_dtypes
except ImportError as e:
    print(f"SKIPPED, not run: {e}. Install numpy and ml_dtypes to run it.")
    print("0 passed, 0 failed, 1 skipped")
    sys.exit(0)

F32, UE8M0, UE4M3, UE8M0_UP = 1, 3, 4, 5            # snip_scale
E4M3, E5M2, E2M1, E2M3, E3M2 = 3, 4, 5, 6, 7        # snip_format
FORMATS = {E4M3: (ml_dtypes.float8_e4m3fn, 448.0, 8), E5M2: (ml_dtypes.float8_e5m2, 57344.0, 15), E2M1: (ml_dtypes.float4_e2m1fn, 6.0, 2),
           E2M3: (ml_dtypes.float6_e2m3fn, 7.5, 2), E3M2: (ml_dtypes.float6_e3m2fn, 28.0, 4)}


class Recipe(ctypes.Structure):
    _fields_ = [("format", ctypes.c_int), ("tile_rows", ctypes.c_int32), ("tile_cols", ctypes.c_int32), ("scale", ctypes.c_int), ("rounding", ctypes.c_int)]


class Key(ctypes.Structure):
    _fields_ = [("seed", ctypes.c_uint64), ("step", ctypes.c_uint32), ("tensor", ctypes.c_uint32)]


def build(folder):
    source, library = os.path.join(folder, "snip.c"), os.path.join(folder, "snip.so")
    with open(source, "w") as f:
        f.write('#define SNIP_IMPLEMENTATION\n#define SNIP_ILP_IMPLEMENTATION\n#include "snip.h"\n')
    subprocess.check_call([os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-I.", source, "-o", library, "-lm"])
    lib = ctypes.CDLL(library)
    for name in ("snip_codes_bound", "snip_scales_bound"):
        getattr(lib, name).restype = ctypes.c_size_t
        getattr(lib, name).argtypes = [ctypes.POINTER(Recipe), ctypes.c_int64, ctypes.c_int64]
    lib.snip_quantize.argtypes = [ctypes.POINTER(Recipe), ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2 + [Key] + [ctypes.c_void_p] * 2
    return lib


def ours(lib, recipe, x):
    rows, cols = x.shape
    codes = np.zeros(lib.snip_codes_bound(recipe, rows, cols), np.uint8)
    scales = np.zeros(lib.snip_scales_bound(recipe, rows, cols), np.uint8)
    status = lib.snip_quantize(recipe, x.ctypes.data, rows, cols, cols, codes.ctypes.data, scales.ctypes.data, Key(0, 0, 0), None, None)
    assert status == 0
    codes = codes.reshape(rows, -1)
    if recipe.format == E2M1:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(rows, -1)[:, :cols]
    return codes, scales


def cast(y, fmt):
    kind, largest, _ = FORMATS[fmt]
    return np.clip(y, np.float32(-largest), np.float32(largest)).astype(kind).view(np.uint8)


def mx(x, fmt, block, up):
    rows, cols = x.shape
    _, largest, emax = FORMATS[fmt]
    t = x.reshape(rows, cols // block, block)
    amax = np.abs(t).max(-1)
    with np.errstate(divide="ignore"):
        if up:      # the power of two at or above amax / largest
            quotient = amax.astype(np.float64) / largest
            e = np.ceil(np.log2(quotient))
            e = np.where(np.ldexp(1.0, np.nan_to_num(e, neginf=-300).astype(int)) < quotient, e + 1, e)
        else:
            e = np.frexp(amax)[1] - 1.0 - emax
    e = np.where(amax == 0, -127, np.maximum(e, -127)).astype(int)
    y = (t.astype(np.float64) * np.ldexp(1.0, -e)[..., None]).astype(np.float32)       # exact: a power of two
    return cast(y, fmt).reshape(rows, cols), (e + 127).astype(np.uint8).ravel()


def nvfp4(x, block):
    rows, cols = x.shape
    f = np.float32
    top = np.abs(x).max()
    S = min(f(448.0 * 6.0) / top, np.finfo(f).max) if top else f(1)
    inverse_S = f(1) / S
    t = x.reshape(rows, cols // block, block)
    scale = (np.abs(t).max(-1) * (S * f(1.0 / 6.0))).astype(ml_dtypes.float8_e4m3fn)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.minimum(f(1) / (scale.astype(f) * inverse_S), np.finfo(f).max)
        y = t * np.where(scale.astype(f) == 0, f(0), inverse)[..., None]                # ours: zeros under a scale of zero
    return cast(y, E2M1).reshape(rows, cols), scale.view(np.uint8).ravel(), inverse_S


def main():
    passed = failed = 0

    def check(ok, what):
        nonlocal passed, failed
        passed, failed = passed + bool(ok), failed + (not ok)
        if not ok:
            print("FAILED:", what)

    rng = np.random.default_rng(1)
    shape = (256, 1024)
    normal = rng.standard_normal(shape).astype(np.float32)
    data = {"normal": normal, "wide": (normal * np.exp(4 * rng.standard_normal(shape))).astype(np.float32), "gradient": normal * np.float32(1e-9),
            "ties": rng.integers(-64, 65, shape).astype(np.float32) * np.float32(0.125), "zeros": np.zeros(shape, np.float32),
            "outlier": np.where(rng.random(shape) < 1e-3, normal * 1e4, normal).astype(np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        lib = build(folder)
        for name, x in data.items():
            x = np.ascontiguousarray(x)
            for fmt in FORMATS:
                for scale in (UE8M0, UE8M0_UP):
                    codes, scales = ours(lib, Recipe(fmt, 1, 32, scale, 0), x)
                    codes_ref, scales_ref = mx(x, fmt, 32, scale == UE8M0_UP)
                    check((codes == codes_ref).all() and (scales == scales_ref).all(), f"MX format {fmt} scale {scale} on {name}: {(codes != codes_ref).sum()} codes, {(scales != scales_ref).sum()} scales differ")
            codes, scales = ours(lib, Recipe(E2M1, 1, 16, UE4M3, 0), x)
            codes_ref, scales_ref, tensor = nvfp4(x, 16)
            n = scales_ref.size
            check((codes == codes_ref).all() and (scales[:n] == scales_ref).all() and scales[-4:].view(np.float32)[0] == tensor,
                  f"NVFP4 on {name}: {(codes != codes_ref).sum()} codes, {(scales[:n] != scales_ref).sum()} scales differ")
    print(f"{passed} passed, {failed} failed, 0 skipped")
    return failed != 0


sys.exit(main())
