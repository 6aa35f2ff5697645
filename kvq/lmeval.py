"""lm-eval on a quantized cache: an HFLM whose forward and generate calls fill the cache they are given, and quiet task loading.

lm-eval's own model class calls `model(ids)` and `model.generate(ids)`, which build an ordinary cache: a codec would never run. Here
both pass a fresh cache of the bound LM, so likelihoods see the same loss as generation.

Departures from `HFLM`, none of the first three beyond the last bits of a likelihood: batches hold inputs of one length only, so that no
padding can enter an exact window or a token group; of a forward only the logits that are scored are computed; requests that begin
alike (few-shot examples, the choices of one question) read that beginning once where codes do not depend on what follows; requests
that lm-eval shortens from the left are remembered instead of only logged; answers end at the turn ends of all model families
(`kvq.prompt`), and the checkpoint's generation config contributes nothing but special tokens (`kvq.models.LM`).
"""

import contextlib
import copy
import difflib
import functools
import inspect
import io
import itertools
import json
import logging
import random
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from kvq.batches import together
from kvq.errors import Refusal
from kvq.models import no_single, padding_behind
from kvq.prompt import stop_ids

HUB_TIMEOUT = 10  # seconds


@contextlib.contextmanager
def quiet():
    """Hold back lm-eval's log lines, warnings and progress bars; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "jieba")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextlib.contextmanager
def seeded(seed: int):
    """Python's and numpy's global generators start from `seed` inside and go on as before behind: RULER draws its prompts from them."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class CachedLM(HFLM):
    """lm-eval's view of an LM: every forward and every generate call gets a fresh cache from `lm.new_cache()`.

    lm: has .model, .tokenizer, .max_length, .new_cache(). chunk: prefill prompts of generation tasks in pieces of this many tokens.
    all_logits: compute the unscored logits too and the softmax in the model's dtype, as the stock model does; at batch size 1 likelihoods
    then equal its to the last bit. Otherwise the softmax is float32.
    truncated: the contexts of requests that were too long and lost tokens on the left.
    """

    def __init__(self, lm, batch_size: int = 1, chunk: int | None = None, all_logits: bool = False):
        with quiet():
            super().__init__(
                pretrained=lm.model, tokenizer=lm.tokenizer, backend="causal", batch_size=batch_size, max_length=lm.max_length,
                softmax_dtype=None if all_logits else "float32",
            )  # fmt: skip
        self.lm, self.chunk = lm, chunk
        self.truncated: set[str] = set()
        self._keep = 0
        self._can_keep = not all_logits and "logits_to_keep" in inspect.signature(lm.model.forward).parameters

    def _model_call(self, inps: Tensor, attn_mask=None, labels=None) -> Tensor:
        """[B, T] ids to the last `_keep` logits [B, K, V] (0: all). Right padding is harmless to the tokens before it."""
        keep = {"logits_to_keep": self._keep} if self._keep and self._can_keep else {}
        with torch.no_grad():
            return self.model(input_ids=inps, past_key_values=self.lm.new_cache(), use_cache=True, **keep).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs) -> Tensor:
        mask = generation_kwargs.pop("attention_mask")
        rows = [row[row_mask.bool()].tolist() for row, row_mask in zip(context, mask)]
        shared, alike = together(rows)[0]
        if self.lm.shareable and len(rows) > 1 and len(alike) == len(rows) and shared:
            context, mask = padding_behind(context, mask, shared)
            cache = self.lm.begin(rows[0][:shared], len(rows), self.chunk)
            for layer in cache.quantized_layers:
                layer.pads = (mask == 0).sum(1).tolist()
        else:
            cache = self.lm.new_cache()
        chunk = no_single(self.chunk, context.shape[1] - cache.get_seq_length())
        ends = {"eos_token_id": stop_ids(self.lm), "prefill_chunk_size": chunk, "past_key_values": cache, "attention_mask": mask}
        return super()._model_generate(context, max_length, stop, **ends, **generation_kwargs)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None) -> list[tuple[float, bool]]:
        """lm-eval's scoring, called once per batch of equally long inputs.

        requests: (strings, context ids, continuation ids). Requests that differ in their last token alone share one forward.
        """
        shared = defaultdict(list)
        for index, (strings, context, continuation) in enumerate(requests):
            if strings is not None and len(context) + len(continuation) > self.max_length + 1:
                self.truncated.add(strings[0])
            shared[tuple(context + continuation[:-1])].append(index)
        size = override_bs or self.batch_size
        answers, left = [None] * len(requests), shared
        if self.lm.shareable and self._can_keep:
            left = self._alike(requests, shared, size, answers)
        lengths = defaultdict(list)
        for inputs, indices in left.items():
            lengths[min(len(inputs), self.max_length)].append(indices)
        for length in sorted(lengths, reverse=True):  # longest first: what does not fit in memory fails at once
            groups = lengths[length]
            for start in range(0, len(groups), size):
                batch = [index for group in groups[start : start + size] for index in group]
                # HFLM reads positions from the end of what it gets, so dropping logits in front is safe.
                self._keep = max(len(requests[index][2]) for index in batch)
                try:
                    scored = super()._loglikelihood_tokens([requests[i] for i in batch], disable_tqdm=True, override_bs=size)
                finally:
                    self._keep = 0
                for index, answer in zip(batch, scored, strict=True):
                    answers[index] = answer
        return answers

    def _alike(self, requests, shared: dict[tuple, list[int]], size: int, answers: list) -> dict[tuple, list[int]]:
        """Score the inputs that begin alike into `answers`, their common beginning read once; return the inputs that share nothing."""
        inputs = list(shared)
        scored = [max(len(requests[i][2]) for i in shared[ids]) for ids in inputs]  # logits needed at the end
        heads = [list(ids[-self.max_length :][:-n]) for ids, n in zip(inputs, scored)]
        left = {}
        for common, group in together(heads):
            if not common:
                left = {inputs[i]: shared[inputs[i]] for i in group}
                continue
            for start in range(0, len(group), size):
                batch = group[start : start + size]
                for i, logits in zip(batch, self._go_on(heads[batch[0]][:common], [list(inputs[i][-self.max_length :]) for i in batch], [scored[i] for i in batch])):
                    for index in shared[inputs[i]]:
                        tokens = torch.tensor(requests[index][2], device=logits.device)
                        rows = logits[-len(tokens) :]
                        answers[index] = float(rows.gather(1, tokens[:, None]).sum()), bool((rows.argmax(-1) == tokens).all())
        return left

    @torch.no_grad()
    def _go_on(self, beginning: list[int], rows: list[list[int]], scored: list[int]) -> list[Tensor]:
        """Log-probabilities [n, V] of the last n = scored[i] positions of each row, all of which begin alike; padded on the right."""
        cache = self.lm.begin(beginning, len(rows), self.chunk)
        read = cache.get_seq_length()
        width = max(map(len, rows)) - read
        ids = torch.tensor([row[read:] + [0] * (width - len(row) + read) for row in rows], device=self.device)
        pads = [width - len(row) + read for row in rows]
        for layer in cache.quantized_layers:
            layer.pads = pads
        keep = max(pad + n for pad, n in zip(pads, scored))
        positions = torch.arange(read, read + width, device=self.device).expand(len(rows), -1)
        logits = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
        return [logits[b, keep - pad - n : keep - pad].log_softmax(-1, dtype=self.softmax_dtype) for b, (pad, n) in enumerate(zip(pads, scored))]

    def tok_batch_encode(self, strings, padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False):
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len and ids.shape[1] > left_truncate_len:
            self.truncated.update(s for s, n in zip(strings, mask.sum(1).tolist()) if n > left_truncate_len)
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask


