"""MLServer with one fixed model: the routes it keeps, the limits it is given, where its log goes."""

import contextlib
import functools
import html
import importlib.resources
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from mlserver import MLServer, ModelSettings, Settings
from mlserver.metrics.prometheus import PrometheusEndpoint
from mlserver.model import MLModel
from mlserver.registry import MultiModelRegistry
from mlserver.rest.server import RESTServer
from starlette.exceptions import HTTPException

from densenet_jax.serve.dataplane import CheckedDataPlane
from densenet_jax.serve.grpc import BoundGRPCServer
from densenet_jax.serve.http import Limited
from densenet_jax.serve.requests import shortened
from densenet_jax.serve.rest import Inference
from densenet_jax.serve.runtime import ImageClassifier

BODY_SECS = 30.0  # in which a request's body has to arrive
MAX_REQUESTS = 256  # under way at once, of each protocol; more are told to come again
STOP_SECS = 5  # in which requests under way may end
MODEL = "/v2/models/{model_name}"
# All else of MLServer's routes would let anybody load and unload models, or brings pages that need another host.
ROUTES = {"/v2", "/v2/health/live", "/v2/health/ready"} | {
    f"{model}{what}" for model in (MODEL, MODEL + "/versions/{model_version}") for what in ("", "/ready")
}
# The page may run what stands in it and speak to this server, and nothing else.
PAGE_POLICY = (
    "default-src 'none'; img-src blob: data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to MLServer."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class BoundRESTServer(RESTServer):
    """MLServer's REST server on a socket that is bound already, with our page and limits and fewer routes."""

    def __init__(
        self, settings: Settings, data_plane: CheckedDataPlane, *, listener: socket.socket, max_body_bytes: int
    ):
        super().__init__(settings, data_plane, None)
        self._listener = listener
        self._max_body_bytes = max_body_bytes
        self._checked = data_plane
        keep_routes(self._app)
        add_error_handlers(self._app)
        self._app.add_route("/metrics", PrometheusEndpoint(settings).handle_metrics)

    def add_page(self, model: str) -> None:
        """Serves the page at /."""
        text = page(model)
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        self._app.add_route("/", lambda request: HTMLResponse(text, headers=headers))

    async def start(self) -> None:
        """Serves until it is stopped."""
        inference = Inference(self._app, self._checked)
        limited = Limited(inference, max_body_bytes=self._max_body_bytes, body_secs=BODY_SECS)
        settings = uvicorn.Config(
            limited,
            access_log=False,
            log_config=None,
            lifespan="off",
            ws="none",
            server_header=False,
            limit_concurrency=MAX_REQUESTS,
            timeout_graceful_shutdown=STOP_SECS,
        )
        self._server = _Uvicorn(settings)
        await self._server.serve(sockets=[self._listener])


def page(model: str) -> str:
    """The page on which a person tries the model."""
    text = importlib.resources.files("densenet_jax.serve").joinpath("page.html").read_text("utf-8")
    return text.replace("MODEL_NAME", html.escape(model, quote=True))


def keep_routes(app: FastAPI) -> None:
    """Takes away every route that is not among `ROUTES`."""
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error `{"error": "..."}`, and none of them repeat the request."""

    async def malformed(_: Request, error: Exception) -> JSONResponse:
        first = error.errors()[0] if isinstance(error, RequestValidationError) and error.errors() else {}
        where = ".".join(str(part) for part in first.get("loc", ()) if part != "body")
        what = shortened(first.get("ctx", {}).get("error", first.get("msg", "it is malformed")), 120)
        return JSONResponse({"error": f"the request is malformed: {f'{where}: ' if where else ''}{what}"}, 400)

    async def refused(_: Request, error: Exception) -> JSONResponse:
        status = error.status_code if isinstance(error, HTTPException) else 400
        return JSONResponse({"error": str(getattr(error, "detail", error))}, status)

    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, refused)


class OneModelServer(MLServer):
    """MLServer that serves `model` and is told by its maker where to listen."""

    def __init__(self, settings: Settings, model: ImageClassifier, listener: socket.socket, max_body_bytes: int):
        """Takes the gRPC address, too.

        Raises:
            UserError: it is in use.
        """
        self._model = model
        self._make_rest = functools.partial(BoundRESTServer, listener=listener, max_body_bytes=max_body_bytes)
        super().__init__(settings)
        self._rest_server.add_page(model.name)
        self._grpc_server.bind()

    @property
    def grpc_port(self) -> int:
        """Where gRPC listens."""
        return self._grpc_server.port

    def _create_model_registry(self) -> MultiModelRegistry:
        def made(settings: ModelSettings) -> MLModel:
            del settings
            return self._model

        return MultiModelRegistry(model_initialiser=made)

    def _configure_logger(self) -> None:
        """Leaves logging alone: MLServer would write to standard output, which belongs to the last line."""

    def _create_servers(self) -> None:
        self._metrics_server = None  # the metrics are served beside the model
        self._kafka_server = None
        checked = CheckedDataPlane(self._data_plane, self._model_registry, self._model)
        self._rest_server = self._make_rest(self._settings, checked)
        self._grpc_server = BoundGRPCServer(self._settings, checked, max_requests=MAX_REQUESTS)
