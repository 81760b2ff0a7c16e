"""What a run goes on from, and which checkpoints fit it."""

import pytest
import torch
from torch import nn

from esam_dist import config, resume
from esam_dist.checkpoint import Checkpoints
from esam_dist.errors import UserError

NETWORK = nn.Linear(3, 2)


def configured(folder, **sections):
    return config.parse({"run": {"folder": str(folder)} | sections.pop("run", {})} | sections, "test")


def state(step, optimizer=("momentum_buffer",), names=("weight", "bias"), network=NETWORK):
    model = {name: torch.full_like(value, float(step)) for name, value in network.state_dict().items()}
    kept = {
        name: {key: torch.tensor(1.0) if key == "step" else torch.ones_like(model[name]) for key in optimizer}
        for name in names
    }
    return {"engine": {"model": model, "optimizer": kept}, "train": {"step": step, "samples_seen": 8 * step}}


@pytest.fixture
def other(tmp_path):
    """Another run with checkpoints of steps 1, 2 and 3, the newest of them broken."""
    (tmp_path / "other").mkdir()
    checkpoints = Checkpoints(tmp_path / "other" / "checkpoints", keep=9)
    for step in (1, 2, 3):
        checkpoints.save(state(step), step, accuracy=0.1 * step)
    (checkpoints.folder / "step_00000003" / "state.pt").write_bytes(b"")
    return tmp_path / "other"


@pytest.fixture
def own(tmp_path):
    (tmp_path / "run").mkdir()
    return Checkpoints(tmp_path / "run" / "checkpoints", keep=9)


def found(own, **run):
    state = resume.find_state(configured(own.folder.parent, run=run), own, NETWORK)
    return state and state["train"]["step"]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *(("checkpoints/step_00000001", 1), ("step_00000001", 1), ("", 2), ("checkpoints/step_00000002", 2)),
        *(("1", 1), ("step_1", 1), ("checkpoints/1", 1), ("checkpoints/step_00000001/state.pt", 1)),
    ],
)
def test_an_empty_folder_begins_from_what_is_named(own, other, name, step):
    assert found(own, resume=str(other / name)) == step


def test_a_folder_with_checkpoints_goes_on_from_its_own_newest_and_says_so(own, other, caplog):
    path = str(other / "checkpoints/step_00000001")
    assert found(own, resume=path) == 1
    own.save(state(5), 5)
    assert found(own, resume=path) == 5
    assert f"run.resume = {path}: passed over" in caplog.text


def test_a_named_checkpoint_that_is_broken_or_missing_is_one_line(own, other, tmp_path):
    with pytest.raises(UserError, match=r"step_00000003: .*use another checkpoint"):
        found(own, resume=str(other / "checkpoints/step_00000003"))
    for name in ("checkpoints/step_00000009", "step_00000009", "9"):
        with pytest.raises(UserError, match=rf"{name}: no such checkpoint; there are step_00000001, step_00000002"):
            found(own, resume=str(other / name))
    with pytest.raises(UserError, match=r"run.resume = .*nowhere: no such checkpoint; give the folder of a run"):
        found(own, resume=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"run.resume = .*: is no checkpoint \(it holds no state.pt\)"):
        found(own, resume=str(tmp_path))
    (tmp_path / "third" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run.resume = .*third: that run has no checkpoint"):
        found(own, resume=str(tmp_path / "third"))


@pytest.mark.parametrize("step", [7, "step_7", "step_00000007"])
def test_a_step_without_a_run_in_an_empty_folder_is_one_line_that_says_how_to_name_the_run(own, step):
    with pytest.raises(UserError, match=rf"run.resume = {step}: .*holds no checkpoint; give RUN/{step}"):
        found(own, resume=step)


@pytest.mark.parametrize("name", ["resnet18.pth", "model.safetensors", "anything"])
def test_a_file_of_weights_is_refused_with_the_key_that_takes_it(own, tmp_path, name):
    torch.save(NETWORK.state_dict(), tmp_path / name)
    with pytest.raises(UserError, match=rf"is a file.*give model.weights={tmp_path / name} and leave run.resume out"):
        found(own, resume=str(tmp_path / name))


def test_a_step_is_one_of_the_runs_own_whatever_lies_in_the_working_directory(other, own, monkeypatch):
    own.save(state(1), 1)
    monkeypatch.chdir(other / "checkpoints")
    path, _ = resume.choose(own, "step_00000001")
    assert path.parent == own.folder


def test_own_checkpoints_that_are_all_broken_are_not_passed_over_for_the_named_one(own, other):
    (own.save(state(5), 5) / "state.pt").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        found(own, resume=str(other))


def test_a_new_run_has_nothing_to_go_on_from(own, other):
    assert found(own, resume="auto") is None
    assert found(own, resume="never") is None


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("newest", "step_00000002"),
        ("step_00000001", "step_00000001"),
        ("1", "step_00000001"),
        ("OTHER", "step_00000002"),
    ],
)
def test_what_is_evaluated_is_sound(other, wanted, name):
    path, chosen = resume.choose(Checkpoints(other / "checkpoints", keep=1), wanted.replace("OTHER", str(other)))
    assert path.name == name
    assert chosen["train"]["step"] == int(name[-1])


