"""The sampler's keys and values: a cache that copies nothing, and attention that copies nothing."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


class GrowingLayer(StaticLayer):
    """A layer's keys and values in memory that is taken once.

    Attention sees the filled slots as a view. transformers' dynamic cache copies everything at
    each token; its static cache lets attention read slots that are not filled yet.
    """

    filled = 0
    slots = None  # [Q], those to be written where the shape must not change: all are then read

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Adds keys and values [R, heads, Q, size]; returns those that attention may read."""
        if self.slots is not None:
            self.keys.index_copy_(2, self.slots, keys.to(self.keys.dtype))
            self.values.index_copy_(2, self.slots, values)
            return self.keys, self.values
        if not self.is_initialized:
            # Rotary embeddings give keys in float32, also where attention then reads bfloat16.
            self.lazy_initialization(keys.to(values.dtype), values)
        end = self.filled + keys.shape[2]
        self.keys[:, :, self.filled : end] = keys
        self.values[:, :, self.filled : end] = values
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, rows: Tensor, slots: Tensor, size: int) -> None:
        """Keeps of `rows` [R] the filled `slots` [R, S], in memory for `size` slots."""
        self.filled = slots.shape[1]
        self.keys = _kept(self.keys, rows, slots, size)
        self.values = _kept(self.values, rows, slots, size)


def _kept(old: Tensor, rows: Tensor, slots: Tensor, size: int) -> Tensor:
    kept = old.new_zeros(len(rows), old.shape[1], size, old.shape[3])
    kept[:, :, : slots.shape[1]] = old[rows[:, None], :, slots].transpose(1, 2)
    return kept


def make_cache(model, slots: int) -> Cache:
    """A cache for rows of at most `slots` tokens; on plain rows the one that the model asks for."""
    if model.shared_rows:
        return Cache(layer_class_to_replicate=lambda: GrowingLayer(slots))
    return DynamicCache(config=model.module.config)


class Recorded:
    """A step on a GPU as a CUDA graph: the same kernels on the same memory, launched as one.

    The first call runs the step as it is, so that libraries choose their kernels and take their
    memory; the second records it; later ones need no Python.
    """

    def __init__(self, step: Callable[[], None]):
        self.step, self.calls = step, 0

    def __call__(self) -> None:
        """Makes a step."""
        self.calls += 1
        if self.calls == 1:
            return self.step()
        if self.calls == 2:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # which computes nothing yet
                self.step()
        self.graph.replay()


def share_heads(module) -> int:
    """Lets a model read the keys of grouped-query heads by `grouped_attention`, if it can do with
    any attention; returns how many query heads share a key head, 1 where nothing is to be done."""
    config = module.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    if groups == 1 or module.config._attn_implementation != "sdpa":
        return 1
    AttentionInterface.register("grouped_sdpa", grouped_attention)
    AttentionMaskInterface.register("grouped_sdpa", sdpa_mask)
    module.set_attn_implementation("grouped_sdpa")
    return groups if module.config._attn_implementation == "grouped_sdpa" else 1


def grouped_attention(layer, query: Tensor, key: Tensor, value: Tensor, mask, **options):
    """transformers' attention, but that a mask of more rows than queries lets the queries of all
    heads that share a key head be queries of one head, in turn: keys and values are read where they
    are, of which the library would make a copy per query head, at each token."""
    rows, heads, asking, size = query.shape
    if mask is None or mask.shape[2] == asking:
        return sdpa_attention_forward(layer, query, key, value, mask, **options)
    query = query.reshape(rows, key.shape[1], -1, size)
    scale = options.get("scaling")
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.view(rows, heads, asking, -1).transpose(1, 2).contiguous(), None
