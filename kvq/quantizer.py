"""The quantizer protocol: a lossy codec for one layer's keys or values, and the arithmetic of its bytes.

The protocol is structural. `gsrq`, `blockgtq` and `kvq.baselines` satisfy it without importing this file; `conf/quant/*.yaml` names them.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

Codes = dict[str, Tensor]
"""Packed codes: every leaf is [batch, heads or 1, n, ...] with n proportional to the tokens, so that appending, beam
reordering, moving and byte counting are tree maps and no method writes them."""


@runtime_checkable
class Quantizer(Protocol):
    """One layer's keys *or* values; in practice an nn.Module whose only state is buffers.

    bits        stored bits per value, side data included, codebooks excluded; equals the measured bytes exactly
    block       `encode` receives whole multiples of this many tokens
    space       "pre" or "post": keys are coded before or after RoPE
    grad_group  None, or the number of consecutive channels over which squared gradients are summed for `fit`

    `fit` is called once, by data-free methods as well (it tells them the shape). A codec with `stateful = True`
    receives `encode(x, state)` with a dict that lives as long as the stream. `check(heads, head_dim)`, where defined,
    raises ValueError before any work if the codec cannot serve that shape. `depends_on`, a subset of ("calib", "seed"), says what
    shapes a fitted codec beyond its options (both, if absent): a run is not repeated for a calibration that it does not use.
    A key codec whose codes a kernel can read offers `fuse(value codec)`, a :class:`Fused` or None. `encode_unchecked(x)`, where defined, is
    `encode` that reads nothing back to the host: what a graph of a decoding step can hold.
    """

    bits: float
    block: int
    space: str
    grad_group: int | None

    def fit(self, calibration: "Calibration") -> "Quantizer": ...

    def encode(self, x: Tensor) -> Codes:
        """[B, H, T, D] in any float dtype to packed codes; raises ValueError on NaN or Inf."""
        ...

    def decode(self, codes: Codes) -> Tensor:
        """Packed codes to float32 [B, H, T, D]."""
        ...


class Fused(Protocol):
    """Attention over the packed codes of one layer, for a pair of codecs that a kernel serves.

    `append(held, tokens, at, turn)`, where it is defined and not None, is what :func:`kernels.append.append` does, with leaves for held: both
    codecs' `encode_unchecked` of one new token, keys turned back first, written at token `at`.
    """

    def held(self, index: int):
        """Where the codes of keys (0) or values (1) are kept, with the members of `kvq.held.Held`; None for a plain one."""
        ...

    def attend(self, query: Tensor, key, value, tokens: int, *, scale: float, first: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """One query per row [B, Hq, D] (after RoPE) over the first `tokens` tokens held by `key` and `value`.

        first [B]: first visible token, or None for 0. positions [B, T] of the tokens, for keys coded before RoPE. Returns the output
        [B, Hq, D] and the log-sum-exp of the scaled scores [B, Hq], float32, as `kernels.attention.attend` defines them.
        """
        ...


@dataclass
class Calibration:
    """What one codec may learn from: activations of one layer's keys or values on the calibration text.

    x          [H, N, D] float32, in the codec's space, tokens in order, samples of `sample_length` tokens concatenated
    queries    [Hq, N, D] float32 in the same space, keys only; query head h reads KV head h // (Hq // H)
    grads      [N, H * D // grad_group] float32: squared gradient of the mean next-token loss, summed inside each group
    pairs      [L, 2] channels that RoPE rotates together, in frequency order; None for values
    inv_freq   [L] radians per token of each pair
    """

    x: Tensor
    kind: str
    layer: int
    seed: int
    positions: Tensor
    sample_length: int
    queries: Tensor | None = None
    grads: Tensor | None = None
    pairs: Tensor | None = None
    inv_freq: Tensor | None = None


def code_bytes(codes: Codes) -> int:
    """Bytes held by the leaves of `codes`."""
    return sum(leaf.numel() * leaf.element_size() for leaf in codes.values())


def table_bytes(codecs: list[nn.Module]) -> int:
    """Bytes of all buffers (codebooks, rotations, scales), a storage shared by several codecs counted once."""
    seen: dict[tuple, int] = {}
    for codec in codecs:
        for buffer in codec.buffers():
            seen[(str(buffer.device), buffer.untyped_storage().data_ptr())] = buffer.untyped_storage().nbytes()
    return sum(seen.values())


def set_buffers(codec: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Restore a fitted codec from its stored buffers, without `fit`. Raises ValueError if a name does not belong."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = dict(codec.named_modules()).get(path)
        if owner is None or leaf not in owner._buffers:
            raise ValueError(f"A stored calibration holds '{name}', which {type(codec).__name__} does not have.")
        owner.register_buffer(leaf, tensor)
    return codec


def select(codes: Codes, rows: Tensor) -> Codes:
    """Pick batch rows, for beam search and batch changes."""
    return {name: leaf.index_select(0, rows.to(leaf.device)) for name, leaf in codes.items()}
