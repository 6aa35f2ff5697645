"""One cell end to end, in process: stopped and resumed, repeated, and measured against one fp16 run."""

import json

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kvq import results, runner
from kvq.errors import Refusal
from kvq.tasks.perplexity import Perplexity
from tests.quants import ROOT

VARIES = ["date", "dirty", "commit"]


@pytest.fixture
def cell(tmp_path):
    """run(*overrides) computes one tiny cell; the folder is tmp_path/<home>."""

    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"{a} {b} river." for a in range(60) for b in ("stone", "lamp", "cloud")))

    def build(*overrides, home="x"):
        fixed = ["model=tiny", "task=perplexity", "task.limit=4", "task.context=48", "calib.samples=2", "calib.length=160"]
        fixed += [f"task.data={words}", f"calib.source={words}"]
        folders = [f"{name}={tmp_path}/{home}/{name}" for name in ("results", "outputs", "calibrations")]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", overrides=[*fixed, *folders, *overrides], return_hydra_config=True)
            choices = {k: cfg.hydra.runtime.choices[k] for k in ("model", "quant", "task", "calib")}
            OmegaConf.set_struct(cfg, False)
            cfg.pop("hydra")
        return cfg, choices

    def run(*overrides, home="x"):
        return runner.run(*build(*overrides, home=home))

    run.build = build
    return run


@pytest.fixture
def windows(monkeypatch):
    """The ids that were scored, in order; set windows.fail_after to stop in the middle."""

    class Windows(list):
        fail_after = None

    scored = Windows()
    real = Perplexity.run

    def spied(self, lm, examples):
        for record in real(self, lm, examples):
            if scored.fail_after is not None and len(scored) >= scored.fail_after:
                raise KeyboardInterrupt
            scored.append((lm is lm.reference or "fp16" in str(type(lm.codecs[0][0])).lower(), record["id"]))
            yield record

    monkeypatch.setattr(Perplexity, "run", spied)
    return scored


def comparable(frame):
    """Rows without what legitimately differs between two runs of the same cell: clocks, dates, folders and the state of the tree."""
    places = ("results", "outputs", "calibrations", "force")
    frame = frame[~frame.metric.str.contains("second")].drop(columns=VARIES).reset_index(drop=True)
    return frame.assign(config=[json.dumps({k: v for k, v in json.loads(c).items() if k not in places}, sort_keys=True) for c in frame.config])


def test_two_runs_of_one_cell_are_identical_apart_from_clocks(cell, windows):
    first, again = (comparable(cell("quant=gsrq", "bits=1", "quant.key.cluster.rounds=1", "quant.value.cluster.rounds=1", home=home)) for home in "ab")
    pd.testing.assert_frame_equal(first, again)
    assert len(first) > 4
    assert len(windows) == 16, "four windows, quantized and fp16, in two places"


def test_a_finished_cell_is_not_computed_again_unless_forced(cell, windows):
    first = cell("quant=int4")
    assert len(windows) == 8
    again = cell("quant=int4")
    assert len(windows) == 8
    pd.testing.assert_frame_equal(again, first, check_dtype=False)
    forced = cell("quant=int4", "force=true")
    assert len(windows) == 12, "force repeats the cell, not its reference"
    pd.testing.assert_frame_equal(comparable(forced), comparable(first))


def test_one_fp16_run_serves_every_quantizer(cell, windows):
    cell("quant=int4")
    cell("quant=int8")
    cell("quant=tq_mse", "bits=2", "seed=3")
    assert [fp16 for fp16, _ in windows].count(True) == 4 and len(windows) == 16
    frame = cell("quant=fp16")
    assert len(windows) == 16 and set(frame["quant"]) == {"fp16"}


@pytest.mark.parametrize("after", [0, 2, 6], ids=lambda n: f"after {n} windows")
def test_a_stopped_cell_goes_on_where_it_stopped(cell, windows, tmp_path, after):
    whole = cell("quant=int4", home="whole")
    del windows[:]
    windows.fail_after = after
    with pytest.raises(KeyboardInterrupt):
        cell("quant=int4", home="stopped")
    runs = tmp_path / "stopped" / "results" / "runs"
    assert len(list(runs.glob("*.parquet"))) == (1 if after >= 4 else 0)
    windows.fail_after = None
    resumed = cell("quant=int4", home="stopped")
    assert len(windows) == 8 and len(set(windows)) == 8, "no window twice"
    pd.testing.assert_frame_equal(comparable(resumed), comparable(whole))
    assert not list((tmp_path / "stopped" / "outputs").rglob("*.jsonl"))


def test_a_batch_cut_in_half_is_done_again_whole(cell, windows, tmp_path):
    """Its usage stands with its first record, so half of it cannot be computed alone."""
    whole = cell("quant=int4", home="whole")
    del windows[:]
    windows.fail_after = 7
    with pytest.raises(KeyboardInterrupt):
        cell("quant=int4", "task.batch_size=2", home="half")
    windows.fail_after = None
    resumed = cell("quant=int4", "task.batch_size=2", home="half")
    assert len(windows) == 7 + 2
    pd.testing.assert_frame_equal(comparable(resumed), comparable(whole))


