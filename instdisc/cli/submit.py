"""`instdisc submit`: train on a Ray cluster as a job that is followed, and submitted again when it is lost."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instdisc.cli.overrides import parse_overrides
from instdisc.cli.train import default_workers, metric_lines
from instdisc.config import TrainConfig
from instdisc.progress import Progress, in_bytes
from instdisc.recipes import RECIPES, recipe
from instdisc.runs import Run, RunResult

if TYPE_CHECKING:
    from cluster.ray_jobs import RayJobs
    from cluster.ray_submit import End

DEFAULT_PATIENCE_MINUTES = 15.0
INTERRUPTED = 130
_PROGRESS = re.compile(r"step [\d,]+/[\d,]+ \(\d+%\)")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser(
        "submit",
        help="train on a Ray cluster: a job that is followed, and submitted again if its driver or head is lost",
        description="Train a recipe on a Ray cluster, as a job. Its log is shown. Ctrl-C detaches, and the job goes "
        "on; the same command follows it again. If the driver or the head is lost, the job is submitted again and "
        "goes on from the newest checkpoint; after three submissions without a new one it is given up. "
        "--SECTION.FIELD VALUE as for `instdisc train`.",
        epilog=f"recipes: {', '.join(RECIPES)}",
    )
    parser.add_argument("recipe", help="what to train")
    parser.add_argument(
        "--address", metavar="URL", help="the cluster's dashboard, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS)"
    )
    parser.add_argument("--run", metavar="URI", dest="uri", help="URI of the run, such as s3://bucket/runs/first")
    parser.add_argument(
        "--shared-folder", action="store_true", help="--run is a folder that is the same on all machines, and here"
    )
    parser.add_argument("--workers", help="N or MIN..MAX DDP workers (default: as for `instdisc train`)")
    parser.add_argument(
        "--working-dir",
        type=Path,
        metavar="DIR",
        help="run in a copy of this folder, without data, runs, environments and secrets (default: the cluster's own)",
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="pass on this environment variable (no secrets)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=DEFAULT_PATIENCE_MINUTES,
        metavar="MINUTES",
        help=f"how long to wait for a head that is away (default: {DEFAULT_PATIENCE_MINUTES:g})",
    )
    parser.add_argument("--no-wait", action="store_true", help="return when the job is submitted")
    parser.add_argument("--json", action="store_true", help="print one JSON document about the end")
    parser.set_defaults(run=run, takes_overrides=True)
    return parser


def run(options: argparse.Namespace) -> int:
    """Submit and follow, with the job's log on standard error and the end on standard output."""
    from instdisc.submission import passed_on, train_command

    # A mistake is found here, not after a minute there.
    config = recipe(options.recipe, **parse_overrides(options.overrides))
    options.workers = options.workers or default_workers(config)
    variables = passed_on(options.env)
    train_command(options.recipe, options.uri or "", options.workers, options.overrides)
    address = options.address or os.environ.get("RAY_API_SERVER_ADDRESS") or ""
    with tempfile.TemporaryDirectory(prefix="instdisc-submit-") as folder:
        return _submit(options, config, address, variables, Path(folder))


def _submit(
    options: argparse.Namespace, config: TrainConfig, address: str, variables: dict[str, str], folder: Path
) -> int:
    from cluster.ray_jobs import RayJobs, runtime_env
    from cluster.ray_submit import HeadLostError, JobSpec, Submission
    from instdisc.submission import job_name, newest_checkpoint, require_groups, run_on_cluster, train_command

    lines = Lines(Progress())
    package = _package(options.working_dir, folder, lines)
    jobs = RayJobs(address)
    uri = run_on_cluster(options.uri, jobs.host_names, is_shared=options.shared_folder)
    require_groups(uri, config, options.workers)
    submission = Submission(
        jobs,
        JobSpec(
            name=job_name(uri),
            run=uri,
            entrypoint=train_command(options.recipe, uri, options.workers, options.overrides),
            runtime_env=runtime_env(variables, package),
        ),
        checkpoint=lambda: newest_checkpoint(uri),
        on_text=lines.add,
        on_event=lines.tell,
        patience_s=60 * options.patience,
    )
    try:
        job = submission.start()
        stop = f"`{jobs.stop_command(job.id)}` stops it, with a checkpoint"
        if options.no_wait:
            lines.message(stop)
            return _print(options.json, uri, submission.ids, job.status, f"Submitted: job {job.id}")
        lines.message(f"Ctrl-C detaches, and the job goes on; {stop}")
        end = submission.finish()
    except KeyboardInterrupt:
        lines.close()
        return _detached(options.json, uri, submission.ids, jobs)
    except HeadLostError as error:
        if _result(uri) is None:
            _print(options.json, uri, submission.ids, "UNKNOWN", "", cause=str(error))
            raise
        # Such as a cluster that is taken down when its job is over.
        text = f"Run {uri} is finished; the head of its cluster is gone"
        return _print(options.json, uri, submission.ids, "SUCCEEDED", text)
    finally:
        lines.close()
    return _ended(options.json, uri, end)


