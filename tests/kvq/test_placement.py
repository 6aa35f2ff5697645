"""A model over several devices: codecs go where their layers compute; device_map=auto passes through to the library."""

import pandas as pd
import torch
from torch import nn

from kvq import models
from kvq.placement import layer_devices
from tests.kvq.test_runner import cell, comparable  # noqa: F401  fixture


class Layered(nn.Module):
    """Three layers on two devices; the last is kept on the meta device and computes elsewhere, as accelerate's offloading does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, device="meta")])
        self.layers[2]._hf_hook = type("Hook", (), {"execution_device": 1})()


def test_each_layer_has_its_own_device():
    assert [str(d) for d in layer_devices(Layered())] == ["cpu", "meta", "cuda:1"]


def test_a_placed_model_gives_the_same_rows(cell, tmp_path):  # noqa: F811
    from kvq import tiny

    for part in tiny.load("llama", "float32", "cpu"):
        part.save_pretrained(tmp_path / "model")
    words = ["model=local", f"model.path={tmp_path}/model", "model.device=cpu", "quant=gsrq", "bits=1", "quant.key.cluster.rounds=1", "quant.value.cluster.rounds=1"]
    words += ["task.batch_size=2", "calib.batch_size=1"]
    plain = cell(*words, home="plain")
    models._load.cache_clear()
    placed = cell(*words, "model.device_map=auto", home="placed")
    model = models._load(str(tmp_path / "model"), None, "float32", "cpu", "auto", "{}")[0]
    assert models._load.cache_info().misses == 1 and layer_devices(model) == [torch.device("cpu")] * 2
    drop = ["config"]
    pd.testing.assert_frame_equal(comparable(plain).drop(columns=drop), comparable(placed).drop(columns=drop))
    models._load.cache_clear()
