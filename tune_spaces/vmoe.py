"""V-MoE: experts, experts per token, placement, router, capacity, strength of the attack, rates."""

from ray import tune

from tune_spaces.space import Space

V_MOE = Space(
    title="V-MoE: experts, experts per token, placement, router, capacity, training attack, rates",
    preset="vmoe_cifar10_small",
    keys={
        "backbone.num_experts": tune.choice([2, 4, 8, 16]),
        "backbone.top_k": tune.choice([1, 2]),
        "backbone.placement": tune.choice(["every_2", "last_1", "last_2", "every_1"]),
        "backbone.router": tune.choice(["top_k", "expert_choice", "soft"]),
        "backbone.capacity": tune.choice([0.0, 1.05, 1.5]),
        "algorithm.attack.eps": tune.uniform(4 / 255, 12 / 255),
        "algorithm.attack.steps": tune.choice([1, 2, 3]),
        "lr": tune.loguniform(3e-4, 3e-3),
        "router_lr": tune.loguniform(1e-4, 3e-3),
    },
)
