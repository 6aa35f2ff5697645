"""From a prompt text to token ids that fit: middle truncation, chat template, stop tokens, left-padded batches."""

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import StoppingCriteria

from kvq.errors import Refusal

# Tokens that end a turn or a text, by model family. A checkpoint's generation config often lists only some of them:
# Llama-3-8B-Instruct without <|eot_id|> runs on to the length limit and scores near zero.
TURN_ENDS = (
    "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<end_of_turn>", "<|end|>", "<|return|>",
    "<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>", "<|endofturn|>", "[|endofturn|]", "<|user|>", "<|observation|>", "<｜end▁of▁sentence｜>",
    "<|eot|>", "<|eom|>", "<|EOT|>", "<|call|>",
)  # fmt: skip


def stop_ids(lm) -> list[int]:
    """Ids that end generation: of the model's generation config, of the tokenizer, of its chat template, and the turn ends in its vocabulary."""
    tokenizer = lm.tokenizer
    config = getattr(lm.model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ids = list(found) if isinstance(found, (list, tuple)) else [found]
    ids += [tokenizer.eos_token_id, _template_end(tokenizer)]
    for token in TURN_ENDS:
        index = tokenizer.convert_tokens_to_ids(token)
        if index is not None and index != tokenizer.unk_token_id:
            ids.append(index)
    unique = sorted({int(i) for i in ids if i is not None})
    if not unique:
        raise Refusal(f"{lm.name} names no end-of-text token: set eos_token_id in its generation_config.json.")
    return unique


def _template_end(tokenizer) -> int | None:
    """The special token that the chat template writes behind an assistant's turn, if it writes one at once."""
    if not tokenizer.chat_template:
        return None
    mark, turns = "answer", [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(mark)[2].lstrip()
    except TemplateError:  # templates may insist on a system turn or on tools
        return None
    ids = tokenizer(behind, add_special_tokens=False, verbose=False)["input_ids"]
    special = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id}
    return ids[0] if ids and ids[0] in special else None


def render(tokenizer, text: str, chat: bool, thinking: bool = False) -> list[int]:
    """Token ids of one user turn under the chat template, or of the bare text with the tokenizer's own special tokens."""
    if not chat:
        return tokenizer(text, verbose=False)["input_ids"]
    turn = [{"role": "user", "content": text}]
    wrapped = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    return tokenizer(wrapped, add_special_tokens=False, verbose=False)["input_ids"]


def fit(tokenizer, text: str, budget: int, chat: bool, thinking: bool = False) -> tuple[list[int], int]:
    """(token ids of at most `budget`, length before the cut): an overlong text loses its middle, head and tail are kept.

    The text is cut before the template is applied, as LongBench does, so the template stays whole. Raises Refusal if the
    template alone exceeds the budget.
    """
    ids = render(tokenizer, text, chat, thinking)
    length = len(ids)
    if length <= budget:
        return ids, length
    body = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    room = budget - (length - len(body))
    while room > 0:
        ids = render(tokenizer, _without_middle(tokenizer, body, room), chat, thinking)
        if len(ids) <= budget:
            return ids, length
        room -= len(ids) - budget  # the seam can tokenize into a few more ids than the halves held
    raise Refusal(f"No room for the prompt: the context leaves {budget} tokens and the template alone needs more; raise task.context.")


def _without_middle(tokenizer, ids: list[int], room: int) -> str:
    head, tail = ids[: room - room // 2], ids[len(ids) - room // 2 :]
    return tokenizer.decode(head, skip_special_tokens=True) + tokenizer.decode(tail, skip_special_tokens=True)


def left_pad(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, T], int64, prompts flush right."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def until_stop(row: list[int], stops: list[int]) -> list[int]:
    """The ids before the first stop token: behind it a batch holds padding."""
    return next((row[:i] for i, token in enumerate(row) if token in stops), row)


class FirstLine(StoppingCriteria):
    """Ends a row once it holds a finished line; `strict` counts an empty first line as finished."""

    def __init__(self, tokenizer, prompt_length: int, strict: bool):
        self.tokenizer, self.start, self.strict = tokenizer, prompt_length, strict

    def __call__(self, input_ids, scores, **kwargs):
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        done = ["\n" in (text if self.strict else text.lstrip("\n")) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def first_line(text: str, strict: bool) -> str:
    """The text up to the first newline; unless `strict`, newlines in front are dropped first (LongBench's own rule)."""
    return (text if strict else text.lstrip("\n")).split("\n")[0]
