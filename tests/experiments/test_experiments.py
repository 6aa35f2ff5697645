"""Every experiment has a sweep and a drawing, and its cells run at size=fast."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "gsrq_shrinkage gsrq_gradients gsrq_gaussian gsrq_reconstruction gsrq_tau gsrq_memory gsrq_iterations gsrq_perplexity gsrq_fewshot gsrq_longbench gsrq_reasoning "
    "gsrq_ablation gsrq_latency blockgtq_energy blockgtq_fingerprint blockgtq_entropy blockgtq_logit_mae blockgtq_attention blockgtq_calibration blockgtq_score "
    "blockgtq_niah blockgtq_longbench blockgtq_aime blockgtq_deployment pareto start_effect codebook_cost equal_bytes beam"
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


@pytest.mark.parametrize(("name", "task"), cells())
def test_its_cells_run_fast(name, task, folder):
    """The first value of every parameter of the sweep, every task; a mistyped key or an impossible budget would be refused."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from kvq.runner import run

    chosen = {key: values[0] for key, values in sweep(name).items()} | {"task": task}
    words = [f"experiment={name}", "size=fast", *(f"{k}={v}" for k, v in chosen.items()), f"results={folder}/results", f"outputs={folder}/outputs"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=words, return_hydra_config=True)
    choices = {k: v for k, v in cfg.hydra.runtime.choices.items() if k in ("model", "quant", "task", "calib")}
    assert choices["model"] == "tiny"
    from omegaconf import OmegaConf

    cfg = OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"])
    frame = run(cfg, choices)
    assert (frame["encoded_tokens"] > 0).all() and frame["value"].notna().all()
