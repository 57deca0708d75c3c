"""JTDMoE (arXiv:2502.06832): the share of the robust model, and how it is made robust."""

from ray import tune

from tune_spaces.space import Space

JTDMOE = Space(
    title="JTDMoE: share alpha of the robust model, experts that are robustified, weight, rate",
    preset="jtdmoe_cifar10_small",
    keys={
        "backbone.alpha": tune.uniform(0.5, 0.95),
        "algorithm.robustify": tune.choice(["second", "all"]),
        "algorithm.beta": tune.loguniform(1.0, 12.0),
        "lr": tune.loguniform(0.01, 0.3),
    },
)
