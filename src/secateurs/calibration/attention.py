"""What the weights of a transformer are for, seen in one forward pass.

Every tensor carries the names of the weights it was last multiplied with. A product of two
tensors that both carry some is an attention product (a layer's has a weight on one side): these
weights give queries, keys and values, and a weight that is multiplied with what comes of such a
product is an output projection. What modules are called plays no part, nor whether they are
called at all; names are the fallback where there are no inputs to run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateurs.parts.costs import attention_in_the_open, evaluating, forward
from secateurs.parts.prunable import prunable_parameters

Role = Literal["qkv", "proj", "bias", "other"]

_ATTENTION = "\0attention"
"""Stands among the names for an attention product."""

_PRODUCTS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "matmul": (0, 1),
    "linear": (0, 1),
    "convolution": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
}
"""Operations that multiply two tensors, and where these stand among the arguments."""

_QKV = {
    "qkv", "query", "key", "value", "query_key_value", "c_attn", "in_proj_weight",
    *(n.format(c) for c in "qkv" for n in ("{}", "{}_proj", "{}_proj_weight", "to_{}", "{}_lin")),
}  # fmt: skip


def seen_roles(model: nn.Module, example_inputs: Any) -> dict[str, Role]:
    """Roles of the prunable weights that one forward pass multiplies with.

    ``bias``: what is added to attention scores, such as the position network of Swin v2, or
    multiplied with what attention gives. All activations are held meanwhile, so
    `example_inputs` should be few.
    """
    watch = _Watch(prunable_parameters(model))
    with evaluating(model), attention_in_the_open(), torch.no_grad(), watch:
        forward(model, example_inputs)
    return watch.finished()


def named_roles(params: Iterable[str], blocks: Iterable[str]) -> dict[str, Role]:
    """The same by what the layers are called inside their blocks, where nothing can be run."""
    roles: dict[str, Role] = {}
    prefixes = [f"{block}." for block in blocks if block]
    for name in params:
        block = next((p for p in prefixes if name.startswith(p)), "")
        parts = name.removeprefix(block).removesuffix(".weight").lower().split(".")
        inside = any("attn" in part or "attention" in part for part in parts[:-1])
        if any("cpb" in part or "bias" in part or "position" in part for part in parts):
            roles[name] = "bias"
        elif parts[-1] in _QKV:
            roles[name] = "qkv"
        else:
            roles[name] = "proj" if inside else "other"
    return roles


class _Watch(TorchDispatchMode):
    """Follows which weights tensors come from."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.roles: dict[str, Role] = {}
        self._weights = {id(p): name for name, p in params.items()}
        self._fed: dict[str, set[str]] = {}
        self._origins: dict[int, frozenset[str]] = {}
        self._held: list[Tensor] = []  # an id is of use only while its tensor lives

    def finished(self) -> dict[str, Role]:
        """The roles; what feeds nothing but a bias is part of the bias."""
        for name in reversed(list(self.roles)):
            fed = self._fed.get(name, set())
            if self.roles[name] == "other" and fed and all(self.roles[n] == "bias" for n in fed):
                self.roles[name] = "bias"
        return self.roles

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__
        places = (0, 1, 2) if "scaled_dot_product" in operation else _PRODUCTS.get(operation, ())
        factors = [args[i] for i in places]
        weights = [w for t in factors if (w := self._weights.get(id(t))) is not None]
        origins = [self._of(t) for t in factors]
        if weights:
            self._multiply(weights[0], frozenset().union(*origins))
            self._note(output, frozenset(weights[:1]))
        elif factors and all(origins):
            for name in frozenset().union(*origins) - {_ATTENTION}:
                self.roles[name] = "qkv"
            self._note(output, frozenset([_ATTENTION]))
        elif not (operation.startswith("new_") or operation.endswith("_like")):
            self._pass_on((args, kwargs), output)
        else:  # of the input it has the shape alone
            self._note(output, frozenset())
        return output

    def _multiply(self, weight: str, origins: frozenset[str]) -> None:
        for name in origins - {_ATTENTION}:
            self._fed.setdefault(name, set()).add(weight)
        # one that was given a role at an earlier call keeps it
        if self.roles.get(weight, "other") == "other":
            self.roles[weight] = "proj" if _ATTENTION in origins else "other"

    def _pass_on(self, inputs: Any, output: Any) -> None:
        tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
        weights = [w for t in tensors if (w := self._weights.get(id(t))) is not None]
        origins = self._of(tensors)
        if weights and not origins:  # a weight transposed, split or cast is still that weight
            for made in tree_leaves(output):
                if isinstance(made, Tensor):
                    self._held.append(made)
                    self._weights[id(made)] = weights[0]
            return
        if _ATTENTION in origins:
            # what meets an attention product outside of layers becomes a part of it
            for name in origins - {_ATTENTION}:
                if self.roles[name] == "other":
                    self.roles[name] = "bias"
            origins = frozenset([_ATTENTION])
        self._note(output, origins)

    def _of(self, values: Any) -> frozenset[str]:
        tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
        return frozenset().union(*(self._origins.get(id(t), frozenset()) for t in tensors))

    def _note(self, output: Any, origins: frozenset[str]) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._held.append(tensor)
                self._origins[id(tensor)] = origins
