"""Every task reads the cache, and every task that needs the hub says so in one sentence where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
TASKS = sorted(p.stem for p in (ROOT / "conf" / "task").glob("*.yaml"))
OFFLINE = {
    "aime": ["task.data=embedded", "task.limit=2", "task.repeats=1", "task.max_new_tokens=12"],
    "allocation": ["task.samples=1", "task.context=128"],
    "attention": ["task.data=embedded", "task.context=128", "task.queries=32"],
    "choices": ["task.limit=3", "task.lines=8"],
    "fewshot": ["task.tasks=[piqa]", "task.num_fewshot=0", "task.data={data}"],
    "gradients": ["task.samples=1", "task.context=128"],
    "gsm8k": ["task.data={data}", "task.num_fewshot=1", "task.max_new_tokens=8"],
    "lm_eval": ["task.tasks=[piqa]", "task.data={data}"],
    "logit_mae": ["task.data=embedded", "task.context=64", "task.samples=2", "task.reach=64", "task.offsets=5"],
    "longbench": ["task.data=embedded", "task.limit=1", "task.context=640", "task.max_new_tokens=12", "task.subsets=[qasper,hotpotqa,trec]"],
    "math500": ["task.data={data}", "task.max_new_tokens=8"],
    "niah": ["task.data=embedded", "task.limit=1", "task.depths=1", "task.lengths=[768]", "task.max_new_tokens=12"],
    "perplexity": ["task.data=embedded", "task.limit=2", "task.context=128"],
    "reconstruction": ["task.data=embedded", "task.samples=1", "task.context=64"],
}
"""How to run each task small and without a network."""
HUB = {
    "aime": ["task.data=hub"],
    "fewshot": [],
    "gsm8k": [],
    "lm_eval": ["task.tasks=[piqa]"],
    "longbench": ["task.data=hub"],
    "math500": [],
    "niah": ["task.data=hub"],
    "perplexity": ["task.data=hub"],
    "ruler": [],
}
"""How each task asks for data from the hub."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few rows of lm-eval tasks in their upstream columns."""
    folder = tmp_path_factory.mktemp("rows")
    sums = [{"question": f"What is {i} plus {i}?", "answer": f"It is twice {i}.\n#### {2 * i}"} for i in range(1, 5)]
    goals = [{"goal": f"How to open box {i}?", "sol1": f"Lift its lid {i} times.", "sol2": "Paint it.", "label": i % 2} for i in range(4)]
    proofs = [{"problem": f"Find ${i}+1$.", "solution": f"It is $\\boxed{{{i + 1}}}$.", "answer": str(i + 1)} for i in range(3)]
    for task, splits in {"gsm8k": {"train": sums, "test": sums[:3]}, "piqa": {"validation": goals}, "hendrycks_math500": {"test": proofs}}.items():
        (folder / task).mkdir()
        for split, rows in splits.items():
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def compose(*words):
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(words))


def test_every_task_is_covered():
    """All but those that time and score nothing (tests/tasks/test_latency.py: a cache that is read wrongly is not timed)."""
    assert set(TASKS) - {"latency", "latency_compiled"} == set(OFFLINE) | set(HUB), "say here how a new task runs without a network, or how it asks the hub"


def canary(model, task, data, folder):
    """Run task under quant=zero; return (fp16 records, zero records, rows)."""
    from kvq.runner import run

    words = [f"model={model}", "quant=zero", f"task={task}", "calib.samples=1", "calib.length=128", f"results={folder}/results", f"outputs={folder}/outputs"]
    cfg = compose(*words, *(word.format(data=data) for word in OFFLINE[task]))
    frame = run(cfg, {"model": model, "quant": "zero", "task": task, "calib": "text"})
    files = {pd.read_parquet(f)["quant"][0]: f.with_suffix(".jsonl") for f in (folder / "results" / "runs").glob("*.parquet")}
    return *([json.loads(line) for line in files[name].read_text().splitlines()] for name in ("fp16", "zero")), frame


@pytest.mark.parametrize("task", sorted(OFFLINE))
def test_forgetting_everything_changes_every_task(task, data, tmp_path):
    plain, zeroed, frame = canary("tiny", task, data, tmp_path)
    assert [r["id"] for r in plain] == [r["id"] for r in zeroed] and len(plain) > 1
    subsets = {r["subset"] for r in plain}
    for subset in subsets:
        pairs = [(a, b) for a, b in zip(plain, zeroed) if a["subset"] == subset]
        changed = [any(a.get(key) != b.get(key) for key in ("metrics", "prediction", "text")) for a, b in pairs]
        assert any(changed), f"{subset} does not read the cache"
    assert (frame.encoded_tokens > 0).all() and (frame[frame.metric == "examples_per_second"].value > 0).all()


def test_forgetting_everything_costs_the_stand_in_its_score(data, tmp_path):
    plain, zeroed, frame = canary("standin", "choices", data, tmp_path)
    value = frame.set_index("metric").value
    assert value["gold_loss"] > sum(r["metrics"]["gold_loss"] for r in plain) / len(plain) + 1


ASK = """
import json, sys, time
sys.path.insert(0, ".")
from tests.tasks.test_canary import HUB, compose
from kvq.errors import Refusal
from kvq.runner import prepare
for task, words in HUB.items():
    start = time.monotonic()
    try:
        prepare(compose("model=local", "model.path=kvq/standin/model", "quant=int4", f"task={task}", *words), {"model": "local", "quant": "int4", "task": task, "calib": "text"})
        said = None
    except Refusal as error:
        said = str(error)
    print("@" + json.dumps([task, said, time.monotonic() - start]), flush=True)
"""


def test_without_a_hub_each_task_refuses_in_one_sentence(tmp_path):
    """One process for all: the hub's address is read at import. Port 9 refuses connections at once."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    said = {task: (sentence, seconds) for task, sentence, seconds in (json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@"))}
    assert set(said) == set(HUB), done.stderr[-2000:]
    for task, (sentence, seconds) in said.items():
        assert sentence and "\n" not in sentence and "hub cannot be reached" in sentence, (task, sentence)
        assert seconds < 60, (task, seconds)  # lm-eval's index on a busy machine takes a while
