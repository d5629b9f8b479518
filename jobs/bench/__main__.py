"""`python -m jobs.bench NAME`: a benchmark without the `slq` command's own dependencies."""

import json
import sys

from jobs.bench.train import run
from slq.errors import SlqError

BENCHES = {"train": run}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHES:
        sys.exit(f"usage: python -m jobs.bench {{{','.join(BENCHES)}}} [options]")
    try:
        print(json.dumps(BENCHES[sys.argv[1]](sys.argv[2:]), indent=2))
    except SlqError as error:
        sys.exit(f"error: {error}")
