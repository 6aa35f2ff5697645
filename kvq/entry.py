"""The command line: compose the configuration, run one cell or a sweep, turn every error into one sentence and a non-zero exit code."""

import difflib
import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
import tomllib
import traceback
import warnings

from kvq import slots, sweep
from kvq.errors import Refusal

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG = os.path.join(ROOT, "conf")
GROUPS = ("model", "quant", "task", "calib")
PLACED = ("joblib", "submitit_local", "ray")
"""Launchers whose processes we give a GPU and cores each; SLURM hands out both itself."""

# Our launcher configs carry the plugins' names and are complete without the plugins' schemas, which Hydra merges into them with a warning.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


stopped: list[Exception] = []
"""What ended this process's single cell."""


def guard() -> None:
    """Raise Refusal if the PyPI package `kernels` is installed: transformers would import this repository's `kernels` in its place."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise Refusal(f"The PyPI package 'kernels' ({version}) clashes with this repository's folder of that name; pip uninstall kernels.")


def cell(cfg) -> None:
    """Hydra's task function: one cell. Alone it keeps what stopped it for `main`; in a sweep it writes down what happened and the sweep goes on."""
    from hydra.core.hydra_config import HydraConfig

    chosen = HydraConfig.get()
    choices = {k: v for k, v in chosen.runtime.choices.items() if k in GROUPS and v}
    if chosen.mode.name != "MULTIRUN":
        _quiet()
        from kvq.runner import run

        try:
            run(cfg, choices)
        except Exception as error:  # raised again once Hydra is done, which would print a heading of its own above the sentence
            stopped.append(error)
        return
    where = sweep.folder(cfg.outputs, cfg.sweep)
    launcher = chosen.runtime.choices["hydra/launcher"]
    note = sweep.Note(where, list(chosen.overrides.task))
    place = (where / ".slots", cfg.jobs, chosen.job.num) if launcher in PLACED else None
    noted(cfg, choices, note, place, wait=launcher == "submitit_slurm")  # a queued job has nothing else to do


def noted(cfg, choices: dict[str, str], note: sweep.Note, place: tuple | None = None, wait: bool = False) -> str:
    """Compute a cell of a sweep and write down what became of it: "" its rows are there, "busy" another process has it, else the sentence of its failure.

    place: arguments of slots.take for a process without a GPU and cores of its own yet. wait: for another process that has the cell.
    """
    from kvq.claim import Busy

    told = {}

    def remember(**known):
        told.update(known)
        note.write("running", **known)

    try:
        if place:
            slots.take(*place)
        note.write("running")
        _quiet()
        from kvq.runner import run

        frame = run(cfg, choices, wait=wait, note=remember)
        note.write("estimated" if cfg.dry_run and not told["finished"] else "finished" if frame is not None else "finished part")
        return ""
    except Busy as busy:
        print(f"left to {busy}: {' '.join(note.state['cell'])}", flush=True)
        note.write("claimed", by=str(busy))
        return "busy"
    except Exception as error:
        reason = explain(error)
        print(f"failed: {' '.join(note.state['cell'])}: {reason}", file=sys.stderr, flush=True)
        note.failed(reason, error)
        return reason
    finally:
        _free_memory()


def explain(error: BaseException) -> str:
    """Any error as one sentence; those that are not meant for users keep their type and place."""
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, Refusal):
        return str(error)
    if isinstance(error, OmegaConfBaseException):
        return sentence(str(error))
    message = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    if type(error).__name__ == "OutOfMemoryError":
        return f"The GPU ran out of memory ({message}); lower task.batch_size or task.context, or see dry_run=true."
    place = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.relpath(place[-1].filename, ROOT)}:{place[-1].lineno}" if place else ""
    return f"unexpected {type(error).__name__}: {message}{where}."


