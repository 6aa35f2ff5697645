"""The only place where model, codecs, task and results meet: one resolved config in, one parquet out."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from kvq import calibrate, models, report, results, statistics, store
from kvq.cache import ATTENTIONS, PREFILLS, coded_shapes
from kvq.errors import Refusal

EVERYTHING = ("calib", "seed")
"""What a codec depends on unless it says otherwise with `depends_on`: an fp16 row is the same for every calibration and seed."""


@dataclass
class Cell:
    """One run, resolved and identified before anything heavy is loaded."""

    cfg: DictConfig
    choices: dict[str, str]
    identity: dict
    run: str

    @property
    def is_reference(self) -> bool:
        return self.choices["quant"] == "fp16"


def prepare(cfg: DictConfig, choices: dict[str, str]) -> Cell:
    """Check all that can be checked without the model, and name the run. Raises Refusal with a sentence."""
    if isinstance(cfg.bits, bool) or not isinstance(cfg.bits, (int, float)) or not math.isfinite(cfg.bits):
        raise Refusal(f"bits={cfg.bits} is not a number.")
    for key, number in (("seed", cfg.seed), ("quant.sink", cfg.quant.sink), ("quant.window", cfg.quant.window)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise Refusal(f"{key}={number} is not a whole number from 0 on.")
    if cfg.prefill not in PREFILLS:
        raise Refusal(f"prefill={cfg.prefill} is not one of {', '.join(PREFILLS)}.")
    if cfg.attention not in ATTENTIONS:
        raise Refusal(f"attention={cfg.attention} is not one of {', '.join(ATTENTIONS)}.")
    if OmegaConf.is_missing(cfg.model, "path"):
        models.check("")
    if "path" in cfg.model:
        models.check(cfg.model.path)
    codecs = [_make(cfg.quant[kind], cfg.seed)() for kind in ("key", "value")]
    depends = set().union(*(getattr(codec, "depends_on", EVERYTHING) for codec in codecs))
    task = _instantiate(cfg.task)
    lossless = choices["quant"] == "fp16"  # its row is the same under every protocol
    if cfg.prefill == "exact" and task.one_pass and not lossless:
        raise Refusal(f"prefill=exact scores {choices['task']} in one full-precision pass, which would be fp16 under another name; use prefill=quantized.")
    if hasattr(task, "check"):
        task.check()
    resolved = OmegaConf.to_container(cfg, resolve=True)
    model = {k: v for k, v in resolved["model"].items() if k not in ("path", "device", "device_map", *models.TASK_DEFAULTS)}
    if "path" in cfg.model:
        model["content"] = models.fingerprint(cfg.model.path, cfg.model.revision)
    model["dtype"] = models.resolve(cfg.model.dtype, cfg.model.device)[0]
    calib = {k: v for k, v in resolved["calib"].items() if k not in ("memory_gb", "batch_size")}
    if "calib" in depends:
        calib["source"] = calibrate.content(cfg.calib.source)
    identity = {
        "model": model,
        "quant": {"name": choices["quant"], **resolved["quant"]},
        "task": {"name": choices["task"], **resolved["task"], "content": getattr(task, "content", None)},
        "prefill": "quantized" if lossless else cfg.prefill,
        "calib": calib if "calib" in depends else None,
        "seed": cfg.seed if "seed" in depends else None,
        **({"attention": "fused"} if cfg.attention == "fused" and not lossless else {}),
    }
    return Cell(cfg, choices, identity, results.run_id(identity))


def run(cfg: DictConfig, choices: dict[str, str]) -> pd.DataFrame:
    """Compute the cell unless its parquet exists, its fp16 reference first; return its rows."""
    cell = prepare(cfg, choices)
    folder = Path(cfg.results) / "runs"
    path = folder / f"{cell.run}.parquet"
    if path.is_file() and not cfg.force:
        report.say(f"run {cell.run} is finished; force=true repeats it")
        return report.show(results.read(path))
    reference = None
    if not cell.is_reference:
        fp16 = _reference(cfg, choices)
        if not (folder / f"{fp16.run}.parquet").is_file():
            _samples(cell, *_instantiate(cfg.model, drop=models.TASK_DEFAULTS))  # refuse before the long fp16 run
            _compute(fp16, folder, None)
        reference = _records(folder / f"{fp16.run}.jsonl")
    return report.show(_compute(cell, folder, reference))


def _reference(cfg: DictConfig, choices: dict[str, str]) -> Cell:
    fp16 = cfg.copy()
    fp16.quant = OmegaConf.load(models.ROOT / "conf" / "quant" / "fp16.yaml")
    fp16.force = False
    return prepare(fp16, {**choices, "quant": "fp16"})


def _compute(cell: Cell, folder: Path, reference: list[dict] | None) -> pd.DataFrame:
    cfg, task = cell.cfg, _instantiate(cell.cfg.task)
    model, tokenizer = _instantiate(cfg.model, drop=models.TASK_DEFAULTS)
    start = time.perf_counter()
    codecs = _codecs(cell, model, tokenizer)
    calibration_seconds = time.perf_counter() - start
    lm = _bind(cell, model, tokenizer, codecs)
    examples = task.examples(lm)
    partial = Path(cfg.outputs) / "partial" / f"{cell.run}.jsonl"
    if cfg.force:
        partial.unlink(missing_ok=True)
    done = {r["id"]: r for r in _records(partial)} if partial.is_file() else {}
    _append(partial, task, lm, [e for e in examples if e.id not in done], cell)
    by_id = {r["id"]: r for r in _records(partial)}
    records = [by_id[e.id] for e in examples]
    usage = pd.DataFrame([r["usage"] for r in records]).sum().to_dict()
    rows = _rows(cell, task, records, reference, {**usage, "calibration_seconds": calibration_seconds}, model)
    results.replace(folder / f"{cell.run}.jsonl", lambda t: t.write_text("".join(json.dumps(r) + "\n" for r in records)))
    frame = results.write(rows, folder / f"{cell.run}.parquet")
    partial.unlink()
    return frame


def _codecs(cell: Cell, model, tokenizer) -> list[tuple]:
    cfg, config = cell.cfg, model.config.get_text_config(decoder=True)
    make_key, make_value = (_make(cfg.quant[kind], cfg.seed) for kind in ("key", "value"))
    samples = _samples(cell, model, tokenizer)
    quant = {k: v for k, v in cell.identity["quant"].items() if k not in ("sink", "window", "bits")}
    text = results.run_id({"tokens": [s.tolist() for s in samples]})
    recipe = {"quant": cell.choices["quant"], "codec": quant, "model": cell.identity["model"], "text": text, "seed": cfg.seed, "code": store.code_version()}
    recipe = json.loads(json.dumps(recipe))
    return store.fetch(
        make_pairs=lambda: [(make_key(), make_value()) for _ in range(config.num_hidden_layers)],
        fit=lambda: _refuse(
            calibrate.fit, model, samples, make_key, make_value, seed=cfg.seed, memory_gb=cfg.calib.memory_gb, batch_size=cfg.calib.batch_size
        ),
        recipe=recipe, folder=Path(cfg.calibrations), device=model.device,
    )  # fmt: skip


def _samples(cell: Cell, model, tokenizer) -> list[torch.Tensor]:
    """The calibration text as token ids. Raises Refusal if there is too little or the codecs cannot serve the model's heads."""
    calib, config = cell.cfg.calib, model.config.get_text_config(decoder=True)
    for kind, shape in coded_shapes(model.config).items():
        codec = _make(cell.cfg.quant[kind], cell.cfg.seed)()
        if hasattr(codec, "check"):
            _refuse(codec.check, *shape)
    if cell.identity["calib"] is None:
        return [torch.arange(64) % config.vocab_size]
    return calibrate.windows(tokenizer, calib.source, calib.samples, min(calib.length, config.max_position_embeddings), calib.offset)


