"""`python -m jobs.bench NAME`: a benchmark without the `slq` command's own dependencies."""

import json
import sys

from jobs.bench.train import run

BENCHES = {"train": run}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHES:
        sys.exit(f"usage: python -m jobs.bench {{{','.join(BENCHES)}}} [options]")
    print(json.dumps(BENCHES[sys.argv[1]](sys.argv[2:]), indent=2))
