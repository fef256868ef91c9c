"""A daemon for each node of a cluster: hears from the cloud that the machine goes, and drains the node in Ray.

    python -m cluster.spot_watch --address HEAD:6379 [--cloud auto|aws|gcp] [--node-id HEX] [--node-ip IP]

Started after `ray start`, it ends with the raylet that it watches. It writes one line for each event on standard error;
what stands there holds no credentials. Training then saves a checkpoint and leaves the node before the deadline.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from cluster.local_raylets import AmbiguousRaylet, NoSuchRaylet, Raylet, choose_raylet, local_raylets
from cluster.metadata_service import METADATA_URL, SERVICES, MetadataService, Notice, detect

POLL_S = 2.0  # AWS advises at most 5 s; a machine of GCP has 30 s from the notice
RETRY_S = 1.0
TELL_S = 30.0
LEAST_NOTICE_S = 5.0  # for a notice that comes late or from a clock that differs
RAYLET_TIMEOUT_S = 60.0
USER_ERROR = 2
_LOG = logging.getLogger("instdisc.spot_watch")

Drain = Callable[[str, str, str, float], None]
"""(address, node id, message, deadline in Unix seconds); raises as long as it is to be tried again."""


class SpotWatch:
    """Watches one metadata service for one raylet. Whatever goes wrong is told and tried again: nobody starts it anew.

    Args:
        open_service: finds the metadata service; asked again while it raises.
    """

    def __init__(self, raylet: Raylet, open_service: Callable[[], MetadataService], drain: Drain, poll_s: float):
        self._raylet = raylet
        self._open_service = open_service
        self._drain = drain
        self._poll_s = poll_s
        self._service: MetadataService | None = None
        self._silent_since_s: float | None = None
        self._told: set[Notice] = set()
        self._pending: list[Notice] = []
        self._failed_told_s = -float("inf")

    def run(self) -> None:
        """Watch until the raylet ends."""
        while self._raylet.is_running():
            for notice in self._poll():
                if notice not in self._told:
                    self._told.add(notice)
                    self._hear(notice)
            self._drain_pending()
            time.sleep(min(RETRY_S, self._poll_s) if self._pending else self._poll_s)
        _LOG.info("the raylet ended; so does this watch")

    def _poll(self) -> list[Notice]:
        try:
            if self._service is None:
                self._service = self._open_service()
                _LOG.info("watching the metadata service of %s for %s", self._service.name, self._raylet)
            notices = self._service.poll()
        except Exception as error:
            if self._silent_since_s is None:
                self._silent_since_s = time.monotonic()
                _LOG.warning(
                    "no answer from the metadata service (%s); asking again every %g s", _said(error), self._poll_s
                )
            return []
        if self._silent_since_s is not None:
            _LOG.info("the metadata service answers again, after %.0f s", time.monotonic() - self._silent_since_s)
            self._silent_since_s = None
        return notices

    def _hear(self, notice: Notice) -> None:
        if notice.deadline_s is None:
            _LOG.info("%s (nothing is done)", notice.event)
            return
        _LOG.warning("%s: %.0f s left, draining the node", notice.event, notice.deadline_s - time.time())
        self._pending.append(notice)

    def _drain_pending(self) -> None:
        while self._pending:
            notice = min(self._pending, key=lambda pending: pending.deadline_s or 0.0)
            deadline_s = max(notice.deadline_s or 0.0, time.time() + LEAST_NOTICE_S)
            try:
                self._drain(self._raylet.gcs_address, self._raylet.node_id, notice.event, deadline_s)
            except Exception as error:
                if time.monotonic() - self._failed_told_s > TELL_S:
                    self._failed_told_s = time.monotonic()
                    _LOG.warning("not drained yet (%s); trying again every %g s", _said(error), RETRY_S)
                return
            _LOG.warning("drained: the cluster knows that this node goes in %.0f s", deadline_s - time.time())
            self._pending.clear()  # the nearest deadline counts


def _said(error: Exception) -> str:
    """Return what went wrong on one line, with its kind where that is no passing failure of a connection."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ConnectionError) else f"{type(error).__name__}: {text}"


def _is_http(url: str) -> bool:
    try:
        place = urlsplit(url)
        return place.scheme == "http" and bool(place.hostname) and place.port != 0
    except ValueError:  # the port
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Watch until the node's raylet ends; 0, or 2 where it is not clear which node to watch."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s spot_watch: %(message)s", stream=sys.stderr)
    if not _is_http(options.metadata_url):
        print(f"--metadata-url {options.metadata_url}: expected http://HOST[:PORT]", file=sys.stderr)
        return USER_ERROR
    if not options.poll_s > 0:
        print(f"--poll-s {options.poll_s:g}: expected seconds, more than 0", file=sys.stderr)
        return USER_ERROR
    try:
        raylet = _wait_for_raylet(options)
    except NoSuchRaylet as error:
        print(f"spot_watch: {error}", file=sys.stderr)
        return USER_ERROR
    from cluster.ray_drain import drain_node  # before a notice comes: Ray takes a second to import

    kind = detect if options.cloud == "auto" else SERVICES[options.cloud]
    SpotWatch(raylet, lambda: kind(options.metadata_url), drain_node, options.poll_s).run()
    return 0


def _wait_for_raylet(options: argparse.Namespace) -> Raylet:
    """The raylet to watch; one that is just being started is waited for."""
    deadline_s = time.monotonic() + options.wait_s
    while True:
        try:
            return choose_raylet(local_raylets(), options.address, options.node_id, options.node_ip)
        except AmbiguousRaylet:
            raise
        except NoSuchRaylet:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(0.5)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.spot_watch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--address", help="host:port of the head (default: that of this machine's only raylet)")
    parser.add_argument("--cloud", choices=("auto", *SERVICES), default="auto", help="whose notices (default: auto)")
    parser.add_argument("--node-id", help="the node to drain, where several run on this machine")
    parser.add_argument("--node-ip", help="the same, by its address in the cluster")
    parser.add_argument("--metadata-url", default=METADATA_URL, help=f"default: {METADATA_URL}")
    parser.add_argument("--poll-s", type=float, default=POLL_S, help=f"seconds between questions (default: {POLL_S:g})")
    parser.add_argument("--wait-s", type=float, default=RAYLET_TIMEOUT_S, help="how long to wait for the raylet")
    return parser


if __name__ == "__main__":
    sys.exit(main())
