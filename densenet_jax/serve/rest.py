"""Inference over REST: an ASGI application that answers it, and leaves everything else to another.

MLServer's own route takes a request through FastAPI's and its own data classes, which costs more than a small model.
"""

import logging
from typing import Any

import numpy as np
import orjson
from mlserver.errors import MLServerError

from densenet_jax.serve.dataplane import CheckedDataPlane
from densenet_jax.serve.http import Application, Receive, Scope, Send, answer
from densenet_jax.serve.requests import Request, RequestError, Tensor
from densenet_jax.serve.runtime import OUTPUTS

logger = logging.getLogger(__name__)


class Inference:
    """Answers `POST /v2/models/NAME[/versions/VERSION]/infer`; bodies come whole, from `Limited`."""

    def __init__(self, application: Application, data_plane: CheckedDataPlane):
        """Wraps `application`."""
        self._application = application
        self._data_plane = data_plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        found = model_of(scope["path"]) if scope["type"] == "http" else None
        if found is None:
            await self._application(scope, receive, send)
        elif scope["method"] != "POST":
            await answer(send, 405, "inference is asked for with POST")
        else:
            await self._infer(*found, (await receive())["body"], send)

    async def _infer(self, model: str, version: str, body: bytes, send: Send) -> None:
        try:
            request = as_request(model, version, body)
            content = as_json(request, self._data_plane.version, await self._data_plane.answer(request))
        except RequestError as error:
            await answer(send, 400, f"the request is malformed: {error}", close=False)
        except MLServerError as error:
            await answer(send, error.status_code, str(error), close=False)
        except Exception:
            logger.exception("a REST request failed")
            await answer(send, 500, "the server is at fault; its log says why")
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": content})


def model_of(path: str) -> tuple[str, str] | None:
    """Model and version that an address of inference names, "" being any version; None: it is another address."""
    match path.split("/"):
        case ["", "v2", "models", model, "infer"]:
            return model, ""
        case ["", "v2", "models", model, "versions", version, "infer"]:
            return model, version
    return None


def as_request(model: str, version: str, body: bytes) -> Request:
    """The request that `body` holds.

    Raises:
        RequestError: it is no JSON, or not what the protocol says.
    """
    try:
        tree = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"it is not JSON ({error.msg})") from error
    inputs, outputs = field(tree, "inputs", list), field(tree, "outputs", list, None)
    tensors = [
        Tensor(
            name=field(given, "name", str, where=f"inputs.{number}."),
            datatype=field(given, "datatype", str, where=f"inputs.{number}."),
            shape=shape_of(given, number),
            data=field(given, "data", list, where=f"inputs.{number}."),
        )
        for number, given in enumerate(inputs)
    ]
    names = [field(wanted, "name", str, where=f"outputs.{number}.") for number, wanted in enumerate(outputs or ())]
    return Request(model, version, field(tree, "id", str, None), tensors, names or None)


def field(tree: Any, name: str, kind: type, *default: Any, where: str = "") -> Any:
    """A value of an object.

    Args:
        tree: the object.
        name: of the value.
        kind: its type.
        *default: in place of a value that is not there, or null.
        where: what stands before `name` in an error.

    Raises:
        RequestError: there is no such value, or it is of another type.
    """
    value = tree.get(name) if isinstance(tree, dict) else None
    if value is None and default:
        return default[0]
    if type(value) is not kind:
        told = "a list" if kind is list else "a string"
        raise RequestError(f"{where}{name} is {'missing' if value is None else f'not {told}'}; expected {told}")
    return value


def shape_of(given: Any, number: int) -> list[int]:
    """The shape of an input.

    Raises:
        RequestError: it is not a list of whole numbers.
    """
    shape = field(given, "shape", list, where=f"inputs.{number}.")
    if not all(type(size) is int for size in shape):
        raise RequestError(f"inputs.{number}.shape is not a list of whole numbers")
    return shape


def as_json(request: Request, version: str, outputs: dict[str, np.ndarray]) -> bytes:
    """The body of the answer to `request` by the model's `version`."""
    told: list[dict[str, Any]] = []
    for name, values in outputs.items():
        output: dict[str, Any] = {"name": name, "shape": list(values.shape), "datatype": OUTPUTS[name]}
        if OUTPUTS[name] == "BYTES":
            output["parameters"] = {"content_type": "str"}
        told.append(output | {"data": values.ravel().tolist() if values.dtype == object else values.ravel()})
    content: dict[str, Any] = {"model_name": request.model, "model_version": version, "outputs": told}
    content |= {"id": request.request_id} if request.request_id is not None else {}
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
