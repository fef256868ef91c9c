"""Starting a run: here, in local processes, or on Ray; the same call continues one that was stopped."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster.environment import have_a_home
from cluster.this_machine import usable_cores, visible_gpus, workers_here
from cluster.worker_range import WorkerRange, parse_workers
from instdisc.command_line import command_line
from instdisc.config import MAY_CHANGE_ON_RESUME, TrainConfig, require_fitting_images
from instdisc.config_effects import refuse_idle
from instdisc.config_sections import ConfigError
from instdisc.overrides import flatten
from instdisc.progress import counted
from instdisc.recipes import starting_point
from instdisc.runs import Run, RunResult, read_curves, usable_workers
from instdisc.start_advice import advice, keeps, of_workers

if TYPE_CHECKING:
    from cluster.worker import Worker

LAUNCHERS = ("ray", "local")
_RAY_WORKING_DIR = "/runtime_resources/working_dir_files/"
OnEvent = Callable[[dict[str, Any]], None]


def fit(
    config: TrainConfig,
    *,
    run: str,
    workers: int | str | tuple[int, int] = 0,
    launcher: str = "ray",
    address: str | None = None,
    on_event: OnEvent | None = None,
) -> RunResult:
    """Train until the end, and return what came out; go on where the run at URI `run` stood, if it stood anywhere.

    workers: 0 trains in this process; W >= 1 trains with W DDP workers, which `launcher` runs: "ray" (a Ray of our own
    on this machine, or the cluster at `address`) or "local" (plain processes). "2..16" or (2, 16) on a cluster: as many
    as there is room for, more or fewer as machines come and go. Under Ray, workers that die are followed by others.
    on_event: called with what happens.
    A finished run returns at once. Ctrl-C, SIGTERM and SIGHUP save a checkpoint and return a result whose `finished` is
    False, or raise KeyboardInterrupt where there is nothing to save yet; SIGUSR1 saves and goes on (main thread only).

    Raises ConfigError where the run was started with another configuration, RunError on other images, and ValueError
    or OSError for what else a person can correct.
    """
    if launcher not in LAUNCHERS:
        raise ConfigError(f"launcher: found {launcher!r}, expected one of {', '.join(LAUNCHERS)}")
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A worker process imports the script that it belongs to; without a guard it would train there again.
        raise ConfigError(
            "fit was called while a worker process imports this script: put the script's own calls below "
            "`if __name__ == '__main__':`"
        )
    have_a_home()
    least, most = _least_and_most(workers)
    if least != most and launcher != "ray":
        raise ConfigError(f"workers: found {least}..{most} with launcher {launcher!r}, expected one number, or Ray")
    if address is not None and (most == 0 or launcher != "ray"):
        where = "workers 0" if most == 0 else f"launcher {launcher}"
        raise ConfigError(
            f"address: found {address!r} with {where}, which trains on this machine; leave one of them out"
        )
    if run.startswith("memory://") and most > 0:
        raise ConfigError(f"run {run}: found memory that ends with each process, expected a folder or a remote URI")
    place = Run(absolute(run))
    if config.data.root is not None:
        config = config.with_overrides({"data.root": absolute(config.data.root)})
    _refuse_idle(config, place)
    require_fitting_images(config)
    done = place.result()
    if done is not None:
        _say_what_is_not_applied(config, place, on_event)
        return done
    if address is None and "RAY_ADDRESS" not in os.environ and config.data.root is not None:
        from dataloading.sources import require_root

        # Here, not after half a minute of start-up.
        require_root(config.data.kind, config.data.root, download=config.data.download)
    if _RAY_WORKING_DIR in place.uri and on_event:
        text = f"run {place.uri} lies in a copy of the job's files on one machine, which Ray deletes: give --run s3://…"
        on_event({"kind": "message", "text": text})
    usable, why = usable_workers(place.agreed_config(config, workers=most), least, most)
    started, about_machine = _workers_here(least, usable, launcher, address)
    asked, config = config, place.agree_on_config(config, workers=most)
    if on_event:
        kept = keeps(config, asked)
        warnings = [*filter(None, (why, about_machine)), *advice(config), *of_workers(config, least, usable, launcher)]
        for text in [*([kept] if kept else []), *(f"warning: {text}" for text in warnings)]:
            on_event({"kind": "message", "text": text, "keep": True})
    outcome = _launch(config, place.uri, (least, started), launcher, address, on_event)
    finished = place.result()
    if finished is not None:
        return finished
    return RunResult(**{**outcome, "uri": place.uri, "metrics": read_curves(outcome["metrics"])})


def _say_what_is_not_applied(config: TrainConfig, place: Run, on_event: OnEvent | None) -> None:
    """Refuse another configuration than the finished run's, and tell of harmless differences."""
    stored = place.require_same_config(config)
    before, now = flatten(stored), flatten(config)
    changed = [name for name in now if name in MAY_CHANGE_ON_RESUME and before[name] != now[name]]
    if changed and on_event:
        text = f"the run is finished: {', '.join(changed)} not applied"
        options = {"eval.k": "--k", "eval.temperature": "--temperature"}
        given = [word for name in changed if name in options for word in (options[name], str(now[name]))]
        if given:
            text += f"; `{command_line('knn', place.uri, *given)}` evaluates anew"
        on_event({"kind": "message", "text": text})


