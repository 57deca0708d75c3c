"""AdvMoE from a dense pathway: stages and their rates, homes, forced routes, width, attack."""

from ray import tune

from tune_spaces.space import Space

UPCYCLED = Space(
    title="Upcycled AdvMoE: stages, homes, forced routes, width, training attack, rates",
    preset="upcycled_adv_moe_cifar10_small",
    keys={
        "algorithm.dense_share": tune.uniform(0.3, 0.9),
        "algorithm.mixture_rate": tune.loguniform(0.05, 1.0),
        "algorithm.homes": tune.choice(["mod", "superclass"]),
        "algorithm.forced_routes": tune.choice([0.0, 0.25, 0.5]),
        "backbone.ratio": tune.choice([0.375, 0.5, 0.75]),
        "algorithm.attack.steps": tune.choice([1, 2, 3]),
        "algorithm.beta": tune.loguniform(3.0, 12.0),
        "lr": tune.loguniform(0.03, 0.3),
        "router_lr": tune.loguniform(0.003, 0.1),
    },
)
