#!/usr/bin/env python3
"""Times snip.h's quantization beside other libraries' on one array, one core, in turn.

bench_quant_peers.py --lib SNIP.so [MiB of floats, 256]

Peers: ml_dtypes and torch (casts, from Python), ggml (environment GGML: path of its libggml-cpu shared library), oneDNN
(found by the loader, or DNNL: its path). A peer that is not there is named in a 'skipped' line. Prints
bench<TAB>case<TAB>ours<TAB>unit<TAB>peer<TAB>theirs<TAB>ratio: medians of the speeds, in GB of floats read a second, and the
median of the pairs' ratios. Processor time; all outputs are allocated and touched beforehand. A plain cast scales
nothing and is set against both our plain cast and our scaled quantization, which does more.
"""
import argparse
import ctypes
import ctypes.util
import os
import statistics
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"     # before any library reads it
try:
    import numpy as np
except ImportError:
    print("skipped: peers of quantization (numpy is not installed)")
    sys.exit(0)

BF16, E4M3, E5M2, E2M1 = 2, 3, 4, 5                     # snip_format
NONE, F32, POW2, UE8M0, UE4M3 = range(5)        # snip_scale
COLS, PAIRS = 4096, 7


class Recipe(ctypes.Structure):
    _fields_ = [("format", ctypes.c_int), ("tile_rows", ctypes.c_int32), ("tile_cols", ctypes.c_int32), ("scale", ctypes.c_int), ("rounding", ctypes.c_int)]


class Key(ctypes.Structure):
    _fields_ = [("seed", ctypes.c_uint64), ("step", ctypes.c_uint32), ("tensor", ctypes.c_uint32)]


OURS = {"bf16": Recipe(BF16, 0, 0, NONE, 0), "e4m3 cast": Recipe(E4M3, 0, 0, NONE, 0), "e5m2 cast": Recipe(E5M2, 0, 0, NONE, 0), "e2m1 cast": Recipe(E2M1, 0, 0, NONE, 0),
        "fp8 1x128": Recipe(E4M3, 1, 128, POW2, 0), "fp4 1x128": Recipe(E2M1, 1, 128, F32, 0),
        "mxfp8": Recipe(E4M3, 1, 32, UE8M0, 0), "mxfp4": Recipe(E2M1, 1, 32, UE8M0, 0), "nvfp4": Recipe(E2M1, 1, 16, UE4M3, 0)}


def touched(size, kind=np.uint8):
    """size bytes at a multiple of 64, as bench_quant.c and the peers' own allocators give"""
    memory = np.ones(size + 64, np.uint8)
    skip = -memory.ctypes.data % 64
    return memory[skip:skip + size].view(kind)


