"""One step of a whole model as one compiled graph, the same for every cache: everything but attention fused by torch.compile.

Keys, values and queries of a layer leave the graph through one operation, `kvq::attend`, which the compiler cannot look into; the decoder that
is stepping appends and attends there as it does without a compiler. So coded and exact caches run the same compiled code around it. Breaks of
the graph and further compilations beyond one per batch are errors: nothing falls back to single calls in silence.
"""

import time

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import metrics
from transformers import Cache

from kvq.layer import Handle, QuantizedLayer

MODES = ("default", "max-autotune-no-cudagraphs")
"""Of torch.compile; those that capture graphs of their own are not among them, a decoder does."""

_stepping: list = []
"""Layers of the decoder that is stepping: what `kvq::attend` reads and writes behind the compiler's back."""


@torch.library.custom_op("kvq::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float) -> Tensor:
    """Append key and value [B, H, 1, D] to the layer and attend with query [B, Hq, 1, D]; [B, 1, Hq, Dv], contiguous."""
    held = _stepping[layer]
    held.append(key, value)
    return held.decode(query, None, scale).contiguous()


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])


class _Traced:
    """New keys and values of one layer on their way to `kvq::attend`, where `kvq.cache.attention` expects a layer that reads codes."""

    def __init__(self, index: int, key: Tensor, value: Tensor):
        self.index, self.key, self.value = index, key, value

    def reads_codes(self, query: Tensor) -> bool:
        return True

    def decode(self, query: Tensor, position_ids: Tensor | None, scale: float) -> Tensor:
        if not torch.compiler.is_compiling():
            raise RuntimeError("A step that was to run compiled ran call by call: torch.compile is switched off in this process.")
        return torch.ops.kvq.attend(query, self.key, self.value, self.index, scale)


class _Slot(QuantizedLayer):
    """Where the model finds a layer's cache while it is traced. Holds nothing, so every decoder's steps are the same graph."""

    def __init__(self, index: int):
        self.index, self.is_initialized = index, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        held = _Traced(self.index, key_states, value_states)
        return Handle(held), Handle(held)

    def get_seq_length(self) -> int:
        return 1  # only sizes a mask that no kernel reads

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return 1, 0


class Step:
    """step(layers, ids, mask, positions) of a model: logits [B, V]. One graph per batch size, made by its first step.

    graphs, kernels: compiled so far, kernels as the compiler counts those that it wrote (products are not); seconds: what that took.
    """

    def __init__(self, model, mode: str = "default"):
        """mode: one of MODES."""
        torch._dynamo.reset()  # so that the compiler's limit counts the batches of this step alone
        cache = Cache(layers=[_Slot(index) for index in range(model.config.get_text_config(decoder=True).num_hidden_layers)])

        def step(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
            return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits[:, -1]

        self.compiled = torch.compile(step, fullgraph=True, dynamic=False, mode=mode)
        self.batches: set[int] = set()
        self.graphs = self.kernels = 0
        self.seconds = 0.0

    def account(self) -> dict[str, float]:
        """What was compiled so far, as metrics of task=latency."""
        return {"compiled/graphs": float(self.graphs), "compiled/kernels": float(self.kernels), "compiled/seconds": self.seconds}

    def __call__(self, layers: list, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        _stepping[:] = layers
        try:
            return self._run(ids, mask, positions)
        finally:
            _stepping.clear()

    def _run(self, *inputs: Tensor) -> Tensor:
        if (batch := len(inputs[0])) in self.batches:
            with torch._dynamo.config.patch(error_on_recompile=True):
                return self.compiled(*inputs)
        graphs, kernels, start = counters["stats"]["unique_graphs"], metrics.generated_kernel_count, time.perf_counter()
        logits = self.compiled(*inputs)
        self.seconds += time.perf_counter() - start
        self.graphs += counters["stats"]["unique_graphs"] - graphs
        self.kernels += metrics.generated_kernel_count - kernels
        self.batches.add(batch)
        return logits
