"""Whether Triton serves a tensor, and how many programs fill the device."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
ASM = not INTERPRET  # the interpreter knows no inline assembly; kernels have the same in plain Triton
STAGES = 1
AHEAD = 3  # stages of the loop over key tiles: with two Triton starts a tile's copy right before it waits for it
VALUE_AHEAD = 3  # the same of value tiles
VTILE = 16  # value channels decoded at a time
KEY_UNROLL = 2  # key tiles in a row, where all are of one width
UNROLL = 2  # such steps in a row
LIMIT = {"maxnreg": 255}
EARLY = 256  # most splits of decode attention whose kernels start before the kernel ahead of them ends (programmatic dependent launch)
WARPS = 8  # single-warp programs that fit a multiprocessor at once (registers and shared memory)


def use_triton(x: Tensor) -> bool:
    """CUDA tensors, and any tensor under TRITON_INTERPRET=1."""
    return (x.is_cuda or INTERPRET) and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def programs(device: torch.device) -> int:
    """Single-warp programs that run at once."""
    return WARPS * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def early(x: Tensor, splits: int) -> bool:
    """Whether the kernels of decode attention in so many splits wait themselves for the one ahead: few splits, compute capability 9.0 or more."""
    return splits <= EARLY and x.is_cuda and not INTERPRET and torch.cuda.get_device_capability(x.device) >= (9, 0)
