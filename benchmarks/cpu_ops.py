"""Time the operator forms that the ONNX Runtime lowering chooses between, on this machine's CPU.

Each section pits several forms of one operator against each other on equal inputs. The contestants
take turns and the best of all turns counts, because a neighbour on the machine can only slow a turn
down. A form whose result differs from the first one of its case by more than 1e-4 relative is
reported as wrong, never timed silently.

    python benchmarks/cpu_ops.py --section all --output cpu_ops.json

One thread is the default, measured in CPU time, which a busy machine disturbs little. With more threads it is
wall time and needs a quiet machine: ONNX Runtime's threads spin while they wait for each other.

The JSON holds, per section, a list of cases {case: {...}, us: {form: microseconds}, error: {form: ...}}.
`docs/lowering-onnxruntime.md` reads the choice per shape from it.

Shape suffixes: B batch, T new tokens, S cache capacity, D hidden, H heads, G kv heads, K head dim,
E experts, I expert inner width.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime as ort

Run = Callable[[], Any]
HERE = Path(__file__).resolve()
HEADER = '<ir_version: 11, opset_import: ["" : 24, "com.microsoft" : 1]>\n'


def session(
    text: str, threads: int, initializers: dict[str, np.ndarray] | None = None, *, copy: bool = False, **config: str
):
    """Load a graph written in ONNX text. Initializers are used where they lie, or through the API that copies them."""
    model = onnx.parser.parse_model(HEADER + text)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # The file that external weights seem to lie in must exist; its content does not matter.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(HERE.parent))
    for key, value in config.items():
        options.add_session_config_entry(key.replace("__", "."), value)
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in (initializers or {}).items()}
    for name, array in (initializers or {}).items():
        tensor = model.graph.initializer.add(name=name, data_type=1, dims=array.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, text_value in (("location", HERE.name), ("offset", "0"), ("length", "0")):
            tensor.external_data.add(key=key, value=text_value)
        if not copy:
            options.add_initializer(name, values[name])
    if copy:
        options.add_external_initializers(list(values), list(values.values()))
    loaded = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return loaded, (values, initializers)


def bound(loaded, feeds: dict[str, np.ndarray], in_place: dict[str, str] | None = None) -> Run:
    """A run with everything bound; `in_place` maps an output to the input whose buffer it overwrites."""
    sess, keep = loaded
    binding = sess.io_binding()
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    fresh = 0
    for index, output in enumerate(sess.get_outputs()):
        source = (in_place or {}).get(output.name)
        if source is None:
            binding.bind_output(output.name, "cpu")
            fresh = index
        else:
            binding.bind_ortvalue_output(output.name, values[source])

    def run():
        sess.run_with_iobinding(binding)
        return binding.get_outputs()[fresh]

    run.keep = (values, keep, feeds)  # type: ignore[attr-defined]
    return run


def compete(contestants: dict[str, Run], seconds: float, threads: int) -> dict[str, Any]:
    """Alternate the contestants for about `seconds`; best time of each in microseconds, and errors."""
    # ONNX Runtime's single thread is ours: its CPU time leaves out what neighbours on the machine take.
    clock = time.thread_time if threads == 1 else time.perf_counter
    first: np.ndarray | None = None
    error = {}
    for name, run in contestants.items():
        result = run().numpy()
        if first is None:
            first = result.astype(np.float64)
        error[name] = float(np.abs(result - first).max() / np.abs(first).max())
    best = dict.fromkeys(contestants, float("inf"))
    end, turns = time.perf_counter() + seconds, 0
    while turns < 3 or (time.perf_counter() < end and turns < 400):
        for name, run in contestants.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
        turns += 1
    wrong = [name for name, value in error.items() if not value < 1e-4]
    return {"us": {n: round(b * 1e6, 1) for n, b in best.items()}, "error": error, "turns": turns, "wrong": wrong}


# ---------------------------------------------------------------------------------------- attention

ATTENTION_4D = """g (float[B,T,Q] q, float[B,T,N] k, float[B,T,N] v, float[B,G,S,K] pk, float[B,G,S,K] pv,
  int64[B] past, int64[B] total) => (float[B,G,S,K] nk, float[B,G,S,K] nv, float[B,T,Q] y) {{
  qs = Constant<value = int64[4] {{0, 0, {H}, {K}}}>()
  ks = Constant<value = int64[4] {{0, 0, {G}, {K}}}>()
  ys = Constant<value = int64[3] {{0, 0, {Q}}}>()
  q4 = Reshape(q, qs)    qt = Transpose<perm = [0, 2, 1, 3]>(q4)
  k4 = Reshape(k, ks)    kt = Transpose<perm = [0, 2, 1, 3]>(k4)
  v4 = Reshape(v, ks)    vt = Transpose<perm = [0, 2, 1, 3]>(v4)
  nk = TensorScatter<axis = 2>(pk, kt, past)
  nv = TensorScatter<axis = 2>(pv, vt, past)
  yt = Attention<is_causal = 1>(qt, nk, nv, , , , total)
  y4 = Transpose<perm = [0, 2, 1, 3]>(yt)
  y = Reshape(y4, ys)
}}"""

GROUP_QUERY = """g (float[B,T,Q] q, float[B,T,N] k, float[B,T,N] v, float[B,G,S,K] pk, float[B,G,S,K] pv,
  int32[B] last, int32 longest) => (float[B,G,S,K] nk, float[B,G,S,K] nv, float[B,T,Q] y) {{
  y, nk, nv = com.microsoft.GroupQueryAttention<num_heads = {H}, kv_num_heads = {G}>(q, k, v, pk, pv, last, longest)
}}"""


def attention_cases(threads: int, seconds: float):
    rng = np.random.default_rng(0)
    in_place = {"nk": "pk", "nv": "pv"}
    for heads, groups, dim in ((8, 2, 64), (64, 8, 128)):
        sizes = {"H": heads, "G": groups, "K": dim, "Q": heads * dim}
        loaded = {
            "attention_4d": session(ATTENTION_4D.format(**sizes), threads),
            "group_query": session(GROUP_QUERY.format(**sizes), threads),
        }
        for batch, tokens, capacity, past in (
            (1, 1, 512, 128),
            (1, 1, 4096, 128),
            (1, 1, 4096, 4000),
            (8, 1, 1024, 600),
            (1, 1, 65536, 1000),
            (1, 1, 65536, 65000),
            (1, 256, 512, 0),
            (1, 256, 4096, 0),
            (1, 256, 4096, 3840),
            (1, 512, 4096, 0),
            (1, 512, 4096, 3584),
            (8, 256, 512, 0),
        ):
            if heads == 64 and batch * capacity > 8192:
                continue
            q = rng.standard_normal((batch, tokens, heads * dim), dtype=np.float32)
            k = rng.standard_normal((batch, tokens, groups * dim), dtype=np.float32)
            v = rng.standard_normal((batch, tokens, groups * dim), dtype=np.float32)
            cache = rng.standard_normal((2, batch, groups, capacity, dim), dtype=np.float32)
            lengths = np.full(batch, past, np.int64)
            common = {"q": q, "k": k, "v": v}
            standard = {"past": lengths, "total": lengths + tokens}
            own = {"last": (lengths + tokens - 1).astype(np.int32), "longest": np.array(past + tokens, np.int32)}
            feeds = {
                "attention_4d": common | standard | {"pk": cache[0].copy(), "pv": cache[1].copy()},
                "group_query": common | own | {"pk": cache[0].copy(), "pv": cache[1].copy()},
            }
            case = {"heads": heads, "kv_heads": groups, "dim": dim, "B": batch, "T": tokens, "S": capacity}
            case["past"] = past
            yield case, compete({n: bound(s, feeds[n], in_place) for n, s in loaded.items()}, seconds, threads)


# ---------------------------------------------------------------------------------------- lightning

LINEAR_OP = """g (float[B,T,N] q, float[B,T,N] k, float[B,T,N] v, float[B,H,K,V] s, float[H] slope)
  => (float[B,H,K,V] ns, float[B,T,N] y) {{
  one = Constant<value = float[1] {{1.0}}>()
  neg = Neg(slope)
  bt1 = Constant<value = int64[3] {{{B}, {T}, {H}}}>()
  decay = Expand(neg, bt1)
  y, ns = com.microsoft.LinearAttention<q_num_heads = {H}, kv_num_heads = {H}, scale = 1.0, update_rule = "gated">(
    q, k, v, s, decay)
}}"""

# One chunk: y = ((q k^T) * D) v + exp(-slope (i+1)) * (q S), S' = exp(-slope T) S + (k * exp(-slope (T-1-j)))^T v.
_DECAYS = """
  i0 = Constant<value = float[{C},1] {{{rows}}}>()
  j0 = Constant<value = float[1,{C}] {{{rows}}}>()
  far = Constant<value = float {{1e30}}>()
  h11 = Constant<value = int64[3] {{-1, 1, 1}}>()
  one = Constant<value = float {{1.0}}>()
  last = Constant<value = float {{{C}.0}}>()
  s1 = Reshape(slope, h11)
  neg = Neg(s1)
  diff = Sub(i0, j0)
  lower = GreaterOrEqual(i0, j0)
  dist = Where(lower, diff, far)
  e0 = Mul(neg, dist)    D = Exp(e0)
  i1 = Add(i0, one)      e1 = Mul(neg, i1)   qd = Exp(e1)
  i2 = Sub(last, i1)     e2 = Mul(neg, i2)   kd = Exp(e2)
  e3 = Mul(neg, last)    sd = Exp(e3)
