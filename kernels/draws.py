"""Random choices: indices drawn in proportion to a mass, and uniform numbers drawn by another thread before they are needed.

Two million numbers of a start are 13 ms of one CPU core; they are drawn while the rounds of the clustering before it run on a GPU.
The numbers are those that the generator would have given. What is drawn ahead supposes how many draws come in between; if there were
others, the generator is in another state, and its numbers are drawn when they are asked for.
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn.functional import pad

RUN = 256  # masses added side by side on a CPU before one running sum over all

_threads = ThreadPoolExecutor(4, thread_name_prefix="draws")
_ahead: dict[torch.Generator, Future] = {}
_lock = threading.Lock()
KEPT = 16  # generators whose numbers wait; what nobody asks for is dropped for newer ones (torch 2.11 has no weak references to generators)


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """`torch.rand(shape, generator=generator)`, float32 on the CPU; from what `draw_ahead` drew where the generator is in the state supposed there."""
    with _lock:
        future = _ahead.pop(generator, None)
    if future is not None:
        before, numbers, after = future.result()
        if numbers.shape == shape and torch.equal(before, generator.get_state()):
            generator.set_state(after)
            return numbers
    return torch.rand(shape, generator=generator)


def draw_ahead(shape: tuple[int, ...], generator: torch.Generator, between: list[tuple[int, ...]]) -> None:
    """Draw what `drawn(shape, generator)` will return after draws of the shapes `between` from the same CPU generator."""
    future = _threads.submit(_draw, shape, generator.get_state(), between)
    with _lock:
        _ahead[generator] = future
        while len(_ahead) > KEPT:
            del _ahead[next(iter(_ahead))]


def by_mass(mass: Tensor, uniform: Tensor) -> Tensor:
    """Indices [G, K] int64 into mass [G, N], each in proportion to it, for uniform numbers [G, K] of [0, 1).

    Inverse transform sampling in float64: a float32 running sum over 10^5 vectors would lose the small ones.
    """
    if mass.is_cuda:
        steps = mass.double().cumsum(-1)
        return torch.searchsorted(steps, uniform.double() * steps[:, -1:], right=True).clamp_max(mass.shape[1] - 1)
    # A run of vectors first, then one of its members: a CPU takes the additions of a running sum over all one after the other.
    runs = pad(mass, (0, -mass.shape[1] % RUN)).unflatten(1, (-1, RUN))
    steps = runs.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform.double() * steps[:, -1:]
    run = torch.searchsorted(steps, target, right=True).clamp_max(steps.shape[1] - 1)
    before = torch.where(run > 0, steps.gather(1, (run - 1).clamp_min(0)), 0.0)
    inside = runs.gather(1, run[..., None].expand(-1, -1, RUN)).double().cumsum(-1)
    place = torch.searchsorted(inside, (target - before)[..., None], right=True)[..., 0].clamp_max(RUN - 1)
    return (run * RUN + place).clamp_max(mass.shape[1] - 1)


def _draw(shape: tuple[int, ...], state: Tensor, between: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    own = torch.Generator().set_state(state)
    for size in between:
        torch.rand(size, generator=own)
    before = own.get_state()
    return before, torch.rand(shape, generator=own), own.get_state()
