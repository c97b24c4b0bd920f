"""Predict the classes of images: orchestrator/cli/predict.py."""

import sys

from orchestrator.cli.start import predict

if __name__ == "__main__":
    sys.exit(predict())
