"""Weights & Biases offline, for real: what was logged is read back from the run's own file; without it, runs go on."""

import json
import struct
import sys

import pytest

from kvq import results, wandb_logger
from tests.kvq.test_runner import cell, windows  # noqa: F401  fixtures

LOGGER = ["logger=wandb", "logger.mode=offline", "sweep=tables"]


def logged(folder):
    """All records of all offline runs under `folder`, oldest first: a log of 32 KB blocks as LevelDB writes it, protocol buffers inside."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime):
        raw, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(raw):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            _, size, kind = struct.unpack("<IHB", raw[at : at + 7])
            whole, at = whole + raw[at + 7 : at + 7 + size], at + 7 + size
            if kind in (1, 4):  # whole, or the last part
                record = Record()
                record.ParseFromString(whole)
                found.append((file, record))
                whole = b""
    return found


def of(records, kind):
    return [getattr(record, kind) for _, record in records if record.WhichOneof("record_type") == kind]


def values(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_what_was_logged_is_there(cell, tmp_path):  # noqa: F811
    (tmp_path / "x" / "results" / "tables").mkdir(parents=True)
    (tmp_path / "x" / "results" / "tables" / "ledger.md").write_text("ours beside reported")
    frame = cell("quant=int4", *LOGGER)
    records = logged(tmp_path / "x" / "outputs")
    runs = of(records, "run")
    ours = next(r for r in runs if r.run_id == frame.run[0])
    assert {r.run_id for r in runs} == set(results.load(tmp_path / "x" / "results").run), "the fp16 cell is a run of its own"
    assert {r.run_group for r in runs} == {"tables"} and {r.project for r in runs} == {"kvq"}
    config = {u.key: json.loads(u.value_json) for u in ours.config.update}
    assert config["quant"]["window"] == 0 and config["task"]["limit"] == 4 and config["identity"]["quant"]["name"] == "int4"
    mine = [(f, r) for f, r in records if f.name == f"run-{frame.run[0]}.wandb"]
    history = [values(h.item) for h in of(mine, "history")]
    progress = [h["done"] for h in history if "done" in h]
    assert progress == [1, 2, 3, 4] and all(h["total"] == 4 for h in history if "done" in h)
    loss = frame[(frame.subset == "text") & (frame.metric == "loss")].value.item()
    assert history[3]["progress/loss"] == pytest.approx(loss, rel=1e-6)
    summary = {k: v for s in of(mine, "summary") for k, v in values(s.update).items()}
    assert summary["bits"] == 4 and summary["bits_stored"] == frame.bits_stored[0] and summary["text/loss"] == pytest.approx(loss)
    table = json.loads(next((tmp_path / "x" / "outputs").glob(f"wandb/*{frame.run[0]}/files/media/table/predictions*")).read_text())
    assert table["columns"][:4] == ["id", "subset", "prediction", "target"] and len(table["data"]) == 4
    artifacts = {a.type: {e.path for e in a.manifest.contents} for a in of(mine, "artifact")}
    assert artifacts["rows"] == {f"{frame.run[0]}.parquet", f"{frame.run[0]}.jsonl"} and artifacts["figures"] == {"tables/ledger.md"}
    assert [e.exit_code for e in of(mine, "exit")] == [0]


def test_a_resumed_run_goes_on(cell, windows, tmp_path):  # noqa: F811
    windows.fail_after = 2
    with pytest.raises(KeyboardInterrupt):
        cell("quant=fp16", *LOGGER)
    windows.fail_after = None
    cell("quant=fp16", *LOGGER)
    records = logged(tmp_path / "x" / "outputs")
    assert len({r.run_id for r in of(records, "run")}) == 1
    steps = [(h["_step"], h["done"]) for h in (values(h.item) for h in of(records, "history")) if "done" in h]
    assert [e.exit_code for e in of(records, "exit")] == [1, 0] and steps == [(1, 1), (2, 2), (3, 3), (4, 4)]


@pytest.mark.parametrize("broken", ["absent", "init", "log", "log_artifact", "finish"])
def test_a_broken_tracker_fails_no_run(cell, monkeypatch, tmp_path, caplog, broken):  # noqa: F811
    import wandb

    def fail(*_, **__):
        raise ConnectionError("no such host")

    if broken == "absent":
        monkeypatch.setitem(sys.modules, "wandb", None)
    elif broken == "init":
        monkeypatch.setattr(wandb, "init", fail)
    else:
        monkeypatch.setattr(wandb.Run, broken, fail)
    frame = cell("quant=fp16", *LOGGER)
    assert len(frame) and (tmp_path / "x" / "results" / "runs" / f"{frame.run[0]}.parquet").is_file()
    assert caplog.text.count("the run goes on without it") == 1


def test_without_a_key_it_is_offline(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert not wandb_logger._has_key()
