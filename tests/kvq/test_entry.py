"""The command line: a cell in one line, and every user error as one sentence with exit code 2 and nothing written."""

import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest

from kvq import entry, models, results, runner, sweep
from kvq.claim import Busy
from tests.quants import ROOT


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command in this process, in an empty directory; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, tiny=True):
        from hydra.core.global_hydra import GlobalHydra

        GlobalHydra.instance().clear()
        given = [f"results={tmp_path}/r", f"outputs={tmp_path}/o", f"calibrations={tmp_path}/c"]
        given += ["model=tiny", "task=perplexity", "task.limit=2", "task.context=64", "calib.samples=2", "calib.length=160"] if tiny else []
        flags = [a for a in arguments if a.startswith("-")]
        monkeypatch.setattr(sys, "argv", ["run.py", *flags, *given, *(a for a in arguments if a not in flags)])
        code = entry.main()
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def written(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_cell_writes_its_rows_and_those_of_fp16_and_nothing_else(command, tmp_path):
    code, out, err = command("quant=int4")
    assert code == 0 and "bits" in out, err
    frame = results.load(tmp_path / "r")
    assert set(frame["quant"]) == {"fp16", "int4"} and (frame.encoded_tokens > 0).all()
    names = written(tmp_path)
    assert len([n for n in names if n.endswith(".parquet")]) == 2 and not [n for n in names if not n.startswith(("r/", "c/"))], names
    before = {n: (tmp_path / n).stat().st_mtime_ns for n in names}
    code, out, _ = command("quant=int4")
    assert code == 0 and before == {n: (tmp_path / n).stat().st_mtime_ns for n in written(tmp_path)}


REFUSED = {
    "unknown quantizer": (["quant=int5"], "no quant=int5; choose one of: .*int4.*Did you mean int"),
    "unknown task": (["task=perplexty"], "no task=perplexty.*Did you mean perplexity"),
    "unknown model": (["model=tinny"], "no model=tinny.*Did you mean tiny"),
    "unknown experiment": (["experiment=paretto"], "no experiment=paretto.*Did you mean pareto"),
    "mistyped key": (["task.limt=2"], "no setting 'task.limt'; valid here: .*limit.*Did you mean limit"),
    "mistyped top key": (["bist=2"], "no setting 'bist'.*Did you mean bits"),
    "mistyped quantizer key": (["quant=gsrq", "quant.key.bem=2"], "quant.key.bem.*Did you mean beam"),
    "bits a word": (["quant=kivi", "bits=abc"], "bits=abc is not a number"),
    "bits unreachable": (["quant=kivi", "bits=0.3"], "bits must be 1, 2, 3 or 4"),
    "bits of the key none": (["quant=tq_mse", "quant.key.bits=null"], "quant.key.bits=None is not a number"),
    "no calibration": (["quant=gsrq", "calib.samples=0"], "calib.samples=0 is not a whole number from 1 on"),
    "a GPU that is not there": (["quant=int4", "model.device=cuda:63"], "model.device=cuda:63: there are . CUDA devices here"),
    "bits between stages": (["quant=gsrq", "bits=0.3"], "nearest: 0.25 and 0.3125.; the paper has 0.375, 0.75, 1 and 2"),
    "bits of the key alone": (["quant=tq_mse", "bits=2", "quant.key.bits=0.3"], "integer number of bits"),
    "bits not finite": (["quant=tq_mse", "bits=nan"], "bits=nan is not a number"),
    "seed a fraction": (["quant=gsrq", "seed=1.5"], "seed=1.5"),
    "unknown option": (["quant=gsrq", "quant.key.weights=heavy"], "weights"),
    "prefill": (["quant=int4", "prefill=fast"], "prefill=fast is not one of"),
    "exact prefill of one pass": (["quant=int4", "prefill=exact"], "prefill=exact.*quantized"),
    "architecture": (["quant=int4", "model.architecture=gpt9"], "architecture=gpt9 is not one of"),
    "all sliding": (["quant=int4", "model.architecture=mistral"], "sliding_attention"),
    "dtype": (["quant=int4", "model.dtype=float8"], "dtype=float8 is not one of"),
    "context too long": (["quant=int4", "task.context=9999"], "task.context=9999 is longer than"),
    "limit zero": (["quant=int4", "task.limit=0"], "limit"),
    "limit too large": (["quant=int4", "task.limit=1000000"], "windows of 64"),
    "negative window": (["quant=int4", "quant.window=-1"], "window=-1"),
    "no text": (["quant=int4", "task.data=/nowhere/text.txt"], "no text at '/nowhere/text.txt'"),
    "no calibration text": (["quant=gsrq", "calib.source=/nowhere/text.txt"], "no text at '/nowhere/text.txt'"),
    "not enough calibration text": (["quant=gsrq", "calib.samples=100000"], "100000 were asked for"),
    "heads that do not fit": (["quant=cq", "bits=1", "quant.key.coupled=64", "quant.key.code_bits=64"], "code of 1 to 16 bits"),
    "groups that do not fit": (["quant=cq", "bits=2", "quant.key.coupled=5", "quant.key.code_bits=10"], "do not divide the head dimension 16"),
}


@pytest.mark.parametrize("arguments,match", REFUSED.values(), ids=REFUSED)
def test_a_user_error_is_one_sentence_and_writes_nothing(command, tmp_path, arguments, match):
    import re

    code, out, err = command(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err + out and "Error executing" not in err, err
    assert re.search(match, lines[0], re.S), lines[0]
    assert not [n for n in written(tmp_path) if n.endswith((".parquet", ".log", ".yaml"))]


@pytest.mark.parametrize("setting", ["results", "outputs", "calibrations"])
def test_a_folder_that_cannot_be_written_is_named_before_any_work(command, tmp_path, setting, monkeypatch):
    from kvq import calibrate

    monkeypatch.setattr(calibrate, "fit", lambda *_, **__: pytest.fail("calibrated first"))
    (tmp_path / "taken").write_text("a file")
    code, out, err = command("quant=int4", f"{setting}={tmp_path}/taken/here")
    assert code == 2 and f"{tmp_path}/taken/here" in err and "cannot be written" in err and "Traceback" not in err + out


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    return path


def test_a_model_folder_must_be_one(command, folder):
    for fill, match in ((lambda: None, "no config.json"), (lambda: (folder / "config.json").write_text("{}"), "no tokenizer")):
        fill()
        code, _, err = command("model=local", f"model.path={folder}", "task=perplexity", "quant=int4", tiny=False)
        assert code == 2 and match in err and "Traceback" not in err
    (folder / "tokenizer.json").write_text("{}")
    code, _, err = command("model=local", f"model.path={folder}", "task=perplexity", "quant=int4", "task.data=embedded", tiny=False)
    assert code == 2 and "cannot be loaded" in err and "Traceback" not in err


def test_a_model_path_must_exist(command):
    for path, match in (("/nowhere/model", "/nowhere/model does not exist"), (None, "needs model.path")):
        code, _, err = command("model=local", *([f"model.path={path}"] if path else []), "task=perplexity", "quant=int4", tiny=False)
        assert code == 2 and match in err and "Traceback" not in err


def test_a_model_folder_runs_and_is_named_by_content(command, tmp_path, monkeypatch):
    import shutil

    from kvq import tiny

    model, tokenizer = tiny.load("llama", "float32", "cpu")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    cell = ["model=local", "task=perplexity", "task.data=embedded", "task.limit=1", "task.context=32", "quant=int8"]
    for name in ("here", "there"):
        code, _, err = command(f"model.path={tmp_path / name}", *cell, tiny=False)
        assert code == 0, err
    assert len(list((tmp_path / "r" / "runs").glob("*.parquet"))) == 2, "a copy of the folder is the same model"
    models._load.cache_clear()


def test_a_sweep_may_be_called_by_a_number(command, tmp_path):
    code, _, err = command("-m", "quant=kivi", "bits=0.3", "sweep=1e8")
    assert code == 2 and "bits must be 1, 2, 3 or 4" in err and "TypeError" not in err


def test_a_sweep_goes_on_after_a_refused_cell(command, tmp_path):
    code, _, err = command("-m", "quant=int4,kivi", "bits=0.3")
    assert code == 2 and "bits must be 1, 2, 3 or 4" in err
    assert set(results.load(tmp_path / "r")["quant"]) == {"fp16", "int4"}
    assert not [n for n in written(tmp_path) if n.endswith((".log", ".yaml")) and "/" not in n], written(tmp_path)


@pytest.mark.parametrize("failure", [None, Busy, ValueError])
def test_memory_is_given_back_after_every_cell_whatever_became_of_it(failure, tmp_path, monkeypatch):
    class Model:
        pass

    def run(*_, **__):
        model = Model()
        held.append(weakref.ref(model))
        if failure:
            raise failure("another")
        return []

    held, gone = [], []
    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(entry, "_free_memory", lambda: gone.append(held[0]() is None))
    entry.noted(SimpleNamespace(dry_run=False), {}, sweep.Note(tmp_path, ["quant=int4"]))
    assert gone == [True], "once, when nothing holds what the cell made"


def test_interrupting_says_how_to_go_on(command, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    code, _, err = command("quant=int4")
    assert code == 130 and "same command again" in err


def test_the_script_itself(tmp_path):
    out = subprocess.run([sys.executable, str(ROOT / "run.py"), "quant=int5"], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr.startswith("error: there is no quant=int5") and not list(tmp_path.iterdir())
