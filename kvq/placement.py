"""Where a model's layers are: one device, or several under model.device_map=auto (accelerate places the layers, we follow)."""

import torch
from torch import nn


def layer_devices(model: nn.Module) -> list[torch.device]:
    """The device on which each decoder layer computes, in order; a layer's codecs and cache tensors belong there.

    Layers that accelerate keeps on the CPU or disk compute on the device of its hook.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return [_device(layer) for layer in decoder.layers]


def _device(layer: nn.Module) -> torch.device:
    hook = getattr(layer, "_hf_hook", None)
    if getattr(hook, "execution_device", None) is not None:
        where = hook.execution_device
        return torch.device("cuda", where) if isinstance(where, int) else torch.device(where)
    return next(layer.parameters()).device
