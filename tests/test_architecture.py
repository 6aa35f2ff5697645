"""The shape of the tree: import arrows, file sizes, empty packages, the `kernels` name, pins that agree."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
OURS = ("kernels", "gsrq", "blockgtq", "kvq", "experiments", "tests", "run")
SOURCES = sorted(p for d in (*OURS, "notebooks") for p in (ROOT / d).rglob("*.py")) + [ROOT / "run.py"]


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Absolute module names imported by a file; top_only leaves out imports inside functions."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def inside(*folders: str) -> list[Path]:
    return [p for p in SOURCES if p.relative_to(ROOT).as_posix().startswith(folders)]


@pytest.mark.parametrize("path", inside("gsrq/", "blockgtq/", "kvq/baselines/"), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_methods_import_only_kernels(path):
    own = ".".join(path.relative_to(ROOT).parts[:-1])
    for module in imports(path):
        top = module.split(".")[0]
        assert top not in ("transformers", "hydra", "omegaconf", "datasets", "lm_eval", "pandas"), module
        if top in OURS:
            assert top == "kernels" or module.startswith(own), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", inside("kernels/"), ids=lambda p: p.name)
def test_kernels_import_nothing_of_ours(path):
    for module in imports(path):
        assert module.split(".")[0] not in set(OURS) - {"kernels"}, module


@pytest.mark.parametrize("path", [p for p in inside("kvq/") if "baselines" not in p.parts], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_harness_names_methods_only_in_yaml(path):
    for module in imports(path):
        assert not module.startswith(("gsrq", "blockgtq", "kvq.baselines")), f"{path.name} imports {module}"
    if path.name not in ("runner.py", "cell.py", "entry.py", "plan.py", "campaign.py", "missing.py"):
        assert not any(m.split(".")[0] in ("hydra", "omegaconf") for m in imports(path)), "hydra belongs to the runner, the entry points and their callback"


def test_only_the_adapter_knows_transformers_caches():
    names = ("transformers.cache_utils", "transformers.masking_utils", "transformers.integrations.sdpa_attention")
    users = {p.relative_to(ROOT).as_posix() for p in inside("kvq/", "gsrq/", "blockgtq/", "kernels/") if imports(p) & set(names)}
    assert users <= {"kvq/cache.py", "kvq/record.py"}


@pytest.mark.parametrize("path", inside("experiments/"), ids=lambda p: p.name)
def test_drawing_needs_no_torch(path):
    assert not any(m.split(".")[0] == "torch" for m in imports(path, top_only=True))


@pytest.mark.parametrize("module", ["kvq.results", "kvq.errors", "kvq.statistics"])
def test_results_need_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_file_over_300_lines():
    assert not {p.relative_to(ROOT).as_posix(): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 300}


def test_package_markers_are_empty():
    for package in ("kernels", "kvq", "kvq/tasks", "kvq/baselines"):
        assert (ROOT / package / "__init__.py").read_text() == ""


def test_no_pickle_anywhere():
    for path in inside("kvq/", "gsrq/", "blockgtq/", "kernels/", "experiments/"):
        assert not imports(path) & {"pickle", "dill", "joblib", "cloudpickle"}, path
        assert "torch.load(" not in path.read_text(), path


def test_model_classes_import_with_our_kernels_first():
    code = "import kernels, sys; from transformers import LlamaForCausalLM; sys.exit('torch' in dir(kernels))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_pypi_kernels_is_named_in_a_clear_error(monkeypatch):
    import importlib.metadata

    from kvq.entry import guard
    from kvq.errors import Refusal

    guard()
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.18.2" if name == "kernels" else real(name))
    with pytest.raises(Refusal, match="pip uninstall kernels"):
        guard()


def test_conda_and_pip_pins_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in conda["dependencies"] if isinstance(d, dict))
    assert sorted(pip) == sorted(project["dependencies"])
    assert project["version"].split(".")[0] != "0", "versions 0.x are mistaken for the PyPI package `kernels`"
    assert all("==" in d for d in project["dependencies"])


def test_ruff_has_nothing_to_say():
    """What `make lint` checks; notebooks too."""
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ".", "--no-cache", "--output-format=concise"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
