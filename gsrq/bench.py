"""Times of clustering, encoding, calibration and decode attention with residual codes, on synthetic data, beside what one would use instead.

python -m gsrq.bench --out rows.json --seconds 280 --parts contexts memory search batches
Needs torch and triton alone; flash-kmeans is timed where it is installed. Rows are written as they come.
Vectors are Gaussian with log-normal lengths, so norms have heavy tails. One row per metric, in long form.
"""

import argparse
import datetime
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.testing import do_bench

from gsrq import bench_attention
from gsrq.gskm import gain_shape, gskm
from gsrq.quantizer import GSRQ
from kernels import append, kmeans, kmeans_triton, rvq
from kernels.kmeans import mean, nearest
from kernels.timing import measure

DEVICE = "cuda"
HEADS, DIM = 8, 128  # one layer of Llama-3-8B
LAYERS = 32
STREAMS = 4
REPORT = 4  # tensors between two reports of a calibration


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
        BOX.note("kmeans_iteration", "triton plain", shape, "time", "ms", clock(lambda: mean(x, ones, inverse, nearest(x, centres)[0], centres)))
        BOX.note("kmeans_iteration", "triton weighted gskm", shape, "time", "ms", clock(lambda: gain_shape(x, weights, inverse, nearest(x, centres)[0], centres)))
        BOX.note("kmeans_assign", "triton", shape, "time", "ms", clock(lambda: nearest(x, centres)))
        BOX.note("kmeans_sums", "triton, 1 weighting", shape, "time", "ms", clock(lambda: kmeans.sums(x, ones, labels, count)))
        BOX.note("kmeans_sums", "triton, 2 weightings", shape, "time", "ms", clock(lambda: kmeans.sums(x, weights, labels, count, inverse)))
        try:
            from flash_kmeans.kmeans_triton_impl import _euclid_iter

            squares = (x**2).sum(-1)
            BOX.note("kmeans_iteration", "flash-kmeans 0.3.1", shape, "time", "ms", clock(lambda: _euclid_iter(x, squares, half)))
        except ImportError:
            print("flash-kmeans is not installed: no row", flush=True)

        def separate():
            for own, table in zip(x, half, strict=True):
                label = torch.addmm(-0.5 * table.float().square().sum(-1).half()[None], own, table.T).argmax(-1)
                torch.zeros(count, DIM, device=DEVICE).index_add_(0, label, own.float())
                torch.zeros(count, device=DEVICE).index_add_(0, label, ones[0])

        BOX.note("kmeans_iteration", "cublas + argmax + index_add", shape, "time", "ms", clock(separate))
        from torch.testing import assert_close

        exact = nearest(x[:2].float().cpu(), centres[:2].half().float().cpu())
        agreement = (labels[:2].cpu() == exact[0]).float().mean().item()
        for update in (mean, gain_shape):
            few = (x[:2], weights[:2], inverse[:2], labels[:2], centres[:2])
            expected = update(*(part.cpu().long() if part is few[3] else part.cpu().float() for part in few))
            for ours, theirs in zip(update(*few), expected, strict=True):
                assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-3)
        BOX.note("kmeans_assign", "triton", shape, "labels equal to float32", "fraction", agreement)


def gathers(groups: int = 32, n: int = 131072, count: int = 256) -> None:
    """Sums of members with other tiles than the default's: members gathered at once, warps, stages, members of a program."""
    x, weights = vectors(groups, n, DIM).half(), torch.rand(2, groups, n, device=DEVICE)
    labels = nearest(x, x[:, :count].float())[0]
    usual = kmeans_triton.GATHER
    try:
        for kmeans_triton.GATHER in (usual, (64, 2, 4, 256), (32, 1, 3, 256), (32, 1, 4, 256), (64, 2, 3, 512)):
            rows, warps, stages, share = kmeans_triton.GATHER
            for several in (1, 2):
                provider = f"triton, {several} weighting{'s' * (several - 1)}, {rows} rows, {warps} warps, {stages} stages, shares of {share}"
                call = clock(lambda several=several: kmeans.sums(x, weights[0], labels, count, *weights[1:several]))
                BOX.note("kmeans_sums", provider, f"b{groups} n{n} k{count} d{DIM}", "time", "ms", call)
    finally:
        kmeans_triton.GATHER = usual


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
            BOX.note("rvq_encode", provider, shape, "throughput of 32 layers, K and V", "tokens/s", tuple(n / (times[i] * 1e-3 * 2 * LAYERS) for i in (0, 2, 1)))


