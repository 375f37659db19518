"""Instance norm by group norm against the definition and against PyTorch's own."""

import pytest
import torch
from conftest import make_trainer
from support.tiny import write_plans
from torch import nn

from nnunet_uda.networks.instance_norm import FASTER, InstanceNorm2d, instance_norm, use_fast_instance_norm

SHAPES = [(3, 5, 7, 6), (1, 2, 1, 2), (2, 4, 3, 5, 6)]


def by_definition(x, weight, bias, eps):
    result = torch.empty_like(x)
    for sample in range(x.shape[0]):
        for channel in range(x.shape[1]):
            values = x[sample, channel]
            normed = (values - values.mean()) / torch.sqrt(((values - values.mean()) ** 2).mean() + eps)
            result[sample, channel] = normed * weight[channel] + bias[channel]
    return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_the_definition_s(shape, layout):
    if layout == torch.channels_last and len(shape) == 5:
        layout = torch.channels_last_3d
    torch.manual_seed(0)
    found, expected = [], []
    x, weight, bias = 3 + 2 * torch.randn(shape), torch.randn(shape[1]), torch.randn(shape[1])
    direction = torch.randn(shape)
    for function, results in ((instance_norm, found), (by_definition, expected)):
        inputs = [x.clone(memory_format=layout).requires_grad_(), weight.clone().requires_grad_()]
        inputs.append(bias.clone().requires_grad_())
        value = function(*inputs, 1e-3)
        results += [value, *torch.autograd.grad((value * direction).sum(), inputs)]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=2e-5), (one - other).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_weights_it_is_pytorch_s_in_every_precision(dtype):
    x = torch.randn(2, 3, 8, 8).to(dtype)
    assert torch.allclose(instance_norm(x), nn.functional.instance_norm(x), atol=1e-5)


@pytest.mark.parametrize("old", FASTER, ids=lambda kind: kind.__name__)
def test_modules_become_faster_and_keep_their_weights(old):
    dimension = 2 if old is nn.InstanceNorm2d else 3
    torch.manual_seed(0)
    norm = old(4, eps=0.1, affine=True)
    nn.init.normal_(norm.weight)
    network = nn.Sequential(nn.Sequential(norm), old(4), old(4, track_running_stats=True), nn.ReLU())
    x = torch.randn(2, 4, *(5,) * dimension)
    before, state = network(x), {key: value.clone() for key, value in network.state_dict().items()}
    assert use_fast_instance_norm(network) is network
    assert [type(module) for module in (network[0][0], network[1], network[2])] == [FASTER[old], FASTER[old], old]
    assert isinstance(network[0][0], old)
    network[2].load_state_dict({key[2:]: value for key, value in state.items() if key.startswith("2.")})
    after = network(x)
    assert torch.allclose(before, after, atol=1e-5)
    assert list(network.state_dict()) == list(state)


def test_one_position_and_a_wrong_dimension_are_refused_as_pytorch_does():
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        instance_norm(torch.ones(2, 3, 1, 1))
    with pytest.raises(ValueError, match="expected 3D or 4D input"):
        InstanceNorm2d(3)(torch.ones(2, 3, 4, 4, 4))


def test_a_sample_without_batch_axis():
    x = torch.randn(3, 4, 5)
    assert torch.allclose(InstanceNorm2d(3)(x), nn.InstanceNorm2d(3)(x), atol=1e-6)


@pytest.mark.parametrize("name", ["CISFATrainer", "SimilarityPrototypesTrainer", "UUDSTrainer", "ADVENTTrainer"])
def test_trainers_train_and_predict_with_the_faster_ones(name, in_workspace):
    write_plans(in_workspace, "uuds")
    trainer = make_trainer(name, "uuds" if name == "UUDSTrainer" else "tiny", num_epochs=1)
    trainer.initialize()
    for_prediction = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, trainer.label_manager.num_segmentation_heads, False
    )
    assert list(for_prediction.state_dict()) == list(trainer.network.state_dict())
    for network in (trainer.network, trainer.networks, for_prediction):
        assert not [module for module in network.modules() if type(module) in FASTER]
    for network in (trainer.network, for_prediction):
        assert [module for module in network.modules() if type(module) in FASTER.values()]
