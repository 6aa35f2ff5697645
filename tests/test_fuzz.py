"""200 random corruptions of result, prediction, calibration, config and data files: a clear error or the very same rows, never a wrong row."""

import json
import random
import re
import shutil
import struct
import sys
import time

import pandas as pd
import pytest

from kvq import calibrate, entry, predictions, results, runner
from kvq.errors import Refusal
from kvq.tasks import perplexity
from tests.kvq.test_runner import VARIES, cell  # noqa: F401  fixture
from tests.quants import ROOT

SLOWEST = 60
"""Seconds within which each corruption must have ended one way or the other."""


def comparable(frame):
    """Rows without clocks and provenance; of the configuration, what identifies the run."""
    frame = frame[~frame.metric.str.contains("second")].drop(columns=VARIES).reset_index(drop=True)
    return frame.assign(config=[json.dumps(json.loads(c)["identity"], sort_keys=True) for c in frame.config])


def truncate(rng, raw):
    return raw[: rng.randrange(len(raw))]


def flip(rng, raw):
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 3))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def blank(rng, raw):
    at = rng.randrange(len(raw))
    return raw[:at] + bytes(min(16, len(raw) - at)) + raw[at + 16 :]


def insert(rng, raw):
    at = rng.randrange(len(raw))
    return raw[:at] + rng.randbytes(rng.randrange(1, 9)) + raw[at:]


