"""A functional model zoo for JAX: the image classifiers of keras.applications as pure Flax modules, in NHWC.

module, variables = fzoo.load("ResNet50")
x = fzoo.preprocess_input(fzoo.load_image_for("parrot.jpg", "ResNet50")[None], "ResNet50")
fzoo.decode_predictions(fzoo.predict(module, variables, x))
"""

from fzoo._version import __version__
from fzoo.apps.picture import save_picture
from fzoo.convert import WeightsReport, inspect_weights
from fzoo.images.labels import decode_predictions
from fzoo.images.reading import load_image
from fzoo.images.recipe import Recipe
from fzoo.inference import devices
from fzoo.inference.explain import Explanation, explain, feature_sheet, grad_cam, overlay
from fzoo.inference.export import export
from fzoo.inference.optimize import optimize_for_inference, tune
from fzoo.inference.predict import features, predict, pyramid
from fzoo.inference.runtime import enable_compilation_cache, reuse_memory
from fzoo.jobs.job import run_job
from fzoo.jobs.predictor import Predictor
from fzoo.layers.classifier import Classifier, Head
from fzoo.layers.graph import layer_names, layer_shapes
from fzoo.layers.stages import StageEnd, stages
from fzoo.nnx import from_nnx, to_nnx, trainable_filter
from fzoo.pretrained import load, load_model
from fzoo.training.config import FinetuneConfig
from fzoo.training.evaluate import evaluate
from fzoo.training.finetune import finetune
from fzoo.training.results import Evaluation, Finetuned
from fzoo.training.runs import LoadedRun, load_run
from fzoo.training.steps import (
    Phase,
    TrainState,
    cross_entropy,
    merge_params,
    partition_params,
    train_step,
    trainable_mask,
    training_layers,
)
from fzoo.training.transfer import transfer
from fzoo.weights import (
    Unmatched,
    WeightsMismatch,
    load_keras_weights,
    load_variables,
    open_weights,
    save_keras_weights,
    save_variables,
)
from fzoo.zoo import ModelSpec, create, list_models, load_image_for, preprocess_input, recipe, spec

__all__ = [
    "Classifier",
    "Evaluation",
    "Explanation",
    "FinetuneConfig",
    "Finetuned",
    "Head",
    "LoadedRun",
    "ModelSpec",
    "Phase",
    "Predictor",
    "Recipe",
    "StageEnd",
    "TrainState",
    "Unmatched",
    "WeightsMismatch",
    "WeightsReport",
    "__version__",
    "create",
    "cross_entropy",
    "decode_predictions",
    "devices",
    "enable_compilation_cache",
    "evaluate",
    "explain",
    "export",
    "feature_sheet",
    "features",
    "finetune",
    "from_nnx",
    "grad_cam",
    "inspect_weights",
    "layer_names",
    "layer_shapes",
    "list_models",
    "load",
    "load_image",
    "load_image_for",
    "load_keras_weights",
    "load_model",
    "load_run",
    "load_variables",
    "merge_params",
    "open_weights",
    "optimize_for_inference",
    "overlay",
    "partition_params",
    "predict",
    "preprocess_input",
    "pyramid",
    "recipe",
    "reuse_memory",
    "run_job",
    "save_keras_weights",
    "save_picture",
    "save_variables",
    "spec",
    "stages",
    "to_nnx",
    "train_step",
    "trainable_filter",
    "trainable_mask",
    "training_layers",
    "transfer",
    "tune",
]
