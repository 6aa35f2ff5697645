"""The training network is transformers' Llama, and its export loads as one."""

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kvq.standin.muon import orthogonal
from kvq.standin.net import Net, config

TINY = {"hidden": 32, "layers": 2, "inner": 48}


def test_same_logits_as_transformers(tmp_path):
    torch.manual_seed(0)
    net = Net(config(vocabulary=64, **TINY), compiled=False)
    ids = torch.randint(64, (2, 17))
    net.save(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    net.load(tmp_path)
    expected = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(net(ids, torch.ones_like(ids, dtype=torch.float32)), expected, rtol=1e-5, atol=1e-5)


def test_weights_choose_the_targets(tmp_path):
    torch.manual_seed(0)
    net = Net(config(vocabulary=64, **TINY), compiled=False)
    ids, weights = torch.randint(64, (1, 9)), torch.zeros(1, 9)
    weights[0, 4] = 3.0
    net.save(tmp_path)
    net.load(tmp_path)
    logits = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids[:, :-1]).logits
    torch.testing.assert_close(net(ids, weights), -logits.log_softmax(-1)[0, 3, ids[0, 4]], rtol=1e-5, atol=1e-5)


def test_orthogonal_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 8, 24), (2, 24, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape), steps=8).float())
        assert values.min() > 0.5 and values.max() < 1.4
