"""The load generator, a process of its own: sends requests when they are due, whatever became of those before.

`python -m jobs.bench.load.generator FOLDER` reads `plan.json` and `arrivals.npz` and writes `records.npz`,
`answers.jsonl` and `end.json`. It says on standard output when it begins, and stops early when its standard input ends.
It tries nothing again, and imports little, as it shares the machine with what it measures.
"""

import asyncio
import gc
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from jobs.bench.load.records import Records
from jobs.bench.load.rude import Rude

PLAN, ARRIVALS, RECORDS, ANSWERS, END = (
    "plan.json",
    "arrivals.npz",
    "records.npz",
    "answers.jsonl",
    "end.json",
)
_BEGINS_AFTER_S = 0.3
_NAP_S = 0.1
_HEADERS = {"content-type": "application/json"}


@dataclass(frozen=True)
class Plan:
    """What a load does.

    Attributes:
        targets: (url, body) of what is asked.
        timeout_s: How long a request may take.
        keep: Whether answers are written down.
        slow_clients: Connections that are held by clients that hardly send anything.
        large_every_s: How often a far too large body is sent; 0 for never.
    """

    targets: list[tuple[str, str]]
    timeout_s: float = 30.0
    keep: bool = False
    slow_clients: int = 0
    large_every_s: float = 0.0


class Generator:
    """Sends a load.

    Args:
        plan: What is asked.
        records: When, of which target; what became of it is written there.
    """

    def __init__(self, plan: Plan, records: Records) -> None:
        self._plan = plan
        self._records = records
        self._targets = [(url, body.encode()) for url, body in plan.targets]
        self._stopped = False
        self.answers: dict[int, bytes] = {}

    def stop(self) -> None:
        """Send no more."""
        self._stopped = True

    async def run(self) -> None:
        """Send everything that is due, and wait for all answers."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=10)
        timeout = aiohttp.ClientTimeout(total=self._plan.timeout_s)
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            headers=_HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
        ) as session:
            await self._send(session)

    async def _send(self, session: aiohttp.ClientSession) -> None:
        tasks: set[asyncio.Task[None]] = set()
        for number, due in enumerate(self._records.scheduled.tolist()):
            while not self._stopped and (left := due - time.monotonic()) > 0:
                await asyncio.sleep(min(left, _NAP_S))
            if self._stopped:
                break
            task = asyncio.create_task(self._ask(session, number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            await asyncio.sleep(0)  # also where it is late, so that answers are read
        if tasks:
            await asyncio.wait(tasks)

    async def _ask(self, session: aiohttp.ClientSession, number: int) -> None:
        notes = self._records
        url, body = self._targets[notes.target[number]]
        notes.sent[number] = time.monotonic()
        try:
            async with session.post(url, data=body) as answer:
                notes.first[number] = time.monotonic()
                content = await answer.read()
            notes.status[number] = answer.status
            notes.retry_after[number] = _seconds(answer.headers.get("retry-after"))
            notes.degraded[number] = b'"degraded":true' in content
            if self._plan.keep and answer.status == 200:
                self.answers[number] = content
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            notes.error[number] = type(error).__name__
        notes.done[number] = time.monotonic()


def _seconds(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:  # a date is allowed, too; none of ours sends one
        return float("nan")


async def _main(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / PLAN).read_text())
    plan = Plan(**{**values, "targets": [tuple(one) for one in values["targets"]]})
    with np.load(folder / ARRIVALS) as arrivals:
        start = time.monotonic() + _BEGINS_AFTER_S
        records = Records.planned(arrivals["target"], start + arrivals["at"])
    generator = Generator(plan, records)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    watching = loop.create_task(_stop_at_the_end_of(reader, generator))
    print(json.dumps({"start": start}), flush=True)
    began = time.process_time()
    async with Rude(plan.targets[0][0], plan.slow_clients, plan.large_every_s) as rude:
        await generator.run()
    cpu_s = time.process_time() - began
    watching.cancel()
    records.save(folder / RECORDS)
    with (folder / ANSWERS).open("wb") as lines:
        for number in range(len(records)):
            lines.write(generator.answers.get(number, b"") + b"\n")
    return {"cpu_s": cpu_s, "rude": rude.outcomes}


async def _stop_at_the_end_of(reader: asyncio.StreamReader, generator: Generator) -> None:
    await reader.read()
    generator.stop()


def main(folder: Path) -> None:
    """Send the load that a folder describes."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection for each that waits
    gc.freeze()
    (folder / END).write_text(json.dumps(asyncio.run(_main(folder))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
