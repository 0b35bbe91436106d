"""Order of a backbone's parameters from input to output, for freezing, layer decay, LoRA and wrapping of blocks.

timm groups its own models; `_MATCHERS` lists other towers in timm's form.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from core.errors import UserError

# Class → timm's matcher: regular expressions of the stem and of the blocks. Blocks are sorted by the numbers that they
# capture, with a suffix of numbers where they capture fewer. Parameters that match neither follow the last block.
_MATCHERS: dict[str, dict[str, Any]] = {
    "VisionTransformer": {  # open_clip's; timm's groups itself
        "stem": r"^(?:conv1|class_embedding|positional_embedding|ln_pre)",
        "blocks": r"^transformer\.resblocks\.(\d+)",
    },
    "ModifiedResNet": {"stem": r"^(?:conv|bn)\d", "blocks": r"^layer(\d+)\.(\d+)"},
    "Blip2VisionModel": {"stem": r"^embeddings", "blocks": r"^encoder\.layers\.(\d+)"},
    "MetaFormer": {
        "stem": r"^stem",
        "blocks": [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)],
    },
    "PoolingVisionTransformer": {
        "stem": r"^(?:cls_token|pos_embed|patch_embed)",
        "blocks": [(r"^transformers\.(\d+)\.pool", (0,)), (r"^transformers\.(\d+)\.blocks\.(\d+)", None)],
    },
}
_FOLLOWS = "?"  # a name that no matcher matches
# Parameters read by all blocks of a transformer, or by the first, which some versions of timm assign to the last block
_FEEDS = re.compile(r"(?:rope|shared_rel_pos|norm_pre|reg_token)\b")


def layers(module: nn.Module) -> list[list[str]]:
    """Names of all parameters by depth, by timm's fine grouping.

    [0] is the stem with its embeddings, [k] the k-th block from the bottom. Parameters after the last block are counted
    to it, since only some backbones have a norm there.

    Raises:
        UserError: The order of the blocks is not known.
    """
    grouped, following = _grouped(module)
    return [*grouped[:-1], grouped[-1] + following]


def blocks(module: nn.Module) -> list[nn.Module]:
    """Blocks, bottom first: for each layer above the stem the largest module with parameters of this layer only.

    Raises:
        UserError: The order of the blocks is not known.
    """
    grouped, _ = _grouped(module)
    # by identity: some backbones use a module in two places
    layer_of = {id(module.get_parameter(name)): layer for layer, names in enumerate(grouped) for name in names}
    largest: dict[int, tuple[int, nn.Module]] = {}
    for layer, part in _single_layer_modules(module, layer_of):
        size = sum(p.numel() for p in part.parameters())
        if layer and size > largest.get(layer, (0, part))[0]:
            largest[layer] = size, part
    return [block for layer in sorted(largest) for block in _callable(largest[layer][1])]


def frozen_names(module: nn.Module, count: int) -> list[str]:
    """Names of the parameters of the stem and the first `count` blocks.

    Raises:
        UserError: The backbone has fewer blocks, or their order is not known.
    """
    by_depth = layers(module)
    if count >= len(by_depth):
        raise UserError(
            f"model.freeze={count} exceeds the {len(by_depth) - 1} blocks of {type(module).__name__}; freeze fewer, or "
            "use model.freeze=all"
        )
    return [name for names in by_depth[: count + 1] for name in names]


def _grouped(module: nn.Module) -> tuple[list[list[str]], list[str]]:
    """Names of the parameters by depth, and names of the parameters after the last block."""
    from timm.models._manipulate import group_with_matcher

    trunk: Any = getattr(module, "trunk", module)  # open_clip's TimmModel
    if hasattr(trunk, "group_matcher"):
        matcher = trunk.group_matcher(coarse=False)
    elif (kind := type(trunk).__name__) in _MATCHERS:
        matcher = _MATCHERS[kind]
    else:
        raise UserError(
            f"the order of {kind}'s blocks is not known; with this backbone use model.freeze=0 or all, "
            "model.lora.blocks=0, optim.layer_decay=1, scale.activation_checkpointing=none and scale.compile=false"
        )
    prefix = "" if trunk is module else "trunk."
    named = [(name, prefix + name) for name, _ in trunk.named_parameters()]
    feeding = [both for both in named if hasattr(trunk, "blocks") and _FEEDS.match(both[0])]
    groups = group_with_matcher(
        iter([*(both for both in named if both not in feeding), (_FOLLOWS, _FOLLOWS)]), matcher, return_values=True
    )
    stem, *grouped, following = (groups[layer] for layer in sorted(groups))
    following.remove(_FOLLOWS)
    following += [name for name, _ in module.named_parameters() if trunk is not module and not name.startswith(prefix)]
    return [stem + [name for _, name in feeding], *grouped], following


def _single_layer_modules(module: nn.Module, layer_of: dict[int, int]) -> Iterator[tuple[int, nn.Module]]:
    """Yield the outermost modules all of whose parameters belong to one layer, with that layer."""
    layers_inside = {layer_of.get(id(p), -1) for p in module.parameters()}
    if len(layers_inside) == 1 and -1 not in layers_inside:
        yield layers_inside.pop(), module
    else:
        for child in module.children():
            yield from _single_layer_modules(child, layer_of)


def _callable(module: nn.Module) -> list[nn.Module]:
    """`module` itself, or its children if it is a container without a forward of its own."""
    if isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and len(module) == 1):
        return [block for child in module for block in _callable(child)]
    return [module]
