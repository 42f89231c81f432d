"""The application: all routes behind one gate."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from gorgon.serve import openai, problems, race, sagemaker
from gorgon.serve.gate import Gate
from gorgon.serve.metrics import Meter
from gorgon.serve.scheduler import Scheduler
from gorgon.serve.service import Service
from gorgon.serve.settings import ServeConfig

PAGE_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
               "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # fmt: skip


def model_name(config: ServeConfig) -> str:
    """The name in the API."""
    if config.name is not None:
        return config.name
    path = Path(config.model)
    return path.resolve().name if path.exists() else config.model


def make_app(
    config: ServeConfig, scheduler: Scheduler, meter: Meter, on_end: Callable[[], None] = lambda: None
) -> FastAPI:
    """The application; it starts the scheduler when it starts, and stops it when it ends."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        scheduler.start(on_end)
        yield
        scheduler.stop()

    app = FastAPI(title="Gorgon", version=version("gorgon-llm"), lifespan=lifespan, docs_url=None, redoc_url=None)
    service = Service(config, scheduler, meter, model_name(config))
    problems.install(app)
    app.include_router(openai.router(service))
    app.include_router(sagemaker.router(service))

    @app.get("/health", responses={503: problems.RESPONSES[503]})
    async def health() -> dict[str, Any]:
        scheduler.check_alive()
        return {"status": scheduler.state, "model": service.name, "queued": scheduler.queued,
                "active": scheduler.active, "slots": config.slots, "context": scheduler.context,
                "drafts": config.drafts}  # fmt: skip

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(meter.text(), media_type=CONTENT_TYPE_LATEST)

    if config.playground:
        app.include_router(race.router(service))
        page = (files("gorgon.serve") / "playground" / "index.html").read_text(encoding="utf-8")

        @app.get("/", include_in_schema=False)
        async def playground() -> HTMLResponse:
            return HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY,
                                               "x-content-type-options": "nosniff"})  # fmt: skip

    app.add_middleware(
        Gate, meter=meter, api_key=config.api_key, max_body_bytes=config.max_body_bytes, check_room=scheduler.check_room
    )
    return app
