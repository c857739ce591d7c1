"""A CUDA graph without a GPU: what a block computes is recorded, and computed again on the same memory.

`Graph` and `capture` stand in the places of torch.cuda.CUDAGraph and torch.cuda.graph. As with the
real ones, recording computes nothing that stays; what the host did in Python meanwhile is not done
again; and what would make a GPU wait for the host, or take its shape from a tensor's values, is an
error.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKS = "_local_scalar_dense nonzero masked_select unique _unique2 unique_consecutive equal".split()


class Graph:
    """The operators of a step, with the tensors that they read and write."""

    def __init__(self):
        self.calls = []

    def replay(self) -> None:
        """Computes the step again."""
        for operator, args, options, outputs in self.calls:
            for recorded, new in zip(outputs, tensors(operator(*args, **options))):
                if recorded is not new:
                    recorded.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph):
        super().__init__()
        self.graph, self.before = graph, {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name, kwargs = operator.overloadpacket.__name__, kwargs or {}
        by_mask = "index" in name and any(x.dtype == torch.bool for x in tensors(args[1]))
        if name in ASKS or by_mask:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        places = {tensor.device.type for tensor in tensors((args, kwargs)) if tensor.dim()}
        for number, argument in enumerate(operator._schema.arguments):
            if argument.alias_info and argument.alias_info.is_write:
                value = args[number] if number < len(args) else kwargs.get(argument.name)
                for tensor in tensors(value):
                    storage = tensor.untyped_storage()
                    self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        found = operator(*args, **kwargs)
        places |= {tensor.device.type for tensor in tensors(found) if tensor.dim()}
        if len(places) > 1:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name} copies")
        if not operator.is_view:
            self.graph.calls.append((operator, args, kwargs, tensors(found)))
        return found


@contextmanager
def capture(graph: Graph):
    """Records what is computed inside, as if it had not been."""
    recorder = _Recorder(graph)
    with recorder:
        yield
    for storage, before in recorder.before.values():
        storage.copy_(before)


def tensors(tree) -> list[torch.Tensor]:
    """Those in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
