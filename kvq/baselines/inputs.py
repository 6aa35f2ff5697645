"""What every baseline refuses before it codes: tensors of the wrong shape, ragged blocks, values that are not finite."""

import torch
from torch import Tensor


def accept(x: Tensor, shape: Tensor | None, block: int = 1) -> Tensor:
    """Return x [B, H, T, D] as float32 once it fits a codec fitted for `shape` = [H, D].

    Raises RuntimeError if the codec has not been fitted or restored, and ValueError if the rank, the heads or the head
    dimension differ, if T is not a multiple of `block`, or if a value is NaN or infinite (naming the first such place).
    """
    heads, dim = fitted(shape)
    if x.dim() != 4 or x.shape[1] != heads or x.shape[3] != dim:
        raise ValueError(f"Expected a tensor [batch, {heads}, tokens, {dim}], got {list(x.shape)}.")
    if x.shape[2] % block:
        raise ValueError(f"{x.shape[2]} tokens are not a multiple of the block of {block} tokens.")
    return finite(x)


def finite(x: Tensor) -> Tensor:
    """Return x as float32. Raises ValueError naming the first NaN or infinity and its index."""
    ok = x.isfinite()
    if not ok.all():
        place = (~ok).nonzero()[0].tolist()
        kind = "NaN" if x[tuple(place)].isnan() else "infinite"
        raise ValueError(f"The value to code at index {place} is {kind} ({int((~ok).sum())} of {x.numel()} values are not finite).")
    return x.float()


def fitted(shape: Tensor | None) -> tuple[int, int]:
    """Return (heads, head dimension) from the buffer set by fit. Raises RuntimeError while it is None."""
    if shape is None:
        raise RuntimeError("This codec has no calibration: call fit, or set the buffers of a fitted codec.")
    heads, dim = shape.tolist()
    return heads, dim


def sizes(x: Tensor) -> Tensor:
    """Return the buffer [H, D] (int32) for calibration vectors x [H, N, D]."""
    return torch.tensor([x.shape[0], x.shape[2]], dtype=torch.int32, device=x.device)


def half(x: Tensor, what: str) -> Tensor:
    """Return x as float16. Raises ValueError naming `what` if a value leaves the float16 range."""
    stored = x.to(torch.float16)
    if not stored.isfinite().all():
        raise ValueError(f"{what} reaches {float(x.abs().max()):.4g}, beyond the float16 range of 65504 in which it is stored.")
    return stored
