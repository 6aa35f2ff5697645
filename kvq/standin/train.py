"""Train the stand-in from scratch on every GPU there is, in a given number of minutes.

    python -m kvq.standin.train --out DIR --minutes 8

The schedule is in fractions of that time: row lengths 512, 2,048, 8,192, 16,384 (kvq.standin.stream), a short warm-up, a linear decay over the last
40 %. The corpus is read from the packages of the running interpreter. The result is a transformers folder with its tokenizer and a log.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist

from kvq.standin import evaluate, shelf, stream
from kvq.standin.muon import Muon
from kvq.standin.net import Net, config

TOKENIZER = Path(__file__).parent / "model"
TINY = {"hidden": 64, "layers": 2, "inner": 128}
WARM_UP, DECAY = 0.02, 0.4


def rate(progress: float) -> float:
    """The share of the peak learning rate at a fraction of the time."""
    return min(1.0, progress / WARM_UP, max(0.0, (1 - progress) / DECAY))


def phase_at(progress: float, shares: list[float]) -> int:
    """The index of the phase that a fraction of the time falls into."""
    ends = [sum(shares[:index + 1]) for index in range(len(shares))]
    return next((index for index, end in enumerate(ends) if progress < end), len(shares) - 1)


def reduce(net: Net, world: int) -> None:
    """Average the gradients over the processes."""
    weights = list(net.parameters())
    flat = torch.cat([weight.grad.flatten() for weight in weights])
    dist.all_reduce(flat)
    for weight, part in zip(weights, flat.div_(world).split([weight.numel() for weight in weights])):
        weight.grad.copy_(part.view_as(weight))


def save(net: Net, folder: Path) -> None:
    """The model with its tokenizer."""
    net.save(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)


def fit(rank: int, world: int, options: argparse.Namespace, feed: stream.Stream, device: torch.device, phases: tuple[stream.Phase, ...]) -> tuple[Net, list[dict]]:
    """The training loop of one process. Progress is rank 0's clock, so all change phase at the same step."""
    torch.manual_seed(options.seed)
    net = Net(config(**(TINY if options.tiny else {})), compiled=device.type == "cuda").to(device)
    if options.start:
        net.load(options.start)
    optimizers = [Muon(net.matrices(), options.rate), torch.optim.AdamW(net.rest(), options.rate, betas=(0.9, 0.95), weight_decay=0.0)]
    shares, share, log, tokens, steps, begun = [phase.share for phase in phases], options.batch // world, [], 0, 0, None
    window: list = []
    phase = 0
    while True:
        clock = torch.tensor([0.0 if begun is None else (time.monotonic() - begun) / (60 * options.minutes)], dtype=torch.float64)
        if world > 1:
            dist.broadcast(clock, 0)
        if (progress := clock.item()) >= 1:
            break
        if rank == 0 and phase_at(progress, shares) > phase:
            save(net, options.out)
        phase = phase_at(progress, shares)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.rate * max(rate(progress), 1e-3)
        done = 0
        while done < share:
            ids, classes = (torch.from_numpy(part).to(device, non_blocking=True) for part in feed.take(phase, min(share - done, options.micro)))
            table = torch.tensor([0.0, *phases[phase].weights], device=device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = net(ids, table[classes])
            loss.backward()
            done += ids[:, 1:].numel()
        if world > 1:
            reduce(net, world)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if begun is None:
            begun = time.monotonic()
        tokens, steps, window = tokens + done * world, steps + 1, [*window, loss.detach()]
        if rank == 0 and (steps % options.every_log == 0):
            log.append({"step": steps, "tokens": tokens, "length": phases[phase].length, "progress": round(progress, 4), "loss": torch.stack(window).mean().item(),
                        "seconds": round(time.monotonic() - begun, 1), "dropped": feed.dropped})
            print(json.dumps(log[-1]), flush=True)
            window = []
    return net, log


def process(rank: int, world: int, options: argparse.Namespace) -> None:
    """One GPU's process: its workers first, then the device."""
    phases = stream.PHASES if not options.lengths else tuple(
        stream.Phase(length, 1 / len(options.lengths), options.text, (options.context, *stream.PHASES[-1].weights[1:])) for length in options.lengths)
    pool = multiprocessing.get_context("fork").Pool(min(6, options.workers))
    feed = stream.Stream(options.work, TOKENIZER, f"{options.seed}/{rank}", options.workers, phases, options.prose)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch._dynamo.config.recompile_limit = 64
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    net, log = fit(rank, world, options, feed, device, phases)
    feed.close()
    if rank == 0:
        save(net, options.out)
        (options.out / "log.json").write_text(json.dumps(log))
        print("saved", flush=True)
    if world > 1:
        dist.barrier()
    score(rank, world, options, device, pool)
    pool.terminate()


def score(rank: int, world: int, options: argparse.Namespace, device: torch.device, pool) -> None:
    """Every process scores its share of the jobs until the time allowed is over, and writes a line for each."""
    started = time.monotonic()
    with (options.out / f"scores{rank}.jsonl").open("w") as file:
        for row in evaluate.rows(options.out, evaluate.jobs(options.eval_lengths)[rank::world], options.n, str(device), pool):
            file.write(json.dumps(row) + "\n")
            file.flush()
            if time.monotonic() - started > 60 * options.eval_minutes:
                break


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its tokenizer, the log and the scores")
    parser.add_argument("--work", type=Path, default=Path("build/standin"), help="folder for the tokenised corpus")
    parser.add_argument("--minutes", type=float, default=8.0, help="training time, compilation of the first length and corpus left out")
    parser.add_argument("--start", type=Path, help="continue from this folder")
    parser.add_argument("--lengths", type=int, nargs="*", help="row lengths in equal shares of the time, instead of the schedule")
    parser.add_argument("--text", type=float, default=0.4, help="with --lengths: the share of text draws")
    parser.add_argument("--context", type=float, default=0.2, help="with --lengths: the loss weight of the tasks' context")
    parser.add_argument("--prose", type=float, default=stream.PROSE_SHARE, help="the share of prose among text draws")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=262144, help="tokens a step, all processes together")
    parser.add_argument("--micro", type=int, default=131072, help="tokens of one forward pass")
    parser.add_argument("--world", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--workers", type=int, default=0, help="data processes for each GPU (default: the cores shared out, less two)")
    parser.add_argument("--thin", type=int, default=1, help="read every n-th source only")
    parser.add_argument("--tiny", action="store_true", help="a toy of two layers, to try the script on a CPU")
    parser.add_argument("--every-log", type=int, default=50)
    parser.add_argument("--eval-minutes", type=float, default=0.7)
    parser.add_argument("--eval-lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--n", type=int, default=22)
    options = parser.parse_args()
    options.workers = options.workers or max(1, os.cpu_count() // options.world - 2)
    return options


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    options, started = parse(), time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.work / "texts.json").exists():
        print(shelf.build(options.work, TOKENIZER, os.cpu_count(), options.thin), f"{time.monotonic() - started:.1f} s", flush=True)
    if options.world == 1:
        process(0, 1, options)
    else:
        torch.multiprocessing.spawn(process, (options.world, options), nprocs=options.world, daemon=False)


if __name__ == "__main__":
    main()
