"""Kernel-level latency of decode attention: packed scalar caches beside fp16 through SDPA, in one run.

python -m kernels.bench_paged --out rows.parquet            needs torch, triton and pandas alone
Inputs are drawn at random; sets of inputs together exceed the L2 cache several times. Times include query rotation and merge. All kernels
are compiled first, in parallel. Every output is compared with the definition before its time is taken: where the assembly of the lookup
gives a wrong one, the same kernel in plain Triton is checked and timed instead and named so; a row says whether its output was right.
"""

import argparse
import concurrent.futures
import datetime
import math
import multiprocessing
import subprocess
import sys
import time

import pandas as pd
import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels import backend, paged, synthetic
from kernels.attention import Part, attend, merge
from kernels.timing import measure

SHAPES = [(16, 2, 1, 8192), (16, 2, 1, 32768), (16, 2, 1, 131072), (16, 2, 1, 524288), (16, 2, 16, 32768),
          (32, 8, 1, 8192), (32, 8, 1, 131072), (32, 8, 1, 524288), (32, 8, 16, 32768)]  # fmt: skip
CACHES = {"tq_k3v3": (3, 3, 1), "tq_k2v2": (2, 2, 1), "blockgtq_k3v3": (3.0, 3, 1), "blockgtq_k2v2": (2.0, 2, 1), "int4": (4, 4, 1),
          "blockgtq_tiles_k3v3": (3.0, 3, 8), "blockgtq_tiles_k2v2": (2.0, 2, 8)}  # fmt: skip
"""Bits of keys (a float: an average over RoPE blocks) and of values, and how many blocks share a width."""
DIM, COLD = 128, 256e6
LIMIT = 1e-2  # relative error of a float16 output
PEAK = 4.3e12  # bytes per second of a large copy on an H200, read and write counted


