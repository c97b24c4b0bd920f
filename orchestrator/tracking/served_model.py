"""What MLflow runs to serve a trained net; stored as text with the model, beside a copy of alexnet/.

model = mlflow.pyfunc.load_model("runs:/RUN_ID/model")
probabilities = model.predict(images)      # (N, S, S, 3) uint8, S the stored side, to (N, classes) float32
"""

from typing import Any

import mlflow
import numpy as np

import alexnet


class Classifier:
    """Centre crop, mean subtraction, net, softmax."""

    def load_context(self, context: Any) -> None:
        self.trained = alexnet.load(context.artifacts["net"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """model_input: (N, S, S, 3) uint8, S the stored side; returns (N, classes) float32 probabilities."""
        return self.trained.probabilities(np.ascontiguousarray(model_input, dtype=np.uint8))


class Served(Classifier, mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Inherits `predict`: MLflow advises type hints where it sees a class define one, and takes them for a schema."""


mlflow.models.set_model(Served())
