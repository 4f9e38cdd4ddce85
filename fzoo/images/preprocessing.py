"""From pixels to what a network takes, as Keras does it."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Images = TypeVar("Images", np.ndarray, jax.Array)


Mode = Literal["caffe", "tf", "torch", "none"]


_CAFFE_MEAN = (103.939, 116.779, 123.68)  # B, G, R


_TORCH_MEAN, _TORCH_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocess(images: Images, mode: Mode, *, data_format: str = "channels_last") -> Images:
    """`preprocess_input` by mode instead of by model."""
    if data_format not in ("channels_last", "channels_first"):
        raise ValueError(f"data_format={data_format!r} given, 'channels_last' or 'channels_first' expected")
    np_like: Any = jnp if isinstance(images, jax.Array) else np
    x = np_like.asarray(images)
    axis = -1 if data_format == "channels_last" else -3
    if x.ndim not in (3, 4) or (mode != "none" and mode != "tf" and x.shape[axis] != 3):
        raise ValueError(f"images of shape {x.shape} given, three RGB channels expected ({data_format})")
    if not (jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.kind in "iub"):
        raise ValueError(f"images of {x.dtype} given, integers or floats expected")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(np.float32)

    def constant(values):
        shape = [3 if i == axis % x.ndim else 1 for i in range(x.ndim)]
        return np_like.asarray(values, x.dtype).reshape(shape)

    if mode == "tf":
        x = x / np_like.asarray(127.5, x.dtype) - np_like.asarray(1, x.dtype)
    elif mode == "torch":
        x = (x / np_like.asarray(255, x.dtype) - constant(_TORCH_MEAN)) / constant(_TORCH_STD)
    elif mode == "caffe":
        x = np_like.flip(x, axis) - constant(_CAFFE_MEAN)
    elif x is images:
        x = x.copy()
    return x
