"""A config is data: changed by dotted keys, written flat, read back, hashed."""

import dataclasses
import itertools
import json
from typing import Any

import pytest

from moe.backbones import BACKBONES
from moe.backbones.dual import DualNetworks
from moe.backbones.lipschitz import Lipschitz
from moe.backbones.mixture import NetworkMixture
from moe.backbones.small import Small
from moe.backbones.vit import ViT
from pipeline.algorithms import ALGORITHMS
from pipeline.algorithms.adv_moe import AdvMoE
from pipeline.algorithms.jtdmoe import JTDMoE
from pipeline.algorithms.moe_at import MoEAT
from pipeline.algorithms.sparse import Sparse
from pipeline.algorithms.standard import Standard
from pipeline.algorithms.trades import Trades
from pipeline.attacks import ATTACKS
from pipeline.attacks.pgd import PGD
from pipeline.config import ELSEWHERE, Config, read
from pipeline.config.overrides import REGISTRIES, flatten, override
from pipeline.data import DATASETS
from pipeline.data.cifar import Cifar10
from pipeline.data.synthetic import Synthetic
from pipeline.measures import Evaluation

OTHER: dict[str, Any] = {  # a valid value that is not the default, for every key
    "dataset": "synthetic",
    "dataset.path": "elsewhere",
    "dataset.train_images": 100,
    "dataset.test_images": 50,
    "dataset.validation": 0.2,
    "dataset.pad": 1,
    "dataset.flip": True,
    "backbone": "resnet18",
    "backbone.num_experts": 3,
    "backbone.ratio": 0.25,
    "backbone.router_scope": "per_layer",
    "backbone.activation": "silu",
    "algorithm": "trades",
    "algorithm.beta": 3.0,
    "algorithm.alpha": 2.0,
    "algorithm.router_loss": "pseudo_label",
    "algorithm.minibatches": "two",
    "algorithm.homes": "superclass",
    "algorithm.forced_routes": 0.5,
    "algorithm.aim": "ce",
    "algorithm.attack.eps": 0.01,
    "algorithm.attack.step_size": 0.01,
    "algorithm.attack.steps": 3,
    "algorithm.attack.norm": "l2",
    "algorithm.attack.start": "clean",
    "algorithm.attack.restarts": 2,
    "evaluation.eps": 0.01,
    "evaluation.step_size": 0.01,
    "evaluation.norm": "l2",
    "evaluation.steps": 20,
    "evaluation.restarts": 2,
    "evaluation.validation_steps": 5,
    "epochs": 7,
    "batch_size": 64,
    "workers": 2,
    "precision": "bf16",
    "optimizer": "adam",
    "momentum": 0.8,
    "weight_decay": 1e-4,
    "lr": 0.05,
    "router_lr": 0.01,
    "schedule": "cyclic",
    "router_schedule": "constant",
    "warmup_epochs": 0.5,
    "ema_decay": 0.99,
    "awp_gamma": 0.01,
    "awp_warmup": 1.5,
    "label_smoothing": 0.1,
    "clip_norm": 1.0,
    "norm_bound": 2.5,
    "augmentation": "randaugment",
    "cutmix": 0.5,
    "seed": 1,
    "upcycle": "runs/dense",
    "upcycle_sha256": "ab" * 32,
    "checkpoint_steps": 10,
    "storage": "elsewhere",
    "tracking_uri": "sqlite:///other.db",
    "experiment": "other",
    "name": "other",
}


def test_dotted_keys_reach_every_depth() -> None:
    config = override(
        Config(), {"epochs": 3, "backbone.num_experts": 4, "algorithm.attack.eps": 0.5}
    )
    assert config.epochs == 3
    assert config.backbone == Small(num_experts=4)
    assert config.algorithm == AdvMoE(attack=dataclasses.replace(AdvMoE().attack, eps=0.5))
    assert config.dataset == Config().dataset


