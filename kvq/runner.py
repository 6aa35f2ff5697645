"""The only place where model, codecs, task and results meet: one resolved config in, one parquet out."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pandas as pd
import torch
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from kvq import calibrate, estimate, models, parts, placement, predictions, report, results, rows, store
from kvq.cache import ATTENTIONS, PREFILLS, coded_shapes
from kvq.cell import Cell
from kvq.claim import Busy, Claim
from kvq.errors import Refusal

EVERYTHING = ("calib", "seed")
"""What a codec depends on unless it says otherwise with `depends_on`: an fp16 row is the same for every calibration and seed."""


def prepare(cfg: DictConfig, choices: dict[str, str]) -> Cell:
    """Check all that can be checked without the model, and name the run. Raises Refusal with a sentence."""
    for key, bits in (("bits", cfg.bits), ("quant.key.bits", cfg.quant.key.bits), ("quant.value.bits", cfg.quant.value.bits)):
        if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not math.isfinite(bits):
            raise Refusal(f"{key}={bits} is not a number.")
    whole = {"seed": (cfg.seed, 0), "quant.sink": (cfg.quant.sink, 0), "quant.window": (cfg.quant.window, 0)}
    whole |= {"calib.samples": (cfg.calib.samples, 1), "calib.length": (cfg.calib.length, 1), "calib.offset": (cfg.calib.offset, 0)}
    for key, (number, least) in whole.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise Refusal(f"{key}={number} is not a whole number from {least} on.")
    parts.check(cfg.part, cfg.parts, cfg.force)
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
    return Cell(cfg, choices, identity, results.run_id(identity), resolved)


def run(cfg: DictConfig, choices: dict[str, str], wait: bool = True, note=lambda **_: None) -> pd.DataFrame | None:
    """Compute the cell unless its parquet exists, its fp16 reference first; return its rows (None after dry_run).

    None as well where this was one part of the cell (part, parts) and others are still to come.
    wait: wait for another process that computes the same cell, instead of raising claim.Busy. note: told run=<id> and finished=<bool>.
    """
    cell = prepare(cfg, choices)
    note(run=cell.run, finished=finished(cell), **({"part": parts.suffix(cfg.part, cfg.parts)} if cfg.parts > 1 else {}))
    if cfg.dry_run:
        return estimate.show(cell, _estimate(cell), finished(cell))
    if finished(cell):
        return _again(cell)
    _estimate(cell).refuse_if_too_large()
    with _claim(cell, wait) as claims:
        if finished(cell):  # by the process that was waited for
            return _again(cell)
        reference = None
        if not cell.is_reference and not getattr(_instantiate(cfg.task), "alone", False):  # a task may bring its own fp16
            fp16 = _reference(cfg, choices)
            if not finished(fp16):
                _samples(cell, *_load(cfg))  # refuse before the long fp16 run
                with _claim(fp16, wait=True) as theirs:
                    if not finished(fp16):
                        _compute(fp16, None, theirs)
            reference = fp16
        frame = _compute(cell, reference, claims)
        return frame if frame is None else report.show(frame)


def finished(cell: Cell) -> bool:
    return cell.path.is_file() and not cell.cfg.force


def _again(cell: Cell) -> pd.DataFrame:
    frame = results.read(cell.path)
    if set(frame.run) != {cell.run}:
        raise Refusal(f"{cell.path} holds rows of run {frame.run.iloc[0]}; delete it and run the cell again.")
    with suppress(Busy, Refusal), _claim(cell, wait=False):  # whoever repeats the run with force=true keeps what it has; a folder may be read-only
        _forget(cell)  # left by a kill between the last two steps
    first = frame.iloc[0]
    report.say(f"run {cell.run} is finished ({first.date[:10]} on {first.device}, rows in {cell.path.parent.parent}); force=true repeats it")
    return report.show(frame)


@contextmanager
def _claim(cell: Cell, wait: bool) -> Iterator[list[Claim]]:
    """The cell's rows and its unfinished records for this process alone; the two folders may be shared by different machines."""
    with ExitStack() as stack:
        name = cell.run + parts.suffix(cell.cfg.part, cell.cfg.parts)
        yield [stack.enter_context(Claim(folder, name, wait)) for folder in _claimed(cell)]


def _claimed(cell: Cell) -> tuple[Path, Path]:
    return cell.path.parent.parent / ".claims", Path(cell.cfg.outputs) / "claims"


def _forget(cell: Cell) -> None:
    for path in cell.partial.parent.glob(f"{cell.run}*.jsonl"):  # of any division into parts: none may outlive the rows
        path.unlink(missing_ok=True)


def _predictions(cell: Cell) -> list[dict]:
    path = cell.path.with_suffix(".jsonl")
    if not path.is_file():
        raise Refusal(f"{path} is missing although its rows exist; run the fp16 cell again with quant=fp16 force=true.")
    return predictions.read(path)


def _reference(cfg: DictConfig, choices: dict[str, str]) -> Cell:
    fp16 = cfg.copy()
    fp16.quant = OmegaConf.load(models.ROOT / "conf" / "quant" / "fp16.yaml")
    fp16.force = False
    return prepare(fp16, {**choices, "quant": "fp16"})


def _load(cfg: DictConfig):
    return _instantiate(cfg.model, drop=models.TASK_DEFAULTS)


