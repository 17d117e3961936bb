"""The Feature Pyramid Network: a drop-in for torchvision's module, computed by the fused calls."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_kernels.modules.alterations import must_step_aside
from fpn_kernels.modules.extra_blocks import ExtraFPNBlock
from fpn_kernels.modules.pathway import GAINS, pyramid
from fpn_kernels.resampling import MODES


class FeaturePyramidNetwork(nn.Module):
    """Feature Pyramid Network with torchvision's constructor, call and checkpoints.

    Each level is ``M_l = gain * (inner_l(C_l) + resize(M_{l+1}))`` and ``P_l = layer_l(M_l)``, with a 1x1 convolution
    `inner_l` and a 3x3 convolution `layer_l`.  The top-down pathway is one fused call if each inner block is a plain
    convolution, alone or followed by BatchNorm with fixed statistics (eval mode, or frozen).  Each call folds the norm
    into weight and bias again, so it sees every edit.

    Any other block is called as a module, in torchvision's order, and `fpn_kernels.upsample_add` merges its result: a
    block with hooks, a parametrisation, a patch, a wrapper (LoRA), a replacement (a quantised convolution), another
    norm, BatchNorm in training, or BatchNorm in 16 bits or under autocast, where folding may overflow.

    The whole pyramid runs by `get_result_from_inner_blocks`, `get_result_from_layer_blocks` and PyTorch's functions
    under a functorch transform, forward-mode AD, a TorchScript tracer or symbolic tracing, with a global module hook,
    where `torch.nn.functional.conv2d`, `interpolate` or `batch_norm` was replaced, and in a subclass that overrides
    either method.

    Args:
        in_channels_list: channels of each feature map, finest first.
        out_channels: channels of every map of the pyramid.
        extra_blocks: appends coarser levels: `LastLevelMaxPool`, `LastLevelP6P7`, another `ExtraFPNBlock`, or
            torchvision's.
        norm_layer: called with `out_channels` to make the norm of each convolution, which then has no bias.
        mode: resize of the coarser map: "nearest" (the paper, torchvision, Detectron2), "nearest-exact" or "bilinear".
        fuse_type: "sum", or "avg" for half the sum (Detectron2's option).

    Shape:
        One map ``[N, in_channels_list[l], H_l, W_l]`` per level, finest first, to one ``[N, out_channels, H_l, W_l]``
        per level, and those of the extra block.  Any sizes: a map is resized to the one that it is added to.

    Raises:
        TypeError: an argument of the wrong type, named in the message.
        ValueError: an argument of the wrong value, named in the message.

    Dtypes and layout:
        float16, bfloat16, float32 and float64.  Each output map has the layout (NCHW or NHWC) of the feature map of its
        level.  The merged maps have the layout in which the output convolutions are fastest.  Under autocast the fused
        calls run in the autocast dtype with float32 accumulators; eager PyTorch resizes, and continues, in float32.

    Cost:
        At least ``sum_l (N H_l W_l (Cin_l + Cout) + Cin_l Cout + 9 Cout Cout + 2 Cout) itemsize`` bytes, and
        ``sum_l N H_l W_l (2 Cin_l Cout + 18 Cout Cout)`` operations; the merged maps, written and read again between
        the two convolutions, add ``2 N Cout H_l W_l`` elements per level.

    Source:
        Feature Pyramid Networks, arXiv 1612.03144, section 3; torchvision's class of the same name.

    Example:
        ```python
        network = fpn_kernels.FeaturePyramidNetwork([256, 512, 1024, 2048], 256, fpn_kernels.LastLevelMaxPool())
        network.load_state_dict(fpn.state_dict())  # torchvision's
        pyramid = network({"0": c2, "1": c3, "2": c4, "3": c5})  # keys "0", "1", "2", "3", "pool"
        ```
    """

    _version = 2  # torchvision's: 1 had bare convolutions (inner_blocks.0.weight)

    def __init__(
        self,
        in_channels_list: Sequence[int],
        out_channels: int,
        extra_blocks: ExtraFPNBlock | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        mode: str = "nearest",
        fuse_type: str = "sum",
    ) -> None:
        super().__init__()
        channels = _check_channels(in_channels_list, out_channels)
        _check_options(extra_blocks, norm_layer, mode, fuse_type)
        self.out_channels = out_channels
        self.mode = mode
        self.fuse_type = fuse_type

        self.inner_blocks = nn.ModuleList()
        self.layer_blocks = nn.ModuleList()
        for in_channels in channels:
            self.inner_blocks.append(_convolution(in_channels, out_channels, 1, norm_layer))
            self.layer_blocks.append(_convolution(out_channels, out_channels, 3, norm_layer))
        # In this order, and before extra_blocks is set, so that a seed gives torchvision's weights.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.extra_blocks = extra_blocks

    def forward(self, x: Mapping[Any, Tensor] | Sequence[Tensor]) -> OrderedDict[Any, Tensor] | tuple[Tensor, ...]:
        """Computes the pyramid.

        Args:
            x: the maps of the backbone, ``[N, in_channels_list[l], H_l, W_l]``, finest first: a mapping of name to map,
                a list or a tuple.

        Returns:
            For a mapping, an `OrderedDict` with the same keys; for a list or tuple, a tuple.  One map
            ``[N, out_channels, H_l, W_l]`` per level, then those of the extra block.

        Raises:
            TypeError, ValueError: wrong maps, or a wrong number of them; the message names the level.
        """
        inner, outer = list(self.inner_blocks), list(self.layer_blocks)
        names, features = _check_features(x, inner)
        if must_step_aside(features) or self._is_overridden():
            results = self._compose(features)
        else:
            _, results = pyramid(features, inner, outer, mode=self.mode, gain=GAINS[self.fuse_type])
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, features, names)
            if len(results) != len(names):
                raise ValueError(
                    f"extra_blocks: {type(self.extra_blocks).__name__} returned {len(results)} maps"
                    f" and {len(names)} names"
                )
        if isinstance(x, Mapping):
            return OrderedDict(zip(names, results, strict=True))
        return tuple(results)

    def _is_overridden(self) -> bool:
        """Whether one of torchvision's methods was overridden in a subclass or patched."""
        cls, held = type(self), self.__dict__
        return (
            cls.get_result_from_inner_blocks is not _INNER_METHOD
            or cls.get_result_from_layer_blocks is not _LAYER_METHOD
            or "get_result_from_inner_blocks" in held
            or "get_result_from_layer_blocks" in held
        )

    def _compose(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The output maps computed as in torchvision, by the modules and PyTorch's functions."""
        merged = self.get_result_from_inner_blocks(features[-1], -1)
        results = [self.get_result_from_layer_blocks(merged, -1)]
        for level in reversed(range(len(features) - 1)):
            lateral = self.get_result_from_inner_blocks(features[level], level)
            align_corners = False if self.mode == "bilinear" else None
            top = F.interpolate(merged, size=lateral.shape[-2:], mode=self.mode, align_corners=align_corners)
            merged = lateral + top if self.fuse_type == "sum" else GAINS[self.fuse_type] * (lateral + top)
            results.insert(0, self.get_result_from_layer_blocks(merged, level))
        return results

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.compile, torch.export or"
            " torch.jit.trace, or load its state_dict into torchvision.ops.FeaturePyramidNetwork and script that"
        )

    def get_result_from_inner_blocks(self, x: Tensor, idx: int) -> Tensor:
        """``inner_blocks[idx](x)``: one level's lateral map, before the merge (torchvision's method)."""
        return self._block(self.inner_blocks, idx)(x)  # type: ignore[no-any-return]

    def get_result_from_layer_blocks(self, x: Tensor, idx: int) -> Tensor:
        """``layer_blocks[idx](x)``: one level's output map (torchvision's method)."""
        return self._block(self.layer_blocks, idx)(x)  # type: ignore[no-any-return]

    @staticmethod
    def _block(blocks: nn.ModuleList, idx: int) -> nn.Module:
        if not -len(blocks) <= idx < len(blocks):
            raise IndexError(f"idx: {idx} is out of range for {len(blocks)} levels")
        return blocks[idx]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        version = local_metadata.get("version", None)
        if version is None or version < 2:
            for blocks in ("inner_blocks", "layer_blocks"):
                for level in range(len(self.inner_blocks)):
                    for name in ("weight", "bias"):
                        old = f"{prefix}{blocks}.{level}.{name}"
                        if old in state_dict:
                            state_dict[f"{prefix}{blocks}.{level}.0.{name}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, fuse_type={self.fuse_type!r}"


_INNER_METHOD = FeaturePyramidNetwork.get_result_from_inner_blocks
_LAYER_METHOD = FeaturePyramidNetwork.get_result_from_layer_blocks


def _check_features(x: Any, inner: Sequence[nn.Module]) -> tuple[list[Any], list[Tensor]]:
    if isinstance(x, Mapping):
        names, features = list(x.keys()), list(x.values())
        keys: Sequence[Any] = names
    elif isinstance(x, (list, tuple)):
        # The names in torchvision's backbones, for the extra block.
        names, features = [str(level) for level in range(len(x))], list(x)
        keys = range(len(x))
    else:
        raise TypeError(f"x: expected a mapping, list or tuple of feature maps, finest first, got {type(x).__name__}")
    if len(features) != len(inner):
        raise ValueError(f"x: expected {len(inner)} feature maps (one per level), got {len(features)}")
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return names, features  # sizes are tensors here, and a check of them would warn
    for level, (key, feature, block) in enumerate(zip(keys, features, inner, strict=True)):
        _check_feature(level, key, feature, block)
    return names, features


def _check_feature(level: int, key: Any, feature: Any, block: nn.Module) -> None:
    if not isinstance(feature, Tensor):
        if isinstance(feature, torch.fx.Proxy):
            return  # a symbolic trace knows neither type nor shape
        raise TypeError(f"x[{key!r}]: expected a Tensor for level {level}, got {type(feature).__name__}")
    if feature.dim() != 4:
        raise ValueError(f"x[{key!r}]: expected a map [N, C, H, W] for level {level}, got shape {tuple(feature.shape)}")
    convolution = next(iter(block), block) if isinstance(block, nn.Sequential) else block
    if isinstance(convolution, nn.Conv2d) and feature.shape[1] != convolution.in_channels:
        raise ValueError(
            f"x[{key!r}]: expected {convolution.in_channels} channels for level {level},"
            f" got {feature.shape[1]} (shape {tuple(feature.shape)})"
        )


def _convolution(
    in_channels: int, out_channels: int, kernel_size: int, norm_layer: Callable[..., nn.Module] | None
) -> nn.Sequential:
    """torchvision's Conv2dNormActivation without the activation: convolution at .0, norm at .1."""
    block = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=norm_layer is None)
    )
    if norm_layer is not None:
        norm = norm_layer(out_channels)
        if not isinstance(norm, nn.Module):
            raise TypeError(f"norm_layer: expected it to return a Module, got {type(norm).__name__}")
        block.append(norm)
    return block