def _workers_here(least: int, most: int, launcher: str, address: str | None) -> tuple[int, str]:
    """Return how many workers to start at most, and what to say of it; ConfigError for what cannot be here."""
    is_connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if most == 0 or (launcher == "ray" and (address or os.environ.get("RAY_ADDRESS") or is_connected)):
        return most, ""
    try:
        return workers_here(least, most, num_cores=usable_cores(), num_gpus=visible_gpus())
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _refuse_idle(config: TrainConfig, place: Run) -> None:
    """Raise ConfigError where a field was changed that nothing reads, unless the run was begun so."""
    asked, made, stored = flatten(config), flatten(starting_point(config)), place.config()
    begun = {} if stored is None else flatten(stored)
    refuse_idle(config, [name for name in asked if asked[name] not in (made[name], begun.get(name, made[name]))])


def _launch(
    config: TrainConfig,
    uri: str,
    workers: tuple[int, int],
    launcher: str,
    address: str | None,
    on_event: OnEvent | None,
) -> dict[str, Any]:
    least, most = workers
    if on_event:
        on_event({"kind": "phase", "text": _starting(least, most, launcher, address)})
    run = Run(uri)
    coordinator = run.coordinator(config)
    preload = ("instdisc.train.loop",)
    if most == 0 or launcher == "local":
        from cluster.worker import run_local

        return run_local(
            train_worker, most, config.to_json(), uri, on_event=on_event, preload=preload, coordinator=coordinator
        )[0]
    from cluster.ray_trainer import run_on_ray

    def take(event: dict[str, Any]) -> None:
        if event.get("kind") == "waiting":
            # In a thread: a storage that is away is tried for minutes.
            threading.Thread(target=run.say_waiting, args=[event["text"]], name="say-waiting", daemon=True).start()
        elif on_event is not None:
            on_event(event)

    return run_on_ray(
        train_worker,
        WorkerRange(least=least, most=most, **asdict(config.elastic)),
        config.to_json(),
        uri,
        address=address,
        on_event=take,
        preload=preload,
        coordinator=coordinator,
    )


def _least_and_most(workers: int | str | tuple[int, int]) -> tuple[int, int]:
    try:
        least, most = workers if isinstance(workers, tuple) else parse_workers(str(workers))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not (0 < least <= most or least == most == 0):
        raise ConfigError(f"workers: found {workers}, expected 0 (this process), a number, or MIN..MAX")
    return least, most


def _starting(least: int, most: int, launcher: str, address: str | None) -> str:
    if most == 0:
        return "starting in this process"
    workers = counted(most, "worker") if least == most else f"{least} to {most} workers"
    if launcher == "local":
        return f"starting {workers} in plain processes"
    place = address or os.environ.get("RAY_ADDRESS")
    return f"starting {workers} on " + (f"the Ray cluster at {place}" if place else "a Ray of our own here")


def train_worker(worker: Worker, config_json: str, uri: str) -> dict[str, Any]:
    """Run `instdisc.train.loop.train`, imported only where it runs: torch takes seconds to load."""
    from instdisc.train.loop import train

    return train(worker, config_json, uri)


def absolute(place: str) -> str:
    """Return a path as workers in other folders find it; a URI as it is."""
    path = place.removeprefix("file://")
    return place if "://" in path else os.path.abspath(os.path.expanduser(path))
