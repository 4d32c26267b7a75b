"""Relevance: how much of a network's evidence for a class flows through every filter (LRP).

From the logit of the label relevance is sent back layer by layer; every rule hands what an
output received on to the inputs, in proportion to what they contributed. With a the inputs of a
layer, W its weights (W⁺, W⁻ their positive and negative parts), b its bias, R the relevance of
its outputs:

    z+          Z = W⁺a + 1e-9                        R_in = a ⊙ W⁺ᵀ(R / Z)
    alpha-beta  X = a + 1e-9, β = 1 − α               R_in = X ⊙ [W⁺ᵀ(αR / W⁺X) + W⁻ᵀ(βR / W⁻X)]
    epsilon     Z = Wa + b                            R_in = a ⊙ Wᵀ(R / (Z + ε sign Z))
    beta0       Z = W⁺max(a, 0) + W⁻min(a, 0)         R_in = a ⊙ ∂Z/∂a (R / Z)
    zB          Z = Wa − W⁺l − W⁻h, pixels in [l, h]  R_in = a⊙Wᵀ(R/Z) − l⊙W⁺ᵀ(R/Z) − h⊙W⁻ᵀ(R/Z)

(arXiv 1912.08881 and its public code.) Activations pass relevance on unchanged; batch norm is
fused into the layer before it, and else passes it on too: a scale has one input an output. Linear
maps without weights (average pooling, resizing) follow epsilon, a sum is split in proportion to
its summands, maximum pooling and whatever moves elements is followed by the gradient.

The network is the traced graph, so functions count like modules and nothing is patched; what has
no rule is refused by name. Each operation runs under a hook of zennit (Anders et al., arXiv
2106.13200). epsilon, beta0 (its ZPlus without biases), zB and Norm are zennit's. Its own ZPlus and
AlphaBeta keep the positive biases, part negative inputs from positive ones and stabilise with the
sign of Z; z+ and alpha-beta here are the lines above, on its `BasicHook`. Where W⁻X (or W⁺X) is 0,
no relevance goes that way; the lines above would give 0/0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from secateurs.errors import InputError, described, library, require
from secateurs.structure.arguments import argument
from secateurs.structure.rules import is_in_place, op_name, out_of_place
from secateurs.structure.surgery import executed_by
from secateurs.structure.trace import Trace, named_tensors

Rule = Literal["z+", "alpha-beta", "epsilon", "beta0", "zB"]
Seed = Literal["onehot", "logit"]
EXTRA = "explain"
"""The extra of secateurs that brings zennit."""

CONVOLUTIONS = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip
ACTIVATIONS = {
    "relu", "relu6", "hardtanh", "leaky_relu", "rrelu", "elu", "selu", "celu", "gelu", "silu",
    "mish", "hardswish", "hardsigmoid", "sigmoid", "tanh", "softplus", "softsign", "prelu", "clamp",
    "clamp_min", "clamp_max", "threshold", "log_sigmoid", "hardshrink", "softshrink", "batch_norm",
}  # fmt: skip
AVERAGES = {
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "mean", "sum", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
}  # fmt: skip
MOVES = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "contiguous", "clone",
    "alias", "squeeze", "unsqueeze", "expand", "cat", "stack", "slice", "split", "split_with_sizes",
    "chunk", "getitem", "narrow", "select", "index_select", "unbind", "pad", "constant_pad_nd",
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "adaptive_max_pool2d",
    "dropout", "feature_dropout", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "roll",
    "flip", "to", "_to_copy", "identity",
}  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """Which rule every layer follows.

    Attributes:
        conv, linear: of convolutions and of linear layers.
        first: of the first layer, where it is another one.
        alpha: of alpha-beta; β = 1 − α.
        epsilon: stabiliser of epsilon, zB, averages and sums.
        low, high: of zB: the smallest and the largest value that an input may have.
    """

    conv: Rule = "z+"
    linear: Rule = "z+"
    first: Rule | None = None
    alpha: float = 1.0
    epsilon: float = 1e-6
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        require(self.epsilon > 0, "epsilon", self.epsilon, "above 0")
        require(self.alpha >= 1, "alpha", self.alpha, "1 or more")
        boxed = "zB" in (self.conv, self.linear, self.first)
        bounds = described(f"low={self.low}, high={self.high}")
        fit = self.low is not None and self.high is not None and self.low <= 0 <= self.high
        require(fit or not boxed, "rule zB", bounds, "low and high, around 0")

    def hook(self, rule: Rule) -> Any:
        """The hook of zennit that follows a rule."""
        zennit = library("zennit.rules", EXTRA)
        match rule:
            case "epsilon":
                return zennit.Epsilon(self.epsilon)
            case "beta0":
                return zennit.ZPlus(lambda z: z + 1e-12 * (z == 0), zero_params="bias")
            case "zB":
                return zennit.ZBox(self.low, self.high, self.epsilon, zero_params="bias")
            case "z+":
                return _shares([(1.0, zennit.ClampMod(min=0.0, zero_params="bias"))], 0.0, 1e-9)
        parts = [
            (self.alpha, zennit.ClampMod(min=0.0, zero_params="bias")),
            (1 - self.alpha, zennit.ClampMod(max=0.0, zero_params="bias")),
        ]
        return _shares(parts, 1e-9, 0.0)


def _shares(parts: list[tuple[float, Any]], shift: float, guard: float) -> Any:
    """Σ share · X ⊙ Vᵀ(R / (V X + guard)) over parts V of the weights, X = a + shift."""

    def portions(received: Tensor, sums: list[Tensor]) -> list[Tensor]:
        return [
            torch.where(z + guard == 0, 0.0, share * received / (z + guard))
            for (share, _), z in zip(parts, sums, strict=True)
        ]

    return library("zennit.core", EXTRA).BasicHook(
        input_modifiers=[lambda a: a + shift] * len(parts),
        param_modifiers=[modifier for _, modifier in parts],
        output_modifiers=[lambda z: z] * len(parts),
        gradient_mapper=portions,
        reducer=lambda inputs, sent: sum(x * g for x, g in zip(inputs, sent, strict=True)),
    )


SEQUENTIAL = Rules()
"""z+ everywhere: what the paper's code does for VGG and AlexNet."""


