"""A checkpoint is whole or it is refused; what it holds is what was saved."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.network import Network
from pipeline import checkpoint
from pipeline.checkpoint import CheckpointError
from pipeline.config import Config
from pipeline.config.overrides import override

CONFIG = override(
    Config(), {"backbone.ratio": 0.125, "dataset": "synthetic", "dataset.size": 8, "name": "a"}
)
META: dict[str, Any] = {
    "epoch": 2,
    "step": 0,
    "update": 20,
    "best": 0.25,
    "history": [{"values": {"a": 1 / 3}}],
}
EVERY_FILE = (*checkpoint.FILES, "meta.json")


@pytest.fixture
def model() -> Network:
    torch.manual_seed(0)
    made = checkpoint.build_model(CONFIG)
    with torch.no_grad():
        made(torch.rand(4, 3, 8, 8))  # statistics other than those of a new net
    return made


@pytest.fixture
def state(model: Network) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(4, 3, 8, 8)).logits.sum().backward()
    optimizer.step()
    return {"optimizers": {"experts": optimizer.state_dict()}}


@pytest.fixture
def saved(tmp_path: Path, model: Network, state: dict[str, Any]) -> Path:
    folder = tmp_path / "checkpoints" / "step_00000020"
    checkpoint.save(folder, CONFIG, model, state, META)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def flip(file: Path, place: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    file.write_bytes(data)


def test_what_was_saved_comes_back(saved: Path, model: Network, state: dict[str, Any]) -> None:
    assert {key: checkpoint.verify(saved)[key] for key in META} == META
    assert checkpoint.load_config(saved) == CONFIG
    loaded = checkpoint.load_state(saved)["optimizers"]["experts"]
    wanted = state["optimizers"]["experts"]
    assert loaded["param_groups"] == wanted["param_groups"]
    for key, slot in wanted["state"].items():
        assert torch.equal(loaded["state"][key]["momentum_buffer"], slot["momentum_buffer"])
    assert sorted(file.name for file in saved.iterdir()) == sorted(EVERY_FILE)
    assert [folder.name for folder in saved.parent.iterdir()] == [saved.name], "no draft is left"


def test_loaded_model_gives_equal_logits_to_the_bit(saved: Path, model: Network) -> None:
    loaded = checkpoint.load_model(str(saved))
    x_BCHW = torch.rand(6, 3, 8, 8)
    assert not loaded.training
    with torch.no_grad():
        wanted, found = model.eval()(x_BCHW), loaded(x_BCHW)
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.router, wanted.router)
    state, other = model.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", EVERY_FILE)
def test_file_with_a_flipped_bit_is_refused_by_name(saved: Path, name: str, place: float) -> None:
    flip(saved / name, place)
    with pytest.raises(CheckpointError, match=rf"{saved.name}.*{name}"):
        checkpoint.verify(saved)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load_model(saved)


def test_every_flipped_bit_of_the_description_is_noticed(saved: Path) -> None:
    whole = (saved / "meta.json").read_bytes()
    for place in range(len(whole)):
        flipped = bytes([whole[place] ^ 1])
        (saved / "meta.json").write_bytes(whole[:place] + flipped + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"meta\.json"):
            checkpoint.verify(saved)
    (saved / "meta.json").write_bytes(whole)
    checkpoint.verify(saved)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_missing_or_empty_file_is_refused_by_name(saved: Path, name: str) -> None:
    (saved / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(saved)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(saved)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"sha256": 3}', '{"sha256": {}}', "\xff"])
def test_description_that_is_none_is_refused(saved: Path, text: str) -> None:
    (saved / "meta.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"meta\.json"):
        checkpoint.verify(saved)


def test_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a checkpoint folder"):
        checkpoint.load_model(tmp_path / "nowhere")


def test_newest_passes_over_the_damaged_and_says_so(
    tmp_path: Path, model: Network, state: dict[str, Any]
) -> None:
    root = tmp_path / "checkpoints"
    assert checkpoint.newest(root) == (None, [])
    for update in (9, 10, 100):
        checkpoint.save(root / f"step_{update:08d}", CONFIG, model, state, META)
    assert checkpoint.newest(root) == (root / "step_00000100", [])
    flip(root / "step_00000100" / "state.pt")
    found, passed = checkpoint.newest(root)
    assert found == root / "step_00000010"
    assert len(passed) == 1
    assert "step_00000100" in passed[0]
    assert "state.pt" in passed[0]
    shutil.rmtree(root / "step_00000010")
    flip(root / "step_00000009" / "model.safetensors")
    found, passed = checkpoint.newest(root)
    assert found is None
    assert len(passed) == 2


@pytest.mark.parametrize("call", ["torch.save", "sha256", "_flush", "publish", "Path.rename"])
def test_kill_in_the_middle_of_a_save_leaves_the_old_checkpoint_or_none(
    tmp_path: Path,
    model: Network,
    state: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    root = tmp_path / "checkpoints"
    checkpoint.save(root / "step_00000001", CONFIG, model, state, META)
    with monkeypatch.context() as patch:

        def killed(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill cleans up nothing
        owner: Any = {"torch.save": torch, "Path.rename": Path}.get(call, checkpoint)
        patch.setattr(owner, call.rpartition(".")[2], killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(root / "step_00000002", CONFIG, model, state, META)
    assert checkpoint.newest(root) == (root / "step_00000001", []), "the draft has another name"
    checkpoint.save(root / "step_00000002", CONFIG, model, state, META)
    checkpoint.prune(root, keep=2)
    assert names(root) == ["step_00000001", "step_00000002"], "and is swept away"


def test_save_replaces_a_checkpoint_of_the_same_name(
    saved: Path, model: Network, state: dict[str, Any]
) -> None:
    checkpoint.save(saved, CONFIG, model, state, META | {"epoch": 3})
    assert checkpoint.verify(saved)["epoch"] == 3
    assert [folder.name for folder in saved.parent.iterdir()] == [saved.name]


def test_copy_is_whole(saved: Path) -> None:
    best = saved.with_name("best")
    checkpoint.copy(saved, best)
    checkpoint.copy(saved, best)
    assert checkpoint.verify(best) == checkpoint.verify(saved)
    assert names(saved.parent) == ["best", saved.name]


def test_prune_keeps_the_newest_and_the_best(
    tmp_path: Path, model: Network, state: dict[str, Any]
) -> None:
    for name in ("step_00000001", "step_00000020", "step_00000003", "best"):
        checkpoint.save(tmp_path / name, CONFIG, model, state, META)
    checkpoint.prune(tmp_path, keep=2)
    assert names(tmp_path) == ["best", "step_00000003", "step_00000020"]


class Intruder:
    """Would make a file as soon as it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def rehash(folder: Path) -> None:
    """What somebody would do who can write the folder: make the hashes fit."""
    hashes = {name: checkpoint.sha256(folder / name) for name in checkpoint.FILES}
    (folder / "meta.json").write_text(checkpoint.describe(META, hashes))


