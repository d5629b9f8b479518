"""An HTTP server without Ray: what a request costs client and machine alone. `python -m jobs.bench.load.bare`."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web


async def _answer(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _main() -> None:
    app = web.Application()
    app.router.add_post("/", _answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until whoever started it lets go


@contextmanager
def bare_server() -> Iterator[str]:
    """Run it while the block runs; gives its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        cwd=Path(__file__).parents[3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/"
    finally:
        process.communicate()


if __name__ == "__main__":
    asyncio.run(_main())
