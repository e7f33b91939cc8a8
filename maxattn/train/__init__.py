"""Training and evaluating classifiers on folders of images."""

from maxattn.train.classifier import Classifier
from maxattn.train.engine import TrainingDiverged, TrainingInterrupted, train
from maxattn.train.recipe import Recipe, TrainConfig, load_config

__all__ = ["Classifier", "Recipe", "TrainConfig", "TrainingDiverged", "TrainingInterrupted", "load_config", "train"]
