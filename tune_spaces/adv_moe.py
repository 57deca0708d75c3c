"""AdvMoE: form of the mixture, router's loss, strength of the attack it is trained with, rates."""

from ray import tune

from tune_spaces.space import Space

PRESET = "adv_moe_cifar10_small"

ADV_MOE = Space(
    title="AdvMoE: experts, width, router, training attack, weights of the losses, rates",
    preset=PRESET,
    keys={
        "backbone.ratio": tune.choice([0.25, 0.375, 0.5, 0.75]),
        "backbone.num_experts": tune.choice([2, 3, 4]),
        "backbone.router_scope": tune.choice(["shared", "per_layer"]),
        "algorithm.router_loss": tune.choice(["pseudo_label", "trades"]),
        "algorithm.attack.eps": tune.uniform(4 / 255, 12 / 255),
        "algorithm.attack.steps": tune.choice([1, 2, 3]),
        "algorithm.attack.step_size": tune.uniform(2 / 255, 8 / 255),
        "algorithm.alpha": tune.loguniform(1.0, 12.0),
        "algorithm.beta": tune.loguniform(1.0, 12.0),
        "lr": tune.loguniform(0.03, 0.3),
        "router_lr": tune.loguniform(0.003, 0.1),
    },
)
