"""How long one token takes through the very cache that is scored, beside fp16 in the same process under the same conditions.

An example is (batch, cached tokens). A step is the whole model with one new token per row, always at the same length. Its subset says how it
ran: `graph` (one CUDA graph, on a GPU) or `eager` (call by call, on a CPU), then what read the cache: `kernels`, `emulated` (the same kernels
without a GPU: interpreted, or their torch definitions) or `reference` (decoded, then SDPA; on a GPU as well `eager`), and `compiled` where
both sides ran everything but attention through torch.compile (`compile`); prompts and encoding are timed without it alone.

step_ms                     median, and /p5, /p95; tokens_per_second = batch / step
fp16_<backend>_ms           the same for an fp16 cache through SDPA with shared KV heads: flash and cudnn on a GPU, sdpa on a CPU; speedup: the
                            fastest of them over ours, per row
bytes/read                  weights and cache, once; rate/gb_per_s: over the step; rate/of_roofline: what they take at rate/copy_gb_per_s, a large
                            copy measured in the same run, over the step
bytes/weights, bytes/cache  the model's parameters; codes, exact tokens and codebooks; on a GPU also bytes/peak, and bytes/transient for the rest
prefill_ms                  one row: a prompt of the example's tokens, if at most `prefill`, through an empty cache, last logits only, fp16 beside it
encode_tokens_per_second    one row: keys and values of all layers, appended behind a few tokens
check/difference            the kernels' attention against decoded keys and values, at the example's length; beyond 1e-2 there is no time
check/<side>_compiled       logits of the compiled step against those of the same step call by call, on either side
compiled/graphs, kernels    graphs compiled so far in this run, one per batch, and the kernels that the compiler wrote for them; compiled/seconds
failed/<part>               1 where a part could not be measured; the record says why
shape/break_even_tokens     derived from the examples of one batch: the cached tokens from which a step is faster than the fastest fp16
"""

