"""One thing at a time, all else as in the preset: each a table by one command.

The values are ours; those of beta are the ones that arXiv:2502.06832 sweeps.
"""

from ray import tune

from tune_spaces.adv_moe import PRESET
from tune_spaces.space import Space

EXPERTS = Space(
    title="number of experts, all as wide: parameters grow, the cost of a route does not",
    preset=PRESET,
    keys={"backbone.num_experts": tune.grid_search([2, 3, 4, 6])},
)
RATIO = Space(
    title="width of an expert over the dense net's",
    preset=PRESET,
    keys={"backbone.ratio": tune.grid_search([0.25, 0.5, 0.75, 1.0])},
)
ATTACK = Space(
    title="radius and steps of the attack in training; the threat that judges stays",
    preset=PRESET,
    keys={
        "algorithm.attack.eps": tune.grid_search([4 / 255, 8 / 255, 12 / 255]),
        "algorithm.attack.steps": tune.grid_search([1, 2, 4]),
    },
)
BETA = Space(
    title="weight of stability against accuracy",
    preset=PRESET,
    keys={"algorithm.beta": tune.grid_search([1.0, 3.0, 6.0, 9.0])},
)
