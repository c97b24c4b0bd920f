"""What MLflow runs to serve a trained net; stored as text with the model, beside a copy of alexnet/.

model = mlflow.pyfunc.load_model("runs:/RUN_ID/model")
probabilities = model.predict(images)      # (N, S, S, 3) uint8, S the stored side, to (N, classes) float32
"""

import json
from typing import Any

import mlflow
import numpy as np
import torch
from safetensors.torch import load_file

import alexnet
from alexnet import augment


class Classifier:
    """Centre crop, mean subtraction, net, softmax."""

    def load_context(self, context: Any) -> None:
        with open(context.artifacts["net"]) as file:
            described = json.load(file)
        build = described["build"]
        self.net = alexnet.build(**(build | {"lrn": alexnet.LRN(**build["lrn"])})).eval()
        self.net.load_state_dict(load_file(context.artifacts["weights"]))
        mean = torch.from_numpy(np.load(context.artifacts["mean_image"], allow_pickle=False))
        self.subtract_mean = alexnet.MeanSubtraction(mean, self.net.input_size, described["pixel_scale"])

    @torch.inference_mode()
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """model_input: (N, S, S, 3) uint8, S the stored side; returns (N, classes) float32 probabilities."""
        images = np.ascontiguousarray(model_input, dtype=np.uint8)
        draws = augment.center(len(images), margin=self.subtract_mean.margin)
        crops = augment.crop_flip_shift(images, draws, np.zeros((len(images), 3), np.float32), self.net.input_size)
        cut = (torch.from_numpy(part) for part in (crops, draws.top, draws.left, draws.flip))
        return torch.softmax(self.net(self.subtract_mean(*cut)), 1).numpy()


class Served(Classifier, mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Inherits `predict`: MLflow advises type hints where it sees a class define one, and takes them for a schema."""


mlflow.models.set_model(Served())
