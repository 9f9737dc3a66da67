"""One gateway: its settings, its model once that is loaded, and what it counts."""

import threading

from respkv.batching.stats import LoopStats
from respkv.gateway.failures import Refused, shown, unavailable
from respkv.gateway.metrics import Metrics
from respkv.gateway.model import Model
from respkv.gateway.prompts import Prompts
from respkv.gateway.settings import GatewaySettings


class Gateway:
    """What all routes share. The model comes from a thread that loads it, while health is asked."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.prompts = Prompts(settings)
        self.metrics = Metrics(self._loop_stats)
        self._lock = threading.Lock()
        self._model: Model | None = None
        self._is_stopping = False

    def install(self, model: Model) -> None:
        """Take requests from now on; from any thread. A gateway that stops closes it at once."""
        with self._lock:
            if not self._is_stopping:
                self._model = model
                return
        model.close(0.0)

    def stop(self) -> Model | None:
        """Take no more requests; returns the model, which the caller has to close."""
        with self._lock:
            self._is_stopping = True
            return self._model

    @property
    def loaded(self) -> Model | None:
        """The model, if it is loaded; it may have crashed since."""
        return self._model

    @property
    def model(self) -> Model:
        """The model. Raises Refused while it cannot be asked."""
        wait = self.settings.retry_after_s
        if self._is_stopping:
            raise unavailable("stopping", "the gateway is being stopped", wait)
        if self._model is None:
            raise unavailable("loading", "the model is being loaded", wait)
        self.check_alive()
        return self._model

    def check_alive(self) -> None:
        """Raise Refused when the model has crashed, after which nothing is served any more."""
        model = self._model
        if model is not None and not model.loop.is_alive and not self._is_stopping:
            message = "the model has crashed; restart the gateway"
            raise unavailable("model_down", message, self.settings.retry_after_s)

    def named_model(self, name: str | None) -> Model:
        """Return the model if that is its name, or none was said.

        Raises Refused when it has another name, or cannot be asked.
        """
        model = self.model
        if name is not None and name != model.name:
            message = f"there is no model {shown(name)} here, only {model.name!r}"
            raise Refused(404, "model_not_found", message, param="model")
        return model

    def _loop_stats(self) -> LoopStats | None:
        model = self._model
        return model.loop.stats() if model is not None and model.loop.is_alive else None