"""

LINEAR_WHOLE = (
    """g (float[B,T,N] q, float[B,T,N] k, float[B,T,N] v, float[B,H,K,V] s, float[H] slope)
  => (float[B,H,K,V] ns, float[B,T,N] y) {{
  hs = Constant<value = int64[4] {{0, 0, {H}, -1}}>()
  ys = Constant<value = int64[3] {{0, 0, -1}}>()"""
    + _DECAYS
    + """
  q3 = Reshape(q, hs)  q4 = Transpose<perm = [0, 2, 1, 3]>(q3)
  k3 = Reshape(k, hs)  k4 = Transpose<perm = [0, 2, 1, 3]>(k3)
  v3 = Reshape(v, hs)  v4 = Transpose<perm = [0, 2, 1, 3]>(v3)
  a0 = com.microsoft.FusedMatMul<transB = 1>(q4, k4)
  a1 = Mul(a0, D)
  o0 = MatMul(a1, v4)
  o1 = MatMul(q4, s)
  o2 = Mul(o1, qd)
  o3 = Add(o0, o2)
  o4 = Transpose<perm = [0, 2, 1, 3]>(o3)
  y = Reshape(o4, ys)
  kk = Mul(k4, kd)
  u0 = com.microsoft.FusedMatMul<transA = 1>(kk, v4)
  u1 = Mul(s, sd)
  ns = Add(u0, u1)
}}"""
)

# Chunks of C at once: inside each as above; states carried across chunks by one small matrix of decays.
LINEAR_TWO_LEVEL = (
    """g (float[B,T,N] q, float[B,T,N] k, float[B,T,N] v, float[B,H,K,V] s, float[H] slope)
  => (float[B,H,K,V] ns, float[B,T,N] y) {{
  hs = Constant<value = int64[5] {{{B}, -1, {C}, {H}, {K}}}>()
  ys = Constant<value = int64[3] {{{B}, {T}, -1}}>()"""
    + _DECAYS
    + """
  q3 = Reshape(q, hs)  q5 = Transpose<perm = [0, 3, 1, 2, 4]>(q3)
  k3 = Reshape(k, hs)  k5 = Transpose<perm = [0, 3, 1, 2, 4]>(k3)
  v3 = Reshape(v, hs)  v5 = Transpose<perm = [0, 3, 1, 2, 4]>(v3)
  ax1 = Constant<value = int64[1] {{1}}>()
  D4 = Unsqueeze(D, ax1)  qd4 = Unsqueeze(qd, ax1)  kd4 = Unsqueeze(kd, ax1)
  a0 = com.microsoft.FusedMatMul<transB = 1>(q5, k5)
  a1 = Mul(a0, D4)
  o0 = MatMul(a1, v5)
  kk = Mul(k5, kd4)
  u0 = com.microsoft.FusedMatMul<transA = 1>(kk, v5)
  us = Constant<value = int64[4] {{{B}, {H}, {M}, -1}}>()
  ss = Constant<value = int64[4] {{{B}, {H}, 1, -1}}>()
  u1 = Reshape(u0, us)
  s1r = Reshape(s, ss)
  all = Concat<axis = 2>(s1r, u1)
  ci = Constant<value = float[{M1},1] {{{chunks}}}>()
  cj = Constant<value = float[1,{M1}] {{{chunks}}}>()
  cdiff = Sub(ci, cj)
  clower = GreaterOrEqual(ci, cj)
  cdist = Where(clower, cdiff, far)
  clen = Mul(cdist, last)
  ce = Mul(neg, clen)   CD = Exp(ce)
  states = MatMul(CD, all)
  z = Constant<value = int64[1] {{0}}>()
  m = Constant<value = int64[1] {{{M}}}>()
  m1 = Constant<value = int64[1] {{{M1}}}>()
  two = Constant<value = int64[1] {{2}}>()
  before = Slice(states, z, m, two)
  after = Slice(states, m, m1, two)
  bs = Constant<value = int64[5] {{{B}, {H}, {M}, {K}, {K}}}>()
  fs = Constant<value = int64[4] {{{B}, {H}, {K}, {K}}}>()
  before5 = Reshape(before, bs)
  ns = Reshape(after, fs)
  o1 = MatMul(q5, before5)
  o2 = Mul(o1, qd4)
  o3 = Add(o0, o2)
  o4 = Transpose<perm = [0, 2, 3, 1, 4]>(o3)
  y = Reshape(o4, ys)
}}"""
)


def _numbers(count: int) -> str:
    return ", ".join(f"{i}.0" for i in range(count))


def lightning_cases(threads: int, seconds: float):
    rng = np.random.default_rng(1)
    for heads, dim in ((8, 64), (64, 128)):
        slope = (2.0 ** (-8.0 * (np.arange(heads) + 1) / heads)).astype(np.float32)
        for batch, tokens in ((1, 1), (8, 1), (1, 4), (1, 16), (1, 64), (8, 64), (1, 256), (1, 512), (1, 1024)):
            if heads == 64 and batch * tokens > 1024:
                continue
            feeds = {n: rng.standard_normal((batch, tokens, heads * dim), dtype=np.float32) * 0.3 for n in "qkv"}
            feeds |= {"s": np.zeros((batch, heads, dim, dim), np.float32), "slope": slope}
            sizes = {"B": batch, "T": tokens, "H": heads, "K": dim}
            graphs = {"op": LINEAR_OP.format(**sizes)}
            if tokens <= 512:
                graphs["whole"] = LINEAR_WHOLE.format(**sizes, C=tokens, rows=_numbers(tokens))
            for chunk in (32, 64, 128):
                if tokens > chunk:
                    count = tokens // chunk
                    more = {"M": count, "M1": count + 1, "chunks": _numbers(count + 1)}
                    text = LINEAR_TWO_LEVEL.format(**sizes, C=chunk, rows=_numbers(chunk), **more)
                    graphs[f"chunks_{chunk}"] = text
            runs = {}
            for name, text in graphs.items():
                own = {n: a.copy() for n, a in feeds.items()}
                runs[name] = bound(session(text, threads), own)
            # The two-buffer form keeps every turn on the same numbers; the state copy it costs is the
            # same for all forms except the op in place, timed apart.
            runs["op_in_place"] = bound(
                session(graphs["op"], threads), {n: a.copy() for n, a in feeds.items()}, {"ns": "s"}
            )
            yield {"heads": heads, "dim": dim, "B": batch, "T": tokens}, compete(runs, seconds, threads)


# ---------------------------------------------------------------------------------------------- MoE

MOE_OP = """g (float[T,D] x, float[T,E] r) => (float[T,D] y) {{
  y = com.microsoft.MoE<k = 2, activation_type = "swiglu", swiglu_fusion = 1, activation_alpha = 1.0,
    activation_beta = 0.0, normalize_routing_weights = 1>(x, r, w1, , w2)
}}"""


def moe_grouped(experts: int, inner: int) -> str:
    """Sort the assignments by expert, split, one product per expert, join; activate; again; put back and mix."""

    def listed(prefix: str) -> str:
        return ", ".join(f"{prefix}{e}" for e in range(experts))

    lines = [
        "g (float[T,D] x, float[T,E] r) => (float[T,D] y) {",
        "k = Constant<value = int64[1] {2}>()  flat = Constant<value = int64[1] {-1}>()",
        "two = Constant<value = int64 {2}>()  ax0 = Constant<value = int64[1] {0}>()",
        "ax1 = Constant<value = int64[1] {1}>()  ax2 = Constant<value = int64[1] {2}>()",
        "top, idx = TopK<axis = -1>(r, k)  mix = Softmax<axis = -1>(top)",
        "ids = Reshape(idx, flat)  n = Shape(ids)",
        "sorted, order = TopK<axis = 0, largest = 0>(ids, n)",
        "back_v, back = TopK<axis = 0, largest = 0>(order, n)",
        "token = Div(order, two)  xs = Gather<axis = 0>(x, token)",
        f"depth = Constant<value = int64 {{{experts}}}>()  onoff = Constant<value = int64[2] {{0, 1}}>()",
        "hot = OneHot<axis = -1>(ids, depth, onoff)  counts = ReduceSum<keepdims = 0>(hot, ax0)",
        f"{listed('x')} = Split<axis = 0>(xs, counts)",
        *(f"h{e} = Gemm<transB = 1>(x{e}, w1_{e})" for e in range(experts)),
        f"h = Concat<axis = 0>({listed('h')})",
        f"pair = Constant<value = int64[3] {{-1, {inner}, 2}}>()  p = Reshape(h, pair)",
        "a, b = Split<axis = 2, num_outputs = 2>(p)  s = com.microsoft.QuickGelu<alpha = 1.0>(a)",
        "m = Mul(s, b)  f = Squeeze(m, ax2)",
        f"{listed('f')} = Split<axis = 0>(f, counts)",
        *(f"o{e} = Gemm<transB = 1>(f{e}, w2_{e})" for e in range(experts)),
        f"o = Concat<axis = 0>({listed('o')})  ob = Gather<axis = 0>(o, back)",
        "d = Shape<start = 1>(x)  kd = Constant<value = int64[2] {-1, 2}>()  pairs = Concat<axis = 0>(kd, d)",
        "oo = Reshape(ob, pairs)  mx = Unsqueeze(mix, ax2)  om = Mul(oo, mx)",
        "y = ReduceSum<keepdims = 0>(om, ax1)",
        "}",
    ]
    return "\n".join(lines)


def moe_cases(threads: int, seconds: float):
    rng = np.random.default_rng(2)
    for hidden, inner, experts in ((384, 576, 32), (128, 128, 8)):
        w1 = rng.standard_normal((experts, 2 * inner, hidden), dtype=np.float32) * hidden**-0.5
        w2 = rng.standard_normal((experts, hidden, inner), dtype=np.float32) * inner**-0.5
        parts = {f"w1_{e}": w1[e] for e in range(experts)} | {f"w2_{e}": w2[e] for e in range(experts)}
        loaded = {
            "op": session(MOE_OP.format(), threads, {"w1": w1, "w2": w2}),
            "grouped": session(moe_grouped(experts, inner), threads, parts),
            "grouped_unpacked": session(moe_grouped(experts, inner), threads, parts, session__disable_prepacking="1"),
        }
        for tokens in (1, 2, 4, 8, 16, 64, 256, 512, 1024):
            x = rng.standard_normal((tokens, hidden), dtype=np.float32)
            r = rng.standard_normal((tokens, experts), dtype=np.float32)
            runs = {n: bound(s, {"x": x, "r": r}) for n, s in loaded.items()}
            yield {"hidden": hidden, "inner": inner, "experts": experts, "T": tokens}, compete(runs, seconds, threads)


# ------------------------------------------------------------------------------------------- linear

# Folding the transpose needs the weight's bytes while the graph is read, so that form cannot do without the copy.
FOLDED = "matmul_of_transpose"
LINEAR = {
    FOLDED: "wt = Transpose<perm = [1, 0]>(w)  y = MatMul(x, wt)",
    "fused_matmul": "y = com.microsoft.FusedMatMul<transB = 1>(x, w)",
    "gemm": "y = Gemm<transB = 1>(x, w)",
}


def linear_text(form: str) -> str:
    return f"g (float[T,D] x) => (float[T,O] y) {{ {LINEAR[form]} }}"


def linear_cases(threads: int, seconds: float):
    rng = np.random.default_rng(3)
    for inputs, outputs in ((384, 1536), (384, 512), (512, 384), (384, 16384), (6144, 3072)):
        w = rng.standard_normal((outputs, inputs), dtype=np.float32) * inputs**-0.5
        loaded = {n: session(linear_text(n), threads, {"w": w}, copy=n == FOLDED) for n in LINEAR}
        for form in ("fused_matmul", "gemm"):
            loaded[f"{form}_unpacked"] = session(linear_text(form), threads, {"w": w}, session__disable_prepacking="1")
        for tokens in (1, 4, 8, 64, 256):
            if outputs * tokens > 2**20:
                continue
            x = rng.standard_normal((tokens, inputs), dtype=np.float32)
            yield (
                {"in": inputs, "out": outputs, "T": tokens},
                compete({n: bound(s, {"x": x}) for n, s in loaded.items()}, seconds, threads),
            )
        del loaded
        gc.collect()


# ------------------------------------------------------------------------------------------- memory


def memory_probe(form: str) -> None:
    """Child process: one 256 MiB weight from a mapped file; print anonymous and file-backed bytes."""

    def rss() -> tuple[int, int]:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return tuple(int(fields[k].split()[0]) * 1024 for k in ("RssAnon", "RssFile"))  # type: ignore[return-value]

    experts, inner, hidden = 16, 1024, 2048  # w1 of the MoE: 16 x 2048 x 2048 floats = 256 MiB
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(4 * experts * 2 * inner * hidden)
        array = np.memmap(file.name, np.float32, "r", shape=(experts, 2 * inner, hidden))
        before = rss()
        copy = form.endswith("_copied") or form == FOLDED
        form = form.removesuffix("_copied")
        config = {"session__disable_prepacking": "1"} if form.endswith("_unpacked") else {}
        form = form.removesuffix("_unpacked")
        if form == "moe":
            w2 = np.ones((experts, hidden, inner), np.float32)
            before = rss()
            loaded = session(MOE_OP.format(), 1, {"w1": array, "w2": w2}, copy=copy, **config)
            feeds = {"x": np.ones((4, hidden), np.float32), "r": np.ones((4, experts), np.float32)}
        else:
            flat = array.reshape(-1, hidden)
            loaded = session(linear_text(form), 1, {"w": flat}, copy=copy, **config)
            feeds = {"x": np.ones((1, hidden), np.float32)}
        bound(loaded, feeds)()
        after = rss()
    print(json.dumps({"anonymous": after[0] - before[0], "file": after[1] - before[1], "weight": array.nbytes}))


def memory_cases(_threads: int, _seconds: float):
    more = ("fused_matmul_copied", "fused_matmul_unpacked_copied", "fused_matmul_unpacked", "gemm_unpacked", "moe")
    for form in (*LINEAR, *more):
        command = [sys.executable, __file__, "--memory-probe", form]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        yield {"form": form}, {k: round(v / 2**20) for k, v in result.items()}


SECTIONS = {
    "attention": attention_cases,
    "lightning": lightning_cases,
    "moe": moe_cases,
    "linear": linear_cases,
    "memory": memory_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=["all", *SECTIONS], default="all")
    parser.add_argument("--threads", type=int, default=1, help="with 1 (default) CPU time is measured, else wall time")
    parser.add_argument("--seconds", type=float, default=0.5, help="time given to each case")
    parser.add_argument("--output", type=Path, help="write the JSON here (default: standard output)")
    parser.add_argument("--memory-probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_probe:
        memory_probe(args.memory_probe)
        return
    report: dict[str, Any] = {
        "onnxruntime": ort.__version__,
        "machine": platform.machine(),
        "threads": args.threads,
        "clock": "thread CPU time" if args.threads == 1 else "wall",
    }
    for name in SECTIONS if args.section == "all" else [args.section]:
        report[name] = []
        for case, result in SECTIONS[name](args.threads, args.seconds):
            report[name].append({"case": case, **result})
            shown = result.get("us", result)
            print(
                f"{name} {case} {shown} {'WRONG ' + str(result['wrong']) if result.get('wrong') else ''}",
                file=sys.stderr,
                flush=True,
            )
    text = json.dumps(report, indent=1)
    if args.output:
        args.output.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
