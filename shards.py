"""A model spread over processes by FSDP2."""

import copy
from functools import partial, wraps

import torch
from torch import Tensor
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module, ModuleList, Parameter
from torch.optim import Optimizer


def blocks_of(model) -> list[Module]:
    """The blocks of a model: its largest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, ModuleList)]
    return [*max(lists, key=lambda x: sum(p.numel() for p in x.parameters()), default=())]

def spread(model, mesh: DeviceMesh):
    """The model with every weight cut over the processes of `mesh` by FSDP2. It runs functions of
    a model in one of two ways, and what it gathers for them it frees after them (through):

    model.blockwise(function, …): as a forward pass, with or without gradient, gathering one block
    at a time. Embeddings, last norm and head are the root's: they stay gathered from the begin of
    the pass to its end, and again in the backward pass, since common.py calls body and head apart
    and the head again in backward. All processes must make the same passes.

    model.whole(function, …): on a plain model with whole weights, gathered once. Processes may take
    their own time and ways inside; it needs memory for one whole copy.
    """
    plain = around(model, [p.new_empty(0) for p in model.parameters()])
    for module in (*blocks_of(model), model):
        fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=True,
                         mp_policy=fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32))

    def whole(function, *inputs, **options):
        for empty, part in zip(plain.parameters(), model.parameters()):
            empty.data = part.detach().full_tensor()
        try:
            return function(plain, *inputs, **options)
        finally:
            for full in plain.parameters():
                full.data = full.new_empty(0)

    model.whole, model.blockwise = whole, lambda function, *inputs: function(model, *inputs)
    fsdp.register_fsdp_forward_method(model, "blockwise")
    return model

def through(way: str):
    """Decorates function(model, …): a model that is spread over processes (spread) runs it
    in this `way`, "blockwise" or on "whole" weights; any other model just runs it."""
    def run(function, model, *inputs, **options):
        if hasattr(model, way):
            return getattr(model, way)(function, *inputs, **options)
        return function(model, *inputs, **options)
    return lambda function: wraps(function)(partial(run, function))

def around(model, weights: list[Tensor]):
    """A copy of a model around other weights: tied ones stay tied, and none is copied."""
    pairs = zip(model.parameters(), weights)
    return copy.deepcopy(model, {id(p): Parameter(w, p.requires_grad) for p, w in pairs})

def shares(saved: dict, part: Module | Optimizer) -> dict:
    """This process's shares of a checkpoint's whole tensors, cut as `part` is."""
    def cut(tensor, like):
        if not isinstance(like, DTensor) or tensor.shape != like.shape:
            return tensor  # not sharded, or AdamW's count of its steps
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)

    if isinstance(part, Module):
        own = part.state_dict()
        return {name: cut(tensor, own.get(name)) for name, tensor in saved.items()}
    weights = [p for group in part.param_groups for p in group["params"]]
    return saved | {"state": {i: {name: cut(x, weights[i]) for name, x in moments.items()}
                              for i, moments in saved["state"].items()}}