def resnet_rules(low: float, high: float) -> Rules:
    """What the paper's code does for ResNets: beta0, epsilon for the classifier, zB at first."""
    return Rules("beta0", "epsilon", "zB", low=low, high=high)


@dataclass
class Relevance:
    """What every layer received.

    Attributes:
        layers: relevance at the output of every convolution and linear layer, in its shape, by
            node of the graph, in the order of execution.
        input: relevance of the inputs.
        logits: what the network gave.
    """

    layers: dict[fx.Node, Tensor]
    input: Tensor
    logits: Tensor

    def by_name(self) -> dict[str, Tensor]:
        """The same by the name of the layer."""
        return {layer_name(node): value for node, value in self.layers.items()}


def layer_name(node: fx.Node) -> str:
    """The path of the layer whose code executed a node, or the node's own name."""
    return executed_by(node) or node.name


def relevance(
    found: Trace,
    inputs: Tensor,
    labels: Tensor,
    rules: Rules = SEQUENTIAL,
    seed: Seed = "onehot",
) -> Relevance:
    """Send the evidence for the labels back through a traced classifier.

    Args:
        found: a trace on a batch as large as this one.
        inputs: (N, ...).
        labels: (n,), n ≤ N; rows without a label are padding and get no relevance.
        seed: at the logit of the label: 1, or the logit itself.

    Raises:
        InputError: labels that are not classes, an operation without a rule, relevance that is
            NaN or Inf (the layer is named), or zennit is not installed.
    """
    graph = Explained(found, rules)
    leaf = inputs.detach().clone().requires_grad_()
    logits = graph.logits(leaf)
    check_labels(labels, logits)
    rows = torch.arange(len(labels))
    start = torch.zeros_like(logits)
    start[rows, labels] = 1.0 if seed == "onehot" else logits.detach()[rows, labels]
    nodes = list(graph.outputs)
    received = torch.autograd.grad(
        logits, [leaf, *graph.outputs.values()], start, materialize_grads=True
    )
    for node, value in zip(nodes, received[1:], strict=True):
        if not bool(torch.isfinite(value).all()):
            finite = "finite relevance; alpha-beta and z+ need inputs that are not negative"
            raise InputError(layer_name(node), described("relevance that is NaN or Inf"), finite)
    return Relevance(dict(zip(nodes, received[1:], strict=True)), received[0], logits.detach())