def prepare_environment() -> None:
    """What this process and the workers it starts rely on."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that spins at a barrier burns the core that the late one waits for
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray hides the GPUs from tasks that do not ask it for one
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))


def main() -> int:
    """Run; return the exit code: 0 done, 1 an unexpected error, 2 refused or failed cells, 3 cells left to other processes, 130 interrupted."""
    prepare_environment()
    from kvq import plan

    arguments, plan.launched, plan.started = list(sys.argv), None, False
    noted = os.environ.get(slots.GPUS)
    if any(a.startswith("hydra/launcher=") for a in arguments):
        os.environ[slots.GPUS] = ",".join(slots.visible_gpus())
    if not any(a.startswith("sweep=") for a in arguments):
        beside = next((i for i, a in enumerate(arguments) if i and "=" in a and not a.startswith("-")), len(arguments))  # overrides stand together
        sys.argv = [*arguments[:beside], f"sweep={sweep.name_of(arguments[1:])}", *arguments[beside:]]
    try:
        problem = _launch()
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from the last finished example", file=sys.stderr)
        return 130
    finally:
        sys.argv = arguments
        if noted is None:
            os.environ.pop(slots.GPUS, None)
    if plan.started and not plan.launched:
        problem = problem or (1, "the plan of the sweep could not be written (see the warning above); its cells ran, but nobody counted what failed.")
    if problem:
        print(f"error: {problem[1]}", file=sys.stderr)
    code = _summary(*plan.launched) if plan.launched else 0
    return problem[0] if problem else code


def _launch() -> tuple[int, str] | None:
    """Hydra's main; (exit code, sentence) if it raised."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        guard()
        hydra.main(version_base="1.3", config_path=CONFIG, config_name="config")(cell)()
        if stopped:
            raise stopped.pop()
    except Refusal as error:
        return 2, str(error)
    except (HydraException, OmegaConfBaseException) as error:
        missing = _missing_plugin(f"{error}\n{error.__cause__ or ''}")
        return 2, missing or sentence(f"{error}\n{error.__cause__ or ''}")
    except (YAMLError, UnicodeDecodeError) as error:
        return 2, f"A file of conf/ is not readable YAML: {' '.join(str(error).split())}"
    except Exception as error:
        if type(error).__name__ == "TerminatedWorkerError" or "died unexpectedly" in str(error):
            return 1, "A worker process was killed (by hand, or for want of memory); run the same command again to go on."
        if missing := _missing_plugin(f"{error}\n{error.__cause__ or ''}"):
            return 2, missing
        traceback.print_exc()
        return 1, explain(error)
    return None


def _summary(where, planned: list[str]) -> int:
    """One line per cell that did not finish and a count, from the states that the workers left; the exit code."""
    from kvq.status import State, states

    found = [s for s in states(where) if s.key in planned]
    failed = [s for s in found if s.state in (State.FAILED, State.STOPPED)]
    left, missing = ([s for s in found if s.state == state] for state in (State.RUNNING, State.MISSING))
    for one in failed:
        print(f"error: {one.cell}: {one.reason}", file=sys.stderr)
    for one in left:
        print(f"left: {one.cell}: {one.reason}", file=sys.stderr)
    done = len(found) - len(failed) - len(left) - len(missing)
    print(f"sweep {where.name}: {done} of {len(found)} cells done, {len(failed)} failed, {len(left)} elsewhere, {len(missing)} not started", file=sys.stderr)
    return 2 if failed or missing else 3 if left else 0


def _missing_plugin(message: str) -> str | None:
    """What to install for a launcher whose plugin is absent, from pyproject.toml."""
    found = re.search(r"hydra_plugins\.hydra_(\w+)_launcher", message)
    if not found or importlib.util.find_spec(f"hydra_plugins.hydra_{found[1]}_launcher"):
        return None
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as stream:
        project = tomllib.load(stream)["project"]
    pins = project["optional-dependencies"].get(found[1]) or [p for p in project["dependencies"] if found[1] in p]
    extra = f" (extra `{found[1]}` in pyproject.toml)" if found[1] in project["optional-dependencies"] else ""
    return f"hydra/launcher={found[1]} needs a plugin that is not installed: pip install {' '.join(pins)}{extra}."


def sentence(message: str) -> str:
    """Hydra's message as one sentence with the valid choices: unknown group options, unknown keys, bad values."""
    missing = re.search(r"Could not find '(.+)/([^/']+)'", message)
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


def _free_memory() -> None:
    """Give back what a cell held on the GPU: other processes of a sweep wait for it."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        import gc

        gc.collect()
        torch.cuda.empty_cache()
