"""How much of the bank's communication a training step waits for on a slow link, and how many bytes it moves.

    uv run python tests/benchmarks/measure_slow_link.py --out slow_link.json --picture timeline.png

Hosts are network namespaces on this machine, joined by a link of 50 ms one way (`slow_link.py`; needs root). On every
host one process trains with the real `Stepper`; in turn with it, a few steps each, the same network makes the same
steps with DDP's gradient exchange alone: same forward and backward pass, NCE loss on rows at hand, optimizer, no bank.
A step computes for 300 ms: a part of it is the network's arithmetic, the rest is slept, as a host sleeps while a GPU
works.

Bytes are those that the kernel counts for the hosts' interfaces (a header for each segment of up to 64 KiB), less those
of the steps without a bank.

Shapes: G samples of all ranks, B of one, K negatives, D feature numbers, W ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from slow_link import Host, SlowLink, slow_hosts, why_not
from torch import Tensor, nn

from cluster.worker import Worker
from dataloading.loader import Batch
from dataloading.order import Permutation
from instdisc.benchmark.bank_workers import expected_bytes
from instdisc.benchmark.environment import environment
from instdisc.config import TrainConfig
from instdisc.objectives import nce_loss
from instdisc.recipes import recipe
from instdisc.timeline import Span, Timeline
from instdisc.train.plan import BatchPlan
from instdisc.train.state import build_state
from instdisc.train.step import Stepper

FORWARD_S, BACKWARD_S = 0.1, 0.2
NUM_ROWS, DIM, NUM_NEGATIVES = 200_000, 128, 4096
WARMUP_STEPS = 8
PORT = 29_517
TIMEOUT_S = 900


class Paced(nn.Module):
    """An encoder whose forward and backward pass last as long as on a device that is busy so long."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images_BCHW: Tensor) -> Tensor:
        started_s = time.monotonic()
        features_BD = _SlowBackward.apply(self.encoder(images_BCHW))
        sleep_until(started_s + FORWARD_S)
        return features_BD


class _SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features_BD: Tensor) -> Tensor:
        return features_BD.clone()

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> Tensor:
        time.sleep(BACKWARD_S)
        return grad_BD


def sleep_until(moment_s: float) -> None:
    time.sleep(max(0.0, moment_s - time.monotonic()))


def config_for(batch: int, ahead: int) -> TrainConfig:
    return recipe(
        "cifar10-cpu",
        **{
            "model.width": 16,
            "objective.name": "nce",
            "objective.z": "ema",
            "objective.num_negatives": NUM_NEGATIVES,
            "optim.global_batch": batch,
            "optim.warmup_epochs": 0,
            "bank.fetch_ahead": ahead,
        },
    )


class Rank:
    """What one host runs: steps with the bank, and steps with the gradient exchange alone."""

    def __init__(self, worker: Worker, config: TrainConfig, spans: list[Span]) -> None:
        plan = BatchPlan(
            config.optim.global_batch, -(-config.optim.global_batch // worker.world_size), worker.world_size
        )
        self.worker, self.plan = worker, plan
        state = build_state(config, NUM_ROWS, worker)
        # DDP stays where it is: its module is paced from inside.
        state.parallel.module.trunk = Paced(state.parallel.module.trunk)
        self.state = state
        self.stepper = Stepper(state, plan, worker, Permutation(NUM_ROWS, 0), Timeline(spans))
        count = plan.counts_W[worker.rank]
        images_BCHW = torch.randn(count, 3, 32, 32)
        self.batch = Batch(images_BCHW, torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.bool))
        self.rows_KD = nn.functional.normalize(torch.randn(NUM_NEGATIVES, DIM), dim=1)

    def with_bank(self) -> None:
        self.stepper.step(self.batch)

    def gradients_alone(self) -> None:
        state = self.state
        features_BD = state.parallel(self.batch.images_BCHW.contiguous(memory_format=torch.channels_last))
        loss = nce_loss(
            features_BD,
            self.rows_KD[: len(features_BD)],
            self.rows_KD,
            temperature=0.2,
            log_z=13.0,
            num_rows=NUM_ROWS,
        )
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)

    def measure(self, trials: int, steps: int) -> dict[str, Any]:
        """Alternate both kinds of steps; return milliseconds of single steps and bytes sent by a step of each."""
        found: dict[str, dict[str, list[float]]] = {}
        for trial in range(trials + 1):
            for name, step in (("bank", self.with_bank), ("alone", self.gradients_alone)):
                seconds, sent = self._run(step, steps if trial else WARMUP_STEPS)
                if trial:  # the first is a warm-up
                    kept = found.setdefault(name, {"step_ms": [], "bytes": []})
                    # A trial's first step finds rows that had the time of the other kind's steps to arrive.
                    kept["step_ms"] += [1000 * s for s in seconds[1:]]
                    kept["bytes"].append(sent / steps)
        return found

    def _run(self, step: Any, steps: int) -> tuple[list[float], int]:
        dist.barrier(self.worker.control_group)
        before, seconds = sent_bytes(), []
        for _ in range(steps):
            started_s = time.monotonic()
            step()
            seconds.append(time.monotonic() - started_s)
        self.stepper.settle()
        dist.barrier(self.worker.control_group)
        return seconds, sent_bytes() - before


