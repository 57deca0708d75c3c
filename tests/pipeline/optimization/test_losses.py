"""Losses against torch.distributions, sums written out, and logits of any size."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from pipeline.optimization.losses import (
    cross_entropy_per_image,
    dlr_per_image,
    dlr_targeted_per_image,
    dominant,
    kl,
    kl_per_image,
    margin_per_image,
)


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_kl_is_that_of_torch_distributions() -> None:
    p_BK, q_BK = logits(50, 7), logits(50, 7, seed=1)
    wanted_B = kl_divergence(Categorical(logits=p_BK), Categorical(logits=q_BK))
    torch.testing.assert_close(kl_per_image(p_BK, q_BK), wanted_B, rtol=0, atol=1e-12)
    torch.testing.assert_close(kl(p_BK, q_BK), wanted_B.mean(), rtol=0, atol=1e-12)


def test_kl_measures_the_second_argument_from_the_first() -> None:
    half, tenth = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.1, 0.9]]).log()
    wanted = 0.5 * math.log(5) + 0.5 * math.log(5 / 9)
    assert kl(half, tenth).item() == pytest.approx(wanted, rel=1e-6)
    assert kl(tenth, half).item() != pytest.approx(wanted, rel=1e-2)


def test_kl_of_several_layers_is_their_mean() -> None:
    p_BLE, q_BLE = logits(6, 4, 3), logits(6, 4, 3, seed=1)
    layers = [kl_per_image(p_BLE[:, layer], q_BLE[:, layer]) for layer in range(4)]
    torch.testing.assert_close(kl_per_image(p_BLE, q_BLE), sum(layers) / 4, rtol=0, atol=1e-12)


def test_kl_of_a_dense_net_without_scores_is_zero() -> None:
    assert torch.equal(kl_per_image(torch.zeros(5, 1), torch.zeros(5, 1)), torch.zeros(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kl_and_its_gradient_stay_finite_where_probabilities_underflow(dtype: torch.dtype) -> None:
    p_BK = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    q_BK = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    p_BK.requires_grad_()
    per_image_B = kl_per_image(p_BK, q_BK)
    per_image_B.sum().backward()
    assert per_image_B.isfinite().all()
    assert per_image_B[0].item() == pytest.approx(2e4, rel=1e-2)
    assert p_BK.grad is not None
    assert q_BK.grad is not None
    assert p_BK.grad.isfinite().all()
    assert q_BK.grad.isfinite().all()
    assert q_BK.grad.abs().max() > 0


def test_gradient_of_kl_is_right_in_both_arguments() -> None:
    p_BK, q_BK = logits(3, 4).requires_grad_(), logits(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(kl_per_image, (p_BK, q_BK))


def test_cross_entropy_is_the_log_probability_of_the_label() -> None:
    z_BK, y_B = logits(20, 5), torch.arange(20) % 5
    wanted_B = -Categorical(logits=z_BK).log_prob(y_B)
    torch.testing.assert_close(cross_entropy_per_image(z_BK, y_B), wanted_B, rtol=0, atol=1e-12)


def test_cross_entropy_of_several_layers_is_their_mean() -> None:
    z_BLE, y_B = logits(6, 4, 3), torch.arange(6) % 3
    layers = [cross_entropy_per_image(z_BLE[:, layer], y_B) for layer in range(4)]
    found_B = cross_entropy_per_image(z_BLE, y_B)
    torch.testing.assert_close(found_B, sum(layers) / 4, rtol=0, atol=1e-12)


def test_cross_entropy_of_several_layers_takes_a_target_for_each() -> None:
    z_BLE = logits(6, 4, 3)
    route_BL = torch.arange(24).view(6, 4) % 3
    layers = [cross_entropy_per_image(z_BLE[:, n], route_BL[:, n]) for n in range(4)]
    found_B = cross_entropy_per_image(z_BLE, route_BL)
    torch.testing.assert_close(found_B, sum(layers) / 4, rtol=0, atol=1e-12)


def test_margin_is_the_best_wrong_logit_less_the_right_one() -> None:
    z_BK = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [-5.0, -4.0, -9.0]])
    assert margin_per_image(z_BK, torch.tensor([0, 2, 0])).tolist() == [-1.0, 1.0, 1.0]


def test_margin_is_positive_exactly_where_the_argmax_is_wrong() -> None:
    z_BK, y_B = logits(200, 5), torch.arange(200) % 5
    assert torch.equal(margin_per_image(z_BK, y_B) > 0, z_BK.argmax(1) != y_B)


def test_margin_has_a_gradient_to_two_logits_alone() -> None:
    z_BK = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    margin_per_image(z_BK, torch.tensor([0])).sum().backward()
    assert z_BK.grad is not None
    assert z_BK.grad.tolist() == [[-1.0, 0.0, 1.0]]


# Labels that are smoothed, and labels of mixed images


def test_smoothed_cross_entropy_is_that_of_torch_and_of_the_smoothed_labels() -> None:
    z_BK, y_B = logits(20, 5), torch.arange(20) % 5
    found_B = cross_entropy_per_image(z_BK, y_B, 0.2)
    torch_s = torch.nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none")(z_BK, y_B)
    assert torch.equal(found_B, torch_s)
    labels_BK = torch.full((20, 5), 0.2 / 5, dtype=torch.float64)
    labels_BK[torch.arange(20), y_B] += 0.8
    wanted_B = -(labels_BK * z_BK.log_softmax(1)).sum(1)
    torch.testing.assert_close(found_B, wanted_B, rtol=0, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_of_shares_is_the_mean_over_the_classes_by_share(smoothing: float) -> None:
    z_BK, one_B, other_B = logits(20, 5), torch.arange(20) % 5, torch.arange(20) % 3
    share_B = torch.arange(20) / 32
    shares_BK = torch.zeros(20, 5)
    shares_BK[torch.arange(20), one_B] += 1 - share_B
    shares_BK[torch.arange(20), other_B] += share_B
    each_B = [cross_entropy_per_image(z_BK, y_B, smoothing) for y_B in (one_B, other_B)]
    wanted_B = (1 - share_B) * each_B[0] + share_B * each_B[1]
    found_B = cross_entropy_per_image(z_BK, shares_BK, smoothing)
    torch.testing.assert_close(found_B, wanted_B, rtol=0, atol=1e-12)


def test_shares_keep_their_digits_beside_logits_of_few() -> None:
    z_BK, shares_BK = torch.zeros(1, 4, dtype=torch.bfloat16), torch.tensor([[0.501, 0.499, 0, 0]])
    z_BK[0, 0] = 1000
    assert cross_entropy_per_image(z_BK, shares_BK).item() == pytest.approx(499, rel=1e-6)


def test_dominant_class_is_the_one_of_the_largest_share() -> None:
    shares_BK = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    assert dominant(shares_BK).tolist() == [2, 1, 0]
    y_B = torch.tensor([3, 1])
    assert torch.equal(dominant(y_B), y_B)


def ratio_written_out(z: list[float], y: int) -> float:
    first, second, third = sorted(z, reverse=True)[:3]
    return -(z[y] - (second if z[y] == first else first)) / (first - third)


def test_ratio_is_its_definition_written_out() -> None:
    z_BK, y_B = logits(40, 6), torch.arange(40) % 6
    wanted = [ratio_written_out(z, y) for z, y in zip(z_BK.tolist(), y_B.tolist(), strict=True)]
    found_B = dlr_per_image(z_BK, y_B)
    assert found_B.tolist() == pytest.approx(wanted, abs=1e-9)
    assert torch.equal(found_B > 0, z_BK.argmax(1) != y_B)


def test_targeted_ratio_is_its_definition_written_out() -> None:
    z_BK, y_B, target_B = logits(40, 6), torch.arange(40) % 6, (torch.arange(40) + 2) % 6
    top_BK = z_BK.sort(1, descending=True).values
    for row, (y, t) in enumerate(zip(y_B.tolist(), target_B.tolist(), strict=True)):
        own, other, top = z_BK[row, y], z_BK[row, t], top_BK[row]
        wanted = -(own - other) / (top[0] - (top[2] + top[3]) / 2)
        found = dlr_targeted_per_image(z_BK, y_B, target_B)[row]
        assert found.item() == pytest.approx(wanted.item(), abs=1e-9)


def test_ratios_do_not_change_with_scale_and_shift_of_the_logits() -> None:
    z_BK, y_B = logits(30, 5), torch.arange(30) % 5
    target_B = (y_B + 1) % 5
    for moved_BK in (1000 * z_BK, z_BK + 50, 0.01 * z_BK - 3):
        for loss in (dlr_per_image, lambda z, y: dlr_targeted_per_image(z, y, target_B)):
            torch.testing.assert_close(loss(moved_BK, y_B), loss(z_BK, y_B), rtol=1e-6, atol=1e-8)


def test_ratio_of_two_classes_is_the_margin() -> None:
    z_BK, y_B = logits(20, 2), torch.arange(20) % 2
    assert torch.equal(dlr_per_image(z_BK, y_B), margin_per_image(z_BK, y_B))


@pytest.mark.parametrize("classes", [2, 3])
def test_targeted_ratio_of_few_classes_is_the_difference_and_never_flat(classes: int) -> None:
    z_BK, y_B = logits(20, classes).requires_grad_(), torch.arange(20) % classes
    target_B, rows_B = (y_B + 1) % classes, torch.arange(20)
    lead_B = dlr_targeted_per_image(z_BK, y_B, target_B)
    torch.testing.assert_close(lead_B, z_BK[rows_B, target_B] - z_BK[rows_B, y_B])
    (gradient_BK,) = torch.autograd.grad(lead_B.sum(), z_BK)
    assert gradient_BK.any(1).all()


def test_ratios_of_equal_logits_are_finite() -> None:
    z_BK, y_B = torch.zeros(2, 5, requires_grad=True), torch.tensor([0, 4])
    both_B = dlr_per_image(z_BK, y_B) + dlr_targeted_per_image(z_BK, y_B, 4 - y_B)
    (gradient,) = torch.autograd.grad(both_B.sum(), z_BK)
    assert both_B.isfinite().all()
    assert gradient.isfinite().all()
