"""Random search on a linear function, whose maximum in the ball is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.attacks.random_search import RandomSearch
from pipeline.seeding import ImageNoise

EPS = 0.1


def slopes() -> Tensor:
    return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))


def inner(count: int) -> Tensor:
    return 0.3 + 0.4 * torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def noise(count: int) -> ImageNoise:
    return ImageNoise(0, torch.arange(count))


@pytest.mark.parametrize(("norm", "share"), [("linf", 0.75), ("l2", 0.6)])
def test_search_climbs_most_of_the_way_without_a_gradient(norm: Any, share: float) -> None:
    w_CHW, x_BCHW = slopes(), inner(8)
    search = RandomSearch(eps=EPS, norm=norm, queries=2000)

    def objective(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return (x * w_CHW).sum((1, 2, 3))

    found = search(objective, x_BCHW, noise(8))
    rise_B = objective_rise(found, x_BCHW, w_CHW)
    most = EPS * (w_CHW.abs().sum() if norm == "linf" else w_CHW.norm())
    assert (rise_B > share * most).all(), rise_B / most
    assert (rise_B <= 1.0001 * most).all()
    step_BD = (found - x_BCHW).flatten(1)
    far_B = step_BD.abs().amax(1) if norm == "linf" else step_BD.norm(dim=1)
    assert (far_B <= EPS + 1e-6).all()


def objective_rise(found: Tensor, x_BCHW: Tensor, w_CHW: Tensor) -> Tensor:
    return ((found - x_BCHW) * w_CHW).sum((1, 2, 3))


def test_more_queries_climb_higher_and_one_is_the_start() -> None:
    w_CHW, x_BCHW = slopes(), inner(4)
    rises = [
        objective_rise(
            RandomSearch(eps=EPS, queries=count)(
                lambda x: (x * w_CHW).sum((1, 2, 3)), x_BCHW, noise(4)
            ),
            x_BCHW,
            w_CHW,
        ).mean()
        for count in (1, 10, 100, 1000)
    ]
    assert rises == sorted(rises)
    assert rises[0] < rises[-1]


def test_image_is_searched_alike_alone_and_in_a_batch() -> None:
    w_CHW, x_BCHW = slopes(), inner(5)
    search = RandomSearch(eps=EPS, queries=50)
    whole = search(lambda x: (x * w_CHW).sum((1, 2, 3)), x_BCHW, noise(5))
    one = ImageNoise(0, torch.tensor([3]))
    alone = search(lambda x: (x * w_CHW).sum((1, 2, 3)), x_BCHW[3:4], one)
    torch.testing.assert_close(alone, whole[3:4], rtol=0, atol=0)


def test_images_stay_in_range_and_a_radius_of_zero_moves_nothing() -> None:
    x_BCHW = torch.rand(3, 3, 8, 8)
    found = RandomSearch(eps=0.9, queries=5)(lambda x: x.sum((1, 2, 3)), x_BCHW, noise(3))
    assert found.min() >= 0
    assert found.max() <= 1
    same = RandomSearch(eps=0.0, queries=5)(lambda x: x.sum((1, 2, 3)), x_BCHW, noise(3))
    assert torch.equal(same, x_BCHW)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        RandomSearch(queries=0)
    with pytest.raises(ValueError, match="share must be above 0 and at most 1, got 0"):
        RandomSearch(share=0.0)