def responses(
    found: Trace, inputs: Tensor, loss: Callable[[Tensor], Tensor]
) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """(outputs, gradient of a loss of the logits) of every convolution and linear layer."""
    graph = Layers(found)
    logits = graph.logits(inputs.detach().clone().requires_grad_())
    outputs = list(graph.outputs.values())
    gradients = torch.autograd.grad(loss(logits), outputs, materialize_grads=True)
    pairs = zip(outputs, gradients, strict=True)
    return dict(zip(graph.outputs, ((o.detach(), g) for o, g in pairs), strict=True))


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Raise `InputError` unless the labels are classes of the logits."""
    shown = described(f"labels of shape {tuple(labels.shape)}, {labels.dtype}")
    plain = labels.ndim == 1 and not labels.is_floating_point() and len(labels) > 0
    require(plain, "labels", shown, "one class a sample")
    for label in (int(labels.min()), int(labels.max())):
        classes = logits.shape[-1]
        require(0 <= label < classes, "labels", label, f"0 to {classes - 1}, the model's outputs")


class Layers(fx.Interpreter):
    """Runs a traced graph and keeps what its convolutions and linear layers give.

    Operations in place run out of place, so that what was kept stays.
    """

    def __init__(self, found: Trace) -> None:
        if found.divided is not None:
            raise InputError("model", described(found.divided), "a model that is traced as a whole")
        super().__init__(found.parts[0].graph)
        self.found = found
        self.outputs: dict[fx.Node, Tensor] = {}

    def logits(self, inputs: Tensor) -> Tensor:
        """(N, classes).

        Raises:
            InputError: the model gives something else.
        """
        given = tree_leaves(self.run(inputs, enable_io_processing=False))
        shapes = described(f"outputs of shapes {[tuple(g.shape) for g in given]}")
        require(len(given) == 1 and given[0].ndim == 2, "model", shapes, "logits (N, classes)")
        result: Tensor = given[0]
        return result

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            value = super().run_node(n)
            return value.detach() if n.op == "get_attr" and isinstance(value, Tensor) else value
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = self.operation(n, args, kwargs)
        if is_layer(n):
            self.outputs[n] = result
        if is_in_place(n):
            self.env[n.all_input_nodes[0]] = result
        return result

    def operation(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """The result of a node."""
        return out_of_place(n)(*args, **kwargs)


def is_layer(node: fx.Node) -> bool:
    """Whether a node multiplies by weights of the model."""
    if op_name(node) not in CONVOLUTIONS | {"linear"}:
        return False
    weight = node.args[1]
    return isinstance(weight, fx.Node) and weight.op == "get_attr"


def output_place(node: fx.Node) -> int:
    """The dimension of a layer's output that its filters or neurons are along."""
    return 1 if op_name(node) in CONVOLUTIONS else node.meta["val"].ndim - 1


