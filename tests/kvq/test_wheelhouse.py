"""The wheelhouse for real and offline: collected by pip from a folder that stands in for the index, installed without one into an empty venv."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from kvq import wheelhouse
from tests.quants import ROOT

NEEDED = ("hydra-core", "omegaconf", "antlr4-python3-runtime", "packaging", "PyYAML")


def pack(name, folder):
    """An installed distribution as a wheel again."""
    found = importlib.metadata.distribution(name)
    tag = next(line.split()[1] for line in found.read_text("WHEEL").splitlines() if line.startswith("Tag:"))
    tags = [line.split()[1] for line in found.read_text("WHEEL").splitlines() if line.startswith("Tag:")]
    tag = tag if len(tags) == 1 else "-".join(tags[0].split("-")[:2]) + "-" + ".".join(t.split("-")[2] for t in tags)
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{found.version}-{tag}.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in found.files:
            path = file.locate()
            if path.is_file() and ".." not in file.parts and "__pycache__" not in file.parts and file.name not in ("INSTALLER", "REQUESTED", "direct_url.json"):
                wheel.write(path, str(file))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    for name in NEEDED:
        pack(name, folder)
    return folder


@pytest.fixture
def offline(index, monkeypatch):
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))


def test_collected_and_installed_without_an_index(offline, tmp_path, monkeypatch, capsys):
    out = tmp_path / "wheelhouse"
    assert wheelhouse.main([str(out), "--only", "hydra-core"]) == 0
    said = capsys.readouterr().out
    assert f"{len(NEEDED)} wheels" in said and (out / "requirements.txt").read_text() == next(p for p in wheelhouse.pins([], []) if p.startswith("hydra-core")) + "\n"
    monkeypatch.delenv("PIP_FIND_LINKS")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "empty"], check=True)
    python = tmp_path / "empty" / "bin" / "python"
    assert subprocess.run([python, "-c", "import hydra"], capture_output=True).returncode != 0
    command = said.strip().splitlines()[-1].partition("or ")[2].split()
    done = subprocess.run([python, "-m", *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "import hydra, omegaconf, sys; print(hydra.__version__); assert sys.prefix in hydra.__file__"
    assert subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip() in (out / "requirements.txt").read_text()


def test_what_the_target_brings_is_left_out(offline, tmp_path):
    out = tmp_path / "wheelhouse"
    assert wheelhouse.main([str(out), "--only", "hydra-core", "--only", "torch", "--without", "torch"]) == 0
    assert not list(out.glob("torch*")) and len(list(out.glob("*.whl"))) == len(NEEDED) and "torch==" in (out / "requirements.txt").read_text()


def test_a_source_without_wheel_is_built(offline, index, tmp_path, monkeypatch):
    """antlr4's runtime exists as source only; the same here."""
    few = tmp_path / "index"
    shutil.copytree(index, few)
    next(few.glob("antlr4*.whl")).unlink()
    asked = []
    real = wheelhouse._pip

    def pip(what, *arguments):
        asked.append(what)
        if what == "wheel":
            shutil.copy(next(index.glob("antlr4*.whl")), tmp_path / "wheelhouse")
            return subprocess.CompletedProcess([], 0, "", "")
        return real(what, *arguments)

    monkeypatch.setenv("PIP_FIND_LINKS", str(few))
    monkeypatch.setattr(wheelhouse, "_pip", pip)
    assert wheelhouse.main([str(tmp_path / "wheelhouse"), "--only", "hydra-core"]) == 0 and asked == ["download", "wheel", "download"]


@pytest.mark.parametrize("arguments,match", [(["--only", "nothing"], "nothing is not pinned"), (["--only", "numpy"], "numpy==.*neither a wheel.*nor a source")])
def test_what_cannot_be_had_is_a_sentence(offline, tmp_path, arguments, match):
    with pytest.raises(SystemExit, match=match):
        wheelhouse.main([str(tmp_path / "w"), *arguments])


def test_tags_of_a_target():
    assert wheelhouse.platforms("x86_64", 28)[0] == "manylinux_2_28_x86_64" and "manylinux2014_x86_64" in wheelhouse.platforms("x86_64", 17)
    assert "manylinux_2_29_x86_64" not in wheelhouse.platforms("x86_64", 28) and not any("x86" in tag for tag in wheelhouse.platforms("aarch64", 28))
    assert (ROOT / "Makefile").read_text().count("kvq.wheelhouse") == 1