def packed(name: str, heads: int, kv: int, batch: int, tokens: int, timed: bool = True) -> dict:
    """Median, 5 % and 95 % of one cache, with the bytes it reads and whether its output is right."""
    key, value, tile = CACHES[name]
    widths = key if isinstance(key, int) else synthetic.draw_widths(kv, DIM // 2, key, 0.75, torch.Generator().manual_seed(0), tile)
    plain = name == "int4"
    k, v = (synthetic.spec(kv, DIM, w, rotated=not plain, offset=plain, integers=plain, device="cuda") for w in (widths, value))
    pair = paged.PagedAttention(k, v)
    first = [synthetic.pages(s, batch, tokens) for s in (k, v)]
    size = sum(x.bytes() for x in first)
    query = torch.randn(batch, heads, DIM, device="cuda", dtype=torch.float16)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    begin = torch.zeros_like(lengths)
    call = lambda held: pair.launch(query, *held, lengths, begin, tokens, DIM**-0.5)  # noqa: E731
    checked = error(call(first), definition(pair, query, *first, tokens)) <= LIMIT
    if not timed:
        return {"checked": checked}
    sets = [first] + [[synthetic.pages(s, batch, tokens) for s in (k, v)] for _ in range(max(0, min(40, round(COLD / size)) - 1))]
    return {"times": measure(lambda i: call(sets[i]), len(sets)), "bytes": size, "checked": checked}


def definition(pair: paged.PagedAttention, query: torch.Tensor, key, value, tokens: int, span: int = 32768) -> Part:
    """Attention as `kernels.paged` defines it, in torch alone, a span of tokens at a time."""
    parts = []
    for start in range(0, tokens, span):
        dense = [paged.reconstruct(pages.spec, *pages.symbols(start, min(start + span, tokens))) for pages in (key, value)]
        parts.append(attend(query, *dense, DIM**-0.5))
    return merge(parts)


def error(ours: Part, theirs: Part) -> float:
    """Relative error of the outputs; infinite where one was not written or the log-sum-exp is off."""
    found = float((ours[0].double() - theirs[0].double()).norm() / theirs[0].double().norm())
    return found if torch.allclose(ours[1].double(), theirs[1].double(), atol=2e-2, rtol=1e-3) and math.isfinite(found) else math.inf


def right(name: str, heads: int, kv: int, tuning: dict) -> tuple[str, int, dict[str, bool]]:
    """In a process of its own: compile the kernels of this cache and check both forms of the lookup on a short one."""
    apply(tuning)
    answers = {}
    for form, asm in (("", True), (" (plain)", False)):
        backend.ASM = asm
        try:
            answers[form] = packed(name, heads, kv, 1, 8192, timed=False)["checked"]
        except Exception as reason:  # a form that does not compile is not used, and says so
            print(name, heads, form, type(reason).__name__, str(reason)[:200], flush=True)
            answers[form] = False
    return name, heads, answers


def apply(tuning: dict) -> None:
    """Set the launch parameters that a run may vary."""
    for name in ("STAGES", "AHEAD", "VALUE_AHEAD", "VTILE", "KEY_UNROLL", "UNROLL", "WARPS"):
        setattr(backend, name, tuning[name])
    backend.LIMIT = {"maxnreg": tuning["registers"]} if tuning["registers"] else {}


def exact(name: str, heads: int, kv: int, batch: int, tokens: int) -> dict:
    """The same for an fp16 cache through one SDPA backend, KV heads shared, not copied."""
    size = 2 * batch * kv * tokens * DIM * 2
    count = max(1, min(40, round(COLD / size)))
    sets = [[torch.randn(batch, kv, tokens, DIM, device="cuda", dtype=torch.float16) for _ in range(2)] for _ in range(count)]
    query = torch.randn(batch, heads, 1, DIM, device="cuda", dtype=torch.float16)
    with sdpa_kernel({"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}[name]):
        call = lambda i: scaled_dot_product_attention(query, *sets[i], enable_gqa=True)  # noqa: E731
        theirs = attend(query[:, :, 0], *sets[0], DIM**-0.5)[0]
        distance = float((call(0)[:, :, 0].double() - theirs.double()).norm() / theirs.double().norm())
        return {"times": measure(call, count), "bytes": size, "checked": distance <= LIMIT}


def rows_of(kernel: str, provider: str, shape: tuple, result: dict, program: str = "kernels.bench_paged") -> list[dict]:
    """Tidy rows, one per metric; those of bytes where the result counts some."""
    heads, kv, batch, tokens = shape
    median, low, high = result["times"]
    common = {"kernel": kernel, "provider": provider, "shape": f"q{heads} kv{kv} d{DIM} b{batch} t{tokens}"}
    where = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "date": datetime.date.today().isoformat()}
    where |= {"checked": result["checked"], "command": f"python -m {program} " + " ".join(sys.argv[1:]), "commit": commit()}
    metrics = [("time", "us", median, low, high)]
    if "bytes" in result:
        rate = [result["bytes"] / t / 1e3 for t in (median, high, low)]  # gigabytes per second; the slowest 5 % are the lowest rate
        metrics += [("bytes_read", "B", *[result["bytes"]] * 3), ("rate", "GB/s", *rate), ("of_roofline", "1", *[1e9 * r / PEAK for r in rate])]
    return [{**common, "metric": name, "unit": unit, "median": m, "p5": lo, "p95": hi, **where} for name, unit, m, lo, hi in metrics]


def commit() -> str:
    """Short hash of the checkout, "+" behind it if files differ; "unknown" outside one."""
    answers = [subprocess.run(["git", *args], capture_output=True, text=True) for args in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])]
    return "unknown" if answers[0].returncode else answers[0].stdout.strip() + ("+" if answers[1].stdout.strip() else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="parquet file for the rows")
    parser.add_argument("--only", nargs="*", default=["sdpa_flash", "sdpa_cudnn", *CACHES])
    parser.add_argument("--shapes", nargs="*", type=int, default=range(len(SHAPES)), help="indices into the list of shapes")
    parser.add_argument("--stages", type=int, default=backend.STAGES)
    parser.add_argument("--per-sm", type=int, default=backend.WARPS, help="programs per multiprocessor")
    parser.add_argument("--registers", type=int, default=backend.LIMIT.get("maxnreg", 0), help="most registers of a thread, 0 for no limit")
    parser.add_argument("--ahead", type=int, default=backend.AHEAD)
    parser.add_argument("--value-ahead", type=int, default=backend.VALUE_AHEAD)
    parser.add_argument("--vtile", type=int, default=backend.VTILE)
    parser.add_argument("--key-unroll", type=int, default=backend.KEY_UNROLL)
    parser.add_argument("--unroll", type=int, default=backend.UNROLL)
    parser.add_argument("--jobs", type=int, default=10, help="processes that compile")
    options = parser.parse_args()
    tuning = {"STAGES": options.stages, "AHEAD": options.ahead, "VALUE_AHEAD": options.value_ahead, "VTILE": options.vtile, "KEY_UNROLL": options.key_unroll}
    tuning |= {"UNROLL": options.unroll, "WARPS": options.per_sm, "registers": options.registers}
    apply(tuning)
    shapes, rows, forms, begun = [SHAPES[i] for i in options.shapes], [], {}, time.time()
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        wanted = [(name, *pair) for name in options.only if name in CACHES for pair in sorted({shape[:2] for shape in shapes})]
        for name, heads, answers in pool.map(right, *zip(*wanted), [tuning] * len(wanted)) if wanted else ():
            forms[name, heads] = next((form for form, good in answers.items() if good), "")
            print(name, heads, answers, flush=True)
    print(f"compiled in {time.time() - begun:.0f} s", flush=True)
    for shape in shapes:
        for provider in options.only:
            torch.cuda.empty_cache()
            form = forms.get((provider, shape[0]), "")
            backend.ASM = not form
            try:
                result = (exact if provider.startswith("sdpa") else packed)(provider, *shape)
            except Exception as reason:  # a provider that cannot serve a shape has no row, and says so
                print(shape, provider, type(reason).__name__, str(reason)[:200], flush=True)
                continue
            rows += rows_of("decode_attention", provider + form, shape, result)
            median, low, high = result["times"]
            told = f"{median:.1f} us [{low:.1f}, {high:.1f}] {result['bytes'] / median / 1e6:.2f} TB/s"
            print(*shape, provider + form, told, "" if result["checked"] else "WRONG OUTPUT", flush=True)
            pd.DataFrame(rows).to_parquet(options.out)  # after every row: a crash loses one


if __name__ == "__main__":
    main()
