"""Initial values as Keras draws them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fzoo.types import DTypeLike


class VarianceScaling(NamedTuple):
    """Random values whose variance is `scale` over the fan; what Keras's Glorot and He initializers are.

    Called as any of Flax's initializers, it draws on the device; `draw` does so on the host, with nothing to compile.

    Attributes:
        scale: of the variance.
        mode: which fan: "fan_in", "fan_out" or "fan_avg".
        distribution: "uniform", or "truncated_normal" (at two standard deviations).
    """

    scale: float
    mode: str
    distribution: str

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        """Draw on the device."""
        return jax.nn.initializers.variance_scaling(*self)(key, shape, dtype)  # pyright: ignore[reportArgumentType]

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Draw on the host, float32."""
        window = np.prod(shape[:-2])
        fan_in, fan_out = window * shape[-2], window * shape[-1]
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        variance = self.scale / fan
        if self.distribution == "uniform":
            return (rng.random(shape, np.float32) - np.float32(0.5)) * np.float32(2 * np.sqrt(3 * variance))
        values = rng.standard_normal(shape, np.float32)
        while (outside := np.abs(values) > 2).any():
            values[outside] = rng.standard_normal(int(outside.sum()), np.float32)
        return values * np.float32(np.sqrt(variance) / 0.87962566103423978)  # the deviation of what the cut leaves


glorot_uniform = VarianceScaling(1.0, "fan_avg", "uniform")


he_normal = VarianceScaling(2.0, "fan_in", "truncated_normal")