def test_weights_that_carry_code_are_refused_and_not_run(saved: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    payload = pickle.dumps({"weight": Intruder(trace)})
    (saved / "model.safetensors").write_bytes(payload)
    rehash(saved)
    checkpoint.verify(saved)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is refused"):
        checkpoint.load_model(saved)
    assert not trace.exists()
    pickle.loads(payload)
    assert trace.exists(), "the intruder does bite those who let it"


@pytest.mark.parametrize("key", ["name", "experiment"])
def test_config_whose_run_would_leave_its_folder_is_refused(saved: Path, key: str) -> None:
    flat = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**flat, key: "../../etc"}))
    rehash(saved)
    with pytest.raises(ValueError, match=f"{key} must be a plain name"):
        checkpoint.load_model(saved)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_state_that_carries_code_is_refused_and_not_run(
    saved: Path, tmp_path: Path, how: str
) -> None:
    trace = tmp_path / "trace"
    payload = {"optimizers": Intruder(trace)}
    if how == "torch":
        torch.save(payload, saved / "state.pt")
    else:
        (saved / "state.pt").write_bytes(pickle.dumps(payload))
    rehash(saved)
    checkpoint.verify(saved)
    with pytest.raises(CheckpointError, match=r"state\.pt is refused"):
        checkpoint.load_state(saved)
    assert not trace.exists()
    checkpoint.load_model(saved)
    assert not trace.exists(), "the model needs no state"
    if how == "torch":
        torch.load(saved / "state.pt", weights_only=False)
        assert trace.exists(), "the intruder does bite those who let it"
