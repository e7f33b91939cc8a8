"""Weights in and out: our own as safetensors; timm's, torchvision's and the official TensorFlow ones in."""

from maxattn.weights.load import load_weights
from maxattn.weights.report import LoadReport
from maxattn.weights.save import open_model, save_weights

__all__ = ["LoadReport", "load_weights", "open_model", "save_weights"]