def _bind(cell: Cell, model, tokenizer, codecs) -> models.LM:
    options = {"sink": cell.cfg.quant.sink, "window": cell.cfg.quant.window, "prefill": cell.identity["prefill"], "memo": cell.cfg.memo, "attention": "reference" if cell.is_reference else cell.cfg.attention}
    plain = models.LM(model, tokenizer, cell.choices["model"], _plain(model))
    return models.LM(model, tokenizer, cell.choices["model"], codecs, reference=plain, **options)


def _plain(model) -> list[tuple]:
    """The 16-bit codecs of the reference, as conf/quant/fp16.yaml names them."""
    quant = OmegaConf.load(models.ROOT / "conf" / "quant" / "fp16.yaml")
    make_key, make_value = (_make(quant[kind], 0) for kind in ("key", "value"))
    samples = [torch.arange(8) % model.config.get_text_config(decoder=True).vocab_size]
    return calibrate.fit(model, samples, make_key, make_value, seed=0, memory_gb=1)


def _append(path: Path, task, lm, examples, cell: Cell) -> None:
    """Run the examples, each record on disk before the next starts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_torn_line(path)
    title = f"{cell.choices['task']} {cell.choices['quant']}"
    with open(path, "a") as stream:
        start = time.perf_counter()
        for record in tqdm(task.run(lm, examples), total=len(examples), desc=title, unit="example", disable=None):
            now = time.perf_counter()
            record["usage"] = {**lm.usage(), "task_seconds": now - start}
            start = now
            stream.write(json.dumps(record) + "\n")
            stream.flush()


def _drop_torn_line(path: Path) -> None:
    if path.is_file():
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            results.replace(path, lambda temporary: temporary.write_text(whole))


def _records(path: Path) -> list[dict]:
    if not path.is_file():
        raise Refusal(f"{path} is missing although its rows exist; run the fp16 cell again with quant=fp16 force=true.")
    records = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise Refusal(f"{path} holds a damaged line; delete it and run again with force=true.") from error
    return records


def _rows(cell: Cell, task, records, reference, usage, model) -> list[dict]:
    """Result rows of one run. Raises RuntimeError through the schema if nothing was compressed."""
    cfg, config = cell.cfg, OmegaConf.to_container(cell.cfg, resolve=True)
    tables = usage.get("table_bytes", 0)
    if not usage.get("coded_values"):
        raise Refusal(
            f"Nothing was compressed: every token stayed exact (quant.sink={cfg.quant.sink}, quant.window={cfg.quant.window}); "
            "lower them or use longer prompts. Nothing was written."
        )
    stored = 8 * usage["code_bytes"] / usage["coded_values"]
    label = (cfg.quant.key.bits + cfg.quant.value.bits) / 2
    common = {
        "run": cell.run, "model": cell.choices["model"], "quant": cell.choices["quant"], "task": cell.choices["task"], "data": str(task.data),
        "calib": cell.choices["calib"] if cell.identity["calib"] else "none", "bits": label, "bits_stored": stored,
        "bits_total": 8 * (usage["code_bytes"] + usage["exact_bytes"] + tables) / usage["slot_values"],
        "encoded_tokens": int(usage["encoded"]), "seed": cfg.seed, "config": json.dumps({**config, "identity": cell.identity}, sort_keys=True),
        **results.provenance(_device_name(model)),
    }  # fmt: skip
    rows = [{**common, **row} for row in statistics.summarize(records).to_dict("records")]
    for suffix, some in (("", records), ("_fp16", reference or [])):
        derived = task.derived(some) if some and hasattr(task, "derived") else []
        rows += [{**common, **row, "metric": row["metric"] + suffix} for row in derived]
    fp16 = records if cell.is_reference else reference
    if hasattr(task, "perfect"):
        rows += [{**common, **row, "metric": statistics.WEAK} for row in statistics.weakness(fp16, task.metric, task.perfect).to_dict("records")]
    if reference is not None:
        for suffix, table in (("fp16", statistics.summarize(reference)), ("minus_fp16", statistics.paired(records, reference, task.metric))):
            table = table[table.metric == task.metric] if "metric" in table else table
            rows += [{**common, **row, "metric": f"{task.metric}_{suffix}"} for row in table.to_dict("records")]
    rate = len(records) / usage["task_seconds"]  # as run: the fp16 forward that perplexity compares with is included
    once = {"tokens": usage["tokens"], "compression": 16 / stored, "examples_per_second": rate, **{k: v for k, v in usage.items() if k.endswith("_seconds")}}
    rows += [{**common, "subset": "run", "metric": k, "value": v, "stderr": 0.0, "n": len(records)} for k, v in once.items()]
    return rows


def _device_name(model) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"


def _make(node: DictConfig, seed: int):
    partial = _instantiate(node)
    return lambda: _refuse(partial, seed=seed)


def _instantiate(node: DictConfig, drop: tuple[str, ...] = ()):
    from hydra.errors import InstantiationException

    node = OmegaConf.create({k: v for k, v in OmegaConf.to_container(node, resolve=True).items() if k not in drop})
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise Refusal(str(error.__cause__)) from error
        raise


def _refuse(call, *arguments, **keywords):
    """Call a codec's code; its ValueError is a sentence for the user."""
    try:
        return call(*arguments, **keywords)
    except Refusal:
        raise
    except ValueError as error:
        raise Refusal(str(error)) from error