import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from kernels import timing
from kvq import distance, fill, report
from kvq.cache import coded_shapes
from kvq.compiled import MODES, Step
from kvq.decode import Decoder
from kvq.errors import Refusal
from kvq.models import no_single
from kvq.records import Example, Record

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Latency:
    """context, batch: lists, every pair is an example, or `pairs` of (batch, context) instead; batch null: as many rows as `cache_gb` holds.

    prefill: longest prompt that is timed, 0 for none; chunk: its pieces. repeats: steps; seconds: for each part of an example at most; box: after
    so many seconds no further example begins, each of them is a row that says so. compile: a mode of `kvq.compiled`, for both sides.
    """

    metric, data, one_pass = "step_ms", "synthetic", False
    alone = True  # fp16 is timed beside every example, in the same process

    def __init__(
        self,
        context,
        batch,
        pairs,
        cache_gb,
        prefill: int,
        chunk: int,
        encode: int,
        repeats: int,
        seconds: float,
        box: float,
        limit: int | None,
        batch_size: int = 1,
        seed: int = 0,
        compile: str | None = None,
    ):
        listed = lambda x: x if isinstance(x, list) else [x]  # noqa: E731
        self.pairs = [tuple(pair) for pair in pairs] if pairs else list(itertools.product(listed(batch), listed(context)))
        whole = lambda x, least: isinstance(x, int) and not isinstance(x, bool) and x >= least  # noqa: E731
        for name, number, least in (("prefill", prefill, 0), ("chunk", chunk, 2), ("encode", encode, 1), ("repeats", repeats, 3), ("limit", limit or 1, 1)):
            if not whole(number, least):
                raise Refusal(f"task.{name}={number} must be a whole number of at least {least}.")
        for pair in self.pairs:
            rows, tokens = pair if len(pair) == 2 else (None, None)
            if not whole(tokens, 2) or not (whole(rows, 1) or rows is None and cache_gb):
                raise Refusal(f"task.pairs holds {list(pair)}: give [batch, tokens] as whole numbers, or batch null with task.cache_gb.")
        self.pairs, self.cache_gb, self.prefill, self.chunk, self.encode = self.pairs[:limit], cache_gb, prefill, chunk, encode
        if compile is not None and compile not in MODES:
            raise Refusal(f"task.compile={compile} is not one of {', '.join(MODES)}.")
        self.repeats, self.seconds, self.box, self.compile, self.compiled = repeats, seconds, box, compile, None

    def examples(self, lm) -> list[Example]:
        """Payload (batch, tokens, batch of fp16)."""
        lm.options["memo"] = False  # a decoded copy would be neither read nor counted
        cuda, fused = lm.device.type == "cuda", lm.options["attention"] == "fused"
        if self.compile and not fused:
            raise Refusal("task.compile is for steps whose attention reads codes; use attention=fused, or task=latency.")
        if cuda and not fused:
            report.say("Codes are decoded and then attended to, call by call; attention=fused times the kernels.")
        how = f"{'graph' if cuda and fused else 'eager'} {('kernels' if cuda else 'emulated') if fused else 'reference'}{' compiled' if self.compile else ''}"
        found = []
        for rows, tokens in self.pairs:
            ours, theirs = (rows, rows) if rows else self._rows(lm, tokens)
            found.append(Example(f"{rows}/{tokens}", f"{f'b{rows}' if rows else f'{self.cache_gb:g}GB'} t{tokens} {how}", (ours, tokens, theirs)))
        return found

    def _rows(self, lm, tokens: int) -> tuple[int, int]:
        """Rows of `tokens` tokens that cache_gb holds, codebooks taken off: (coded, fp16)."""
        sizes = [heads * dim for heads, dim in coded_shapes(lm.model.config).values()]
        coded = sum(size * codec.bits / 8 for pair in lm.codecs for size, codec in zip(sizes, pair) if codec is not None)
        plain = 2 * sum(sizes) * len(lm.codecs)
        ours, theirs = int((self.cache_gb * 1e9 - lm.table_bytes) / (coded * tokens)), int(self.cache_gb * 1e9 / (plain * tokens))
        if min(ours, theirs) < 1:
            raise Refusal(f"task.cache_gb={self.cache_gb:g} does not hold one sequence of {tokens} tokens ({plain * tokens / 1e9:.2f} GB at 16 bits); raise it.")
        return ours, theirs

    @torch.inference_mode()
    def run(self, lm, examples: list[Example]) -> Iterator[Record]:
        begun = time.monotonic()
        rate = timing.bandwidth(lm.device) if examples else 0.0
        self.compiled = Step(lm.model, self.compile) if self.compile else None
        for example in examples:
            rows, tokens, plain_rows = example.payload
            shape = {"shape/batch": float(rows), "shape/tokens": float(tokens), "shape/fp16_batch": float(plain_rows), "rate/copy_gb_per_s": rate / 1e9}
            metrics, reasons = {}, {}
            parts = self._parts(lm, rows, tokens, plain_rows, rate)
            if time.monotonic() - begun > self.box:
                parts = {"step": self._late}
            for name, part in parts.items():
                try:
                    _free(lm)
                    metrics |= part()
                except Exception as error:  # whatever ends one part is its result; the others go on
                    reasons[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
                    metrics[f"failed/{name}"] = 1.0
                    report.say(f"{example.subset}: {name} failed: {reasons[name]}")
            metrics |= shape | (self.compiled.account() if self.compiled else {})
            fastest = min((metrics[f"fp16_{name}_ms"] / plain_rows for name in _backends(lm) if f"fp16_{name}_ms" in metrics), default=None)
            if fastest and "step_ms" in metrics:
                metrics["speedup"] = fastest * rows / metrics["step_ms"]
            yield {"id": example.id, "subset": example.subset, "metrics": metrics, "reasons": reasons}

    def derived(self, records: list[dict]) -> list[dict]:
        """break_even_tokens per batch, at the first length from which all are faster: linear between the measured lengths around it.

        Where the shortest is already faster it is a bound; no row means never.
        """
        lines: dict[str, list[tuple[float, float, str]]] = {}
        for record in records:
            batch, m = record["subset"].split()[0], record["metrics"]
            if batch.startswith("b") and "speedup" in m:
                lines.setdefault(batch, []).append((m["shape/tokens"], m["step_ms"] * (m["speedup"] - 1), record["subset"]))
        rows = []
        for points in map(sorted, lines.values()):
            at = next((i for i in range(len(points)) if all(gain > 0 for _, gain, _ in points[i:])), None)
            if at is not None:
                tokens, gain, subset = points[at]
                if at:
                    before, loss, _ = points[at - 1]
                    tokens = before + (tokens - before) * loss / (loss - gain)
                rows.append({"subset": subset, "metric": "shape/break_even_tokens", "value": tokens, "stderr": 0.0, "n": len(points)})
        return rows

    def _late(self) -> dict:
        raise Refusal(f"not begun: task.box={self.box:g} seconds were over.")

    def _parts(self, lm, rows: int, tokens: int, plain_rows: int, rate: float) -> dict[str, Callable[[], dict]]:
        parts = {"step": lambda: self._step(lm, rows, tokens, rate)}
        parts |= {f"fp16_{name}": lambda name=name: self._plain(lm, name, plain_rows, tokens) for name in _backends(lm)}
        if rows == 1 and not self.compile:
            parts["encode"] = lambda: self._encode(lm, min(tokens, self.encode))
        if rows == 1 and tokens <= self.prefill and not self.compile:
            prompt = fill.random_ids(lm, 1, tokens)
            parts["prefill"] = lambda: self._prefill(lm, "prefill", lambda: fill.fresh(lm), prompt.split(no_single(self.chunk, prompt.shape[1]), 1), None)
            for name in _backends(lm):
                make = lambda: DynamicCache(config=lm.model.config)
                parts[f"fp16_{name}_prefill"] = lambda name=name: self._prefill(lm, f"fp16_{name}_prefill", make, (prompt,), name)
        return parts

    def _step(self, lm, rows: int, tokens: int, rate: float) -> dict[str, float]:
        cache, ids = fill.coded(lm, rows, tokens), fill.random_ids(lm, rows, 1)
        held = cache.audit()
        for name, amount in {**held, "table_bytes": lm.table_bytes * rows}.items():
            lm.book(name, amount)
        found = {}
        if lm.options["attention"] == "fused":
            found["check/difference"] = distance.checked(distance.of_kernels(lm, cache), "the kernels' attention differs from its definition")
            decoder = Decoder(lm.model, cache, ids, steps=1, still=True)
            found |= self._compile(decoder, "step")
            times, peak = self._decode(decoder)
        else:
            positions = lambda: torch.full_like(ids, cache.get_seq_length())  # noqa: E731
            times, peak = self._clock(lm, lambda: lm.model(ids, position_ids=positions(), past_key_values=cache, use_cache=True)), 0
        size = held["code_bytes"] + held["exact_bytes"] + lm.table_bytes
        weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
        embedding, head = lm.model.get_input_embeddings().weight, lm.model.get_output_embeddings().weight
        read = weights + size - (0 if head is embedding else embedding.numel() * embedding.element_size())
        seconds = times.median / 1e3
        found |= {
            **_series("step_ms", times), "tokens_per_second": rows / seconds, "bytes/read": read, "rate/gb_per_s": read / seconds / 1e9,
            "rate/of_roofline": read / rate / seconds, "bytes/weights": weights, "bytes/cache": size,
        }  # fmt: skip
        return found | ({"bytes/peak": peak, "bytes/transient": peak - weights - size} if peak else {})

    def _plain(self, lm, name: str, rows: int, tokens: int) -> dict[str, float]:
        decoder = Decoder(lm.model, fill.exact(lm.model, rows, tokens), fill.random_ids(lm, rows, 1), steps=1, still=True)
        with _only(name):
            found = self._compile(decoder, f"fp16_{name}")
            times, peak = self._decode(decoder, graph=lm.options["attention"] == "fused")
        return found | {**_series(f"fp16_{name}_ms", times), f"fp16_{name}_tokens_per_second": rows / times.median * 1e3} | ({f"bytes/fp16_{name}_peak": peak} if peak else {})

    def _compile(self, decoder: Decoder, side: str) -> dict[str, float]:
        """Let the compiled step take over, if there is one."""
        if self.compiled is None:
            return {}
        return {f"check/{side}_compiled": distance.of_compiled(decoder, self.compiled)}

    def _decode(self, decoder: Decoder, graph: bool = True) -> tuple[timing.Spread, int]:
        """(times of a step, peak bytes from the filled cache on); as a graph on a GPU."""
        cuda = decoder.ids.is_cuda
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        if cuda and graph:
            ids = decoder.ids.clone()
            eager = decoder.step().float()
            decoder.ids.copy_(ids)
            decoder.capture()
            distance.checked(distance.relative(decoder.step(), eager), "the graph's logits differ from those of the same step call by call")
        times = timing.clock(decoder.step, decoder.ids.device, self.repeats, self.seconds)
        return times, torch.cuda.max_memory_allocated() if cuda else 0

    def _clock(self, lm, call: Callable[[], object]) -> timing.Spread:
        return timing.clock(call, lm.device, self.repeats, self.seconds)

    def _encode(self, lm, tokens: int) -> dict[str, float]:
        cache = fill.fresh(lm)
        lm.model(fill.random_ids(lm, 1, 32), past_key_values=cache, use_cache=True, logits_to_keep=1)
        shapes = list(coded_shapes(lm.model.config).values())
        xs = [torch.randn(1, heads, tokens, dim, device=lm.device, dtype=lm.model.dtype) for heads, dim in shapes]

        def append() -> None:
            for layer in cache.quantized_layers:
                for stream, x in zip(layer.streams, xs):
                    stream.append(x, stream.length + torch.arange(tokens, device=lm.device)[None] if stream.turns else None)

        times = self._clock(lm, append)
        return {
            "encode_tokens_per_second": tokens / times.median * 1e3,
            "encode_tokens_per_second/p5": tokens / times.p95 * 1e3,
            "encode_tokens_per_second/p95": tokens / times.p5 * 1e3,
        }

    def _prefill(self, lm, metric: str, make: Callable[[], object], pieces: tuple[torch.Tensor, ...], backend: str | None) -> dict[str, float]:
        """Whole prompts, three if there is time; raises Refusal, with how far it came, where one takes longer than `seconds`."""
        total, times = sum(piece.shape[1] for piece in pieces), []
        with _only(backend):
            lm.model(pieces[0][:, : fill.READ], past_key_values=make(), use_cache=True, logits_to_keep=1)
            while not times or len(times) < 3 and sum(times) + times[-1] < 1e3 * self.seconds:
                cache, done, start = make(), 0, _now(lm)
                for piece in pieces:
                    if 1e3 * self.seconds < _now(lm) - start:
                        raise Refusal(f"after {(_now(lm) - start) / 1e3:.0f} s {done} of {total} tokens were read; raise task.seconds or lower task.prefill.")
                    lm.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    done += piece.shape[1]
                times.append(_now(lm) - start)
        found = timing.spread(times)
        return {**_series(f"{metric}_ms", found), f"{metric}_tokens_per_second": total / found.median * 1e3, "shape/prefill_tokens": float(total)}


def _backends(lm) -> list[str]:
    return list(BACKENDS) if lm.device.type == "cuda" else ["sdpa"]


def _only(backend: str | None):
    return sdpa_kernel(BACKENDS[backend]) if backend in BACKENDS else contextlib.nullcontext()


def _series(name: str, times: timing.Spread) -> dict[str, float]:
    return {name: times.median, f"{name}/p5": times.p5, f"{name}/p95": times.p95}


def _free(lm) -> None:
    gc.collect()
    if lm.device.type == "cuda":
        torch.cuda.empty_cache()


def _now(lm) -> float:
    """Milliseconds, the device's work done."""
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
    return 1e3 * time.perf_counter()
