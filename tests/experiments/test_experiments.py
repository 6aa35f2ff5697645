"""Every experiment has a sweep and a drawing, and its cells run at size=fast."""

import itertools
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "gsrq_shrinkage gsrq_gradients gsrq_gaussian gsrq_reconstruction gsrq_tau gsrq_memory gsrq_iterations gsrq_perplexity gsrq_fewshot gsrq_longbench gsrq_reasoning "
    "gsrq_ablation gsrq_latency blockgtq_energy blockgtq_fingerprint blockgtq_entropy blockgtq_logit_mae blockgtq_attention blockgtq_calibration blockgtq_score "
    "blockgtq_niah blockgtq_longbench blockgtq_aime blockgtq_deployment pareto start_effect codebook_cost equal_bytes beam suites budget"
).split()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_drawn(name):
    from experiments.__main__ import modules

    module = modules([name])[0]
    assert module.__doc__ and hasattr(module, "draw")


def sweep(name: str) -> dict[str, list[str]]:
    params = yaml.safe_load((ROOT / "conf" / "experiment" / f"{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    return {key: [v.strip("'\"") for v in str(values).strip("'\"").split(",")] for key, values in params.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all, so that experiments that share a cell compute it once."""
    return tmp_path_factory.mktemp("fast")


def cells() -> list[tuple[str, str]]:
    return [(name, task) for name in NAMES for task in sweep(name)["task"]]


def composed(words: list[str]):
    """(configuration without Hydra's part, choices) of a command line."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=words, return_hydra_config=True)
    choices = {k: v for k, v in cfg.hydra.runtime.choices.items() if k in ("model", "quant", "task", "calib")}
    return OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]), choices


@pytest.mark.parametrize(("name", "task"), cells())
def test_its_cells_run_fast(name, task, folder):
    """The first value of every parameter of the sweep, every task; a mistyped key or an impossible budget would be refused."""
    from kvq.runner import run

    chosen = {key: values[0] for key, values in sweep(name).items()} | {"task": task}
    cfg, choices = composed([f"experiment={name}", "size=fast", *(f"{k}={v}" for k, v in chosen.items()), f"results={folder}/results", f"outputs={folder}/outputs"])
    assert choices["model"] == "tiny"
    frame = run(cfg, choices)
    assert (frame["encoded_tokens"] > 0).all() and frame["value"].notna().all()


SCALARS = ("bits", "seed", "task", "quant.key.bits", "quant.key.beam", "quant.key.score", "quant.key.cluster.rounds", "calib.samples", "calib.length", "calib.offset")
"""Parameters whose values only replace a number or a name; the others choose files and interpolations, and must work together."""


def combinations(name: str) -> list[list[str]]:
    """Every combination of the parameters that choose, at size=gpu; the first one at the other sizes as well."""
    params = {key: values[:1] if key in SCALARS else values for key, values in sweep(name).items()}
    words = [[f"{k}={v}" for k, v in zip(params, values)] for values in itertools.product(*params.values())]
    return [[f"size={size}", *words[0]] for size in ("full", "fast")] + [["size=gpu", *cell] for cell in words]


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_it_composes_at_every_size(name):
    """Interpolations resolve, codecs take their options and reach their budgets, and no two cells of a sweep are the same run."""
    from kvq.runner import prepare

    runs = {tuple(words): prepare(*composed([f"experiment={name}", *words])).run for words in combinations(name)}
    gpu = [run for words, run in runs.items() if words[0] == "size=gpu"]
    assert len(set(gpu)) == len(gpu)
