"""Studies on small models: definitions by hand, closed forms, the command end to end.

Shapes: B images, L layers, T tokens, E experts.
"""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from moe.backbones.small import Small
from moe.backbones.vit import ViT
from moe.cost import cost
from moe.fold_batchnorm import fold
from moe.network import Network
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.data.digits import Digits
from pipeline.data.splits import Images
from pipeline.presets import PRESETS
from pipeline.study import QUESTIONS
from pipeline.study.__main__ import read_settings, run
from pipeline.study.compute_and_experts import compute_variants, experts_variants
from pipeline.study.routing_under_attack import ranks_apart, routing_change, shuffled, variants
from pipeline.study.sampled_lipschitz import boundary_jump, margin_slope
from pipeline.study.subjects import StudySettings, Subject, small_steps

QUICK = StudySettings(images=12, eps=(4.0, 16.0), steps=3)


def v_moe(**settings: Any) -> Network:
    torch.manual_seed(0)
    settings = {"num_experts": 4, "top_k": 1} | settings
    net = ViT(size="micro", ratio=0.125, patch=4, **settings).build(10, 8)
    for name, parameter in net.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return fold(net)


def adv_moe(scope: str = "shared") -> Network:
    torch.manual_seed(0)
    net = Small(num_experts=3, ratio=0.125, router_scope=scope).build(10, 8)  # type: ignore[arg-type]
    net.train()(torch.rand(16, 3, 8, 8))
    return fold(net)


def subject(model: Network, name: str = "a", backbone: Any = None) -> Subject:
    images = Images(torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8), torch.arange(12) % 10)
    config = Config(dataset=Digits(), backbone=backbone or Small())
    return Subject(name, model, config, images)


def test_small_steps_start_clean_and_stay_in_the_ball() -> None:
    model, x_BCHW = v_moe(), torch.rand(4, 3, 8, 8)
    y_B = torch.arange(4)
    x_adv = small_steps(model, x_BCHW, y_B, 0.1, StudySettings(steps=5))
    assert float((x_adv - x_BCHW).abs().max()) <= 0.1 + 1e-6
    assert torch.equal(
        small_steps(model, x_BCHW, y_B, 0.1, StudySettings(steps=5)), x_adv
    )  # no random start
    one = small_steps(model, x_BCHW, y_B, 0.1, StudySettings(steps=1))
    slope = torch.autograd.grad(
        torch.nn.functional.cross_entropy(
            model(x := x_BCHW.clone().requires_grad_()).logits, y_B, reduction="sum"
        ),
        x,
    )[0]
    assert_close(one, (x_BCHW + 0.1 * slope.sign()).clamp(0, 1))
    released = StudySettings(steps=1, attack="released")
    found = small_steps(model, x_BCHW, y_B, 0.1, released)
    assert_close(found, x_BCHW + 0.1 * slope.sign())
    assert float(found.max()) > 1


@pytest.mark.parametrize("top_k", [1, 2])
def test_routing_change_is_one_minus_mean_token_iou(top_k: int) -> None:
    model = v_moe(top_k=top_k)
    torch.manual_seed(0)
    before, after = torch.randn(2, 3, 15, 4)  # 3 images, 3 layers of 5 tokens
    found_BL = routing_change(model, before, after)
    for image in range(3):
        for layer in range(3):
            total = 0.0
            for token in range(5 * layer, 5 * layer + 5):
                sets = [set(s[image, token].topk(top_k).indices.tolist()) for s in (before, after)]
                total += len(sets[0] & sets[1]) / len(sets[0] | sets[1])
            assert float(found_BL[image, layer]) == pytest.approx(1 - total / 5)


def test_routing_change_of_soft_moe_compares_dispatch_weights() -> None:
    model = v_moe(router="soft")
    torch.manual_seed(0)
    before, after = torch.randn(2, 2, 15, 4)  # one slot of each of four experts
    dispatch = [torch.unflatten(s, 1, (3, 5)).softmax(2) for s in (before, after)]
    want_BL = torch.zeros(2, 3)
    for image in range(2):
        for layer in range(3):
            own = [
                1 - sum(float(min(d[image, layer, t, s] for d in dispatch)) for t in range(5))
                for s in range(4)
            ]
            want_BL[image, layer] = sum(own) / 4
    assert_close(routing_change(model, before, after), want_BL, rtol=1e-5, atol=1e-6)
    assert float(routing_change(model, before, before).abs().max()) < 1e-6


def test_ranks_are_swapped_and_gates_keep_their_values() -> None:
    scores = torch.tensor([[0.1, 4.0, 3.0, 2.0, 1.0]])
    assert ranks_apart(scores, 1).tolist() == [[pytest.approx(0.1), 3.0, 4.0, 2.0, 1.0]]
    assert ranks_apart(scores, 2).tolist() == [[pytest.approx(0.1), 2.0, 1.0, 4.0, 3.0]]
    scores = torch.randn(5, 6, 4)
    mixed = shuffled(scores, 0)
    assert torch.equal(mixed.sort(-1).values, scores.sort(-1).values)
    assert not torch.equal(mixed, scores)


