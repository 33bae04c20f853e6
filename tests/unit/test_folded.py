"""Normalisation within the convolution: the same values, gradients and names."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2

from sbir_ray.models.backbone import load_backbone
from sbir_ray.models.folded import FoldedSequential, fold


def plain():
    """Layers of every kind that is folded and of some that are not, with odd statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        nn.Sequential(nn.Conv2d(8, 8, 3, 1, 2, dilation=2, groups=8), nn.BatchNorm2d(8)),
        nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)),
        nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)),
    ).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                tensor.data.uniform_(0.5, 1.5)
    return net


def stored(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


def values(net, x):
    """Of the output and of all gradients."""
    x = x.clone().requires_grad_()
    out = net(x)
    torch.autograd.backward(out.pow(2).sum())
    return [out, x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("frozen", [True, False])
def test_values_and_gradients_are_those_of_the_layers_one_by_one(frozen):
    one = plain().train()
    two = fold(copy.deepcopy(one))
    if frozen:
        one, two = stored(one), stored(two)
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    for a, b in zip(values(one, x), values(two, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(one.buffers(), two.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_only_sequences_whose_normalisations_follow_convolutions_are_folded():
    net = plain()
    names = list(net.state_dict())
    folded = fold(net)
    assert [type(part) is FoldedSequential for part in folded] == [True, True, True, False]
    assert list(folded.state_dict()) == names
    assert folded.train()[0][1].training
    assert not folded.eval()[0][1].training


def test_the_backbones_tensors_keep_their_names_and_all_its_normalisations_are_folded():
    backbone = load_backbone("mobilenetv2", "none")
    assert list(backbone.body.state_dict()) == list(mobilenet_v2().features[:14].state_dict())
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    folded = [module for module in backbone.modules() if isinstance(module, FoldedSequential)]
    assert sum(isinstance(part, nn.BatchNorm2d) for one in folded for part in one) == norms > 30
