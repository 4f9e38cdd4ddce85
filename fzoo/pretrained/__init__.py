"""Networks with their variables: those that Keras published, and those of users' files."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fzoo.files import one_line
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import random_variables, trace
from fzoo.models.keras_model import KerasModel
from fzoo.pretrained.channels import check_adaptation, with_channels
from fzoo.pretrained.comparison import check_same_network
from fzoo.pretrained.imagenet import needed, proof_of, published
from fzoo.pretrained.options import network_of
from fzoo.pretrained.whole import described_whole, network_in
from fzoo.types import DTypeLike, MutableVariables, Options, Weights
from fzoo.weights import WeightsMismatch, load_planned, load_variables, read_description, weights_file
from fzoo.weights.download import fetch
from fzoo.weights.graph import CustomObjects
from fzoo.weights.state_dict import TORCH_ENDINGS, StateDict, import_torch, is_state_dict, variables_of_state_dict
from fzoo.zoo import create, list_models, spec


def load(
    name: str | None = None,
    *,
    weights: Weights = "imagenet",
    rng: jax.Array | None = None,
    adapt_channels: str | None = None,
    **create_options: Any,
) -> tuple[Classifier, MutableVariables]:
    """Make a model's network with its variables.

    A file that fzoo wrote carries its network's options: they are taken from it, but for those that are given here. One
    that is given and makes it another network is an error; a network without its top (`include_top=False`), without the
    activation (`classifier_activation=None`) or for another size is not, nor are dropout and dtype. What a loaded
    network computes can be changed on purpose: `module.clone(classifier_activation="sigmoid")`.

    A whole model of Keras's is compared with the network: the size of its images, its classes, its classifier's
    activation and a published variant (`alpha`) are taken from it, and any other difference is an error, which names
    the layer. A file of weights alone has no description, but its layers show EfficientNet's division by the standard
    deviation (Keras adds it for "imagenet" alone) and a preprocessing that was left out. All of EfficientNet's
    published files, wherever they lie, come with `divide_by_std=True`, which their training wants.

    Args:
        name: of the model, from `list_models()`: Keras's name, with a tag for weights that others published
            ("ResNet50.tv2_in1k"). May be left out where the weights tell it.
        weights: "imagenet" for what was published (downloaded once into Keras's own cache), the path of a file that
            Keras or `save_variables` wrote, the folder of a fine-tuning, or None for random ones, with Keras's
            initialisers. With a tag also a state dict by the names of timm or torchvision: a `.safetensors` or `.pth`
            file, or a mapping from names to NumPy arrays or PyTorch's tensors.
        rng: a `jax.random.key` for `weights=None`; key 0 by default. It may be traced, as by a
            `jax.vmap` over keys.
        adapt_channels: how the kernel that reads the images is changed where `input_shape` has another number of
            channels n than the weights: "sum" has each read what all did, over n, so that equal channels, or a single
            one, give what a grey image gave; "repeat" has them in turn, times 3 / n. That is of preprocessed channels:
            what "caffe" and "torch" subtract of each colour is left to the caller.
        **create_options: see `create`.

    Returns:
        (module, variables), for `module.apply`, `predict` and `features`.

    Warns:
        UserWarning: once, for published weights whose licence forbids commercial use.

    Raises:
        ModuleNotFoundError: what reads the file is not installed (safetensors, PyTorch).
        ValueError: a bad option, no published file for these options, or a file that does not fit or is of another
            network.
        OSError: the file is not there, or can't be downloaded.
    """
    if weights is not None and rng is not None:
        raise ValueError(f"rng goes with weights=None, weights={str(weights)!r} given")
    if adapt_channels is not None:
        shape = create_options.pop("input_shape", None)
        check_adaptation(adapt_channels, shape)
        if weights is None:
            raise ValueError(f"adapt_channels={adapt_channels!r} given, which goes with weights that there are")
        own = {"input_shape": (*shape[:2], 3)} if isinstance(weights, str) and weights == "imagenet" else {}
        loaded = load(name, weights=weights, **own, **create_options)
        return with_channels(*loaded, shape, adapt_channels)
    if isinstance(weights, Mapping):
        return load_state_dict(name, weights, create_options)
    if weights is not None and (not isinstance(weights, (str, os.PathLike)) or not os.fspath(weights)):
        raise ValueError(f"weights={weights!r} given, 'imagenet', None, a path or a mapping of arrays expected")
    if weights is not None and weights != "imagenet":
        whole = described_whole(weights)
        name, options = network_of(weights, name, create_options, whole)
        description = read_description(weights)
        module = create(name, **options).clone(prepared=description.prepared if description else None)
        try:
            trace(module)
        except (ValueError, TypeError, ArithmeticError, MemoryError) as e:  # sizes that a stranger's file asks for
            raise ValueError(f"{weights}: no such network can be made: {one_line(e)}") from e
        if is_state_dict(weights_file(weights)):
            check_tag(name, create_options, str(weights))
        variables = load_variables(module, weights)
        if whole is not None:
            check_same_network(module, name, weights_file(weights), whole)
        return module, variables
    if name is None:
        raise ValueError(f"the name of a model expected with weights={weights!r}; fzoo.list_models() has them")
    if weights is None:
        module = create(name, **create_options)
        return module, random_variables(module, jax.random.key(0) if rng is None else rng)
    module = create(name, **{**needed(name), **create_options})
    file = published(name, module)
    if file.name.endswith(TORCH_ENDINGS):
        import_torch()  # before anything is downloaded
    proof = proof_of(file, module)
    path = fetch(file.url, file.name, proof, ", or pass the path of one: weights=PATH, --weights PATH")
    variables = load_variables(module, path)
    warn_of_licence(name)
    return module, variables


@functools.cache
def warn_of_licence(name: str) -> None:
    """Warn, once in a process, where the licence of published weights forbids commercial use."""
    record = spec(name)
    if record.is_noncommercial:
        warnings.warn(f"the weights {name} are under {record.licence}, which forbids commercial use", stacklevel=4)


def load_state_dict(
    name: str | None, arrays: StateDict, create_options: Options
) -> tuple[Classifier, MutableVariables]:
    """Do what `load` does, of a state dict in memory."""
    if name is None:
        raise ValueError("the name of a model expected with a mapping of arrays; fzoo.list_models() has them")
    module = create(name, **create_options)
    check_tag(name, create_options, "weights")
    return module, variables_of_state_dict(module, arrays, "weights")


def check_tag(name: str, create_options: Options, weights: str) -> None:
    """Refuse PyTorch's weights for a model whose own are Keras's: no array tells that they want other pixels.

    Raises:
        WeightsMismatch: neither a tag nor the preprocessing is named.
    """
    record = spec(name)
    tags = [tag for tag in list_models(f"{name}.*") if spec(tag).is_torch]
    if tags and record.weight_files and not record.is_torch and "preprocessing" not in create_options:
        raise WeightsMismatch(
            f"{weights} is a state dict of PyTorch's, and {name} is for Keras's weights: its tags are for those of "
            f"PyTorch's ({', '.join(tags)}), or preprocessing=... says what these want of pixels",
            [],
        )


def load_model(
    path: str | os.PathLike,
    *,
    dtype: DTypeLike = jnp.float32,
    custom_objects: CustomObjects | None = None,
) -> tuple[KerasModel, MutableVariables]:
    """Make the network that a Keras file holds, whatever a user built of Keras's layers, with its variables.

    Args:
        path: a whole model as Keras saved it: `.keras`, a legacy `.h5` of any version, or a `.weights.h5` with its
            `config.json` beside it. No code of the file is run.
        dtype: of the computation; parameters are float32.
        custom_objects: what classes compute that are not Keras's, by their names: a function (k, x, config) for each,
            of a `fzoo.layers.Layers`, of the array that the layer takes (or a list of them) and of its configuration,
            in which "name" is its name in the network. A layer of `k` with weights has those of the file if it is
            given that name; the module is equal to another if the functions are the same objects.

    Returns:
        (module, variables), for all that takes a network of `load`. Layers of models inside of the model are named by
        their paths ("mobilenetv2/Conv1"), in `variables`, too; the later calls of a layer that is called more than
        once are named "dense:1". What takes several inputs is called with a tuple of arrays in the file's order, or a
        mapping by their names; what has several outputs gives a tuple.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ValueError: it has no model in it, a damaged one, or one with a layer that is not known; the message names the
            layer and its class.
    """
    module, plans = network_in(path, dtype, custom_objects)
    return module, load_planned(module, plans, path)
