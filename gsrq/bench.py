"""Times of clustering, encoding, calibration and decode attention with residual codes, on synthetic data, beside what one would use instead.

python -m gsrq.bench --out rows.json            needs torch and triton alone; flash-kmeans is timed where it is installed
Vectors are Gaussian with log-normal lengths, so norms have heavy tails. One row per metric, in long form.
"""

import argparse
import datetime
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from gsrq.gskm import gain_shape, gskm
from gsrq.quantizer import GSRQ
from kernels import kmeans, lookup, rvq
from kernels.kmeans import mean, nearest
from kernels.timing import measure

DEVICE = "cuda"
HEADS, QUERIES, DIM = 8, 32, 128  # one layer of Llama-3-8B
LAYERS = 32
STREAMS = 4
ROWS: list[dict] = []


def note(kernel: str, provider: str, shape: str, metric: str, unit: str, times) -> None:
    """Keep and print one row; times are (median, 5 %, 95 %) or one number."""
    median, low, high = times if isinstance(times, (tuple, list)) else (times, times, times)
    ROWS.append({
        "kernel": kernel, "provider": provider, "shape": shape, "metric": metric, "unit": unit, "median": median, "p5": low, "p95": high,
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.date.today().isoformat(), "command": "python -m gsrq.bench " + " ".join(sys.argv[1:]),
    })  # fmt: skip
    print(f"{kernel} {provider} {shape} {metric} {median:.4g} {unit}", flush=True)


def clock(call, rep: int = 200):
    """Median, 5 % and 95 % milliseconds, the L2 cache flushed before every call."""
    return do_bench(call, warmup=25, rep=rep, quantiles=[0.5, 0.05, 0.95])


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE) * torch.randn(*shape[:-1], 1, device=DEVICE).exp()


def clustering(groups: int = 32, n: int = 131072) -> None:
    """One Lloyd iteration: ours plain and weighted gain-shape, flash-kmeans, and products + argmax + index_add."""
    x = vectors(groups, n, DIM).half()
    ones, weights = torch.ones(groups, n, device=DEVICE), torch.rand(groups, n, device=DEVICE)
    inverse = 1 / x.norm(dim=-1, dtype=torch.float32)
    for count in (1024, 256):
        shape, centres = f"b{groups} n{n} k{count} d{DIM}", x[:, :count].float()
        half = centres.half()
        labels = nearest(x, centres)[0]
        note("kmeans_iteration", "triton plain", shape, "time", "ms", clock(lambda: mean(x, ones, inverse, nearest(x, centres)[0], centres)))
        note("kmeans_iteration", "triton weighted gskm", shape, "time", "ms", clock(lambda: gain_shape(x, weights, inverse, nearest(x, centres)[0], centres)))
        note("kmeans_assign", "triton", shape, "time", "ms", clock(lambda: nearest(x, centres)))
        note("kmeans_sums", "triton, 1 weighting", shape, "time", "ms", clock(lambda: kmeans.sums(x, ones, labels, count)))
        note("kmeans_sums", "triton, 2 weightings", shape, "time", "ms", clock(lambda: kmeans.sums(x, torch.stack([ones, weights]), labels, count)))
        try:
            from flash_kmeans.kmeans_triton_impl import _euclid_iter

            squares = (x**2).sum(-1)
            note("kmeans_iteration", "flash-kmeans 0.3.1", shape, "time", "ms", clock(lambda: _euclid_iter(x, squares, half)))
        except ImportError:
            print("flash-kmeans is not installed: no row", flush=True)

        def separate():
            for own, table in zip(x, half, strict=True):
                label = torch.addmm(-0.5 * table.float().square().sum(-1).half()[None], own, table.T).argmax(-1)
                torch.zeros(count, DIM, device=DEVICE).index_add_(0, label, own.float())
                torch.zeros(count, device=DEVICE).index_add_(0, label, ones[0])

        note("kmeans_iteration", "cublas + argmax + index_add", shape, "time", "ms", clock(separate))
        from torch.testing import assert_close

        found, mass = mean(x[:2], ones[:2], inverse[:2], labels[:2], centres[:2])
        exact = nearest(x[:2].float().cpu(), centres[:2].half().float().cpu())
        agreement = (labels[:2].cpu() == exact[0]).float().mean().item()
        expected = mean(x[:2].float().cpu(), ones[:2].cpu(), inverse[:2].cpu(), labels[:2].long().cpu(), centres[:2].cpu())[0]
        assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
        note("kmeans_assign", "triton", shape, "labels equal to float32", "fraction", agreement)


