"""AT (Sparse): robust training, robust channel pruning, robust fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from moe.backbones import Backbone
from moe.network import Network
from moe.pruning.hydra import scored, scored_body
from moe.valid_fields import InsideOne, NonNegative, Positive, check_fields
from pipeline.algorithms.attack_objectives import AimKind
from pipeline.algorithms.staged import Stage
from pipeline.algorithms.trades import Trades
from pipeline.attacks import Attack
from pipeline.attacks.pgd import PGD
from pipeline.optimization.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """TRADES in three stages: train a dense net, learn which channels to keep, fine-tune those.

    The Sparse baseline of AdvMoE (arXiv:2308.10110), after HYDRA (Sehwag et al., NeurIPS 2020,
    arXiv:2002.10509, section 3): (1) ``min l(w)``; (2) ``min over s of l(w m(s))``, the weights at
    rest, m the mask of the highest scores, with a straight-through gradient; (3) ``min l(w)`` over
    what is kept. ``l = CE(f(x), y) + beta KL(f(x) || f(x'))`` throughout. HYDRA prunes single
    weights; here whole channels go, ``int(r * width)`` of each layer are kept, and what remains is
    a dense net of the shape ``num_experts=1, ratio=r``, which the backbone's settings ask for.

    Attributes:
        beta: Weight of stability against accuracy, as in ``Trades``.
        pretrain, score: Shares of the updates for (1) and (2); the rest is (3). HYDRA takes 100,
            20 and 100 epochs.
        score_rate, tune_rate: Peak rates of (2) and (3) over ``lr``; HYDRA's are 1 and 0.1. Whole
            channels leave more to fix than single weights: on digits (450 images, ``ratio=0.25``,
            8 epochs, eps 0.1, seed 0) 31% of 300 test images stand with 0.1, 69% with 1.
        aim: What x' raises: ``kl`` or ``ce``, as in ``Trades``.
        attack: How x' is found.

    Raises:
        ValueError: A setting is out of its range.
    """

    beta: NonNegative = 6.0
    pretrain: InsideOne = 0.45
    score: InsideOne = 0.1
    score_rate: Positive = 1.0
    tune_rate: Positive = 1.0
    aim: AimKind = "kl"
    attack: Attack = PGD(start="gaussian")

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.pretrain + self.score < 1:
            raise ValueError(
                f"score must be below {1 - self.pretrain:.6g}, what pretrain leaves of the run, "
                f"got {self.score}"
            )

    def step(self, state: TrainState, x_BCHW: Tensor, y_B: Tensor) -> dict[str, Tensor]:
        """Update what the stage trains; return detached losses in nats per image."""
        return Trades(beta=self.beta, aim=self.aim, attack=self.attack).step(state, x_BCHW, y_B)

    def stages(self) -> tuple[Stage, ...]:
        """Training the dense net, its scores, and the small net."""
        rest = 1 - self.pretrain - self.score
        return (
            Stage(self.pretrain, 1.0),
            Stage(self.score, self.score_rate),
            Stage(rest, self.tune_rate),
        )

    def build(self, stage: int, backbone: Backbone, num_classes: int, image_size: int) -> Network:
        """Make the dense net, the same with scores, or the small net."""
        if stage == 2:
            return backbone.build(num_classes, image_size)
        whole: Backbone = replace(backbone, ratio=1.0)  # type: ignore[type-var]
        dense = whole.build(num_classes, image_size)
        if stage == 0:
            return dense
        return scored(dense, backbone.build(num_classes, image_size), image_size)

    def hand_over(self, stage: int, old: Network, new: Network) -> None:
        """Copy weights and BatchNorm's statistics; start the scores from the weights."""
        if stage == 1:
            body = scored_body(new)
            body.dense.load_state_dict(old.body.state_dict())
            body.start_scores()
        else:
            scored_body(old).prune_into(new.body)