def test_override_leaves_its_argument_alone() -> None:
    config = Config()
    override(config, {"epochs": 3, "algorithm.attack.eps": 0.5})
    assert config == Config()


def test_no_changes_change_nothing() -> None:
    assert override(Config(), {}) == Config()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lr", "8/255", 8 / 255),
        ("lr", "1e-3", 1e-3),
        ("lr", 1, 1.0),
        ("algorithm.attack.eps", "8/255", 8 / 255),
        ("evaluation.eps", " 4 / 255 ", 4 / 255),
        ("epochs", "12", 12),
        ("epochs", 12.0, 12),
        ("router_lr", "none", None),
        ("router_lr", "None", None),
        ("router_lr", None, None),
        ("router_lr", "1/4", 0.25),
        ("dataset.train_images", "none", None),
        ("dataset.train_images", "50", 50),
        ("dataset.flip", "true", True),
        ("dataset.flip", "0", False),
        ("dataset.flip", True, True),
        ("backbone.router_scope", "per_layer", "per_layer"),
        ("name", "7", "7"),
    ],
)
def test_value_is_read_as_the_type_of_its_field(key: str, text: Any, value: Any) -> None:
    found = flatten(override(Config(router_lr=0.3), {key: text}))[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("epoch", "epochs"),
        ("dataset.valid", "dataset.validation"),
        ("algorithm.bet", "algorithm.beta"),
        ("algorithm.attack.epsilon", "algorithm.attack.eps"),
        ("evaluation.eps.x", "evaluation.eps.x"),
        ("attack.eps", "algorithm.attack.eps"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_ones(key: str, known: str) -> None:
    with pytest.raises(ValueError, match=r"^no key ") as caught:
        override(Config(), {key: "1"})
    assert repr(key) in str(caught.value) or repr(key.partition(".")[0]) in str(caught.value)
    assert known in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "valid"),
    [
        ("epochs", "many", "a whole number"),
        ("epochs", "1.5", "a whole number"),
        ("epochs", True, "a whole number"),
        ("epochs", "0", "at least 1"),
        ("lr", "fast", "a number such as 0.1 or 8/255"),
        ("lr", "1/0", "a number such as 0.1 or 8/255"),
        ("lr", "1/2/3", "a number such as 0.1 or 8/255"),
        ("lr", "__import__('os')", "a number such as 0.1 or 8/255"),
        ("lr", "nan", "above 0"),
        ("lr", "inf", "above 0"),
        ("router_lr", "0", "above 0"),
        ("momentum", "1", "below 1"),
        ("dataset.flip", "maybe", "true or false"),
        ("precision", "fp8", "fp32, bf16"),
        ("schedule", "step", "cosine, cyclic, triangular, constant"),
        ("backbone.router_scope", "both", "shared, per_layer"),
        ("backbone.ratio", "1.5", "at most 1"),
        ("algorithm.beta", "-1", "at least 0"),
        ("algorithm.attack.eps", "-1", "at least 0"),
        ("algorithm.attack.eps", "8", "8/255 was probably meant"),
        ("algorithm.attack.step_size", "0", "no image would move"),
        ("algorithm.attack.step_size", "inf", "finite"),
        ("algorithm.attack.steps", "1000000", "from 0 to 10000"),
        ("algorithm.beta", "inf", "finite"),
        ("evaluation.eps", "8", "8/255 was probably meant"),
        ("evaluation.step_size", "0", "no image would move"),
        ("dataset.validation", "0.9", "0.5"),
        ("dataset.pad", "50", "at most 4, half of an image's side"),
        ("name", "a/b", "without /"),
        ("name", "", "without /"),
        ("ema_decay", "1", "at least 0 and below 1"),
        ("ema_decay", "-0.1", "at least 0 and below 1"),
        ("label_smoothing", "nan", "at least 0 and below 1"),
        ("awp_gamma", "-0.01", "at least 0"),
        ("awp_warmup", "inf", "at least 0 and finite"),
        ("clip_norm", "-1.0", "at least 0"),
        ("augmentation", "autoaugment", "none, randaugment"),
        ("cutmix", "1.5", "from 0 to 1"),
        ("workers", "3", "batch_size must be a multiple of workers (3)"),
    ],
)
def test_bad_value_is_refused_with_key_value_and_what_is_valid(
    key: str, value: Any, valid: str
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        override(Config(), {key: value})
    said = str(caught.value)
    assert key in said
    assert valid in said
    assert str(value) in said
    assert "\n" not in said


def test_l2_radius_that_reaches_grey_is_refused_by_the_size_of_the_images() -> None:
    override(Config(), {"evaluation.norm": "l2", "evaluation.eps": "3"})
    with pytest.raises(ValueError, match=r"evaluation.eps must be at most 6\.928 .* 128/255 was"):
        override(Config(), {"evaluation.norm": "l2", "evaluation.eps": "128"})


@pytest.mark.parametrize("registry", ["dataset", "backbone", "algorithm", "algorithm.attack"])
def test_unknown_component_is_refused_with_the_nearest_ones(registry: str) -> None:
    with pytest.raises(ValueError, match=rf"no {registry} 'other'") as caught:
        override(Config(), {registry: "other"})
    shown = str(caught.value).replace("nearest:", "only").partition("only ")[2].split(", ")
    assert 0 < len(shown) <= 3
    assert set(shown) <= set(REGISTRIES[registry.rpartition(".")[2]])


def test_component_cannot_be_set_to_a_plain_value() -> None:
    with pytest.raises(ValueError, match="evaluation has keys of its own"):
        override(Config(), {"evaluation": "strong"})


def test_another_algorithm_keeps_the_settings_that_both_have() -> None:
    attack = PGD(eps=0.3, steps=7)
    config = Config(algorithm=AdvMoE(beta=2.0, alpha=9.0, attack=attack))
    switched = override(config, {"algorithm": "moe_at"})
    assert switched.algorithm == MoEAT(beta=2.0, attack=attack)
    assert override(config, {"algorithm": "standard"}).algorithm == Standard()
    assert override(config, {"algorithm": "adv_moe"}) == config


def test_another_dataset_keeps_what_was_set_and_brings_its_own_augmentation() -> None:
    small = override(Config(), {"dataset.train_images": 200})
    switched = override(small, {"dataset": "cifar10"})
    assert switched.dataset == Cifar10(train_images=200)
    flipped = override(override(Config(), {"dataset.flip": True}), {"dataset": "synthetic"})
    assert flipped.dataset == Synthetic(flip=True)


def test_settings_of_a_component_apply_to_the_new_one() -> None:
    changes = {"dataset.classes": 3, "dataset": "synthetic"}
    assert override(Config(), changes).dataset == Synthetic(classes=3)


def test_order_of_the_changes_does_not_matter() -> None:
    changes = {"batch_size": 9, "workers": 3, "algorithm": "trades", "algorithm.beta": "2"}
    changes["backbone.num_experts"] = 1  # which adv_moe alone refuses
    found = {override(Config(), dict(order)) for order in itertools.permutations(changes.items())}
    assert len(found) == 1


def test_adv_moe_of_a_dense_net_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"backbone\.num_experts must be at least 2 .* got 1"):
        override(Config(), {"backbone.num_experts": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"backbone\.num_experts must be 1 for algorithm=sparse, got 2"),
        (
            {"backbone.num_experts": 1, "backbone.ratio": 1},
            r"backbone\.ratio must be below 1 for algorithm=sparse, got 1\.0",
        ),
    ],
)
def test_sparse_wants_the_net_that_shall_remain(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(Config(), {"algorithm": "sparse"} | changes)


COMPONENTS = [
    *(Config(dataset=kind(train_images=20, flip=True)) for kind in DATASETS.values()),
    *(
        Config(backbone=kind(num_experts=5, ratio=0.3))
        for kind in BACKBONES.values()
        if kind not in (ViT, DualNetworks, Lipschitz)
    ),
    Config(backbone=NetworkMixture(expert=ViT(size="small", patch=2), router="cnn")),
    Config(backbone=ViT(ratio=0.3), algorithm=Standard()),
    Config(backbone=Lipschitz(depth=3), algorithm=Standard(), norm_bound=2.5),
    *(Config(algorithm=kind()) for kind in ALGORITHMS.values() if kind not in (Sparse, JTDMoE)),
    Config(algorithm=JTDMoE(beta=2.0), backbone=DualNetworks(standard=Small(ratio=0.3), alpha=0.2)),
    Config(algorithm=Sparse(pretrain=0.3), backbone=Small(num_experts=1)),
    *(Config(algorithm=AdvMoE(attack=kind(eps=0.2))) for kind in ATTACKS.values()),
    Config(evaluation=Evaluation(norm="l2", eps=1 / 3), router_lr=1e-5),
]


@pytest.mark.parametrize("config", COMPONENTS)
def test_flat_form_reads_back_as_the_same_config(config: Config) -> None:
    flat = flatten(config)
    assert all(value is None or isinstance(value, (str, int, float)) for value in flat.values())
    assert read(json.loads(json.dumps(flat))) == config
    assert read({key: str(value) for key, value in flat.items()}) == config, "as MLflow keeps it"
    assert flatten(read(flat)) == flat


def test_example_values_cover_every_key() -> None:
    assert OTHER.keys() == flatten(Config()).keys() - {"algorithm.attack"}


@pytest.mark.parametrize("key", OTHER)
def test_fingerprint_changes_with_all_that_decides_the_numbers_and_nothing_else(key: str) -> None:
    changed = override(Config(), {key: OTHER[key]})
    assert changed != Config()
    assert (changed.fingerprint == Config().fingerprint) == (key in ELSEWHERE)


def test_fingerprint_leaves_out_where_a_run_lives_alone() -> None:
    places = {"dataset.path", "storage", "tracking_uri", "experiment", "name", "checkpoint_steps"}
    weights = {key for key in ELSEWHERE if key.endswith("weights")}  # their sha256 counts
    assert {"backbone.weights", "backbone.expert.weights"} < weights
    assert set(ELSEWHERE) == places | weights | {"dataset.reader", "upcycle"}


def test_fingerprint_is_the_same_in_every_process() -> None:
    import subprocess
    import sys

    code = "from pipeline.config import Config; print(Config().fingerprint)"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert printed == Config().fingerprint
    assert len(printed) == 64


def test_config_and_its_components_are_frozen() -> None:
    config = Config()
    for node in (config, config.dataset, config.backbone, config.algorithm, config.evaluation):
        name = dataclasses.fields(node)[0].name  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(node, name, 1)


def test_cutmix_wants_images_in_pairs_on_every_worker() -> None:
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of 4 .* got 66"):
        override(Config(), {"cutmix": 0.5, "batch_size": 66, "workers": 2})
    assert override(Config(), {"cutmix": 0.5, "batch_size": 68, "workers": 2}).cutmix == 0.5


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (Config(backbone=ViT(size="small"), algorithm=Trades()), "9e25992aa716e82e"),
        (
            Config(backbone=NetworkMixture(expert=ViT(), gate="hard", top_k=1)),
            "fa433a24ff435dc6",
        ),
    ],
    ids=["vit", "mixture of vit"],
)
def test_settings_of_mixtures_of_mlps_leave_older_fingerprints_as_they_were(
    config: Config, want: str
) -> None:
    assert config.fingerprint.startswith(want)
    many = {"backbone": ViT(num_experts=2), "algorithm": Trades()}
    few = Config(**many | {"backbone": ViT(num_experts=2, placement="last_2")})
    assert Config(**many).fingerprint != few.fingerprint
