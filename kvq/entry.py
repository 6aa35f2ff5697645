"""The command line: compose the configuration, run one cell, turn every user error into one sentence and a non-zero exit code."""

import difflib
import importlib.metadata
import logging
import os
import re
import sys

from kvq.errors import Refusal

CONFIG = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "conf")


def guard() -> None:
    """Raise Refusal if the PyPI package `kernels` is installed: transformers would import this repository's `kernels` in its place."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise Refusal(f"The PyPI package 'kernels' ({version}) clashes with this repository's folder of that name; pip uninstall kernels.")


def main() -> int:
    """Run; return the exit code: 0 done, 2 refused with a sentence, 130 interrupted."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    failures = []

    @hydra.main(version_base="1.3", config_path=CONFIG, config_name="config")
    def job(cfg) -> None:
        _quiet()
        from kvq.runner import run

        chosen = HydraConfig.get()
        choices = {k: v for k, v in chosen.runtime.choices.items() if k in ("model", "quant", "task", "calib") and v}
        try:
            run(cfg, choices)
        except (Refusal, OmegaConfBaseException) as error:
            failures.append((" ".join(chosen.overrides.task), sentence(str(error))))
            if chosen.mode.name == "MULTIRUN":
                print(f"refused: {failures[-1][0]}: {failures[-1][1]}", file=sys.stderr)

    try:
        guard()
        job()
    except Refusal as error:
        failures.append(("", str(error)))
    except (HydraException, OmegaConfBaseException) as error:
        failures.append(("", sentence(f"{error}\n{error.__cause__ or ''}")))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from the last finished example", file=sys.stderr)
        return 130
    for cell, reason in failures:
        print(f"error: {reason}" if len(failures) == 1 else f"error: {cell}: {reason}", file=sys.stderr)
    return 2 if failures else 0


def sentence(message: str) -> str:
    """Hydra's message as one sentence with the valid choices: unknown group options, unknown keys, bad values."""
    missing = re.search(r"Could not find '([^/']+)/([^']+)'", message)
    if missing:
        group, wanted = missing.groups()
        options = re.findall(r"^\t(\S+)$", message, re.M)
        return f"there is no {group}={wanted}; choose one of: {', '.join(options)}.{_nearest(wanted, options)}"
    unknown = re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", message)
    if unknown:
        key, full = unknown.groups()
        siblings = _keys(full)
        return f"there is no setting '{full}'; valid here: {', '.join(siblings)}.{_nearest(key, siblings)}"
    return " ".join(line.strip() for line in message.splitlines() if line.strip() and "full_key" not in line and "object_type" not in line)


def _nearest(wanted: str, options: list[str]) -> str:
    close = difflib.get_close_matches(wanted, options, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _keys(full: str) -> list[str]:
    """The settings beside a mistyped one, from the composed defaults and the choices on the command line."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import DictConfig

    path = full.split(".")[:-1]
    groups = [a for a in sys.argv[1:] if re.match(r"(model|quant|task|calib|experiment)=[\w-]+$", a)]
    try:
        GlobalHydra.instance().clear()
        from hydra import initialize_config_dir

        with initialize_config_dir(CONFIG, version_base="1.3"):
            node = compose("config", overrides=groups)
            for part in path:
                node = node[part]
            return [str(k) for k in node if not str(k).startswith("_")] if isinstance(node, DictConfig) else []
    except Exception:
        return ["see conf/" + "/".join(path)]


def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("kvq").setLevel(logging.INFO)
