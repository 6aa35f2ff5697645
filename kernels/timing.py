"""Times of calls: replays of a CUDA graph or plain calls timed by events, calls on a CPU by the clock; always a median with 5 % and 95 %."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Spread(NamedTuple):
    """Milliseconds of `count` calls."""

    median: float
    p5: float
    p95: float
    count: int


def spread(times: list[float]) -> Spread:
    """The spread of some milliseconds."""
    found = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.05, 0.95], dtype=torch.float64))
    return Spread(*found.tolist(), len(times))


def clock(call: Callable[[], object], device: torch.device, repeats: int = 30, seconds: float = 10.0) -> Spread:
    """Up to `repeats` calls after one that is not counted, at least 3, fewer where they would take longer than `seconds`."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
    once = time.perf_counter() - start
    count = max(3, min(repeats, int(seconds / max(once, 1e-9))))
    return spread((_events if device.type == "cuda" else _wall)(call, count))


def _wall(call: Callable[[], object], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _events(call: Callable[[], object], count: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def capture(call: Callable[[], object], warm: int = 1) -> tuple[torch.cuda.CUDAGraph, object]:
    """(graph of one call, what the call returned); `warm` calls before it on the capturing stream compile and allocate."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        result = call()
    return graph, result


def measure(call: Callable[[int], None], sets: int, replays: int = 30) -> tuple[float, float, float]:
    """(median, 5 %, 95 %) microseconds of call(i), i < sets, inside one graph, the sets being read in turn so that none stays in the cache."""
    graph, _ = capture(lambda: [call(i) for i in range(sets)])
    for _ in range(3):
        graph.replay()
    found = spread(_events(graph.replay, replays))
    return tuple(1e3 * t / sets for t in found[:3])


def bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes per second of a large copy, read and written bytes counted: the ceiling that a roofline is drawn at."""
    source = torch.ones(size or (2**31 if device.type == "cuda" else 2**26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * clock(lambda: target.copy_(source), device, 10, 2.0).median)