def sent_bytes() -> int:
    """Return what the interface of this host has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == os.environ["GLOO_SOCKET_IFNAME"]:
            return int(counts.split()[8])
    raise OSError("/proc/net/dev: the host's interface is not there")


@contextlib.contextmanager
def transfers_taken_down(spans: list[Span]) -> Iterator[None]:
    """Take down when the collectives of bank and statistics were on their way."""
    originals = dist.all_gather_into_tensor, dist.all_reduce

    def watch(work: Any, name: str, started_s: float) -> Any:
        if work is not None:
            work.get_future().add_done_callback(lambda _: spans.append(Span(name, started_s, time.monotonic())))
        return work

    def all_gather(output: Tensor, tensor: Tensor, **options: Any) -> Any:
        name = "validity" if tensor.dtype == torch.bool else "features"
        if len(tensor) > 512:
            name = "rows of the next step"
        return watch(originals[0](output, tensor, **options), name, time.monotonic())

    def all_reduce(tensor: Tensor, **options: Any) -> Any:
        name = "sum for Z" if tensor.dtype == torch.float64 else "BatchNorm statistics"
        return watch(originals[1](tensor, **options), name, time.monotonic())

    dist.all_gather_into_tensor, dist.all_reduce = all_gather, all_reduce
    try:
        yield
    finally:
        dist.all_gather_into_tensor, dist.all_reduce = originals


def run_rank(arguments: argparse.Namespace) -> None:
    rank, world_size = arguments.rank, arguments.world_size
    torch.set_num_threads(1)
    store = dist.TCPStore(arguments.address, PORT, world_size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    control_group = dist.new_group()
    worker = Worker(rank=rank, world_size=world_size, device=torch.device("cpu"), control_group=control_group)
    spans: list[Span] = []
    side = Rank(worker, config_for(arguments.batch, arguments.ahead), spans)
    found = side.measure(arguments.trials, arguments.steps)
    spans.clear()
    with transfers_taken_down(spans):
        side._run(side.with_bank, 4)
    if rank == 0:
        print(json.dumps({**found, "spans": [[s.name, s.start_s, s.stop_s] for s in spans]}), flush=True)
    # Leaving the groups in order takes a round trip for each; nobody needs it.
    dist.barrier(control_group)
    os._exit(0)


def run_hosts(arguments: argparse.Namespace, world_size: int) -> dict[str, Any]:
    """Run a rank on each of `world_size` hosts; return what rank 0 found."""
    with slow_hosts(world_size, delay_s=arguments.delay_ms / 1000, keep_window=True) as link:
        processes = [start_rank(arguments, link, host) for host in link.hosts]
        out, _ = processes[0].communicate(timeout=TIMEOUT_S)
        codes = [process.wait(timeout=60) for process in processes]
    if any(codes):
        raise SystemExit(f"{world_size} hosts: ranks ended with {codes}")
    return json.loads(out.splitlines()[-1])


def start_rank(arguments: argparse.Namespace, link: SlowLink, host: Host) -> subprocess.Popen[str]:
    options = {
        "--rank": host.rank,
        "--world-size": len(link.hosts),
        "--address": link.hosts[0].address,
        "--batch": arguments.batch,
        "--ahead": arguments.ahead,
        "--trials": arguments.trials,
        "--steps": arguments.steps,
    }
    command = [sys.executable, __file__, *(str(word) for option in options.items() for word in option)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": host.interface, "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(host.command(command), env=environment, stdout=subprocess.PIPE, text=True)


def result(arguments: argparse.Namespace, world_size: int, found: dict[str, Any]) -> dict[str, Any]:
    """Return what `world_size` hosts came to: milliseconds of both kinds of steps, and bytes against the formula."""
    bank_ms, alone_ms = (statistics.median(found[kind]["step_ms"]) for kind in ("bank", "alone"))
    sent = statistics.median(found["bank"]["bytes"]) - statistics.median(found["alone"]["bytes"])
    formula = expected_bytes(
        global_batch=arguments.batch, num_negatives=NUM_NEGATIVES, dim=DIM, world_size=world_size, number_bytes=4
    )
    return {
        "world_size": world_size,
        "step_with_bank_ms": bank_ms,
        "step_with_gradients_alone_ms": alone_ms,
        "exposed_ms": bank_ms - alone_ms,
        "sent_bytes_per_step": sent,
        "formula_bytes": formula,
        "sent_over_formula": sent / sum(formula.values()),
        "trials": {kind: found[kind] for kind in ("bank", "alone")},
    }


def draw_timeline(spans: list[list[Any]], path: Path) -> None:
    """Draw the parts of the last steps of rank 0, and what was on its way meanwhile, into a PNG file."""
    from PIL import Image, ImageDraw, ImageFont

    work = ["embed", "wait for rows", "score", "backward", "optimizer"]
    transfers = ["rows of the next step", "validity", "features", "sum for Z", "BatchNorm statistics"]
    colors = dict(
        zip(work + transfers, ["#4c78a8", "#e45756", "#72b7b2", "#54a24b", "#b279a2"] + ["#bab0ac"] * 5, strict=True)
    )
    starts = sorted(start for name, start, _ in spans if name == "embed")
    first, last = starts[1], starts[-1] + 0.1
    width, left, row = 1400, 190, 30
    image = Image.new("RGB", (width, row * 11 + 40), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(15)

    def x(moment_s: float) -> float:
        return left + (moment_s - first) / (last - first) * (width - left - 20)

    for number, name in enumerate(work + transfers):
        top = 12 + row * number + (12 if number >= len(work) else 0)
        draw.text((8, top + 3), name, fill="black", font=font)
        for found, start, stop in spans:
            if found == name and stop > first and start < last:
                draw.rectangle(
                    (max(x(start), left), top, max(min(x(stop), width - 20), x(start) + 1), top + row - 8),
                    fill=colors[name],
                )
    bottom = 12 + row * 10 + 16
    for tick in range(int((last - first) * 10) + 1):
        draw.line((x(first + tick / 10), 8, x(first + tick / 10), bottom), fill="#dddddd" if tick % 5 else "#999999")
        if tick % 5 == 0:
            draw.text((x(first + tick / 10) + 2, bottom), f"{tick * 100} ms", fill="black", font=font)
    image.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--delay-ms", type=float, default=50.0)
    parser.add_argument("--batch", type=int, default=60, help="global batch")
    parser.add_argument("--ahead", type=int, default=1, help="bank.fetch_ahead")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--world-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments)
    if why_not() is not None:
        raise SystemExit(f"cannot be measured here: {why_not()}")
    results = []
    for world_size in arguments.hosts:
        found = run_hosts(arguments, world_size)
        results.append(result(arguments, world_size, found))
        shown = {name: value for name, value in results[-1].items() if name != "trials"}
        print(json.dumps(shown), file=sys.stderr, flush=True)
        if arguments.picture is not None and world_size == arguments.hosts[0]:
            draw_timeline(found["spans"], arguments.picture)
    facts = {"delay_ms": arguments.delay_ms, "global_batch": arguments.batch, "fetch_ahead": arguments.ahead}
    document = {"benchmark": "slow link", "environment": environment(), "config": facts, "results": results}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
