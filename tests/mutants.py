"""Mutants: mistakes put into a copy of fzoo, each of which must fail a test of the file whose subject it is.

`python tests/mutants.py` tries all, `python tests/mutants.py WORD ...` those with one of these in their names. It says
which test caught which, and exits with 1 if one survives, or if a test that caught one fails without it, too; with 2 if
the text of one is not there any more.
"""

from __future__ import annotations

import compileall
import functools
import importlib
import os
import py_compile
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from compiled_once import shared_cache

ROOT = Path(__file__).parent.parent

#: What a copy of the tree needs for its tests.
COPIED = ("fzoo", "tests", "docs", "pyproject.toml", "README.md")

#: Copies, and mutants that are tried at once.
WORKERS = 2

#: Seconds that the tests of a mutant may take.
LIMIT = 600


class Mutant(NamedTuple):
    """A mistake.

    Attributes:
        name: what goes wrong.
        file: of fzoo.
        old, new: its text, which is there once, and what takes its place.
        tests: the file of tests whose subject it is.
        chosen: which of its tests, as for `pytest -k`; all by default.
        slow: whether they are of the slow tier.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    chosen: str = ""
    slow: bool = False


MUTANTS = (
    Mutant(
        "options: nothing is computed again",
        "layers/remat.py",
        "run = run if part is parts[-1] else jax.checkpoint(run)",
        "run = run",
        "test_options.py",
        "test_remat and MobileNet",
        slow=True,
    ),
    Mutant(
        "options: one part is computed again, all at once",
        "layers/remat.py",
        "            parts.append([])",
        "            pass",
        "test_options.py",
        "test_remat and MobileNet",
        slow=True,
    ),
    Mutant(
        "options: parameters are float32 whatever is said",
        "layers/forward.py",
        "make = functools.partial(make, param_dtype=self.param_dtype)",
        "make = functools.partial(make, param_dtype=jnp.float32)",
        "test_options.py",
        "made_so and MobileNet",
    ),
    Mutant(
        "options: precision is ignored",
        "layers/classifier.py",
        "if self.precision is None else",
        "if self.precision else",
        "test_options.py",
        "precision_of",
    ),
    Mutant(
        "options: forms in spite of plain_convolutions",
        "layers/forward.py",
        "lax.conv_general_dilated if plain_convolutions else",
        "lax.conv_general_dilated if not self else",
        "test_options.py",
        "plain_convolutions",
    ),
    Mutant(
        "options: channels are summed and not shared out",
        "pretrained/channels.py",
        "n, 2) / n",
        "n, 2)",
        "test_options.py",
        "adapted_channels",
    ),
    Mutant(
        "options: a file says nothing of bfloat16",
        "weights/__init__.py",
        "    return dtype.type if known else module.param_dtype",
        "    return module.param_dtype",
        "test_options.py",
        "come_back",
    ),
    Mutant(
        "options: an optimized network is taken for a plain one",
        "weights/description.py",
        "    if untuned(description.prepared) != untuned(module.prepared):",
        "    if False:",
        "test_options.py",
        "optimized_network",
    ),
    Mutant(
        "options: pixels are taken for floats",
        "layers/classifier.py",
        """        check_floats("images", x)\n""",
        "",
        "test_options.py",
        "nothing_preprocessed",
    ),
    Mutant(
        "NNX: statistics stay as they were",
        "nnx.py",
        "        for layer in moving & self.batch_stats.keys():",
        "        for layer in moving - self.batch_stats.keys():",
        "test_nnx.py",
        "train_and_eval",
    ),
    Mutant(
        "NNX: eval() is ignored",
        "nnx.py",
        """        if self.deterministic and self.use_running_average:
            return False""",
        """        if self.deterministic and self.use_running_average:
            return self.training""",
        "test_nnx.py",
        "train_and_eval or inference",
    ),
    Mutant(
        "NNX: which layers train is ignored",
        "nnx.py",
        """        if not self.deterministic and not self.use_running_average:
            return self.training""",
        """        if not self.deterministic and not self.use_running_average:
            return True""",
        "test_nnx.py",
        "layers_that_train",
    ),
    Mutant(
        "NNX: what a mask freezes trains",
        "nnx.py",
        "return any(tuple(path[start:]) in self.paths for start in range(len(path)))",
        'return "params" in path',
        "test_nnx.py",
        "new_head or a_step",
    ),
    Mutant(
        "NNX: each call drops the same",
        "nnx.py",
        '"dropout": self.rngs()}',
        '"dropout": self.rngs.key[...]}',
        "test_nnx.py",
        "dropout",
    ),
    Mutant(
        "NNX: an attribute that nothing reads is taken",
        "nnx.py",
        'elif not name.startswith("_"):',
        "elif not name:",
        "test_nnx.py",
        "silence",
    ),
    Mutant(
        "RegNet: squeezed to a fourth of the block's own width",
        "models/regnet.py",
        "skip, squeezed = x, x.shape[-1] // 4",
        "skip, squeezed = x, width // 4",
        "test_tf_keras.py",
        "layers or small",
    ),
    Mutant(
        "RegNet: the head of a file has to be the first of its session",
        "models/regnet.py",
        r"""r"1\1", old)""",
        r"""r"\g<0>", old)""",
        "test_tf_keras.py",
        "files",
    ),
    Mutant(
        "ResNet-RS: blocks of all stages are dropped as often",
        "models/resnet_rs.py",
        "self.drop_connect_rate * stage / 5",
        "self.drop_connect_rate",
        "test_tf_keras.py",
        "stochastic_depth",
    ),
    Mutant(
        "ResNet-RS: a tag's network takes images of the model's size",
        "models/resnet_rs.py",
        """"tag": f"i{size}", "default_size": size""",
        """"tag": f"i{size}", "default_size": 224""",
        "test_tf_keras.py",
        "of_a_size",
    ),
    Mutant(
        "whole models: any network is taken for the file's",
        "pretrained/comparison.py",
        "if target is not None and digests[target] in given:",
        "if target is not None:",
        "test_same_network.py",
        "another_network",
    ),
    Mutant(
        "whole models: numbers of a computation do not count",
        "layers/computation.py",
        "return digest_constant(atom.val) if isinstance(atom, Literal) else digests[atom]",
        'return "" if isinstance(atom, Literal) else digests[atom]',
        "test_same_network.py",
        "epsilon or six",
    ),
    Mutant(
        "whole models: which array it is does not count",
        "layers/computation.py",
        """f"array {arrays.get(path, '/'.join(path))}" for path""",
        """f"array {len(path)}" for path""",
        "test_same_network.py",
        "tell_arrays_apart",
    ),
    Mutant(
        "whole models: the head's end is not the file's",
        "pretrained/options.py",
        "if nested and whole.module is not None and given",
        "if not nested and whole.module is not None and given",
        "test_same_network.py",
        "head_around",
    ),
    Mutant(
        "partial loading: what was not taken is not told",
        "weights/partial.py",
        "if path not in taken}",
        "if path in taken}",
        "test_partial_weights.py",
        "as_keras",
    ),
    Mutant(
        "partial loading: the rest of the variables stays without values",
        "weights/__init__.py",
        "    variables = random_variables(module, rng)\n",
        "    variables = jax.tree.map(jnp.zeros_like, random_variables(module, rng))\n",
        "test_partial_weights.py",
        "as_keras",
    ),
    Mutant(
        "partial loading: an ambiguous name leads to the first layer",
        "weights/partial.py",
        "if len(there) > 1:",
        "if len(there) > 99:",
        "test_partial_weights.py",
        "two_equal",
    ),
    Mutant(
        "open_weights: what was never written is read as zeros",
        "weights/arrays.py",
        "if array.id.get_storage_size() < array.nbytes:",
        "if array.id.get_storage_size() > array.nbytes:",
        "test_partial_weights.py",
        "unasked",
    ),
    Mutant(
        "predict: images are zero",
        "inference/batches.py",
        "return module.apply(variables, images)\n",
        "return module.apply(variables, 0 * images)\n",
        "test_inference.py",
        "any_batch_size",
    ),
    Mutant(
        "predict: rows in reverse",
        "inference/batches.py",
        "map(placed_as, wholes, first)",
        "map(placed_as, [whole[::-1] for whole in wholes], first)",
        "test_inference.py",
        "any_batch_size",
    ),
    Mutant(
        "predict: the padding of the last batch comes first",
        "inference/batches.py",
        "np.asarray(y)[: count - at]",
        "np.roll(np.asarray(y), 1, 0)[: count - at]",
        "test_inference.py",
        "any_batch_size",
    ),
    Mutant(
        "predict: what is put together is committed",
        "inference/batches.py",
        "        return jax.device_put(array)\n",
        "        return jax.device_put(array, next(iter(y.devices())))\n",
        "test_inference.py",
        "stay_where",
    ),
    Mutant(
        "predict: a count that micro-batches do not divide is computed one by one",
        "inference/batches.py",
        "parts = -(-count // micro)",
        "parts, micro = count, 1",
        "test_inference.py",
        "micro",
    ),
    Mutant(
        "streams: a batch is not copied, and its memory is filled again",
        "inference/streams.py",
        "filling is None and count_of(images) == program.size and is_on_devices(images)",
        "filling is None and count_of(images) == program.size",
        "test_streams.py",
        "same_array_again",
    ),
    Mutant(
        "streams: an error comes before the results that are under way",
        "inference/streams.py",
        "                error = e\n                break\n",
        "                raise\n",
        "test_streams.py",
        "error_comes_after",
    ),
    Mutant(
        "streams: each batch has a program of its own",
        "inference/streams.py",
        "        if kind not in self.programs:\n",
        "        if True:\n",
        "test_streams.py",
        "one_compilation",
    ),
    Mutant(
        "streams: the whole stream is taken at once",
        "inference/streams.py",
        "in_flight(self.started(batches))",
        "list(self.started(batches))",
        "test_streams.py",
        "in_memory or before_a_result",
    ),
    Mutant(
        "streams: the rest of a batch begins where the batch did",
        "inference/streams.py",
        "np.asarray(theirs)[start:end]",
        "np.asarray(theirs)[: end - start]",
        "test_streams.py",
        "results_are_those",
    ),
    Mutant(
        "Predictor: rows behind one that can't be read are moved up",
        "jobs/predictor.py",
        "columns[name][[start + i for i in good]] = rows",
        "columns[name][start : start + len(good)] = rows",
        "test_predictor.py",
        "those_of_classify",
    ),
    Mutant(
        "Predictor: each copy loads its network",
        "jobs/predictor.py",
        "        return keep_loaded(settings)\n",
        "        keep_loaded.cache_clear()\n        return keep_loaded(settings)\n",
        "test_predictor.py",
        "pickled",
    ),
    Mutant(
        "Predictor: a file that was changed is taken for the one before",
        "jobs/predictor.py",
        "            state_of(source),\n",
        "            (),\n",
        "test_predictor.py",
        "was_changed",
    ),
    Mutant(
        "Predictor: pixels of the network's size are cropped",
        "jobs/predictor.py",
        "if source.shape[:2] == recipe.size:",
        "if False:",
        "test_predictor.py",
        "taken_as_they_are",
    ),
    Mutant(
        "optimized: committed to a device",
        "inference/devices.py",
        "return jax.device_put(tree, sharding)\n\n\ndef along",
        "return jax.device_put(tree, sharding or jax.local_devices()[0])\n\n\ndef along",
        "test_optimize.py",
        "commits_nothing",
    ),
    Mutant(
        "x64: parameters have JAX's default dtype",
        "layers/modules.py",
        "(*init_args, self.param_dtype)[:2]",
        "(*init_args, float)[:2]",
        "test_inference.py",
        "x64 and MobileNet",
        slow=True,
    ),
    Mutant(
        "files: what they say of their network is not compared",
        "weights/description.py",
        "    return theirs != ours\n",
        "    return False\n",
        "test_description.py",
        "makes_it_another",
    ),
    Mutant(
        "files: the options that they say are not taken",
        "pretrained/options.py",
        "return name, {**options, **given}",
        "return name, dict(given)",
        "test_description.py",
        "carry_their_network",
    ),
    Mutant(
        "files: Keras's layers without arrays show nothing",
        "weights/mapping.py",
        "return Counter(match[1] for match in matches) if listed else None",
        "return None",
        "test_description.py",
        "preprocessing_that_is_left_out and ConvNeXtTiny",
        slow=True,
    ),
    Mutant(
        "files: a scalar in safetensors becomes an array",
        "weights/formats.py",
        'np.asarray(leaf, order="C")',
        "np.ascontiguousarray(np.asarray(leaf))",
        "test_description.py",
        "scalars",
    ),
    Mutant(
        "predict: pixels are not preprocessed",
        "inference/batches.py",
        "return function(target, variables, images if preprocess is None else preprocess_input(images, preprocess))",
        "return function(target, variables, images)",
        "test_inference.py",
        "pixels_are_preprocessed",
    ),
    Mutant(
        "predict: in a jit, pixels are not preprocessed",
        "inference/batches.py",
        "images if preprocess is None else preprocess_input(jnp.asarray(images), preprocess)\n",
        "jnp.asarray(images, jnp.float32)\n",
        "test_inference.py",
        "pixels_are_preprocessed",
    ),
    Mutant(
        "a tap is what comes into its layer",
        "layers/forward.py",
        "self.tapped[name] = y",
        "self.tapped[name] = inputs[0] if inputs and inputs[0].shape == y.shape else y",
        "test_models.py",
        "every_layer and MobileNet and not MobileNetV",
    ),
    Mutant(
        "create: what an option has to be is not checked",
        "layers/classifier.py",
        "        check_declared(self)\n        check_common",
        "        check_common",
        "test_registry.py",
        "bad_options",
    ),
    Mutant(
        "zoo: of two models with one name the second is lost",
        "zoo.py",
        "variants.setdefault(record.name, record) is not record",
        "variants.setdefault(record.name, record) is None",
        "test_registry.py",
        "two_variants",
    ),
    Mutant(
        "MobileNet: ReLU before BN",
        "models/mobilenet.py",
        'x = k.relu(bn(x, name=f"conv_pw_{i}_bn"), 6, name=f"conv_pw_{i}_relu")',
        'x = bn(k.relu(x, 6, name=f"conv_pw_{i}_relu"), name=f"conv_pw_{i}_bn")',
        "test_models.py",
        "every_layer and MobileNet and not MobileNetV",
    ),
    Mutant(
        "DenseNet: new channels before the old",
        "models/densenet.py",
        "x = k.concat([x, y], room=room,",
        "x = k.concat([y, x], room=room,",
        "test_models.py",
        "every_layer and DenseNet121",
    ),
    Mutant(
        "BN: epsilon is left out",
        "layers/modules.py",
        "lax.rsqrt(var + epsilon) * scale",
        "lax.rsqrt(var) * scale",
        "test_models.py",
        "every_layer and MobileNet and not MobileNetV",
    ),
    Mutant(
        "padding before strides by the wrong parity",
        "layers/keras.py",
        "even = [1 - n % 2 if",
        "even = [n % 2 if",
        "test_models.py",
        "test_options and MobileNetV2-options2",
        slow=True,
    ),
    Mutant(
        "optimized: the bias from the BN is dropped",
        "inference/folding.py",
        '(layer.get("bias", 0) * scale + shift)',
        '(layer.get("bias", 0) * scale + 0 * shift)',
        "test_optimize.py",
        "is_a_module_like_any",
        slow=True,
    ),
    Mutant(
        "optimized: BN's variance without its root",
        "inference/folding.py",
        'scale = 1 / np.sqrt(stats["var"].astype(np.float64) + node.config["epsilon"])',
        'scale = 1 / (stats["var"].astype(np.float64) + node.config["epsilon"])',
        "test_optimize.py",
        "is_a_module_like_any",
        slow=True,
    ),
    Mutant(
        "average pooling counts the padding",
        "ops/pooling.py",
        "inside = np.pad(np.ones(x.shape[axis]), pads)",
        "inside = np.ones(x.shape[axis] + sum(pads))",
        "test_ops.py",
        "pools",
    ),
    Mutant(
        "channel_mean: of the first image",
        "ops/reductions.py",
        "return (jnp.ones((1, x.size // x.shape[-1]), x.dtype) @ x.reshape(-1, x.shape[-1]))[0]",
        "return (jnp.ones((1, x.size // x.shape[-1]), x.dtype) @ jnp.broadcast_to(x[:1], x.shape)"
        ".reshape(-1, x.shape[-1]))[0]",
        "test_ops.py",
        "means",
    ),
    Mutant(
        "caffe: RGB is not turned into BGR",
        "images/preprocessing.py",
        "np_like.flip(x, axis) - constant(_CAFFE_MEAN)",
        "x - constant(_CAFFE_MEAN)",
        "test_preprocessing.py",
        "every_mode",
    ),
    Mutant(
        "Keras's files: mean and variance swapped",
        "weights/mapping.py",
        """        ("moving_mean", ("batch_stats", "mean")),
        ("moving_variance", ("batch_stats", "var")),