def encoding(tokens: int = 65536, stages: int = 16) -> None:
    """Greedy and beam codes of one tensor of one layer, as tokens per second through keys and values of all layers."""
    for piece, r in ((DIM, stages), (32, stages // 4)):
        pieces, shape = HEADS * DIM // piece, f"n{tokens} pieces{HEADS * DIM // piece} stages{r} k256 d{piece}"
        x = vectors(tokens, pieces, piece).transpose(0, 1)
        tables = (0.3 * torch.randn(pieces, r, 256, piece, device=DEVICE)).half()
        for provider, call, n in (
            ("triton greedy", lambda: rvq.encode(x, tables), tokens),
            ("stage by stage, tf32 products", lambda: rvq._greedy(x[:, :4096].float(), tables), 4096),
            ("torch beam 4", lambda: rvq.encode(x[:, :4096].contiguous(), tables, 4), 4096),
        ):
            times = clock(call, 100)
            note("rvq_encode", provider, shape, "throughput of 32 layers, K and V", "tokens/s", tuple(n / (times[i] * 1e-3 * 2 * LAYERS) for i in (0, 2, 1)))


def calibration(n: int = 262144, rounds: int = 40, whole: bool = False) -> None:
    """1-bit codebooks at the paper's protocol: 8 pieces x 16 stages x 256 entries per tensor, tolerance 0; STREAMS tensors at a time."""
    data = [vectors(HEADS, n, DIM) for _ in range(STREAMS)]
    grads = torch.rand(n, HEADS * DIM // 8, device=DEVICE) ** 8

    def fit(index: int, rounds: int = rounds) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            codec = GSRQ(1.0, weights="log", cluster=lambda *a, **k: gskm(*a, rounds=rounds, **k))
            codec.fit(SimpleNamespace(x=data[index % STREAMS], grads=grads, kind="key", layer=index, seed=0, pairs=None, inv_freq=None))
            torch.cuda.current_stream().synchronize()

    fit(0, rounds=2)  # compile
    count = 2 * LAYERS if whole else STREAMS
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(fit, range(count)))
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / count
    shape = f"n{n} pieces{HEADS} stages16 k256 d{DIM} rounds{rounds}"
    note("calibration", f"triton, {STREAMS} streams, {count} tensors timed", shape, "time per tensor", "s", seconds)
    note("calibration", f"triton, {STREAMS} streams, {count} tensors timed", shape, "time of 32 layers, K and V", "s", seconds * 2 * LAYERS)
    note("calibration", f"triton, {STREAMS} streams, {count} tensors timed", shape, "peak memory", "GB", torch.cuda.max_memory_allocated() / 1e9)


def attention(lengths=(8192, 32768, 131072)) -> None:
    """One query per sequence, 32 query and 8 KV heads, inputs in turn so that none stays in L2: codes, fp16, and rebuilding."""
    scale, inv_freq = DIM**-0.5, 5e5 ** (-torch.arange(0, DIM, 2, device=DEVICE) / DIM)
    base = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for tokens in lengths:
        shape = f"q{QUERIES} kv{HEADS} d{DIM} b1 t{tokens}"
        query = torch.randn(1, QUERIES, DIM, device=DEVICE).half()
        sets = max(2, min(16, 2 * 131072 // tokens))
        caches = [torch.randn(2, 1, HEADS, tokens, DIM, device=DEVICE).half() for _ in range(sets)]
        for backend, name in ((SDPBackend.FLASH_ATTENTION, "fp16 flash"), (SDPBackend.CUDNN_ATTENTION, "fp16 cudnn")):
            with sdpa_kernel(backend):
                run = lambda i: scaled_dot_product_attention(query[:, :, None], *caches[i], enable_gqa=True)
                note("decode_attention", name, shape, "time", "us", measure(run, sets))
        for piece, stages, dtype in ((128, 16, "fp16"), (128, 12, "fp16"), (128, 16, "fp8"), (64, 8, "fp16"), (32, 4, "fp16"), (32, 3, "fp16"), (32, 4, "fp8")):
            pieces = HEADS * DIM // piece

            def coded(layout: str):
                tables = (0.3 * torch.randn(pieces, stages, 256, piece, device=DEVICE)).to(torch.float8_e4m3fn if dtype == "fp8" else torch.float16)
                codes = torch.randint(0, 256, (1, tokens, pieces * stages), dtype=torch.uint8, device=DEVICE).mT
                return lookup.Coded(codes.contiguous() if layout == "code-major" else codes, tables)

            for layout in ("token-major", "code-major"):
                inputs = [(coded(layout), coded(layout)) for _ in range(sets)]
                name = f"codes {8 * stages / piece:g} bit d{piece} {dtype} tables {layout}"
                run = lambda i: lookup.attend(query, *inputs[i], tokens, scale, inv_freq, base)
                try:
                    note("decode_attention", name, shape, "time", "us", measure(run, sets))
                except Exception as error:
                    print(name, shape, type(error).__name__, str(error)[:200], flush=True)
            if dtype == "fp16" and tokens == 131072 and stages in (16, 4):
                def rebuilt():
                    key, value = (lookup.rebuild(c, HEADS, tokens) for c in inputs[0])
                    key = lookup.rotate(key, inv_freq, base).half()
                    return scaled_dot_product_attention(query[:, :, None], key, value.half(), enable_gqa=True)

                note("decode_attention", f"rebuild {8 * stages / piece:g} bit d{piece}, then SDPA", shape, "time", "us", tuple(1e3 * t for t in clock(rebuilt, 50)))
                ours, lse = lookup.attend(query, *inputs[0], tokens, scale, inv_freq, base)
                error = ((ours - rebuilt()[:, :, 0].float()).norm() / ours.norm()).item()
                note("decode_attention", name, shape, "difference from rebuilding", "relative", error)


def main() -> None:
    parts = {"clustering": clustering, "encoding": encoding, "calibration": calibration, "attention": attention, "whole": lambda: calibration(whole=True)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON file for the rows")
    parser.add_argument("--parts", nargs="*", default=list(parts)[:-1], choices=list(parts))
    options = parser.parse_args()
    torch.manual_seed(0)
    for part in options.parts:
        try:
            parts[part]()
        finally:
            torch.cuda.empty_cache()
            with open(options.out, "w") as file:
                json.dump(ROWS, file, indent=1)


if __name__ == "__main__":
    main()
