"""How the devices that `jax.shard_map` or `jax.pmap` maps over exchange sums."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Replicas(NamedTuple):
    """Devices that share statistics; see `autodiff.forward`.

    Args:
        axis: the name of the axis of devices, as collectives take it.
        size: how many there are.
    """

    axis: str
    size: int

    def total(self, *values):
        """Tensors, each added up over the devices, with gradients."""
        return [jax.lax.psum(value, self.axis) for value in values]

    def gather(self, *values):
        """Tensors, each with the devices along a new leading axis.

        A sum of rows, for JAX knows that its result is the same on every device.
        """
        own = jnp.arange(self.size) == jax.lax.axis_index(self.axis)

        def rows(value):
            mine = jnp.reshape(own, [-1] + [1] * value.ndim)
            # Not a product with 0 and 1, which would spread a NaN to the other rows.
            return jax.lax.psum(
                jnp.where(mine, value, jnp.zeros_like(value)), self.axis
            )

        return [rows(value) for value in values]


def mapped() -> Replicas | None:
    """The devices that this code is mapped over; None if JAX sees one program.

    Raises:
        ValueError: over several axes of devices: some may hold other channels.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = [name for name in mesh.manual_axes if mesh.shape[name] > 1]
    if len(axes) > 1:
        raise ValueError(
            "`synchronized=True` shares statistics along one axis of devices. Map over "
            "that axis alone: `jax.shard_map(..., axis_names={'batch'})`. Received: "
            f"code that is mapped over the axes {axes}"
        )
    return Replicas(axes[0], mesh.shape[axes[0]]) if axes else None