""",
        """        ("moving_mean", ("batch_stats", "var")),
        ("moving_variance", ("batch_stats", "mean")),
""",
        "test_weights.py",
        "other_names",
    ),
    Mutant(
        "Keras's files: grouped kernels as they lie",
        "weights/mapping.py",
        "self.groups, channels // self.groups, multiplier).swapaxes(2, 3)",
        "self.groups, channels // self.groups, multiplier)",
        "test_keras_applications.py",
        "",
    ),
    Mutant(
        "state dicts: what is left over is not told",
        "weights/state_dict.py",
        'for today, name in sorted(given.items()) if today not in expected]',
        'for name in ()]',
        "test_state_dict.py",
        "another_state_dict",
    ),
    Mutant(
        "state dicts: a flattened map's rows are Keras's",
        "weights/state_dict.py",
        "array = array.reshape(-1, channels, height, width)",
        "array = array.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)",
        "test_state_dict.py",
        "round_trip and VGG",
    ),
    Mutant(
        "state dicts: PyTorch's weights for a model of Keras's",
        "pretrained/__init__.py",
        'and "preprocessing" not in create_options:',
        'and "preprocessing" not in create_options and False:',
        "test_state_dict.py",
        "keras_graphs",
    ),
    Mutant(
        "ResNet: the stride is in the first 1x1",
        "models/resnet.py",
        "before, within = (1, stride) if net.stride_in_3x3 else (stride, 1)",
        "before, within = (stride, 1)",
        "test_state_dict.py",
        "small_versions and ResNet50.tv2",
    ),
    Mutant(
        "Keras's files: outputs of a depthwise kernel in another order",
        "weights/__init__.py",
        "return slot.from_keras(value.astype(slot.dtype, copy=False))",
        "value = value.swapaxes(2, 3) if slot.keras_shape != slot.shape else value\n"
        "        return slot.from_keras(value.astype(slot.dtype, copy=False))",
        "test_weights.py",
        "depthwise",
    ),
    Mutant(
        "given: dense blocks go on from what they computed",
        "layers/keras.py",
        "self._growing[0] is x:",
        "self._growing[0].shape == x.shape:",
        "test_composition.py",
        "all_that_counts and DenseNet121",
    ),
    Mutant(
        "fine-tuning: zeros for the kept features",
        "training/finetune.py",
        "parts_of[name].append(np.asarray(array))",
        "parts_of[name].append(np.zeros_like(array))",
        "test_finetune.py",
        "kept_change_nothing or each_image",
    ),
    Mutant(
        "fine-tuning: labels of the kept features in another order",
        "training/finetune.py",
        "np.concatenate(all_labels))",
        "np.concatenate(all_labels)[::-1])",
        "test_finetune.py",
        "kept_change_nothing or each_image",
    ),
    Mutant(
        "fine-tuning: kept features of another image",
        "training/data.py",
        "return {layer: array[index] for layer, array in self.arrays.items()}",
        "return {layer: array[index - 1] for layer, array in self.arrays.items()}",
        "test_finetune.py",
        "kept_change_nothing or each_image",
    ),
    Mutant(
        "fine-tuning: labels shuffled, images in place",
        "training/data.py",
        "            return image, labels[index]",
        "            return image, labels[len(labels) - 1 - index]",
        "test_finetune.py",
        "kept_change_nothing or each_image",
    ),
    Mutant(
        "fine-tuning: what is frozen trains",
        "training/finetune.py",
        'trained, frozen = partition_params(variables["params"], mask)',
        'frozen, trained = partition_params(variables["params"], mask)',
        "test_finetune.py",
        "frozen_is_frozen",
    ),
    Mutant(
        "fine-tuning: a run is resumed in its first phase",
        "training/finetune.py",
        "for number in range(progress.phase, len(config.phases)):",
        "for number in range(len(config.phases)):",
        "test_finetune.py",
        "long_epoch",
        slow=True,
    ),
    Mutant(
        "fine-tuning: no smoothing of labels",
        "training/steps.py",
        "if not label_smoothing:",
        "if label_smoothing < 1:",
        "test_finetune.py",
        "options_of_training",
    ),
    Mutant(
        "fine-tuning: BN's momentum is that of the batch",
        "layers/modules.py",
        "self.momentum * running.value + (1 - self.momentum) * new",
        "(1 - self.momentum) * running.value + self.momentum * new",
        "test_finetune.py",
        "training_is_keras",
    ),
    Mutant(
        "evaluation: labels of the image before",
        "training/evaluate.py",
        "np.add.at(confusion, (labels, predicted), 1)",
        "np.add.at(confusion, (np.roll(labels, 1), predicted), 1)",
        "test_finetune.py",
        "each_image",
    ),
    Mutant(
        "images: a damaged place of an archive is passed over",
        "images/tar.py",
        "if gap is None and (header is None or zeros == 1):",
        "if gap is None and header is None and zeros == 2:",
        "test_archives.py",
        "test_damaged_header or test_lost_block",
    ),
    Mutant(
        "images: a member's data from its header on",
        "images/tar.py",
        "TarMember(name, header.offset_data, header.size, parts, error=error)",
        "TarMember(name, header.offset, header.size, parts, error=error)",
        "test_archives.py",
        "whole_archives",
    ),
    Mutant(
        "images: a pattern takes what is in its folders twice",
        "images/walk.py",
        "if any(folder in folders for folder in folders_around(path)):",
        "if path in folders:",
        "test_walk.py",
        "test_globs",
    ),
    Mutant(
        "images: hidden folders are seen",
        "images/walk.py",
        "for entry in entries if hidden or not is_hidden(entry.name))",
        "for entry in entries)",
        "test_walk.py",
        "test_a_folder",
    ),
    Mutant(
        "evaluation: a tie is right",
        "training/evaluate.py",
        "np.where(right > logits.max(1)",
        "np.where(right >= logits.max(1)",
        "test_evaluate.py",
        "tie",
    ),
    Mutant(
        "evaluation: folders that are numbers by their order",
        "training/data.py",
        "places = {n: int(n) for n in files.class_names",
        "places = {n: i for i, n in enumerate(files.class_names)",
        "test_evaluate.py",
        "numbers",
    ),
    Mutant(
        "fine-tuning: stochastic depth is left out",
        "training/steps.py",
        'if moves or "rate" in node.config:',
        'if moves or node.kind == "Dropout":',
        "test_finetune_data.py",
        "drops_in_training or stochastic",
    ),
    Mutant(
        "fine-tuning: the last of an accumulation is lost",
        "training/finetune.py",
        "together, max(1, rest))",
        "together, together)",
        "test_finetune_data.py",
        "accumulation",
    ),
    Mutant(
        "fine-tuning: test/ validates",
        "training/splits.py",
        "return Parts(train, validation, test, others)",
        "return Parts(train, validation or test, test, others)",
        "test_finetune_data.py",
        "known_parts",
    ),
    Mutant(
        "meshes: statistics are those of each device",
        "layers/modules.py",
        "if self.axis_name is None or self.is_initializing():",
        "if self.axis_name is not None or self.is_initializing():",
        "test_meshes.py",
        "statistics_over_an_axis",
    ),
    Mutant(
        "meshes: a batch's axis is made one with others",
        "ops/winograd.py",
        "    return jnp.tensordot(jnp.asarray(matrix, x.dtype), terms, 1)",
        "    together = jnp.asarray(matrix, x.dtype) @ terms.reshape(len(matrix), -1)\n"
        "    return together.reshape(len(matrix), *moved[0].shape)",
        "test_meshes.py",
        "test_a_split_batch",
    ),
    Mutant(
        "meshes: only the axis that is called batch",
        "inference/devices.py",
        "    axes = mesh.axis_names",
        '    axes = ("batch",)',
        "test_meshes.py",
        "test_predict_on_explicit_axes",
    ),
    Mutant(
        "stages: the first of a size, not the last",
        "layers/stages.py",
        "            ends[2 ** round(math.log2(height / node.shape[0]))] = node",
        "            ends.setdefault(2 ** round(math.log2(height / node.shape[0])), node)",
        "test_stages.py",
        "test_layers",
    ),
    Mutant(
        "jobs: a shard is written twice",
        "jobs/shards.py",
        "parts = [self.path(number) for number in range(-(-self.images.count // self.size))]",
        "parts = [self.path(max(number - 1, 0)) for number in range(-(-self.images.count // self.size))]",
        "test_jobs.py",
        "test_features or test_classes",
    ),
    Mutant(
        "jobs: a shard is lost",
        "jobs/shards.py",
        "rows = sum(len(names) for names in arrays_of(parts, IMAGES))",
        "parts = parts[:-1]\n        rows = sum(len(names) for names in arrays_of(parts, IMAGES))",
        "test_jobs.py",
        "test_features or test_classes",
    ),
    Mutant(
        "jobs: an image that was changed keeps its row",
        "jobs/shards.py",
        "if not same or any(new not in (tuple(old), GONE)",
        "if not same or any(new[0] not in (old[0], -1)",
        "test_jobs_state.py",
        "image_that_was_changed",
    ),
    Mutant(
        "jobs: each process has shards of its own size",
        "jobs/shards.py",
        'self.size, self.manifest = int(manifest["shard_size"]), manifest',
        "self.size, self.manifest = 3, manifest",
        "test_jobs_state.py",
        "the_first_process_decides",
    ),
    Mutant(
        "jobs: the later process's description replaces the first one's",
        "jobs/shards.py",
        "temporary.rename(self.folder)",
        "shutil.rmtree(self.folder, ignore_errors=True)\n            temporary.rename(self.folder)",
        "test_jobs_state.py",
        "the_first_process_decides",
    ),
    Mutant(
        "jobs: a member of an archive is read from where another one lies",
        "jobs/pipeline.py",
        "if is_member(entry.image) and is_changed(entry):",
        "if False:",
        "test_jobs_state.py",
        "archive_that_was_changed",
    ),
    Mutant(
        "jobs: an output keeps the row of an image that was changed",
        "jobs/listing.py",
        "row if state == entry.state != GONE else -1",
        "row",
        "test_jobs_state.py",
        "output_that_grows",
    ),
    Mutant(
        "jobs: an output's kept rows are those of its neighbours",
        "jobs/job.py",
        "old = {key: array[numbers] for",
        "old = {key: array[[max(number - 1, 0) for number in numbers]] for",
        "test_jobs_state.py",
        "output_that_grows",
    ),
    Mutant(
        "jobs: NaN is written",
        "jobs/network.py",
        "and not np.isfinite(array).all():",
        "and np.isinf(array).any():",
        "test_jobs_state.py",
        "not_finite or nan_weights",
    ),
    Mutant(
        "jobs: a function goes by its address",
        "jobs/network.py",
        "if is_importable(value):",
        "if True:\n            return repr(value)\n        if is_importable(value):",
        "test_jobs_state.py",
        "with_functions",
    ),
    Mutant(
        "jobs: a file system without locks is an error",
        "files.py",
        "if e.errno in NO_LOCKS:",
        "if not e.errno:",
        "test_jobs_state.py",
        "without_locks",
    ),
    Mutant(
        "a carriage return ends a line of a table",
        "files.py",
        """(quoted if any("\\r" in cell for cell in cells) else plain)""",
        "plain",
        "test_jobs_state.py",
        "strange_names",
    ),
    Mutant(
        "jobs: rows of other images beside those that can't be read",
        "jobs/network.py",
        "{name: np.asarray(array)[good] for name, array in outputs.items()}",
        "{name: np.asarray(array)[: len(good)] for name, array in outputs.items()}",
        "test_jobs.py",
        "test_features or test_classes",
    ),
    Mutant(
        "jobs: the unlikeliest classes",
        "jobs/network.py",
        'np.argsort(-p, axis=1, kind="stable")',
        'np.argsort(p, axis=1, kind="stable")',
        "test_jobs.py",
        "test_classes",
    ),
    Mutant(
        "downloads: no digits of a hash are a hash, too",
        "weights/download.py",
        "not DIGITS <= len(digits) <= 2 *",
        "not len(digits) <= 2 *",
        "test_download.py",
        "digits",
    ),
    Mutant(
        "downloads: of the digits of a hash, the first alone counts",
        "weights/download.py",
        '.startswith(f"{algorithm}:{digits}")',
        '.startswith(f"{algorithm}:{digits[:1]}")',
        "test_download.py",
        "digits",
    ),
    Mutant(
        "state dicts: what has a stride is padded as by TF, in MobileNetV3",
        "models/mobilenet_v3.py",
        "kernel // 2 if self.symmetric_padding else k.correct_pad(x, kernel)",
        "k.correct_pad(x, kernel)",
        "test_state_dict.py",
        "test_small_versions and MobileNetV3Small",
    ),
    Mutant(
        "output_stride: what keeps the size is padded before, too",
        "layers/dilation.py",
        "pads = pads[0], max(after, taps - 1 - before) - axis.zeros[1]",
        "pads = (taps - 1) // 2, taps - 1 - (taps - 1) // 2",
        "test_dilation.py",
        "test_windows_of_chains",
    ),
    Mutant(
        "output_stride: the parity of the denser map decides the padding",
        "layers/keras.py",
        "for n in self.plain_size(x)]",
        "for n in x.shape[1:3]]",
        "test_dilation.py",
        "test_every_rth_value and EfficientNetB0",
    ),
    Mutant(
        "output_stride: zeros around a map are as many as without",
        "layers/keras.py",
        "        wide = [(axis.dilation * a, axis.dilation * b) for axis, (a, b) in zip(axes, padding, strict=True)]",
        "        wide = [*padding]",
        "test_dilation.py",
        "test_shapes_of_every_layer and ResNet50V2",
    ),
    Mutant(
        "output_stride: a Sequential forgets it",
        "layers/weighted.py",
        "        inner.nodes, inner.names, inner._modules = {}, [], {}\n",
        "        inner.nodes, inner.names, inner._modules, inner.output_stride = {}, [], {}, None\n",
        "test_dilation.py",
        "test_shapes_of_every_layer and ConvNeXt",
    ),
    Mutant(
        "output_stride: prepared kernels are not dilated",
        "layers/weighted.py",
        "            if (steps, apart) != ((1, 1), (1, 1)):",
        "            if False:",
        "test_dilation.py",
        "test_prepared_for_another",
    ),
    Mutant(
        "output_stride: a file of weights does not say it",
        "weights/description.py",
        "field.name in LATER and value == field.default",
        "field.name in LATER",
        "test_dilation.py",
        "test_files_of_weights",
    ),
    Mutant(
        "pools: by phases, zeros around an image may win",
        "ops/pooling.py",
        "((0, 0), *filled, (0, 0)), constant_values=neutral)",
        "((0, 0), *filled, (0, 0)))",
        "test_dilation.py",
        "test_dilated_pools",
    ),
    Mutant(
        "platforms: predict traces every platform's forms",
        "inference/batches.py",
        "@traced_for(platform, alone=calls_onednn)",
        "@traced_for(None, alone=calls_onednn)",
        "test_inference.py",
        "program_is_for_its_platform",
    ),
    Mutant(
        "oneDNN: what the function returns is taken into a chain",
        "inference/epilogues.py",
        "if chain.output in self._returned or any(",
        "if any(",
        "test_onednn.py",
        "what_others_read_stays",
    ),
    Mutant(
        "oneDNN: what another reads as well is taken into a chain",
        "inference/epilogues.py",
        "elif len(equations) == 1:",
        "elif equations:",
        "test_onednn.py",
        "what_others_read_stays",
    ),
    Mutant(
        "oneDNN: an equation is in two chains",
        "inference/epilogues.py",
        " or any(number in others for number in readers):",
        ":",
        "test_onednn.py",
        "what_others_read_stays",
    ),
    Mutant(
        "oneDNN: a ReLU that ends at 5 ends at 6",
        "inference/epilogues.py",
        " and self.is_number(other, 6):",
        ":",
        "test_onednn.py",
        "what_comes_behind and clipped",
    ),
    Mutant(
        "oneDNN: any gate is SiLU's",
        "inference/epilogues.py",
        "word = onednn.SILU if alone and {*equations[1].invars} == {chain.output, gate} else None",
        "word = onednn.SILU",
        "test_onednn.py",
        "what_comes_behind and gate",
    ),
    Mutant(
        "oneDNN: small calls of float32 are its as well",
        "ops/convolution.py",
        "(kernel or conv.flops >= LARGE_CALL)",
        "(kernel or conv.flops)",
        "test_onednn.py",
        "where_it_is_chosen",
    ),
    Mutant(
        "oneDNN: what was traced before is written to JAX's cache",
        "ops/onednn.py",
        "            if self._calls:\n                self._entered",
        "            if False:\n                self._entered",
        "test_onednn.py",
        "traced_before",
    ),
    Mutant(
        "oneDNN: a layer that was traced before is written to JAX's cache",
        "inference/epilogues.py",
        "            onednn.note_call()\n",
        "",
        "test_onednn.py",
        "traced_before",
    ),
    Mutant(
        "oneDNN: images are padded on their other sides",
        "ops/onednn.py",
        "before, after = zip(",
        "after, before = zip(",
        "test_onednn.py",
        "is_there_for_what_is_tested",
    ),
    Mutant(
        "oneDNN: crops are left to it",
        "ops/onednn.py",
        "within = all(0 <= side <=",
        "within = all(side <=",
        "test_onednn.py",
        "does_not_compute",
    ),
    Mutant(
        "oneDNN: what XLA splits over devices calls it",
        "inference/batches.py",
        'whole and platform == "cpu") if prepared',
        'platform == "cpu") if prepared',
        "test_onednn.py",
        "who_does_not_call_it",
    ),
    Mutant(
        "oneDNN: the first thread that leaves lets programs be cached again",
        "ops/onednn.py",
        "            if not _inside:\n                jax",
        "            if True:\n                jax",
        "test_onednn.py",
        "nothing_is_written",
    ),
    Mutant(
        "oneDNN: a gradient forgets the groups",
        "ops/convolution.py",
        "derive = functools.partial(plain, conv, feature_group_count=conv.groups)",
        "derive = functools.partial(plain, conv)",
        "test_onednn.py",
        "it_is_derived and groups",
    ),
    Mutant(
        "platforms: a pool traces every platform's form",
        "ops/pooling.py",
        "_pool_for(pooling, known_platform(), x)",
        "_pool_for(pooling, None, x)",
        "test_ops.py",
        "forms_of_a_known_platform",
    ),
    Mutant(
        "depthwise gradients: rows are next to each other",
        "ops/convolution.py",
        "number * down + top",
        "number + top",
        "test_ops.py",
        "derivatives_of_a_depthwise and stride",
    ),
    Mutant(
        "depthwise gradients: what is padded is the same on both sides",
        "ops/convolution.py",
        "(pads[0] - r, pads[1] - r, 0)",
        "(pads[1] - r, pads[0] - r, 0)",
        "test_ops.py",
        "derivatives_of_a_depthwise and more",
        slow=True,
    ),
    Mutant(
        "tuning: forms are not taken",
        "layers/forward.py",
        "if layer not in self._forms or self.plain_convolutions:",
        "if True:",
        "test_tuning.py",
        "the_forms_are_what_runs",
    ),
    Mutant(
        "tuning: compiled as usual",
        "inference/batches.py",
        "fusions, alone = (prepared.fusions, whole",
        "fusions, alone = (None, whole",
        "test_tuning.py",
        "what_ynnpack_gets",
    ),
    Mutant(
        "tuning: the slower network is taken",
        "inference/optimize.py",
        "chosen = fastest(seconds, UNTUNED)",
        "chosen = next(iter(by_name))",
        "test_tuning.py",
        "never_the_slower",
    ),
    Mutant(
        "tuning: the slowest form is taken",
        "inference/tuning.py",
        "form = min(seconds,",
        "form = max(seconds,",
        "test_tuning.py",
        "fastest",
    ),
    Mutant(
        "tuning: a file forgets the forms",
        "weights/description.py",
        "Prepared(biased, folded, scaled, tiles, gone, forms, fusions)",
        "Prepared(biased, folded, scaled, tiles, gone)",
        "test_tuning.py",
        "goes_with_the_weights",
    ),
    Mutant(
        "tuning: a job does not say it",
        "jobs/job.py",
        'job["tune"] = True',
        'job.pop("tune", None)',
        "test_tuning.py",
        "tuned_job",
    ),
    Mutant(
        "bfloat16: kernels of large maps lose their digits",
        "inference/folding.py",
        " | {name: params[name] for name in tiles}}",
        "}",
        "test_optimize.py",
        "large_maps",
    ),
    Mutant(
        "processor: its vectors are not asked for",
        "inference/compiler.py",
        "    if has_wide_vectors():",
        "    if False:",
        "test_runtime.py",
        "follows_from_instruction_sets",
    ),
    Mutant(
        "convolutions: depthwise kernels lie together",
        "ops/shapes.py",
        "places = [(i * conv.dilation[0], j * conv.dilation[1]) for",
        "places = [(i, j) for",
        "test_dilation.py",
        "test_dilated_depthwise",
    ),
)  # fmt: skip


class OutOfDate(Exception):
    """The table does not fit the tree any more."""


def check(mutants: Iterable[Mutant]) -> None:
    """Look for each mutant's text.

    Raises:
        OutOfDate: it isn't there, or more than once.
    """
    for mutant in mutants:
        count = (ROOT / "fzoo" / mutant.file).read_text().count(mutant.old)
        if count != 1:
            line = " ".join(mutant.old.split())
            raise OutOfDate(f"{mutant.name}: {count} times in fzoo/{mutant.file}, once expected: {line:.80}")


def copy_tree(target: Path) -> Path:
    """Copy what the tests need, and see that a process there has the copy's fzoo.

    Raises:
        OutOfDate: it has another.
    """
    target.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    # By the text and not by its date, so that no mutant's bytecode is taken for another's.
    compileall.compile_dir(target / "fzoo", quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    code = "import fzoo; print(fzoo.__file__)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=target / "tests", env=environment(target), capture_output=True, text=True)
    if Path(found.stdout.strip()) != target / "fzoo" / "__init__.py":
        raise OutOfDate(f"processes in {target} have another fzoo: {found.stdout}{found.stderr}")
    return target


@functools.cache
def flags() -> str:
    """What the tests compile with, as `conftest.py` asks for it."""
    command = [sys.executable, str(ROOT / "tests" / "hurry.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def environment(tree: Path) -> dict[str, str]:
    """For tests of a copy: its fzoo, and programs compiled once."""
    own = {"FZOO_TEST_FLAGS": flags(), "PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu", "FZOO_TEST_MUTANT": "1"}
    own["PYTEST_ADDOPTS"] = ""  # the session that asks for the mutants may run slow tests
    return {**os.environ, **own, **shared_cache(tree.parent / "xla")}


class Outcome(NamedTuple):
    """What pytest said.

    Attributes:
        code: its exit code.
        failed: the tests that failed, in their order.
        seconds: how long it took.
        output: the end of it.
    """

    code: int
    failed: list[str]
    seconds: float
    output: str


def import_peers(cache: Path) -> None:
    """Import what the tests are held against, and what takes longest: a process that forks from this one has it.

    Nothing of fzoo, which differs from copy to copy, and JAX's backend is not started.
    """
    os.environ |= {"KERAS_BACKEND": "jax", **shared_cache(cache), "JAX_PLATFORMS": "cpu"}
    for name in ("jax", "flax.linen", "optax", "keras.applications", "jaxtyping", "beartype", "PIL.Image", "h5py"):
        importlib.import_module(name)
    for kind in (RuntimeWarning, DeprecationWarning):  # JAX's threads start with its backend; ours hold no lock
        warnings.filterwarnings("ignore", ".*fork", kind)
    assert not any(name.split(".")[0] == "fzoo" for name in sys.modules)


class Failures:
    """A plugin that writes the name of each test that fails, on a line of its own."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Look at the end of a test, or of what it is set up with."""
        if report.failed:
            os.write(self.descriptor, f"{report.nodeid}\n".encode())


