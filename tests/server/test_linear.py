"""Linear layers by oneDNN: PyTorch's results, for all inputs and layers of the stages."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import audioldm2_triton.server.linear
from audioldm2_triton.server.linear import Linear, linear, replace_linear_layers


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audioldm2_triton.server.linear, "WORTHWHILE", 0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


INPUTS = {
    "one row": random(1, 48),
    "no row": random(0, 48),
    "batch": random(2, 5, 48),
    "image": random(2, 5, 3, 48),
    "channels first": random(2, 48, 5, 3).permute(0, 2, 3, 1),
    "part": random(2, 9, 96)[:, 2:7, 48:],
    "double": random(3, 48, dtype=torch.float64),
}


@torch.inference_mode()
@pytest.mark.parametrize("bias", [None, random(32)], ids=["plain", "bias"])
@pytest.mark.parametrize("hidden", INPUTS.values(), ids=INPUTS)
def test_results_are_pytorchs(hidden: Tensor, bias: Tensor | None) -> None:
    weight = random(32, 48).to(hidden.dtype)
    own_bias = None if bias is None else bias.to(hidden.dtype)
    for own_weight in (weight, weight.t().contiguous().t()):
        output = linear(hidden, own_weight, own_bias)
        torch.testing.assert_close(output, functional.linear(hidden, weight, own_bias), atol=2e-5, rtol=0)


def test_onednn_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def product(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return functional.linear(*arguments[:3])

    monkeypatch.setattr(audioldm2_triton.server.linear, "PRODUCT", product)
    with torch.inference_mode():
        linear(random(2, 48), random(32, 48))
        assert len(calls) == 1
        linear(random(2, 48).bfloat16(), random(32, 48).bfloat16())
        monkeypatch.setattr(audioldm2_triton.server.linear, "WORTHWHILE", 2 * 48 * 32 + 1)
        linear(random(2, 48), random(32, 48))
    assert len(calls) == 1


def test_gradients_stay() -> None:
    layer = nn.Linear(48, 32)
    Linear(layer)(random(2, 48)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, random(2, 48).sum(0).expand(32, -1))


def test_compiled_code_is_free_to_choose() -> None:
    with torch.inference_mode():
        compiled = torch.compile(linear, backend="eager", fullgraph=True)
        assert torch.equal(compiled(random(2, 48), random(32, 48)), functional.linear(random(2, 48), random(32, 48)))


def test_layers_are_replaced_with_their_parameters() -> None:
    network = nn.Sequential(nn.Linear(48, 24), nn.ModuleDict({"inner": Conv1D(16, 24)}), nn.LayerNorm(16))
    first, inner = network[0], network[1]["inner"]  # type: ignore[index]
    hidden = random(3, 48)
    expected = inner(first(hidden))
    parameters = dict(network.named_parameters())
    replace_linear_layers(network)
    assert [type(layer) for layer in (network[0], network[1]["inner"])] == [Linear, Linear]  # type: ignore[index]
    replaced = dict(network.named_parameters())
    assert replaced.keys() == parameters.keys()
    assert all(replaced[name] is parameter for name, parameter in parameters.items())
    with torch.inference_mode():
        output = network[1]["inner"](network[0](hidden))  # type: ignore[index]
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
