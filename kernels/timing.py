"""Time of one call inside a CUDA graph, cold in L2: the call is captured once per input set, replays are timed by events."""

from collections.abc import Callable

import torch


def measure(call: Callable[[int], None], sets: int, replays: int = 30) -> tuple[float, float, float]:
    """(median, 5 %, 95 %) microseconds of call(i), i < sets, the sets being read in turn so that none stays in the cache."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for i in range(sets):
            call(i)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            call(i)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays + 3)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = torch.tensor([1e3 * start.elapsed_time(end) / sets for start, end in events[3:]], dtype=torch.float64)
    return tuple(times.quantile(torch.tensor([0.5, 0.05, 0.95], dtype=torch.float64)).tolist())
