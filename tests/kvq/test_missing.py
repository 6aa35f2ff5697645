"""Cells of an experiment without rows: told by the run's own name, and apart from rows of another name."""

from kvq import missing
from kvq.campaign import cells
from kvq.runner import run


def said(capsys, *words) -> tuple[int, str]:
    code = missing.main([*map(str, words)])
    return code, capsys.readouterr().out


def test_a_cell_is_missing_then_finished_and_renamed_for_another_number_type(tmp_path, capsys):
    words = ["blockgtq_energy", "size=fast", f"results={tmp_path}/results", f"outputs={tmp_path}/outputs"]
    code, out = said(capsys, *words)
    assert code == 1 and "blockgtq_energy: 1 cells, 1 missing" in out and "missing  quant=blockgtq bits=3 task=allocation" in out
    code, out = said(capsys, *words[:1], *words, "--list")
    assert code == 1 and out.count("\n") == 1 and "quant=blockgtq" in out, "a cell of two experiments is listed once"
    compute(cells(words[:1], words[1:])[0])
    code, out = said(capsys, *words)
    assert code == 0 and out.endswith("blockgtq_energy: 1 cells, 1 finished\n")
    assert said(capsys, *words, "--list", "model.dtype=bfloat16") == (0, "")
    code, out = said(capsys, *words, "model.dtype=bfloat16")
    runs = {p.stem for p in (tmp_path / "results" / "runs").glob("*.parquet")}
    assert code == 1 and "1 cells, 1 renamed\n" in out and out.partition("  renamed  quant=blockgtq bits=3 task=allocation: ")[2].strip() in runs


def test_what_a_method_cannot_do_is_refused_not_missing(tmp_path, capsys):
    code, out = said(capsys, "blockgtq_energy", "size=fast", "bits=0.5", f"results={tmp_path}")
    assert code == 0 and "1 refused" in out and "BlockGTQ takes an average of 1 to 8 bits" in out


def test_an_unknown_experiment_is_a_sentence(capsys):
    assert missing.main(["no_such"]) == 2 and "there is no experiment no_such; choose from:" in capsys.readouterr().err


def compute(cell: list[str]) -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from kvq import entry

    with initialize_config_dir(entry.CONFIG, version_base="1.3"):
        cfg = compose("config", cell, return_hydra_config=True)
    choices = {k: v for k, v in cfg.hydra.runtime.choices.items() if k in entry.GROUPS and v}
    run(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]), choices)