def test_a_torn_line_is_done_again(cell, windows, tmp_path):
    whole = cell("quant=fp16", home="whole")
    del windows[:]
    windows.fail_after = 3
    with pytest.raises(KeyboardInterrupt):
        cell("quant=fp16", home="torn")
    partial = next((tmp_path / "torn" / "outputs").rglob("*.jsonl"))
    text = partial.read_text()
    partial.write_text(text[:-20])
    windows.fail_after = None
    resumed = cell("quant=fp16", home="torn")
    assert len(windows) == 5
    pd.testing.assert_frame_equal(comparable(resumed), comparable(whole))


def test_a_damaged_line_is_named(cell, windows, tmp_path):
    windows.fail_after = 3
    with pytest.raises(KeyboardInterrupt):
        cell("quant=fp16")
    partial = next((tmp_path / "x" / "outputs").rglob("*.jsonl"))
    partial.write_text("{broken\n" + partial.read_text())
    windows.fail_after = None
    with pytest.raises(Refusal, match="damaged line.*force=true"):
        cell("quant=fp16")
    cell("quant=fp16", "force=true")


def test_predictions_that_went_missing_are_named(cell, tmp_path):
    cell("quant=fp16")
    next((tmp_path / "x" / "results" / "runs").glob("*.jsonl")).unlink()
    with pytest.raises(Refusal, match="quant=fp16 force=true"):
        cell("quant=int4")


def test_rows_follow_the_schema_and_add_up(cell, tmp_path):
    frame = cell("quant=int4", "quant.window=8")
    assert list(frame.columns) == list(results.COLUMNS) and frame.run.nunique() == 1
    row = frame.iloc[0]
    assert row.bits == 4 and row.bits_stored == 4 + 2 * 16 / 16 and row.encoded_tokens == 4 * 40 and row.calib == "none"
    assert row.bits_total == pytest.approx((row.bits_stored * 40 + 32 * 8) / 48, rel=0.01)
    assert {"loss", "loss_fp16", "loss_minus_fp16", "kl", "top1", "tokens"} <= set(frame.metric)
    value = frame[frame.subset == "text"].set_index("metric").value
    assert value.loss_minus_fp16 == pytest.approx(value.loss - value.loss_fp16, abs=1e-9) and value.kl > 0


def test_fp16_loses_nothing_and_the_canary_everything(cell):
    fp16, zero = (cell(f"quant={name}").set_index("metric").value for name in ("fp16", "zero"))
    assert abs(fp16.kl) < 1e-6 and fp16.top1 == 1.0 and zero.kl > 100 * abs(fp16.kl)
    assert zero.loss_minus_fp16 != 0


SAME = [
    ("results=/elsewhere", "outputs=/elsewhere"), ("memo=false",), ("calib.memory_gb=1",), ("calib.batch_size=2",), ("force=true",),
    ("bits=1.0",), ("model.device=cpu",), ("model.dtype=float32",),
]  # fmt: skip
OTHER = [
    ("seed=1",), ("bits=2",), ("quant.window=4",), ("quant.sink=1",), ("calib.samples=3",), ("task.context=49",), ("model.architecture=qwen3",),
    ("model.seed=1",), ("quant.key.beam=2",),
]  # fmt: skip


@pytest.mark.parametrize("overrides", SAME, ids=str)
def test_the_id_ignores_where_and_how_fast(cell, overrides):
    base = ("quant=gsrq", "bits=1")
    assert runner.prepare(*cell.build(*base)).run == runner.prepare(*cell.build(*base, *overrides)).run


@pytest.mark.parametrize("overrides", OTHER, ids=str)
def test_the_id_tells_apart_what_is_computed(cell, overrides):
    base = ("quant=gsrq", "bits=1")
    assert runner.prepare(*cell.build(*base)).run != runner.prepare(*cell.build(*base, *overrides)).run


def test_a_calibration_text_is_named_by_what_it_holds(cell, tmp_path):
    for name, text in (("a", "one text"), ("b", "one text"), ("c", "another text")):
        (tmp_path / f"{name}.txt").write_text(text)
    ids = [runner.prepare(*cell.build("quant=gsrq", "bits=1", f"calib.source={tmp_path}/{name}.txt")).run for name in "abc"]
    assert ids[0] == ids[1] != ids[2]


def test_a_data_free_quantizer_is_the_same_for_every_calibration_but_not_for_every_protocol(cell):
    def run(*overrides):
        return runner.prepare(*cell.build("quant=int4", *overrides)).identity

    assert run() == run("calib.samples=9", "seed=5")
    with pytest.raises(Refusal, match="prefill=exact"):
        run("prefill=exact")