def run_tests(tree: Path, arguments: Iterable[str], limit: float) -> Outcome:
    """Run tests of a copy, in a process of their own.

    Args:
        tree: the copy.
        arguments: for pytest.
        limit: seconds.
    """
    options = ["-q", "-n0", "-p", "no:cacheprovider", "--durations=0", "--durations-min=9999"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that are there from the fork on
    options += ["-p", "no:unraisableexception", "-p", "no:threadexception"]  # what a failure leaves open is no matter
    start = time.monotonic()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as failures:
        pid = os.fork()
        if pid == 0:
            run_pytest(tree, [*options, *arguments], output.fileno(), failures.fileno())
        ended, status = 0, 0
        while not ended and time.monotonic() - start < limit:
            time.sleep(0.05)
            ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Outcome(-1, [], limit, f"no end after {limit} s")
        texts = []
        for file in (output, failures):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    lines = "\n".join(texts[0].strip().splitlines()[-25:])
    return Outcome(os.waitstatus_to_exitcode(status), texts[1].splitlines(), time.monotonic() - start, lines)


def run_pytest(tree: Path, arguments: list[str], output: int, failures: int) -> NoReturn:
    """Be pytest in a copy, from the fork on."""
    code = 70
    try:
        os.setsid()  # so that what it starts can be stopped with it
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(tree)
        os.environ |= environment(tree)
        sys.path.insert(0, str(tree))
        sys.dont_write_bytecode = False
        code = int(pytest.main(arguments, plugins=[Failures(failures)]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # none of the parent's threads and files is this process's to end


def try_mutant(trees: queue.Queue[Path], mutant: Mutant) -> Outcome:
    """Run a mutant's tests on it, up to the first that fails."""
    arguments = [*(["-k", mutant.chosen] if mutant.chosen else []), *(["-m", ""] if mutant.slow else [])]
    tree = trees.get()
    path = tree / "fzoo" / mutant.file
    text = path.read_text()
    try:
        path.write_text(text.replace(mutant.old, mutant.new))
        return run_tests(tree, ["-x", *arguments, f"tests/{mutant.tests}"], LIMIT)
    finally:
        path.write_text(text)
        trees.put(tree)


def try_unchanged(trees: queue.Queue[Path], tests: list[str]) -> Outcome:
    """Run the tests that caught mutants where nothing is wrong."""
    tree = trees.get()
    try:
        return run_tests(tree, ["-m", "", *tests], LIMIT * len(tests))
    finally:
        trees.put(tree)


def main(words: list[str]) -> int:
    """Try mutants; returns the exit code."""
    mutants = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    with tempfile.TemporaryDirectory(prefix="fzoo-mutants-") as scratch, ThreadPoolExecutor(WORKERS) as pool:
        import_peers(Path(scratch, "xla"))
        try:
            check(mutants)
            trees: queue.Queue[Path] = queue.Queue()
            for tree in pool.map(copy_tree, [Path(scratch, str(i)) for i in range(WORKERS)]):
                trees.put(tree)
        except OutOfDate as e:
            print(f"mutants: {e}", file=sys.stderr)
            return 2
        caught: Counter[str] = Counter()
        survivors, broken = 0, 0
        width = max(len(mutant.name) for mutant in mutants)
        for mutant, found in zip(mutants, pool.map(lambda mutant: try_mutant(trees, mutant), mutants), strict=True):
            if found.code == 0:
                survivors, said = survivors + 1, f"SURVIVES {mutant.tests}"
            elif found.code == 1 and found.failed:
                said = found.failed[0].removeprefix("tests/")
                caught[found.failed[0]] += 1
            else:
                broken, said = broken + 1, f"BROKEN, exit code {found.code}\n{found.output}"
            print(f"{mutant.name:{width}}  {found.seconds:5.1f} s  {said}", flush=True)
        tests = sorted(caught)
        shares = [share for share in (tests[: len(tests) // 2], tests[len(tests) // 2 :]) if share]
        for share, found in zip(shares, pool.map(lambda share: try_unchanged(trees, share), shares), strict=True):
            wrong = found.failed if found.code == 1 else share if found.code else []
            broken += sum(caught[test] for test in wrong)
            if found.code:
                said = f"BROKEN without a mutant, exit code {found.code}: {', '.join(wrong)}"
                print(f"{said}\n{found.output}", flush=True)
    print(f"{len(mutants)} mutants: {survivors} survive, {broken} could not be judged")
    return 1 if survivors or broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