def snip(path, x):
    """{case: function} and {case: its codes}"""
    lib = ctypes.CDLL(os.path.abspath(path))
    lib.snip_quantize.argtypes = [ctypes.POINTER(Recipe), ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2 + [Key] + [ctypes.c_void_p] * 2
    rows = x.size // COLS
    codes, scales = touched(2 * x.size), touched(x.size // 8 + 64)

    def run(recipe):
        if lib.snip_quantize(recipe, x.ctypes.data, rows, COLS, COLS, codes.ctypes.data, scales.ctypes.data, Key(0, 0, 0), None, None):
            raise SystemExit("snip_quantize refused")
    return {name: lambda recipe=recipe: run(recipe) for name, recipe in OURS.items()}, codes


# Each peer: [(name, function, our cases, its codes as comparable bytes or None)], or an exception that says what is missing.
def peer_ml_dtypes(x):
    import ml_dtypes

    def cast(kind, cases):
        out = touched(x.size * np.dtype(kind).itemsize, kind)
        return f"ml_dtypes {kind.__name__}", lambda: np.copyto(out, x, casting="unsafe"), cases, out.view(np.uint8)
    found = [cast(ml_dtypes.float8_e4m3fn, ["e4m3 cast", "fp8 1x128"]), cast(ml_dtypes.bfloat16, ["bf16"])]
    if hasattr(ml_dtypes, "float4_e2m1fn"):     # one code to a byte
        found.append(cast(ml_dtypes.float4_e2m1fn, ["e2m1 cast", "fp4 1x128"])[:3] + (None,))
    return found


def peer_torch(x):
    import torch
    torch.set_num_threads(1)
    source = torch.from_numpy(x)

    def cast(kind, cases):
        out = torch.from_numpy(touched(x.size * kind.itemsize)).view(kind)
        return f"torch {str(kind)[6:]}", lambda: out.copy_(source), cases, out.view(torch.uint8).numpy()

    def scaled(v):                              # as users write it: amax, divide, clamp, cast
        v = v.view(-1, 128)
        scales = v.abs().amax(1, keepdim=True) / 448
        return (v / scales).clamp(-448, 448).to(torch.float8_e4m3fn), scales
    found = [cast(torch.float8_e4m3fn, ["e4m3 cast", "fp8 1x128"]), cast(torch.float8_e5m2, ["e5m2 cast"]), cast(torch.bfloat16, ["bf16"]),
             ("torch 1x128", lambda: scaled(source), ["fp8 1x128"], None)]
    try:
        compiled = torch.compile(scaled)
        compiled(source)
        found.append(("torch 1x128, compiled", lambda: compiled(source), ["fp8 1x128"], None))
    except Exception as e:                      # no C++ compiler
        print(f"skipped: torch.compile ({type(e).__name__})", flush=True)
    return found


def peer_ggml(x):
    if not os.environ.get("GGML"):
        raise OSError("GGML names no library")
    lib = ctypes.CDLL(os.environ["GGML"])
    if hasattr(lib, "ggml_cpu_init"):
        lib.ggml_cpu_init()
    out = touched(2 * x.size)
    found = []
    for kind, cases in (("mxfp4", ["mxfp4"]), ("nvfp4", ["nvfp4"]), ("q8_0", ["fp8 1x128", "mxfp8"])):
        function = getattr(lib, "quantize_row_" + kind, None) or getattr(lib, "quantize_row_" + kind + "_ref", None)
        if function:
            function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
            found.append((f"ggml {kind}", lambda f=function: f(x.ctypes.data, out.ctypes.data, x.size), cases, None))
    return found


def peer_onednn(x):
    """Reorders, the s8 one with a common scale. Versions 2 and 3 differ in descriptors and in where scales go."""
    path = os.environ.get("DNNL") or ctypes.util.find_library("dnnl")
    if not path:
        raise OSError("no libdnnl")
    lib, P = ctypes.CDLL(path), ctypes.c_void_p
    two = hasattr(lib, "dnnl_memory_desc_init_by_tag")
    s8, bf16, f32, CPU, SRC, DST, SCALES = 5, 2, 3, 1, 1, 17, 4096

    class Arg(ctypes.Structure):
        _fields_ = [("arg", ctypes.c_int), ("memory", P)]

    def call(name, *args):
        status = getattr(lib, "dnnl_" + name)(*args)
        if status:
            raise OSError(f"dnnl_{name} returned {status}")

    def made(name, *args):
        it = P()
        call(name, ctypes.byref(it), *args)
        return it

    def descriptor(kind, *shape):
        dims = (ctypes.c_int64 * 12)(*shape)
        tag = 1 + len(shape)        # a, ab: row-major
        if two:
            it = ctypes.create_string_buffer(4096)
            call("memory_desc_init_by_tag", it, len(shape), dims, kind, tag)
            return it
        return made("memory_desc_create_with_tag", len(shape), dims, kind, tag)

    engine = made("engine_create", CPU, ctypes.c_size_t(0))
    stream = made("stream_create", engine, 1)
    source = descriptor(f32, x.size // COLS, COLS)
    scale = np.array([32], np.float32)

    def reorder(name, kind, cases, scaled):
        out = touched(x.size * (1 if kind == s8 else 2))
        target = descriptor(kind, x.size // COLS, COLS)
        attr = made("primitive_attr_create")
        args = [(SRC, made("memory_create", source, engine, P(x.ctypes.data))), (DST, made("memory_create", target, engine, P(out.ctypes.data)))]
        if scaled and two:
            call("primitive_attr_set_output_scales", attr, ctypes.c_int64(1), 0, P(scale.ctypes.data))
        elif scaled:
            call("primitive_attr_set_scales_mask", attr, SRC, 0)
            args.append((SCALES | SRC, made("memory_create", descriptor(f32, 1), engine, P(scale.ctypes.data))))
        primitive = made("primitive_create", made("reorder_primitive_desc_create", source, engine, target, engine, attr))
        args = (Arg * len(args))(*[Arg(a, m) for a, m in args])

        def run(alive=(out, scale)):        # oneDNN has their addresses alone
            call("primitive_execute", primitive, stream, len(args), args)
            call("stream_wait", stream)
        run()
        if scaled and abs(int(out.view(np.int8)[0]) - np.clip(np.rint(x[0] * scale[0]), -128, 127)) > 0:
            raise OSError("unexpected result")
        return name, run, cases, None if scaled else out

    return [reorder("oneDNN s8, one scale", s8, ["e4m3 cast", "fp8 1x128"], True), reorder("oneDNN bf16", bf16, ["bf16"], False)]


def seconds(function):
    begin = time.process_time()
    function()
    return time.process_time() - begin


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--lib", required=True)
    a.add_argument("mib", type=int, nargs="?", default=256)
    a = a.parse_args()
    x = touched(a.mib << 20, np.float32)
    np.random.default_rng(1).standard_normal(x.size, np.float32, x)
    ours, codes = snip(a.lib, x)
    for peer in (peer_ml_dtypes, peer_torch, peer_ggml, peer_onednn):
        label = peer.__name__[5:]
        try:
            found = peer(x)
        except (ImportError, OSError, AttributeError) as e:
            print(f"skipped: {label} ({os.path.basename(str(e).splitlines()[0])})", flush=True)
            continue
        for name, theirs, cases, result in found:
            for case in cases:
                ours[case](), theirs()
                if result is not None and case in ("bf16", "e4m3 cast", "e5m2 cast") and not np.array_equal(result, codes[:result.size]):
                    raise SystemExit(f"{name} and {case} give different codes")
                pairs = [(seconds(ours[case]), seconds(theirs)) for _ in range(PAIRS)]
                mine, its = (x.nbytes * 1e-9 / statistics.median(times) for times in zip(*pairs))
                print(f"bench\tquantize {case}, {a.mib} MiB\t{mine:.2f}\tGB/s read\t{name}\t{its:.2f}\t{statistics.median(t / m for m, t in pairs):.2f}", flush=True)


if __name__ == "__main__":
    main()