def one_token(tiles: bool = False) -> None:
    """A token's keys and values of one layer, turned back, coded and written, in a graph over tables of all layers, which L2 does not hold.

    Codes are compared with the definition's first; what it takes in torch is timed beside. `tiles`: other sequences and warps of a program, one token of all.
    """
    usual = append.TILES
    for piece, r, kind in ((32, 4, torch.float8_e4m3fn), (32, 4, torch.float16), (DIM, 16, torch.float8_e4m3fn), (DIM, 16, torch.float16)):
        pieces = HEADS * DIM // piece
        layers = [[append.Book((0.3 * torch.randn(pieces, r, 256, piece, device=DEVICE)).to(kind), 1.0) for _ in range(2)] for _ in range(LAYERS)]
        for batch in (1, 64, 256):
            shape = f"b{batch} kv{HEADS} d{DIM} pieces of {piece} stages{r} {'fp8' if kind.itemsize == 1 else 'fp16'} tables"
            angle = torch.rand(batch, DIM // 2, device=DEVICE)
            held, expected = ([torch.zeros(batch, 1, 8, pieces * r, dtype=torch.uint8, device=DEVICE) for _ in range(2)] for _ in range(2))
            rest = [vectors(batch, HEADS, 1, DIM).half() for _ in range(2)], torch.tensor([3], device=DEVICE), append.Turn(angle.cos(), angle.sin())

            def call(i: int, held=held, layers=layers, rest=rest) -> None:
                append.append(held, rest[0], layers[i], *rest[1:])

            append.define(expected, rest[0], layers[0], *rest[1:])
            others = [tile for tile in ((8, 2), (8, 4), (8, 8), (8, 16), (16, 4), (16, 8), (32, 4), (32, 8), (64, 8)) if batch <= 16 * tile[0] <= 16 * max(8, batch)]
            for tile in others if tiles else [None]:
                append.TILES = ((1, *tile),) if tile else usual
                provider = "one launch" + (f", {tile[0]} sequences, {tile[1]} warps" if tile else "")
                try:
                    call(0)
                    equal = min((a == b).float().mean().item() for a, b in zip(held, expected))
                    if equal < 0.99:
                        raise RuntimeError(f"{1 - equal:.2%} of the codes differ; not timed")
                    BOX.note("append", provider, shape, "codes equal to the definition's", "fraction", equal)
                    BOX.note("append", provider, shape, "time", "us", measure(call, LAYERS))
                except Exception as error:
                    print(f"{provider}, {shape}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                finally:
                    append.TILES = usual
            if not tiles:
                BOX.note("append", "as defined", shape, "time", "us", measure(lambda i, e=expected, b=layers, r=rest: append.define(e, r[0], b[i], *r[1:]), LAYERS))


def calibration(n: int = 262144, rounds: int = 40, whole: bool = False) -> None:
    """1-bit codebooks at the paper's protocol: 8 pieces x 16 stages x 256 entries per tensor, tolerance 0; STREAMS tensors at a time.

    `whole`: all 64 tensors, with rows after every REPORT of them. When the time is over no tensor is begun, and the rows stand as they are.
    """
    data = [vectors(HEADS, n, DIM) for _ in range(STREAMS)]
    grads = torch.rand(n, HEADS * DIM // 8, device=DEVICE) ** 8

    def fit(index: int, rounds: int = rounds) -> None:
        codec = GSRQ(1.0, weights="log", cluster=lambda *a, **k: gskm(*a, rounds=rounds, **k))
        codec.fit(SimpleNamespace(x=data[index % STREAMS], grads=grads, kind="key", layer=index, seed=0, pairs=None, inv_freq=None))
        if DEVICE == "cuda":
            torch.cuda.current_stream().synchronize()

    fit(0, rounds=2)  # compile
    everything = 2 * LAYERS
    count = everything if whole else STREAMS
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    shape = f"n{n} pieces{HEADS} stages16 k256 d{DIM} rounds{rounds}"
    start = time.perf_counter()
    with ThreadPoolExecutor(STREAMS, initializer=apart) as pool:
        try:
            for done, fitted in enumerate(as_completed([pool.submit(fit, index) for index in range(count)]), 1):
                fitted.result()
                seconds = time.perf_counter() - start
                provider = f"triton, {STREAMS} streams, {done} tensors timed"
                if done % REPORT == 0 or done == count:
                    BOX.note("calibration", provider, shape, "time so far" if done < everything else "time of 32 layers, K and V", "s", seconds)
                if done % REPORT == 0 and done < everything:
                    BOX.note("calibration", provider, shape, "extrapolation to 32 layers, K and V", "s", seconds / done * everything)
                if time.monotonic() > BOX.end and done < count:
                    print(f"no time left: {done} of {count} tensors timed", flush=True)
                    break
        finally:
            pool.shutdown(cancel_futures=True)
    if DEVICE == "cuda":
        BOX.note("calibration", provider, shape, "peak memory", "GB", torch.cuda.max_memory_allocated() / 1e9)


def apart() -> None:
    """Give the calling thread a stream of its own, and with it the allocator's memory of every tensor that it fits."""
    if DEVICE == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())


def search(tokens: int = 32768, stages: int = 16) -> None:
    """Beam codes of one tensor of one layer, kernel and torch: codes compared, then tokens per second through keys and values of all layers."""
    from kernels import rvq_beam_triton

    for piece, r in ((DIM, stages), (32, stages // 4)):
        pieces = HEADS * DIM // piece
        x = vectors(tokens, pieces, piece).transpose(0, 1)
        tables = (0.3 * torch.randn(pieces, r, 256, piece, device=DEVICE)).half()
        for beam in (2, 4, 8):
            shape = f"n{tokens} pieces{pieces} stages{r} k256 d{piece} beam{beam}"
            few = x[:, :2048].contiguous()
            ours, theirs = rvq_beam_triton.encode(few, tables, beam).long(), rvq.encode(few, tables, beam)
            BOX.note("rvq_encode", "triton beam", shape, "codes equal to torch", "fraction", (ours == theirs).all(-1).float().mean().item())
            errors = [(few - rvq.decode(codes, tables)).square().sum().item() for codes in (ours, theirs)]
            if abs(errors[0] / errors[1] - 1) > 1e-3:
                raise RuntimeError(f"beam {beam}, d{piece}: error {errors[0]:.6g} where torch has {errors[1]:.6g}; not timed")
            times = clock(lambda beam=beam, tables=tables, x=x: rvq_beam_triton.encode(x, tables, beam), 100)
            BOX.note("rvq_encode", "triton beam", shape, "throughput of 32 layers, K and V", "tokens/s", tuple(tokens / (times[i] * 1e-3 * 2 * LAYERS) for i in (0, 2, 1)))


class Box:
    """Rows as they come, and the time that is left for more."""

    def __init__(self):
        self.rows, self.out, self.end = [], None, math.inf

    def note(self, kernel: str, provider: str, shape: str, metric: str, unit: str, times) -> None:
        """Print one row and write all so far; times are (median, 5 %, 95 %) or one number."""
        median, low, high = times if isinstance(times, (tuple, list)) else (times, times, times)
        self.rows.append({
            "kernel": kernel, "provider": provider, "shape": shape, "metric": metric, "unit": unit, "median": median, "p5": low, "p95": high,
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
            "date": datetime.date.today().isoformat(), "command": "python -m gsrq.bench " + " ".join(sys.argv[1:]),
        })  # fmt: skip
        print(f"{kernel} {provider} {shape} {metric} {median:.4g} {unit}", flush=True)
        self.out.write_text(json.dumps(self.rows, indent=1))

    def spend(self, part, *arguments) -> None:
        """Call `part` unless the time is over; a part that fails says so and leaves the others alone."""
        name = getattr(part, "__name__", str(part))
        if time.monotonic() > self.end:
            print(f"no time left for {name} {arguments[:1]}", flush=True)
            return
        try:
            part(*arguments)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        torch.cuda.empty_cache()


BOX = Box()


def main() -> None:
    parts = {
        "contexts": lambda: bench_attention.contexts(BOX),
        "memory": lambda: bench_attention.memory(BOX),
        "search": search,
        "batches": lambda: bench_attention.batches(BOX),
        "clustering": clustering,
        "gathers": gathers,
        "encoding": encoding,
        "calibration": calibration,
        "append": one_token,
        "append_tiles": lambda: one_token(tiles=True),
        "whole": lambda: calibration(whole=True),
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="JSON file for the rows")
    parser.add_argument("--parts", nargs="*", default=list(parts)[:-2], choices=list(parts), help="in this order")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after so many seconds")
    options = parser.parse_args()
    torch.manual_seed(0)
    BOX.out, BOX.end = options.out, time.monotonic() + options.seconds
    for part in options.parts:
        BOX.spend(parts[part])


if __name__ == "__main__":
    main()
