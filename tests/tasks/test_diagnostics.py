"""The diagnostics on tiny models: identities that hold for any codec, and every architecture."""

import math

import pytest
import torch

from blockgtq import BlockGTQ, TurboQuantMSE, allocate
from blockgtq.diagnose import attention_kl_topk, compare_widths, logit_mae, summarize_widths
from blockgtq.energy import block_energy, score_blocks
from gsrq import GSRQ
from gsrq.weights import log_weights
from kvq import calibrate, tiny
from kvq.baselines.fp16 import FP16
from kvq.errors import Refusal
from kvq.models import LM
from kvq.record import record
from kvq.tasks.allocation import Allocation
from kvq.tasks.attention import Attention
from kvq.tasks.gradients import Gradients
from kvq.tasks.logit_mae import LogitMAE
from kvq.tasks.reconstruction import Reconstruction

TEXT = {"data": "standin:heldout", "limit": None, "subsets": None, "batch_size": 1}
WIDTHS = {"scores": score_blocks, "energies": block_energy, "allocate": allocate, "compare": compare_widths, "summary": summarize_widths, "score": "qk_avg"}
MAKE = {
    "fp16": lambda: FP16(16, seed=0), "tq": lambda: TurboQuantMSE(3, seed=0), "gsrq": lambda: GSRQ(1, piece=16, entries=16, seed=0), "blockgtq": lambda: BlockGTQ(3, seed=0),
}  # fmt: skip


def bound(key, value="fp16", architecture="llama", source="standin:heldout"):
    model, tokenizer = tiny.load(architecture, "float32", "cpu")
    samples = calibrate.windows(tokenizer, source, 1, 256)
    return LM(model, tokenizer, "tiny", calibrate.fit(model, samples, MAKE[key], MAKE[value], seed=0, memory_gb=1))


def records(task, lm):
    found = list(task.run(lm, task.examples(lm)))
    assert [r["id"] for r in found] and {r["id"] for r in found} == {e.id for e in task.examples(lm)} and lm.usage()["encoded"] > 0
    return {r["id"]: r["metrics"] | {k: v for k, v in r.items() if k != "metrics"} for r in found}


def test_exact_keys_move_nothing_and_coarser_keys_move_more():
    error = LogitMAE(logit_mae, offsets=5, reach=32, context=64, samples=2, **TEXT)
    attention = Attention(attention_kl_topk, queries=32, top=4, context=64, samples=2, **TEXT)
    exact, coded = ((records(error, lm), records(attention, lm)) for lm in (bound("fp16"), bound("tq")))
    for name in exact[0]:
        assert exact[0][name]["logit_mae"] < 0.02 * coded[0][name]["logit_mae"]
        assert exact[1][name]["kl"] < 0.01 * coded[1][name]["kl"] and exact[1][name]["top10"] >= coded[1][name]["top10"]


def test_windows_are_averaged():
    lm = bound("tq")
    one, two, both = (
        records(Attention(attention_kl_topk, queries=16, top=4, context=64, samples=n, offset=o, **TEXT), lm)["0/0"]["kl"] for n, o in ((1, 0), (1, 64), (2, 0))
    )
    assert both == pytest.approx((one + two) / 2)


def test_stages_account_for_the_whole_error():
    train = {"source": "standin:heldout", "offset": 0, "samples": 1, "length": 256}
    found = records(Reconstruction(train, context=256, samples=1, **TEXT), bound("gsrq", "gsrq"))
    for metrics in found.values():
        stages = max(int(k.split("/")[1]) for k in metrics if k.startswith("mse/"))
        assert stages == 4 and metrics[f"mse/{stages}"] == pytest.approx(metrics["relative"], rel=1e-3)
        for stage in range(2, stages + 1):
            assert metrics[f"captured/{stage}"] == pytest.approx(1 - metrics[f"mse/{stage}"] / metrics[f"mse/{stage - 1}"], rel=1e-3, abs=1e-5)
        assert 0 < metrics["entropy/1"] <= 4 and -1 <= metrics["cosine/1"] <= 1
    assert found["0/key train"]["relative"] == pytest.approx(found["0/key heldout"]["relative"])  # the same text here


def test_too_much_text_for_the_calibration_is_refused():
    with pytest.raises(Refusal, match="more than the 128 tokens calibrated on"):
        Reconstruction({"source": "x", "offset": 0, "samples": 1, "length": 128}, context=128, samples=2, **TEXT)


def test_log_weights_of_the_recorded_norms():
    found = records(Gradients(log_weights, 1.0, None, context=128, samples=1, **TEXT), bound("tq", "tq"))
    assert set(found) == {"0/key", "0/value", "1/key", "1/value"}
    for metrics in found.values():
        assert metrics["log/1"] == pytest.approx(math.log1p(metrics["raw/1"]) / math.log(2), rel=1e-3)
        assert 0 < metrics["error_log"] < 1 and metrics["raw/0.5"] == pytest.approx(1, rel=0.1)


def test_the_reference_allocation_is_its_own():
    text = {**TEXT, "context": 256, "samples": 1}
    own, uniform = (records(Allocation(**WIDTHS, **text), bound(name, architecture="qwen25")) for name in ("blockgtq", "tq"))
    for metrics in own.values():
        assert metrics["hamming"] == 0 and metrics["regret"] == pytest.approx(0, abs=1e-9) and metrics["high_jaccard"] == 1
        assert sum(metrics[f"width/{b}"] for b in range(1, 9)) == pytest.approx(1)
    for metrics in uniform.values():
        assert metrics["regret"] > 0 and metrics["entropy"] == 0 and metrics["groups"] == 1 and metrics["width/4"] == 1  # 3 bits and a norm per 16 channels


@pytest.mark.parametrize("architecture", ["llama31", "qwen3", "glm4", "gemma3", "deepseek_v2"])
def test_every_architecture(architecture):
    latent = architecture == "deepseek_v2"
    lm = bound("tq", "tq", architecture)
    text = {**TEXT, "context": 64, "samples": 1}
    tasks = [LogitMAE(logit_mae, offsets=3, reach=16, **text), Attention(attention_kl_topk, queries=16, top=4, **text), Reconstruction(None, **text), Allocation(**WIDTHS, **text)]
    for task in tasks if latent else [*tasks, Gradients(log_weights, 1.0, None, **text)]:
        assert all(math.isfinite(r[task.metric]) for r in records(task, lm).values())


def test_layers_that_are_not_asked_for_are_not_kept():
    model, tokenizer = tiny.load("llama", "float32", "cpu")
    slots = next(record(model, calibrate.windows(tokenizer, "standin:heldout", 1, 32), range(1, 2), [(None, None)] * 2, None))
    assert [slot.index for slot in slots] == [1] and slots[0].seen[0].shape[2] == 32


def test_width_distances_by_definition():
    widths, reference, scores = torch.tensor([[1, 4, 4, 3]]), torch.tensor([[1, 5, 3, 3]]), torch.tensor([[1.0, 9.0, 2.0, 3.0]])
    found = compare_widths(widths, reference, scores)
    best = sum(s * 4.0**-b for s, b in zip(scores[0].tolist(), reference[0].tolist()))
    assert found["hamming"] == 0.5 and found["high_jaccard"] == 0.5
    assert found["regret"] == pytest.approx(sum(s * 4.0**-b for s, b in zip(scores[0].tolist(), widths[0].tolist())) / best - 1)
    assert summarize_widths(torch.tensor([[1, 1, 2, 2]])) == {"entropy": 1.0, "groups": 2.0, **{f"width/{b}": 0.5 if b < 3 else 0.0 for b in range(1, 9)}}