def repeat(rng, raw):
    at = rng.randrange(len(raw))
    return raw[:at] + raw[at // 2 :]


def digit(rng, raw):
    """Another digit in a number, where the file still parses."""
    places = [m.start() for m in re.finditer(rb"[0-9]", raw)] or [0]
    at = rng.choice(places)
    return raw[:at] + str((int(raw[at : at + 1] or b"0") + 1) % 10).encode() + raw[at + 1 :] if raw[at : at + 1].isdigit() else raw[::-1]


DAMAGES = (truncate, flip, blank, insert, repeat, digit)


def corrupt(path, rng, extra=()):
    whole = path.read_bytes()
    path.write_bytes(rng.choice((*DAMAGES, *extra))(rng, whole))
    return path.read_bytes() != whole


def ended(call, expected):
    """Run `call`: a Refusal of one sentence, or exactly the expected rows; True if it was refused."""
    start = time.monotonic()
    try:
        frame = call()
    except Refusal as error:
        assert str(error).strip() and "\n" not in str(error).strip()
        return True
    finally:
        assert time.monotonic() - start < SLOWEST
    pd.testing.assert_frame_equal(comparable(frame), expected, check_dtype=False)
    return False


@pytest.fixture
def home(cell, tmp_path):  # noqa: F811
    """(cfg and choices of one tq_mse cell, its rows, its folder, a restore function)."""
    built = cell.build("quant=tq_mse", "bits=2", "task.limit=2")
    expected = comparable(runner.run(*built))
    shutil.copytree(tmp_path / "x", tmp_path / "sound")

    def restore():
        shutil.rmtree(tmp_path / "x")
        shutil.copytree(tmp_path / "sound", tmp_path / "x")

    return built, expected, tmp_path / "x", restore


def test_result_files(home):
    (cfg, choices), expected, folder, restore = home
    run, refused = runner.prepare(cfg, choices).run, 0
    path = folder / "results" / "runs" / f"{run}.parquet"

    def column(rng, raw):
        """A valid file of another schema: a column missing, of another dtype, or with other values under the old digest."""
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        at = rng.randrange(len(table.column_names))
        name = table.column_names[at]
        changed = table.drop_columns([name]) if rng.random() < 0.5 else table.set_column(at, name, table.column(name).cast("string").slice(0).combine_chunks())
        pq.write_table(changed if rng.random() < 0.7 else table.slice(1), path)
        return path.read_bytes()

    for seed in range(70):
        rng = random.Random(seed)
        if corrupt(path, rng, (column, column)):
            refused += ended(lambda: runner.run(cfg, choices), expected)
        restore()
    assert refused > 40


def test_predictions_of_the_reference(home):
    (cfg, choices), expected, folder, restore = home
    cfg.force, refused = True, 0
    reference = runner._reference(cfg, choices).path.with_suffix(".jsonl")
    for seed in range(25):
        corrupt(reference, random.Random(seed))
        refused += ended(lambda: runner.run(cfg, choices), expected)
        restore()
    assert refused > 15


def test_unfinished_records(home):
    (cfg, choices), expected, folder, restore = home
    done = runner.prepare(cfg, choices)
    refused = 0
    for seed in range(25):
        done.path.unlink()
        done.partial.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(done.path.with_suffix(".jsonl"), done.partial)
        corrupt(done.partial, random.Random(seed))
        refused += ended(lambda: runner.run(cfg, choices), expected)
        restore()
    assert 5 < refused < 25, "a torn last line is not an error"


def header(rng, raw):
    """A well-formed safetensors header that lies: another dtype, a huge or negative shape, a missing tensor, other metadata."""
    size = struct.unpack("<Q", raw[:8])[0]
    table = json.loads(raw[8 : 8 + size])
    name = rng.choice([key for key in table if key != "__metadata__"])
    lie = rng.randrange(6)
    if lie == 0:
        table[name]["dtype"] = rng.choice(["F16", "I64", "F8_E4M3", "NONE"])
    elif lie == 1:
        table[name]["shape"] = rng.choice([[2**40, 2**20], [-1], [0], [10**30]])
    elif lie == 2:
        del table[name]
    elif lie == 3:
        table["__metadata__"].pop(rng.choice(["recipe", "digest"]))
    elif lie == 4:
        table["__metadata__"]["recipe"] = rng.choice(["{}", "[]", "null", '{"quant": 7}'])
    else:
        table[name + "x"] = table.pop(name)
    text = json.dumps(table).encode()
    return struct.pack("<Q", rng.choice([len(text), len(text), 2**62])) + text + raw[8 + size :]


def test_stored_calibrations(home):
    (cfg, choices), expected, folder, restore = home
    cfg.force, rebuilt = True, 0
    for seed in range(50):
        path = next((folder / "calibrations").glob("tq_mse-*.safetensors"))
        sound = path.read_bytes()
        if corrupt(path, random.Random(seed), (header,) * 6):
            refused = ended(lambda: runner.run(cfg, choices), expected)
            rebuilt += not refused and path.read_bytes() == sound
        restore()
    assert rebuilt > 20


@pytest.mark.parametrize("name", ["config.yaml", "quant/int4.yaml", "task/perplexity.yaml", "model/tiny.yaml", "calib/text.yaml"])
def test_config_files(name, cell, tmp_path, monkeypatch, capsys):  # noqa: F811
    from hydra.core.global_hydra import GlobalHydra

    cfg, choices = cell.build("quant=int4", "task.limit=1")
    sound = comparable(runner.run(cfg, choices))
    run = runner.prepare(cfg, choices).run
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.setattr(entry, "CONFIG", str(tmp_path / "conf"))
    words = ["model=tiny", "task=perplexity", "quant=int4", "task.limit=1", "task.context=48", "calib.samples=2", "calib.length=160"]
    words += [f"task.data={tmp_path}/words.txt", f"calib.source={tmp_path}/words.txt", *(f"{n}={tmp_path}/y/{n}" for n in ("results", "outputs", "calibrations"))]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    monkeypatch.chdir(tmp_path)
    whole = (tmp_path / "conf" / name).read_bytes()
    for seed in range(4):
        corrupt(tmp_path / "conf" / name, random.Random(f"{name}{seed}"))
        GlobalHydra.instance().clear()
        start, code = time.monotonic(), entry.main()
        out = capsys.readouterr()
        assert time.monotonic() - start < SLOWEST and (code == 0 or re.search(r"^error: \S.*", out.err, re.M)), out.err
        same = tmp_path / "y" / "results" / "runs" / f"{run}.parquet"
        if same.is_file():
            found, expected = (rows.drop(columns="seed") for rows in (comparable(results.read(same)), sound))  # int4 depends on no seed
            pd.testing.assert_frame_equal(found, expected, check_dtype=False)
        shutil.rmtree(tmp_path / "y", ignore_errors=True)
        (tmp_path / "conf" / name).write_bytes(whole)


def test_data_files(home, tmp_path):
    """Another text is another run, or no text at all; never other rows under the same run."""
    (cfg, choices), expected, folder, restore = home
    run, other = runner.prepare(cfg, choices).run, 0
    words = tmp_path / "words.txt"
    sound = words.read_bytes()
    for seed in range(12):
        if corrupt(words, random.Random(seed)):
            try:
                for cached in (perplexity.text, calibrate.text):  # a process reads a text once
                    getattr(cached, "cache_clear", int)()
                assert runner.prepare(cfg, choices).run != run
                other += len(runner.run(cfg, choices)) > 0
            except Refusal:
                pass
        words.write_bytes(sound)
        restore()
    assert other > 3


def test_a_record_is_checked_to_the_letter(tmp_path):
    path, record = tmp_path / "x.jsonl", {"id": "a", "subset": "s", "metrics": {"loss": 1.5}, "usage": {}}
    predictions.append(path, [record, {**record, "id": "b"}])
    assert [r["id"] for r in predictions.read(path)] == ["a", "b"] and predictions.read(path)[0] == record
    whole = path.read_bytes()
    for at in range(len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(predictions.Damaged, match="damaged line"):
            predictions.read(path)
