"""What surrounds each method of the protocol over gRPC: a status for every mistake, and its metrics.

MLServer's interceptor keeps the same metrics, but looks their labels up anew for each request and has grpcio build the
method anew: a quarter of what a small model costs.
"""

import functools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
from mlserver.errors import MLServerError
from mlserver.grpc import dataplane_pb2 as pb
from prometheus_client import Counter, Histogram

logger = logging.getLogger(__name__)

Method: TypeAlias = Callable[..., Awaitable[Any]]
Servicer = TypeVar("Servicer", bound=type)
SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
LABELS = ("grpc_type", "grpc_service", "grpc_method")
STARTED = Counter("grpc_server_started", "Requests that were begun.", LABELS)
HANDLED = Counter("grpc_server_handled", "Requests that were answered, well or not.", (*LABELS, "grpc_code"))
DURATION = Histogram("grpc_server_handling_seconds", "How long answering took.", LABELS)
STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    501: grpc.StatusCode.UNIMPLEMENTED,
}


def answered(servicer: Servicer) -> Servicer:
    """Decorates a class that has all methods of the service: what they raise becomes a status, and is counted.

    An `MLServerError` is the client's fault, whose message it gets; MLServer's own way leaves some out and logs a
    traceback for each.
    """
    for method in SERVICE.methods:
        kind = "BIDI_STREAMING" if method.client_streaming else "UNARY"
        labels = (kind, SERVICE.full_name, method.name)
        setattr(servicer, method.name, _answered(getattr(servicer, method.name), labels))
    return servicer


def _answered(method: Method, labels: tuple[str, str, str]) -> Method:
    started, duration = STARTED.labels(*labels), DURATION.labels(*labels)

    @functools.cache
    def handled(code: grpc.StatusCode) -> Counter:
        return HANDLED.labels(*labels, code.name)

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        begun = time.perf_counter()
        started.inc()
        code = grpc.StatusCode.CANCELLED  # as it stays where the client has gone
        try:
            found = await method(self, request, context)
            code = grpc.StatusCode.OK
            return found
        except MLServerError as error:
            code = STATUS.get(error.status_code, grpc.StatusCode.FAILED_PRECONDITION)
            await context.abort(code, str(error))
        except Exception:
            logger.exception("a gRPC request failed")
            code = grpc.StatusCode.INTERNAL
            await context.abort(code, "the server is at fault; its log says why")
        finally:
            handled(code).inc()
            duration.observe(time.perf_counter() - begun)

    return call
