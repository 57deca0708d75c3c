"""Random numbers follow from the seed and the place, and from nothing else."""

import pytest
import torch
from torch import Tensor

from pipeline.seeding import ImageNoise, Noise, generator_at, seed_of


@pytest.mark.parametrize("kind", ["uniform", "normal"])
@pytest.mark.parametrize("world", [2, 3])
def test_parts_of_the_workers_join_to_what_one_worker_draws(kind: str, world: int) -> None:
    x_BCHW = torch.zeros(6, 3, 4, 4)
    alone = Noise(generator_at("cpu", 5))
    parts = [Noise(generator_at("cpu", 5), rank, world) for rank in range(world)]
    for _ in range(2):  # the second draw too
        whole, shares = getattr(alone, kind)(x_BCHW), x_BCHW.chunk(world)
        joined = torch.cat(
            [getattr(part, kind)(x_bCHW) for part, x_bCHW in zip(parts, shares, strict=True)]
        )
        assert torch.equal(joined, whole)


def test_two_draws_of_a_training_batch_differ() -> None:
    noise = Noise(generator_at("cpu", 5))
    x_BCHW = torch.zeros(2, 3, 4, 4)
    assert not torch.equal(noise.uniform(x_BCHW), noise.uniform(x_BCHW))


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_noise_of_an_image_depends_on_its_index_alone(kind: str) -> None:
    def drawn(*index: int) -> Tensor:
        noise = ImageNoise(3, torch.tensor(index))
        draws: Tensor = getattr(noise, kind)(torch.zeros(len(index), 3, 4, 4))
        return draws

    whole = drawn(*range(10))
    assert torch.equal(drawn(7, 2, 9), whole[[7, 2, 9]]), "another batch and order"
    assert torch.equal(torch.cat([drawn(0, 2, 4), drawn(1, 3)]), whole[[0, 2, 4, 1, 3]]), "shards"
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 10, "each image its own"


def test_repeated_draws_for_an_image_differ_and_do_not_depend_on_the_batch() -> None:
    """Without this, the restarts of an evaluation would all begin at the same place."""
    few, many = ImageNoise(3, torch.tensor([4])), ImageNoise(3, torch.arange(6))
    first, second = (few.uniform(torch.zeros(1, 3, 4, 4)) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first[0], many.uniform(torch.zeros(6, 3, 4, 4))[4])
    assert torch.equal(second[0], many.uniform(torch.zeros(6, 3, 4, 4))[4])


def test_evaluation_with_another_seed_starts_elsewhere() -> None:
    x_BCHW, index_B = torch.zeros(2, 3, 4, 4), torch.arange(2)
    assert not torch.equal(
        ImageNoise(0, index_B).uniform(x_BCHW), ImageNoise(1, index_B).uniform(x_BCHW)
    )


@pytest.mark.parametrize("world", [1, 2])
def test_uniform_numbers_fill_their_range_evenly(world: int) -> None:
    x_BCHW = torch.zeros(100, 3, 8, 8)
    for source in (Noise(generator_at("cpu", 1), 0, world), ImageNoise(1, torch.arange(100))):
        numbers = source.uniform(x_BCHW)
        assert numbers.min() >= -1
        assert numbers.max() < 1
        assert numbers.mean().abs() < 0.02
        assert abs(numbers.var().item() - 1 / 3) < 0.01
        assert numbers.shape == x_BCHW.shape


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before, x_BCHW = torch.get_rng_state(), torch.zeros(2, 3, 4, 4)
    Noise(generator_at("cpu", 1)).normal(x_BCHW)
    ImageNoise(1, torch.arange(2)).normal(x_BCHW)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_of_different_places_differ() -> None:
    places = [(0, "update", epoch, step) for epoch in range(30) for step in range(30)]
    places += [(1, "update", 0, 0), (0, "validation"), (0, 0), (0, "0"), ("00",)]
    seeds = {seed_of(*place) for place in places}
    assert len(seeds) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seed_of_a_place_never_changes() -> None:
    assert seed_of(0, "update", 1, 2) == 3306798604001544476
