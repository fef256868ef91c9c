"""Take a run's lease in a process of its own, hold it until something comes through stdin, and say what happens.

Usage: hold_lease.py FOLDER LEASE_S BEAT_S. Prints {"refused": text}, or {"taken": pid} and later {"lost": …} or
{"released": …}.
"""

import json
import os
import select
import sys

from cluster.lease import Holder, Lease, RunHeldError
from cluster.store import Store


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def main(folder: str, lease_s: float, beat_s: float) -> None:
    lease = Lease(Store(folder), Holder.of_this_process(), lease_s=lease_s)
    say(started=os.getpid())
    try:
        lease.take()
    except RunHeldError as error:
        say(refused=str(error))
        return
    say(taken=os.getpid())
    while True:
        if select.select([sys.stdin], [], [], beat_s)[0]:
            lease.release()
            say(released=os.getpid())
            return
        if not lease.beat():
            say(lost=os.getpid())
            return


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