class Explained(Layers):
    """The same under hooks: what a backward pass then gives is relevance."""

    def __init__(self, found: Trace, rules: Rules) -> None:
        super().__init__(found)
        self.rules = rules
        self.hooks: list[Any] = []
        nodes = list(found.parts[0].graph.graph.nodes)
        self.first = next((n for n in nodes if n.op == "call_function" and is_layer(n)), None)
        self.fused = {n.args[0]: n for n in nodes if n.op == "call_function" and _fusable(n)}

    def operation(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        name, call = op_name(n), out_of_place(n)
        carried = [a for a in tree_leaves((args, kwargs)) if _carries(a)]
        if not carried:
            return call(*args, **kwargs)
        if is_layer(n) and len(carried) == 1:
            return self._layer(n, args)
        if n in self.fused.values():
            return args[0]
        if name in MOVES:
            return call(*args, **kwargs)
        alone = len(carried) == 1 and carried[0] is args[0]
        if alone and name in ACTIVATIONS | {"add", "sub", "mul", "div"}:
            passing = library("zennit.rules", EXTRA).Pass()
            return self._under(passing, lambda x: call(x, *args[1:], **kwargs), args[0])
        if alone and name in AVERAGES:
            norm = library("zennit.rules", EXTRA).Norm(self.rules.epsilon)
            return self._under(norm, lambda x: call(x, *args[1:], **kwargs), args[0])
        if name in ("add", "sub") and len(carried) == 2:
            norm = library("zennit.rules", EXTRA).Norm(self.rules.epsilon)
            both = torch.stack(torch.broadcast_tensors(*args[:2]), -1)
            return self._under(norm, lambda s: call(s[..., 0], s[..., 1], **kwargs), both)
        where = executed_by(n)
        raise InputError(
            "model", described(f"the operation {name}" + (f" in {where}" if where else "")),
            "operations with a relevance rule: convolutions, linear layers, batch norm, "
            "activations, pooling, sums, and what moves elements",
        )  # fmt: skip

    def _layer(self, n: fx.Node, args: Any) -> Tensor:
        weight, bias = args[1], args[2] if len(args) > 2 else None
        if (norm := self.fused.get(n)) is not None:
            weight, bias = self._with_norm(n, weight, bias, norm)
        own = self.rules.conv if op_name(n) in CONVOLUTIONS else self.rules.linear
        rule = self.rules.first if n is self.first and self.rules.first is not None else own
        operation: Any = n.target
        layer = Weighted(lambda x, w, b: operation(x, w, b, *args[3:]), weight, bias)
        return self._hooked(self.rules.hook(rule), layer, args[0])

    def _with_norm(
        self, n: fx.Node, weight: Tensor, bias: Tensor | None, norm: fx.Node
    ) -> tuple[Tensor, Tensor]:
        """Weights and bias of a layer with the batch norm behind it: W γ/σ, (b − μ) γ/σ + β."""
        named: Any = norm.args[1:5]
        scale, shift, mean, variance = (
            None if a is None else self.fetch_attr(str(a.target)).detach() for a in named
        )
        assert mean is not None  # `_fusable` looked
        assert variance is not None
        eps: Any = norm.args[7]
        factor = torch.rsqrt(variance + eps)
        factor = factor if scale is None else factor * scale
        base = -mean if bias is None else bias - mean
        moved = base * factor + (0 if shift is None else shift)
        return scaled_outputs(n, weight, factor), moved

    def _under(self, hook: Any, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self._hooked(hook, Weighted(lambda x, *_: call(x)), x)

    def _hooked(self, hook: Any, layer: nn.Module, x: Tensor) -> Tensor:
        hook.register(layer)
        self.hooks.append(hook)  # zennit refers to it weakly
        result: Tensor = layer(x)
        return result


class Weighted(nn.Module):
    """An operation as a module, which is what zennit hangs its hooks on."""

    def __init__(
        self,
        call: Callable[..., Tensor],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.call = call
        self.weight = None if weight is None else nn.Parameter(weight, False)
        self.bias = None if bias is None else nn.Parameter(bias, False)

    def forward(self, x: Tensor) -> Tensor:
        """The operation on its one input that carries relevance."""
        return self.call(x, self.weight, self.bias)


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _fusable(node: fx.Node) -> bool:
    """Whether a node is a batch norm in eval mode right behind a layer that nobody else reads."""
    if op_name(node) != "batch_norm" or node.args[5] is True:
        return False
    layer = node.args[0]
    if not isinstance(layer, fx.Node) or layer.op != "call_function" or not is_layer(layer):
        return False
    known = isinstance(node.args[3], fx.Node) and isinstance(node.args[4], fx.Node)
    return known and len(layer.users) == 1 and output_place(layer) == 1


def scaled_outputs(node: fx.Node, weight: Tensor, factor: Tensor) -> Tensor:
    """The weight of a layer with every output multiplied by a factor of its own."""
    if not op_name(node).startswith("conv_transpose"):
        return weight * factor.view([-1] + [1] * (weight.ndim - 1))
    groups = weight.unflatten(0, (factor.numel() // weight.shape[1], -1))
    own = factor.view([len(groups), 1, -1] + [1] * (weight.ndim - 2))
    return (groups * own).flatten(0, 1)


def output_magnitudes(found: Trace) -> dict[fx.Node, Tensor]:
    """Σ |W| of every filter or neuron of every layer, (outputs,) each, float64."""
    tensors, sums = named_tensors(found.model), {}
    nodes = (n for n in found.parts[0].graph.graph.nodes if n.op == "call_function")
    for node in filter(is_layer, nodes):
        weight = tensors[str(node.args[1].target)].detach().double().abs()
        if op_name(node).startswith("conv_transpose"):
            groups = weight.unflatten(0, (int(argument(node, "groups")), -1))
            sums[node] = groups.flatten(3).sum((1, 3)).flatten()
        else:
            sums[node] = weight.flatten(1).sum(1)
    return sums
