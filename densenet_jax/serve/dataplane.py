"""What both protocols ask: readiness, metadata, and the answer to a request."""

from typing import Any

import numpy as np
from mlserver.errors import MLServerError, ModelNotReady
from mlserver.handlers import DataPlane
from mlserver.registry import MultiModelRegistry
from mlserver.types import MetadataModelResponse

from densenet_jax.serve.requests import Request, RequestError, check_id, shortened
from densenet_jax.serve.runtime import ImageClassifier


class CheckedDataPlane:
    """MLServer's handlers, behind a check of names: MLServer keeps metrics of every name that anybody ever sent.

    Inference goes past MLServer's handler, whose data classes and headers cost more than a small model does.
    """

    def __init__(self, inner: DataPlane, registry: MultiModelRegistry, model: ImageClassifier):
        self._inner, self._registry, self._model = inner, registry, model
        of_model = {"model": model.name, "version": model.version}
        self._successes = inner._ModelInferRequestSuccess.labels(**of_model)
        self._failures = inner._ModelInferRequestFailure.labels(**of_model)
        self._duration = inner._ModelInferRequestDuration.labels(**of_model)

    @property
    def version(self) -> str:
        """Of the model."""
        return self._model.version or ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def _check(self, name: str, version: str | None) -> None:
        try:
            await self._registry.get_model(name, version)
        except MLServerError as error:
            which = f" of version {shortened(version)}" if version else ""
            raise MLServerError(f"there is no model {shortened(name)}{which}", error.status_code) from error

    async def model_ready(self, name: str, version: str | None = None) -> bool:
        """Whether the model is compiled."""
        await self._check(name, version)
        return await self._inner.model_ready(name, version)

    async def model_metadata(self, name: str, version: str | None = None) -> MetadataModelResponse:
        """Inputs and outputs."""
        await self._check(name, version)
        return await self._inner.model_metadata(name, version)

    async def answer(self, request: Request) -> dict[str, np.ndarray]:
        """The outputs for one request, counted as MLServer counts.

        Raises:
            MLServerError: the request is at fault, or there is no such model.
        """
        await self._check(request.model, request.version or None)
        if request.request_id is not None:
            try:
                check_id(request.request_id)
            except RequestError as error:
                raise MLServerError(str(error)) from error
        with self._duration.time(), self._failures.count_exceptions():
            if not self._model.ready:
                raise ModelNotReady(self._model.name)
            outputs = await self._model.answer(request)
        self._successes.inc()
        return outputs