def _compute(cell: Cell, reference: Cell | None, claims: list[Claim]) -> pd.DataFrame | None:
    cfg, task = cell.cfg, _instantiate(cell.cfg.task)
    with ExitStack() as stack:
        log = stack.enter_context(_instantiate(cfg.logger).run(cell))
        model, tokenizer = _load(cfg)
        start = time.perf_counter()
        codecs = _codecs(cell, model, tokenizer)
        calibration_seconds = time.perf_counter() - start
        lm = _bind(cell, model, tokenizer, codecs)
        examples = task.examples(lm)
        if cfg.force:
            cell.partial.unlink(missing_ok=True)
        mine = parts.stretch(examples, cfg.part, cfg.parts)
        done = {r["id"]: r for r in predictions.resume(cell.partial, cfg.task.get("batch_size"), len(mine))}
        log.resume(list(done.values()), len(mine))
        predictions.append(cell.partial, _timed(task, lm, [e for e in mine if e.id not in done], cell, log))
        if cfg.parts > 1:  # one writer: parts may end at the same moment
            claims = [*claims, stack.enter_context(Claim(_claimed(cell)[0], cell.run, wait=True))]
            if finished(cell):
                return results.read(cell.path)
        records = parts.gather(cell.partials, examples)
        if records is None and cfg.parts == 1:
            raise Refusal(f"{cell.partial} was deleted while run {cell.run} was computed; run the cell again.")
        if records is None:
            report.say(f"part {cfg.part} of {cfg.parts} of run {cell.run} is done; the rows follow with the last part")
            return None
        usage = {**pd.DataFrame([r["usage"] for r in records]).sum().to_dict(), "calibration_seconds": calibration_seconds}
        table = _refuse(rows.of_run, cell, task, records, reference and _predictions(reference), usage, _device_name(model), store.content(codecs))
        for claim in claims:
            claim.check()
        for torn in cell.path.parent.glob(f".{cell.run}.*"):  # left by a kill in the middle of a write
            torn.unlink()
        text = "".join(map(predictions.line, records))
        results.replace(cell.path.with_suffix(".jsonl"), lambda t: t.write_text(text, encoding="utf-8"))
        frame = results.write(table, cell.path)
        _forget(cell)
        log.finish(frame, records)
    return frame


def _timed(task, lm, examples, cell: Cell, log) -> Iterator[dict]:
    """The task's records with what each took; the logger sees them after the caller has written them."""
    title = f"{cell.choices['task']} {cell.choices['quant']}"
    start = time.perf_counter()
    for record in tqdm(task.run(lm, examples), total=len(examples), desc=title, unit="example", disable=None):
        now = time.perf_counter()
        record["usage"] = {**lm.usage(), "task_seconds": now - start}
        start = now
        yield record
        log.example(record)


def _codecs(cell: Cell, model, tokenizer) -> list[tuple]:
    cfg, config = cell.cfg, model.config.get_text_config(decoder=True)
    make_key, make_value = (_make(cfg.quant[kind], cfg.seed) for kind in ("key", "value"))
    samples = _samples(cell, model, tokenizer)
    quant = {k: v for k, v in cell.identity["quant"].items() if k not in ("sink", "window", "bits")}
    recipe = {
        "quant": cell.choices["quant"], "codec": quant, "model": cell.identity["model"], "revision": getattr(model.config, "_commit_hash", None),
        "tokens": sum(map(len, samples)), "text": results.run_id({"tokens": [s.tolist() for s in samples]}), "seed": cfg.seed, "code": store.code_version(),
    }  # fmt: skip
    return store.fetch(
        make_pairs=lambda: [(make_key(), make_value()) for _ in range(config.num_hidden_layers)],
        fit=lambda: _refuse(
            calibrate.fit, model, samples, make_key, make_value, seed=cfg.seed, memory_gb=cfg.calib.memory_gb, batch_size=cfg.calib.batch_size
        ),
        recipe=json.loads(json.dumps(recipe)), folder=Path(cfg.calibrations), devices=placement.layer_devices(model), may_fit=cfg.fit,
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
    options = {"sink": cell.cfg.quant.sink, "window": cell.cfg.quant.window, "prefill": cell.identity["prefill"], "memo": cell.cfg.memo}
    options["attention"] = "reference" if cell.is_reference else cell.cfg.attention
    plain = models.LM(model, tokenizer, cell.choices["model"], _plain(model))
    return models.LM(model, tokenizer, cell.choices["model"], codecs, reference=plain, **options)


def _plain(model) -> list[tuple]:
    """The 16-bit codecs of the reference, as conf/quant/fp16.yaml names them."""
    quant = OmegaConf.load(models.ROOT / "conf" / "quant" / "fp16.yaml")
    make_key, make_value = (_make(quant[kind], 0) for kind in ("key", "value"))
    samples = [torch.arange(8) % model.config.get_text_config(decoder=True).vocab_size]
    return calibrate.fit(model, samples, make_key, make_value, seed=0, memory_gb=1)


def _estimate(cell: Cell) -> "estimate.Estimate":
    codecs = {kind: _make(cell.cfg.quant[kind], cell.cfg.seed) for kind in ("key", "value")}
    return estimate.of(cell, _instantiate(cell.cfg.task), codecs, lambda: _config(cell.cfg))


def _config(cfg: DictConfig):
    """The config of a model without a path: from its loader's `config`, which makes no weights, where it has one."""
    made = getattr(get_method(cfg.model._target_), "config", None)
    return made(**OmegaConf.to_container(cfg.model, resolve=True)) if made else _load(cfg)[0].config


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
    """Call code that does not know Refusal; its ValueError is a sentence for the user."""
    try:
        return call(*arguments, **keywords)
    except Refusal:
        raise
    except ValueError as error:
        raise Refusal(str(error)) from error