@functools.cache
def library() -> Path:
    """The folder of lm-eval's own task definitions."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def read_file(file: Path, limit: int | None = None) -> list[dict]:
    """The first `limit` rows of a .jsonl or .parquet file. Raises Refusal with the record number on broken JSON."""
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file).slice(0, limit).to_pylist()
    rows = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(itertools.islice((line for line in lines if line.strip()), limit), 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise Refusal(f"{file}, record {number}, is not JSON: {error}.") from error
    return rows


def find_file(folder: Path, name: str) -> Path | None:
    """<folder>/<name>.jsonl or .parquet, or None."""
    return next((f for f in (folder / f"{name}.jsonl", folder / f"{name}.parquet") if f.is_file()), None)


@functools.cache
def task_config(path: str | Path) -> dict:
    """The resolved YAML of a task, by its path (below lm-eval's task folder, or absolute), with its functions imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    with quiet():
        try:
            return load_yaml(library() / path)
        except ImportError as error:
            raise Refusal(f"lm-eval's {path} needs a package that is missing: {error}") from error


@functools.lru_cache(maxsize=8)
def manager(names: tuple[str, ...], include_path: str | None = None, metadata: str = "{}"):
    """A TaskManager that knows `names`; only their folders are indexed where names lead to folders. metadata: JSON for tasks that make their data.

    The full index (14,683 names) takes 4 to 9 seconds and is built only for names not found in a folder called like them.
    """
    from lm_eval.tasks import TaskManager

    folders = {folder for folder in library().iterdir() if folder.is_dir() and any(_may_hold(folder.name, name) for name in names)}
    extra = [include_path] if include_path else []
    with quiet():
        found = TaskManager(include_defaults=False, include_path=[*sorted(map(str, folders)), *extra], metadata=json.loads(metadata))
        if any(name not in found.task_index for name in names):
            found = TaskManager(include_path=extra or None, metadata=json.loads(metadata))
    unknown = [name for name in names if name not in found.task_index]
    if unknown:
        close = difflib.get_close_matches(unknown[0], found.all_tasks, n=5)
        hint = f" Close: {', '.join(close)}." if close else ""
        raise Refusal(f"lm-eval has no task {', '.join(unknown)}.{hint} All names: `lm_eval ls tasks`.")
    return found


def _may_hold(folder: str, name: str) -> bool:
    """Whether a task may live in a folder, by their names: `truthfulqa_mc2` in truthfulqa, `hendrycks_math500` in hendrycks_math, RULER's needles in ruler."""
    return name.startswith(folder) or (folder == "ruler" and name.startswith("niah_"))


def load_task(config: dict, splits: dict | None = None):
    """An lm-eval task from its YAML's config; `splits` ({split: datasets.Dataset}) replaces the data and nothing else."""
    from lm_eval.api.task import ConfigurableTask

    config = copy.deepcopy({key: value for key, value in config.items() if key not in ("tag", "group", "task_list")})
    if splits is not None:
        config["custom_dataset"] = lambda **_: splits
    with quiet():
        return ConfigurableTask(config=config)


def hub_dataset(path: str, name: str | None, remedy: str):
    """(dataset, revision) from the hub or the local hub cache; raises Refusal with `remedy` when neither has it."""
    import datasets

    revision, cached = hub_revision(path, remedy)
    try:
        with quiet():
            return datasets.load_dataset(cached or path, name, **({} if cached else {"revision": revision})), revision
    except Exception as error:
        raise Refusal(f"{path} {name or ''} cannot be loaded: {str(error).strip().splitlines()[0]} {remedy}") from error


def hub_revision(path: str, remedy: str) -> tuple[str, str | None]:
    """(revision of a hub data set, its cached folder where the hub cannot be reached); Refusal with `remedy` if it is in neither.

    Asked before the data library is: that one retries for half a minute before it admits that there is no network.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return HfApi().dataset_info(path, timeout=HUB_TIMEOUT).sha, None
    except RepositoryNotFoundError as error:
        raise Refusal(f"The hub has no data set {path}, or it is gated. {remedy}") from error
    except Exception as error:  # each transport library has its own errors for "no network"
        try:
            folder = Path(snapshot_download(path, repo_type="dataset", local_files_only=True))
        except LocalEntryNotFoundError:
            raise Refusal(f"{path} cannot be loaded: the hub cannot be reached and the data was never downloaded here. {remedy}") from error
        return folder.name, str(folder)
