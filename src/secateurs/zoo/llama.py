"""A small Llama of transformers: grouped-query attention, rotary positions, gated layers."""

from __future__ import annotations

from torch import nn

from secateurs.errors import library, require
from secateurs.zoo.networks import Shape, network, scaled


@network("llama", inputs=(128,), classes=256, kind="language", init="glorot-normal")
def llama(
    inputs: Shape,
    classes: int,
    width: float = 1.0,
    *,
    dim: int = 96,
    heads: int = 4,
    groups: int = 2,
    depth: int = 4,
    hidden: int = 256,
) -> nn.Module:
    """Llama (arXiv 2302.13971) as transformers has it, so that what is pruned stays loadable.

    Args:
        dim: width of the residual stream at width 1, a multiple of `heads`.
        heads: of the queries; their number does not change with the width, their size does.
        groups: heads of keys and values, a divisor of `heads`.
        depth: blocks.
        hidden: neurons of a feed-forward layer at width 1.
    """
    require(dim % heads == 0, "dim", dim, f"a multiple of heads={heads}")
    require(groups >= 1 and heads % groups == 0, "groups", groups, f"a divisor of heads={heads}")
    transformers = library("transformers", "hf")
    size = 2 * max(1, round(dim * width / heads / 2))  # rotary positions pair dimensions
    config = transformers.LlamaConfig(
        vocab_size=classes,
        hidden_size=heads * size,
        intermediate_size=scaled(hidden, width),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=size,
        max_position_embeddings=max(2048, inputs[0]),
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        architectures=["LlamaForCausalLM"],
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model
