"""Every command of docs/running.md and CONTRIBUTING.md runs at small sizes, composes, or says what it needs."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.test_readme import ROOT, execute, overrides

DOCS = "\n".join((ROOT / name).read_text() for name in ("docs/running.md", "CONTRIBUTING.md"))


def commands(start: str) -> list[tuple[str, str]]:
    """(command, note) of the shell lines that begin with `start`."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", DOCS, re.S) for line in block.splitlines()]
    parts = [re.match(r"(.*?)(?:\s+#\s*(.*))?$", line).groups(default="") for line in lines if line.strip()]
    return [(command, note) for command, note in parts if command.removeprefix("HF_HUB_OFFLINE=1 ").startswith(start)]


def launched(command: str) -> bool:
    return "hydra/launcher=" in command


@pytest.mark.parametrize("command", [c for c, note in commands("python run.py") if "needs" not in note and not launched(c)])
def test_commands_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert execute(overrides(command.removeprefix("python run.py ")), tmp_path, monkeypatch) == 0, capsys.readouterr().err
    assert bool(list(tmp_path.glob("results/runs/*.parquet"))) != ("dry_run=true" in command)
    assert bool(list(tmp_path.glob("outputs/wandb/offline-run-*"))) == ("logger=wandb" in command)


@pytest.mark.parametrize("command", [c for c, note in commands("python run.py") if "needs" in note or launched(c)])
def test_other_commands_compose(command):
    """tests/kvq/test_sweep.py runs every launcher for real."""
    from hydra import compose, initialize_config_dir

    words = [w for w in shlex.split(command.removeprefix("HF_HUB_OFFLINE=1 ").removeprefix("python run.py ")) if w != "-m"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        one = [re.sub(r",.*", "", w) if w.split("=")[0] in ("quant", "bits", "model", "part") else w for w in words]
        cfg = compose("config", overrides=one, return_hydra_config=True)
    launcher = next((w.split("=")[1] for w in words if w.startswith("hydra/launcher=")), "basic")
    assert cfg.hydra.runtime.choices["hydra/launcher"] == launcher


TARGETS = {
    "sweep-status": "kvq.status", "calib-export": "kvq.share export", "calib-import": "kvq.share import", "wheelhouse": "kvq.wheelhouse wheelhouse --python 3.12",
    "setup": "pip install", "test": "-m pytest", "lint": "ruff check",
}  # fmt: skip


@pytest.mark.parametrize("command", [c for c, _ in commands("make ")])
def test_make_targets_do_what_they_say(command):
    fresh = ["-W", "pyproject.toml"] if "setup" in command else ["-o", ".venv/run.ready", "-o", ".venv/dev.ready"]
    plan = subprocess.run(shlex.split(command) + ["-n", *fresh], cwd=ROOT, capture_output=True, text=True)
    assert plan.returncode == 0 and TARGETS[command.split()[1]] in plan.stdout, plan.stdout + plan.stderr
    for given, expected in (("WITHOUT=torch", "--without torch"), ("WHEELHOUSE=wheelhouse", "--no-index --find-links wheelhouse"), ("TO=", ".tar"), ("FROM=", ".tar")):
        assert given not in command or expected in plan.stdout


def test_every_command_is_of_a_kind_that_is_checked():
    others = [c for c, note in commands("") if not c.removeprefix("HF_HUB_OFFLINE=1 ").startswith(("python run.py", "make ")) and "needs" not in note]
    assert not others
    assert sys.executable and len(commands("make ")) > 8


def test_settings_in_the_prose_exist():
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    of_tasks = {f"task.{key}" for file in (ROOT / "conf" / "task").glob("*.yaml") for key in OmegaConf.load(file)}
    named = re.findall(r"`((?:task|quant|model|calib|hydra)\.[\w.]+?)(?:=[^`]*)?`", DOCS)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for key in sorted(set(named)):
            launcher = "ray" if ".ray." in key else "submitit_slurm"
            cfg = compose("config", overrides=[f"hydra/launcher={launcher}"], return_hydra_config=True)
            assert key in of_tasks or OmegaConf.select(cfg, key, default="absent") != "absent", key
