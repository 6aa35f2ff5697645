"""Every command and code block of the README is executed, at small sizes, or marked as needing something a laptop lacks."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SMALL = {
    "perplexity": ["task.limit=1", "task.context=128"],
    "niah": ["task.limit=1", "task.lengths=[256]", "task.depths=1", "task.subsets=[single]"],
    "longbench": ["task.limit=1", "task.context=768", "task.subsets=[trec]"],
}
LITTLE = ["model=tiny", "calib.samples=2", "calib.length=256"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[tuple[str, str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [(line.split("#")[0].strip(), line.partition("#")[2]) for line in lines]


def overrides(command: str) -> list[str]:
    """The command's own overrides with small sizes added for its task."""
    words = shlex.split(command)
    task = next((w.split("=")[1] for w in words if w.startswith("task=")), "longbench")
    added = [w for w in SMALL[task] if not any(a.split("=")[0] == w.split("=")[0] for a in words)]
    words = [re.sub(r"^task.lengths=.*", "task.lengths=[256]", w) for w in words]
    return [*words, *LITTLE, *added]


def execute(arguments: list[str], folder: Path, monkeypatch) -> int:
    from kvq.entry import main

    monkeypatch.setattr(sys, "argv", ["run.py", *arguments, f"results={folder}/results", f"outputs={folder}/outputs"])
    return main()


@pytest.mark.parametrize("command", [c for c, note in commands() if c.startswith("python run.py") and "needs" not in note and "experiment=" not in c])
def test_python_commands_run(command, tmp_path, monkeypatch, capsys):
    assert execute(overrides(command.removeprefix("python run.py ")), tmp_path, monkeypatch) == 0, capsys.readouterr().err
    assert list(tmp_path.glob("results/runs/*.parquet"))


@pytest.mark.parametrize("command", [c for c, note in commands() if "needs" in note or "experiment=" in c])
def test_other_commands_compose(command):
    words = shlex.split(command.removeprefix("python run.py "))
    done = subprocess.run([sys.executable, "run.py", *words, "--cfg", "job"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c, _ in commands() if c.startswith("make ")])
def test_make_targets_do_what_they_say(command, tmp_path, monkeypatch):
    (tmp_path / "ready").touch()
    plan = subprocess.run(shlex.split(command) + ["-n", "-o", ".venv/run.ready", "-o", ".venv/dev.ready"], cwd=ROOT, capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr
    expected = {"run": "run.py", "test": "-m pytest", "figures": "-m experiments", "sweep-status": "kvq.status"}[command.split()[1]]
    assert expected in plan.stdout
    if expected == "run.py":
        line = next(line for line in plan.stdout.splitlines() if expected in line)  # a make inside a make says more
        arguments = line.partition("run.py ")[2]
        assert "results=outputs/results" in arguments, "beside the committed rows a fresh clone would compute nothing"
        assert execute(overrides(arguments), tmp_path, monkeypatch) == 0


def test_make_figures_needs_only_the_committed_rows(tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.rmtree(tmp_path / "results" / "figures", ignore_errors=True)
    code = "import sys, pathlib; from experiments.__main__ import main; main(pathlib.Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "results")], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "drew" not in done.stdout
    assert (tmp_path / "results" / "figures" / "pareto.png").stat().st_size > 10_000


def test_python_block_reads_results():
    block = blocks("python")[0]
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "gsrq" in done.stdout, done.stderr


def test_a_quantizer_is_two_files(tmp_path):
    """The documented example, applied to a copy of the tree: it runs, it is tested by the glob, and nothing else changed."""
    for name in ("conf", "kvq", "kernels", "gsrq", "blockgtq", "tests", "run.py", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    module = next(b for b in blocks("python") if "class Sign" in b)
    (tmp_path / "kvq" / "baselines" / "sign.py").write_text(module)
    (tmp_path / "conf" / "quant" / "sign.yaml").write_text(blocks("yaml")[0])
    small = [*LITTLE, *SMALL["perplexity"]]
    run = subprocess.run([sys.executable, "run.py", "quant=sign", "task=perplexity", *small], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "2.000 stored per value" in run.stdout, run.stdout + run.stderr
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    contract = [sys.executable, "-m", "pytest", "-k", "sign", "tests/test_quantizers.py"]
    tested = subprocess.run(contract, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert tested.returncode == 0 and " passed" in tested.stdout, tested.stdout[-2000:]


def test_one_screen_before_the_first_scroll():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert next(i for i, line in enumerate(lines) if line.startswith("## ")) <= 28
