"""Apps that do nothing, to tell what Ray Serve and HTTP cost by themselves."""

from typing import Any

from fastapi import FastAPI, Request
from ray import serve
from ray.serve.handle import DeploymentHandle

NOOP, COMPOSED = "bench-noop", "bench-composed"
_ANSWER = {"status": "ok", "results": [], "timings_ms": {"embed": 0.0}}
_MANY = 1024  # as our ingress
noop_app = FastAPI()
composed_app = FastAPI()


@serve.deployment(max_ongoing_requests=_MANY, ray_actor_options={"num_cpus": 0})
@serve.ingress(noop_app)
class Noop:
    """Answers a small JSON."""

    @noop_app.post("/")
    async def answer(self, request: Request) -> dict[str, Any]:
        """The same every time; the body is read, for which Ray Serve asks its proxy, and looked at no further."""
        await request.body()
        return _ANSWER


@serve.deployment(max_ongoing_requests=_MANY, ray_actor_options={"num_cpus": 0})
class Inner:
    """What the composed app asks."""

    async def answer(self) -> dict[str, Any]:
        """The same every time."""
        return _ANSWER


@serve.deployment(max_ongoing_requests=_MANY, ray_actor_options={"num_cpus": 0})
@serve.ingress(composed_app)
class Composed:
    """Asks one deployment by its handle and passes its answer on."""

    def __init__(self, inner: DeploymentHandle) -> None:
        self._inner = inner

    @composed_app.post("/")
    async def answer(self, request: Request) -> Any:
        """What the deployment says; the body is read."""
        await request.body()
        return await self._inner.answer.remote()


def start_apps() -> dict[str, str]:
    """Start both beside the service; gives their paths."""
    apps = {
        NOOP: Noop.bind(),  # type: ignore[attr-defined]
        COMPOSED: Composed.bind(Inner.bind()),  # type: ignore[attr-defined]
    }
    for name, app in apps.items():
        serve.run(app, name=name, route_prefix=f"/{name}")
    return {name: f"/{name}/" for name in apps}


def stop_apps() -> None:
    """Stop what `start_apps` started."""
    for name in (NOOP, COMPOSED):
        serve.delete(name)
