"""Workers that end when they are told to.

A worker of Ray 2.60 that ends in good order may lock itself up in the destructors of Ray's own core: it then keeps its
memory for ever, though its cluster is long gone (about one in ten runs left an actor behind). By then Python has
ended, and Ray has told everybody that it leaves; so nothing is lost where the destructors are left out.
"""

import atexit
import os
import sys
from functools import cache


@cache
def leave_without_destructors() -> None:
    """Let this process end as soon as Python has; nothing happens where it is no worker of Ray's."""
    import ray

    if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        atexit.register(_leave)


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
