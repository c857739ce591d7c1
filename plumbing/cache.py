"""The key and value cache of the sampler: `common.sample` makes one per call."""

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticLayer


class GrowingLayer(StaticLayer):
    """A layer's keys and values in memory that is taken once.

    Attention sees the filled slots as a view. transformers' dynamic cache copies everything at
    each token; its static cache lets attention read slots that are not filled yet.
    """

    filled = 0

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Adds keys and values [R, heads, Q, size]; returns those of all filled slots."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        end = self.filled + keys.shape[2]
        self.keys[:, :, self.filled : end] = keys
        self.values[:, :, self.filled : end] = values
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of `indices`: the others have ended."""
        self.keys, self.values = self.keys[indices], self.values[indices]


def make_cache(model, slots: int) -> Cache:
    """A cache for rows of at most `slots` tokens; on plain rows the one that the model asks for."""
    if model.shared_rows:
        return Cache(layer_class_to_replicate=lambda: GrowingLayer(slots))
    return DynamicCache(config=model.module.config)
