"""Loading a causal language model and binding it to a cache: any transformers folder or hub id, once per process."""

import functools
import hashlib
import inspect
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria
from transformers.utils import logging

from kvq.batches import LEAST
from kvq.cache import ATTENTION, QuantizedCache, layer_kinds
from kvq.errors import Refusal
from kvq.quantizer import table_bytes
from kvq.rope import Rope

ROOT = Path(__file__).resolve().parent.parent
TASK_DEFAULTS = ("data", "text", "context", "limit", "batch_size")
"""Keys of conf/model that tasks and calibration take their defaults from; they say nothing about the model itself."""


@functools.lru_cache(maxsize=1)
def _load(path: str, revision: str | None, dtype: str, device: str, device_map: str | None, overrides: str):
    source = folder(path) or path
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # a bar of returns in a log file
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        for key, value in json.loads(overrides).items():
            setattr(config, key, value)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(
            source, config=config, revision=revision, dtype=getattr(torch, dtype), device_map=device_map, attn_implementation=ATTENTION
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(f"model.path={path} cannot be loaded: {reason} Without network, download it elsewhere and pass model=local model.path=<folder>.") from error
    return (model if device_map else model.to(device)).eval(), tokenizer


def load(path: str, revision: str | None = None, dtype: str = "auto", device: str = "auto", device_map: str | None = None, overrides: dict | None = None):
    """(model, tokenizer) from a transformers folder or a hub id; loaded once per process and kept.

    dtype `auto` is bfloat16 on a GPU and float32 on a CPU; `overrides` sets config attributes (sliding_window: null for
    Mistral-v0.1). Raises Refusal if the folder lacks a config or a tokenizer, or the hub cannot be reached.
    """
    check(path)
    dtype, device = resolve(dtype, device)
    return _load(path, revision, dtype, device, device_map, json.dumps(dict(overrides or {}), sort_keys=True))


def resolve(dtype: str, device: str) -> tuple[str, str]:
    """(dtype, device) with `auto` replaced. Raises Refusal on an unknown dtype and on a GPU that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise Refusal(f"model.device={device}: there are {torch.cuda.device_count()} CUDA devices here; use model.device=auto or cpu.")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise Refusal(f"model.dtype={dtype} is not one of auto, float32, bfloat16, float16.")
    return dtype, device


def folder(path: str) -> Path | None:
    """The local folder that `path` means (relative to the working directory or the repository), or None for a hub id."""
    for candidate in (Path(path).expanduser(), ROOT / path):
        if candidate.is_dir():
            return candidate.resolve()
    return None


def check(path: str) -> None:
    """Refuse, before loading anything, a path that cannot be a model."""
    if not path or path == "???":
        raise Refusal("model=local needs model.path=<folder of a transformers causal language model>.")
    found = folder(path)
    if found is None:
        if path.startswith(("/", ".", "~")) or path.count("/") > 1:
            raise Refusal(f"model.path={path} does not exist; give a folder with config.json, tokenizer and safetensors, or a hub id like org/name.")
        return
    if not (found / "config.json").is_file():
        raise Refusal(f"{found} is not a model folder: it has no config.json.")
    if not any((found / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")):
        raise Refusal(f"{found} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json); save one there with tokenizer.save_pretrained.")


def fingerprint(path: str, revision: str | None = None) -> str:
    """Identity of a model by content: 16 hex digits over its files, or the hub id and revision."""
    found = folder(path)
    digest = hashlib.sha256()
    if found is None:
        digest.update(f"{path}@{revision or 'main'}".encode())
    else:
        for file in sorted(found.glob("*")):
            if file.suffix in (".json", ".safetensors", ".model", ".bin") and file.is_file():
                digest.update(file.name.encode() + _file_hash(file, file.stat().st_mtime_ns))
    return digest.hexdigest()[:16]


@functools.cache
def _file_hash(file: Path, mtime: int) -> bytes:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def special_tokens_only(config: GenerationConfig) -> GenerationConfig:
    """The ids that begin, end and pad a text, without the checkpoint's taste in sampling.

    transformers merges a checkpoint's repetition_penalty, min_new_tokens and the like into every generate call, greedy ones included
    (Qwen2.5-Instruct: repetition_penalty 1.05), which would change scores behind the task's back.
    """
    return GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)


class LM:
    """A model bound to one way of caching. Tasks see nothing else.

    codecs: one (key, value) pair per layer, (None, None) where the library's cache stays. `reference` is the same model with the 16-bit cache.
    The model's generation config loses everything but its special tokens: a task alone says how its answers are drawn.
    """

    def __init__(self, model, tokenizer, name: str, codecs: list, *, sink=0, window=0, prefill="quantized", memo=True, attention="reference", reference: "LM | None" = None):
        kinds = layer_kinds(model.config)
        model.generation_config = special_tokens_only(model.generation_config)
        self.model, self.tokenizer, self.name, self.codecs = model, tokenizer, name, codecs
        self.options = {"sink": sink, "window": window, "prefill": prefill, "memo": memo, "attention": attention}
        self.reference = reference or self
        used = [codec for pair in codecs for codec in pair if codec is not None]
        before_rope = any(key is not None and key.space == "pre" for key, _ in codecs)
        self.rope = Rope(model) if before_rope else None
        if before_rope:
            self.rope.check_undo()
        self.batch_safe = window == 0 and all(c.block == 1 and not getattr(c, "stateful", False) for c in used)
        # Forks are exact where nothing depends on what stands behind the shared tokens: kernels count padding from the front, and a sink
        # longer than the shortest shared prefix would fill with padding.
        plain = attention != "fused" and sink <= LEAST
        self.shareable = plain and self.batch_safe and all(kind == "full_attention" for kind, _ in kinds)
        self.table_bytes = table_bytes(used)
        self._open: list[QuantizedCache] = []
        self._beginning: tuple[list[int], QuantizedCache] = ([], None)
        self._spent: dict[str, float] = {}

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_length(self) -> int:
        return self.model.config.get_text_config(decoder=True).max_position_embeddings

    def new_cache(self) -> QuantizedCache:
        """An empty cache for one forward or generate call; the previous one is audited and its bytes are booked."""
        self._settle()
        cache = QuantizedCache(self.model.config, self.codecs, self.rope, **self.options)
        self._open.append(cache)
        return cache

    @torch.inference_mode()
    def begin(self, ids: list[int], rows: int, chunk: int | None = None) -> QuantizedCache:
        """A cache of `rows` equal rows that have read `ids`, or most of them; the model reads them once, for all rows and for the next call.

        Only where `shareable`: then what a token becomes in the cache depends on the tokens before it alone, so a row that goes on from
        here equals the row read at once. A sequence's tokens and bytes are booked with each row, as if it had been read alone.
        """
        self._settle()
        kept, cache = self._beginning
        if cache is None or ids[: len(kept)] != kept or len(kept) < 0.8 * len(ids):
            self._beginning = ([], None)
            start, cache = time.perf_counter(), QuantizedCache(self.model.config, self.codecs, self.rope, **self.options)
            keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
            for piece in torch.tensor([ids], device=self.device).split(no_single(chunk, len(ids)) or len(ids), dim=1):
                self.model(piece, past_key_values=cache, use_cache=True, **keep)
            self._sync()
            self.book("prefill_seconds", time.perf_counter() - start)
            self._beginning, kept = (list(ids), cache), list(ids)
            self.book("reused_tokens", -len(ids))
        self.book("reused_tokens", rows * len(kept))
        fork = cache.fork(rows)
        self._open.append(fork)
        return fork

    def drop(self) -> None:
        """Forget the caches of a call that failed, and what the device keeps for them."""
        self._open.clear()
        self._beginning = ([], None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _settle(self) -> None:
        for cache in self._open:
            if any(layer.count for layer in cache.quantized_layers):
                report = cache.audit()
                report["table_bytes"] = self.table_bytes * len(cache.quantized_layers[0].pads)
                for name, amount in report.items():
                    self.book(name, amount)
        self._open.clear()

    def book(self, name: str, amount: float) -> None:
        """Add to this LM's account (seconds, tokens, bytes)."""
        self._spent[name] = self._spent.get(name, 0) + amount

    def usage(self) -> dict[str, float]:
        """What was spent since the last call: tokens, encoded, bytes, seconds. Raises RuntimeError if a cache lost a token."""
        self._settle()
        spent, self._spent = self._spent, {}
        return spent

    @torch.inference_mode()
    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T] token ids to [B, T, V] logits in one forward over the cache; `mask` [B, T] marks right padding with 0.

        Rows of different lengths run one by one where padding could enter a window or a token group.
        """
        start = time.perf_counter()
        ids = ids.to(self.device)
        if mask is not None and not self.batch_safe and not bool(mask.all()):
            rows = [self.model(ids[b : b + 1, : int(n)], past_key_values=self.new_cache()).logits for b, n in enumerate(mask.sum(1))]
            logits = torch.cat([torch.nn.functional.pad(row, (0, 0, 0, ids.shape[1] - row.shape[1])) for row in rows])
        else:
            positions = torch.arange(ids.shape[1], device=self.device).expand(ids.shape[0], -1)
            logits = self.model(ids, position_ids=positions, past_key_values=self.new_cache()).logits
        self._sync()
        self.book("prefill_seconds", time.perf_counter() - start)
        return logits

    @torch.inference_mode()
    def generate(self, ids: Tensor, mask: Tensor, max_new_tokens: int, stop_ids: list[int], chunk: int | None = None, shared: int = 0, **sampling) -> Tensor:
        """New token ids [B, n] after left-padded prompts ids/mask [B, T]; greedy unless `sampling` says do_sample=True.

        chunk: prefill in pieces of this many tokens, so that transients follow the chunk and not the prompt. shared: tokens at the
        beginning of every prompt that are the same, to be read once.
        """
        clock = _Clock(self)
        sampling.setdefault("do_sample", False)
        if shared:
            ids, mask = padding_behind(ids, mask, shared)
            cache = self.begin(ids[0, :shared].tolist(), len(ids), chunk)
            for layer in cache.quantized_layers:
                layer.pads = (mask == 0).sum(1).tolist()
        else:
            cache = self.new_cache()
        chunk = no_single(chunk, ids.shape[1] - cache.get_seq_length())
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else stop_ids[0]
        out = self.model.generate(
            ids.to(self.device), attention_mask=mask.to(self.device), past_key_values=cache, max_new_tokens=max_new_tokens,
            eos_token_id=stop_ids, pad_token_id=pad, prefill_chunk_size=chunk, stopping_criteria=[clock, *sampling.pop("stopping_criteria", [])], **sampling,
        )
        clock.stop()
        return out[:, ids.shape[1] :]

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def padding_behind(ids: Tensor, mask: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Left-padded prompts ids/mask [B, T] with their first `shared` tokens, equal in all rows, in front of the padding."""
    rows = [torch.cat([row[pad : pad + shared], row[:pad], row[pad + shared :]]) for row, pad in zip(ids, (mask == 0).sum(1).tolist())]
    masks = torch.cat([torch.ones_like(mask[:, :shared]), mask[:, : mask.shape[1] - shared]], dim=1)
    return torch.stack(rows), masks


def no_single(chunk: int | None, tokens: int) -> int | None:
    """A chunk of at least this size that leaves no last chunk of one token: it would pass for a generated one, which prefill=exact reads from codes."""
    while chunk and 1 < chunk < tokens and tokens % chunk == 1:
        chunk += 1
    return chunk


class _Clock(StoppingCriteria):
    """Splits a generate call into prefill (up to the first token) and generation."""

    def __init__(self, lm: LM):
        self.lm, self.start, self.first = lm, time.perf_counter(), None

    def __call__(self, input_ids, scores, **kwargs):
        if self.first is None:
            self.lm._sync()
            self.first = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def stop(self) -> None:
        self.lm._sync()
        now = time.perf_counter()
        self.lm.book("prefill_seconds", (self.first or now) - self.start)
        self.lm.book("generation_seconds", now - (self.first or now))
