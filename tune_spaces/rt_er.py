"""RT-ER (arXiv:2502.06832): which experts are robustified, how strongly, and the rates."""

from ray import tune

from tune_spaces.space import Space

RT_ER = Space(
    title="RT-ER: experts that are robustified, weight of the KL, training attack, rate",
    preset="rt_er_cifar10_small",
    keys={
        "algorithm.robustify": tune.choice(["second", "all", "none"]),
        "algorithm.beta": tune.loguniform(1.0, 12.0),
        "algorithm.attack.eps": tune.uniform(4 / 255, 12 / 255),
        "lr": tune.loguniform(0.01, 0.3),
    },
)
