"""One cell of a sweep: a resolved config, what identifies its run, and where its files are."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from kvq import parts


@dataclass
class Cell:
    """One run, resolved and identified before anything heavy is loaded."""

    cfg: DictConfig
    choices: dict[str, str]
    identity: dict
    run: str
    resolved: dict

    @property
    def is_reference(self) -> bool:
        return self.choices["quant"] == "fp16"

    @property
    def label(self) -> float:
        """The paper's bits: the mean of keys' and values'."""
        return (self.cfg.quant.key.bits + self.cfg.quant.value.bits) / 2

    @property
    def path(self) -> Path:
        return Path(self.cfg.results) / "runs" / f"{self.run}.parquet"

    @property
    def partials(self) -> list[Path]:
        """Records of unfinished runs, one file for each part of the cell."""
        return [Path(self.cfg.outputs) / "partial" / f"{self.run}{parts.suffix(part, self.cfg.parts)}.jsonl" for part in range(self.cfg.parts)]

    @property
    def partial(self) -> Path:
        return self.partials[self.cfg.part]