class Lines:
    """Shows a job's log, which comes in pieces, and what happens besides: whole lines, each once.

    In a terminal the job's progress is one line that is redrawn.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._rest = ""

    def add(self, text: str) -> None:
        """Show a piece of the log."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            is_progress = self._progress.is_terminal and _PROGRESS.match(line)
            self._progress.update({"kind": "phase" if is_progress else "message", "text": line})

    def tell(self, event: dict[str, Any]) -> None:
        """Show an event; a line of the log that has come in part comes after it, whole."""
        self._progress.update(event)

    def message(self, text: str) -> None:
        """Show a line that is not the job's."""
        self.tell({"kind": "message", "text": text})

    def close(self) -> None:
        """Show what is left."""
        if self._rest:
            self.add("\n")
        self._progress.close()


def _package(working_dir: Path | None, folder: Path, lines: Lines) -> Path | None:
    if working_dir is None:
        return None
    from cluster.ray_working_dir import pack_working_dir

    packed = pack_working_dir(working_dir, folder)
    lines.message(f"sends {packed.num_files:,} files of {working_dir}, {in_bytes(packed.num_bytes)}")
    if packed.secrets:
        named = ", ".join(packed.secrets[:5]) + (", …" if len(packed.secrets) > 5 else "")
        lines.message(f"left out {len(packed.secrets):,} files that may hold credentials: {named}")
    return packed.package


def _detached(as_json: bool, uri: str, ids: tuple[str, ...], jobs: RayJobs) -> int:
    if ids:
        print(
            f"\nDetached: job {ids[-1]} goes on, and is not submitted again if it is lost. The same command follows it "
            f"again; `{jobs.stop_command(ids[-1])}` stops it, with a checkpoint",
            file=sys.stderr,
        )
    _print(as_json, uri, ids, "DETACHED" if ids else "UNKNOWN", "")
    return INTERRUPTED


def _ended(as_json: bool, uri: str, end: End) -> int:
    """Print the end and return the exit code, or raise what says why it is not a good one."""
    from cluster.job import JobRefusedError, Verdict

    last, num_submissions = end.ids[-1], len(end.ids)
    again = f" ({num_submissions} submissions)" if num_submissions > 1 else ""
    text = {
        Verdict.SUCCEEDED: f"Job {last} succeeded{again}: run {uri}",
        Verdict.STOPPED: f"Job {last} was stopped{again}. The same command goes on with run {uri}",
    }.get(end.verdict, "")
    _print(as_json, uri, end.ids, end.status, text, exit_code=end.exit_code, cause=end.cause)
    if end.verdict is Verdict.MISTAKE:
        raise JobRefusedError(f"job {last} ended with exit code {end.exit_code}:\n{end.cause}")
    if end.verdict is Verdict.LOST:
        raise GaveUpError(f"run {uri}: {end.cause}")
    return INTERRUPTED if end.verdict is Verdict.STOPPED else 0


class GaveUpError(RuntimeError):
    """The job ended without success, again and again."""


def _print(as_json: bool, uri: str, ids: tuple[str, ...], status: str, text: str, **more: Any) -> int:
    """Print the end as it was asked for."""
    result = _result(uri) if status == "SUCCEEDED" else None
    if as_json:
        found = {"step": result.step, "metrics": result.metrics} if result else {}
        document = {"run": uri, "status": status, "jobs": ids, "submissions": len(ids), **more, **found}
        print(json.dumps(document, indent=1))
    elif text:
        print("\n".join([text, *(metric_lines(result) if result else [])]))
    return 0


def _result(uri: str) -> RunResult | None:
    """Return what the run came to, None where it cannot be read from here."""
    try:
        return Run(uri).result()
    except (OSError, ValueError, ImportError):
        return None