@pytest.mark.parametrize("kind", ["v_moe", "shared", "per_layer"])
def test_replaced_experts_are_what_their_names_say(kind: str) -> None:
    model = v_moe() if kind == "v_moe" else adv_moe(kind)
    x_BCHW, other = torch.rand(2, 5, 3, 8, 8)
    tried = variants(model, QUICK)
    deployed = model(x_BCHW).logits
    assert torch.equal(tried["deployed"](model, x_BCHW, other), deployed)
    assert_close(tried["route of the counterpart"](model, x_BCHW, x_BCHW), deployed)
    rolled = model.held(x_BCHW, model.routing_scores(x_BCHW.roll(1, 0)))
    assert_close(tried["routes of other images"](model, x_BCHW, other), rolled)
    second = tried["ranks 2..2"](model, x_BCHW, other)
    if kind != "v_moe":
        order = model(x_BCHW).router.argsort(-1, descending=True)
        assert_close(second, model.along(x_BCHW, order[..., 1]))
        alone = tried["expert 2 alone"](model, x_BCHW, other)
        assert_close(alone, model.along(x_BCHW, torch.full_like(model(x_BCHW).route, 2)))
    assert not torch.allclose(second, deployed)


def test_slope_of_the_margin_of_a_linear_map_is_the_distance_of_its_rows() -> None:
    weight = torch.tensor([[1.0, 0, 0], [0, -2.0, 0.5], [0.0, 0.0, -9.0]])
    x = torch.tensor([[3.0, -1.0, 0.2], [1.0, -4.0, 0.5]])
    found = margin_slope(lambda x: x @ weight.T, x)
    assert_close(found, torch.tensor([3.5, 3.5]))


def test_jump_at_a_boundary_is_the_gate_times_the_difference_of_the_experts() -> None:
    model = adv_moe()
    x_BCHW = torch.rand(6, 3, 8, 8)
    scores = model(x_BCHW).router.topk(2, 1).indices
    logits = [model.along(x_BCHW, scores[:, rank]) for rank in (0, 1)]
    assert_close(boundary_jump(model, x_BCHW), (logits[0] - logits[1]).abs().amax(1))


@pytest.mark.parametrize("question", ["routing", "replace", "lipschitz", "compute"])
@pytest.mark.parametrize("kind", ["v_moe", "expert_choice", "soft", "adv_moe"])
def test_every_question_takes_every_mixture(question: str, kind: str, tmp_path: Path) -> None:
    model = adv_moe("per_layer") if kind == "adv_moe" else None
    if model is None:
        model = v_moe() if kind == "v_moe" else v_moe(router=kind)
    found = QUESTIONS[question]([subject(model)], QUICK)
    assert found.rows
    found.write_csv(tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert len(rows) == len(found.rows)
    found.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert found.markdown().count("\n|") == len(found.rows) + 2


def test_theory_agrees_with_its_closed_forms() -> None:
    found = QUESTIONS["theory"]([], StudySettings(num_experts=(1, 2, 8)))
    assert {row["holds"] for row in found.rows} == {"yes"}
    gains = [row["computed"] for row in found.rows if str(row["statement"]).startswith("T2")]
    assert gains == pytest.approx([1.0, 2**0.5, 8**0.5])
    apart = [row for row in found.rows if str(row["statement"]).startswith("T3 constant")]
    assert float(apart[-1]["computed"]) > float(apart[-1]["closed form"]) / 2  # type: ignore[arg-type]


def test_twins_have_the_macs_or_the_parameters_of_the_mixture() -> None:
    base = override(PRESETS["vmoe_quickstart"](), {"backbone.top_k": 2})
    made = compute_variants(base, 2)
    assert [len(configs) for configs in made.values()] == [2, 2, 2]
    sparse, macs, parameters = (
        cost(configs[0].backbone.build(10, 8), 8) for configs in made.values()
    )
    assert macs.gmac == pytest.approx(sparse.gmac, rel=0.01)
    assert macs.params < sparse.params
    assert parameters.params == pytest.approx(sparse.params, rel=0.01)
    assert len({c.fingerprint for configs in made.values() for c in configs}) == 6


def test_experts_are_varied_with_those_of_a_token() -> None:
    settings = StudySettings(num_experts=(1, 2, 4), top_k=(1, 2))
    names = list(experts_variants(PRESETS["vmoe_quickstart"](), settings))
    assert names == ["E=1, k=1", "E=2, k=1", "E=4, k=1", "E=2, k=2", "E=4, k=2"]


def test_command_writes_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    where = [f"storage={tmp_path}/runs", f"tracking_uri={uri}", "num_experts=2,4"]
    assert run(["theory", *where]) == 0
    assert "T2 gain over dense" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs").glob("*/study theory-*")
    files = [file for file in folder.rglob("*") if file.suffix in (".csv", ".md", ".png")]
    kept = {str(file.relative_to(folder)) for file in files}
    assert kept == {"theory.csv", "theory.md", "plots/theory.png"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "which question"),
        (["compote"], "compute"),
        (["routing"], "routing needs one or more runs"),
        (["theory", "images=0"], "images must be at least 1, got 0"),
        (["theory", "eps=a"], "eps must be of type float, got 'a'"),
    ],
)
def test_wrong_questions_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(argv)


def test_settings_are_read_by_their_types() -> None:
    found = read_settings({"eps": "1,2.5", "num_experts": "2,8", "images": "7"})
    assert (found.eps, found.num_experts, found.images) == ((1.0, 2.5), (2, 8), 7)