def _check_channels(in_channels_list: Any, out_channels: Any) -> list[int]:
    if isinstance(in_channels_list, (str, bytes)) or not hasattr(in_channels_list, "__iter__"):
        raise TypeError(f"in_channels_list: expected a sequence of integers, got {type(in_channels_list).__name__}")
    channels = list(in_channels_list)
    if not channels:
        raise ValueError("in_channels_list: expected at least one level, got none")
    for level, in_channels in enumerate(channels):
        if in_channels == 0:  # torchvision's words
            raise ValueError(f"in_channels_list[{level}]: in_channels=0 is currently not supported")
        check_integer(f"in_channels_list[{level}]", in_channels)
    check_integer("out_channels", out_channels)
    return channels


def check_integer(argument: str, value: Any, low: int = 1, high: int | None = None) -> None:
    """Raise TypeError unless `value` is an integer, ValueError unless it is from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument}: expected an integer, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{argument}: expected {bounds}, got {value}")


def check_norm_layer(norm_layer: Any) -> None:
    """Raise TypeError unless `norm_layer` is a callable other than a module."""
    if isinstance(norm_layer, nn.Module) or not callable(norm_layer):
        raise TypeError(
            f"norm_layer: expected a callable (number of channels to norm), got {type(norm_layer).__name__}"
        )


def _check_options(extra_blocks: Any, norm_layer: Any, mode: Any, fuse_type: Any) -> None:
    # Also torchvision's blocks, which derive from another class of the same name.
    if extra_blocks is not None and not (
        isinstance(extra_blocks, nn.Module)
        and any(cls.__name__ == "ExtraFPNBlock" for cls in type(extra_blocks).__mro__)
    ):
        raise TypeError(f"extra_blocks: expected an ExtraFPNBlock or None, got {type(extra_blocks).__name__}")
    if norm_layer is not None:
        check_norm_layer(norm_layer)
    for argument, value, choices in (("mode", mode, MODES), ("fuse_type", fuse_type, tuple(GAINS))):
        if not isinstance(value, str):
            raise TypeError(f"{argument}: expected one of {choices}, got {type(value).__name__}")
        if value not in choices:
            raise ValueError(f"{argument}: expected one of {choices}, got {value!r}")