def test_a_best_one_that_is_broken_is_one_line(other):
    with pytest.raises(UserError, match=r"step_00000003: .*; use another checkpoint"):
        resume.choose(Checkpoints(other / "checkpoints", keep=1), "best")


ADAMW = ("step", "exp_avg", "exp_avg_sq")
SGD = ("momentum_buffer",)


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
@pytest.mark.parametrize(
    ("optim", "kept"),
    [
        ({"name": "sgd"}, ADAMW),
        ({"name": "sgd", "momentum": 0.0}, ADAMW),
        ({"name": "adamw"}, SGD),
        ({"name": "adamw"}, ()),
        ({"name": "adamw"}, ("step", "exp_avg")),
        ({"name": "sgd"}, ("momentum_buffer", "exp_avg")),
    ],
)
def test_the_state_of_another_optimizer_is_refused_in_one_line(own, engine, optim, kept):
    own.save(state(4, kept), 4)
    cfg = configured(own.folder.parent, optim=optim, engine={"name": engine})
    with pytest.raises(UserError, match=rf"step_00000004: .*another optimizer.*optim.name = {optim['name']}"):
        resume.find_state(cfg, own, NETWORK)


def test_momentum_of_another_shape_is_refused(own):
    broken = state(4)
    broken["engine"]["optimizer"]["bias"]["momentum_buffer"] = torch.ones(7)
    own.save(broken, 4)
    with pytest.raises(UserError, match="another optimizer"):
        found(own)


def fitted(own, saved, optim, engine):
    own.save(saved, 4)
    cfg = configured(own.folder.parent, optim=optim, engine={"name": engine})
    return resume.find_state(cfg, own, NETWORK)["engine"]["optimizer"]


def test_missing_momentum_is_momentum_of_zero(own):
    none = state(4, names=())
    assert fitted(own, none, {}, "native") == {}
    assert fitted(own, none, {}, "deepspeed") == {"weight": {}, "bias": {}}
    assert fitted(own, none, {"momentum": 0.0}, "deepspeed") == {"weight": {}, "bias": {}}


def test_momentum_that_is_not_asked_for_is_dropped(own):
    assert fitted(own, state(4), {"momentum": 0.0}, "deepspeed") == {"weight": {}, "bias": {}}
    assert fitted(own, state(4), {"momentum": 0.0}, "native") == {}


def test_a_parameter_that_was_never_updated_comes_behind_those_that_tell_the_number_of_updates(own):
    kept = fitted(own, state(4, ADAMW, names=("bias",)), {"name": "adamw"}, "deepspeed")
    assert list(kept) == ["bias", "weight"]
    assert kept["weight"] == {}


def test_a_checkpoint_of_another_network_is_refused(own):
    path = own.save(state(4, network=nn.Linear(3, 5)), 4)
    with pytest.raises(UserError, match="another network") as refused:
        found(own)
    assert "weight is [5, 3], not [2, 3]" in str(refused.value)
    assert f"a new run.folder with model.weights={path} in place of run.resume" in str(refused.value)
    own.save(state(5, names=(), network=nn.Linear(3, 2, bias=False)), 5)
    with pytest.raises(UserError, match=r"another network.*\(bias is missing\)"):
        found(own)
