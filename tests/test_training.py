"""The training loop: killed anywhere it ends where it would have ended, and it does what plain torch does."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import PartialState
from torch import Tensor, nn
from training_job import (
    BATCH,
    ROWS,
    SIZE,
    STEPS,
    Points,
    Stop,
    checkpoint_steps,
    final,
    noisy_loss,
    plain_loss,
    small_model,
    stop_at,
)

from course_utils import pretrained, runtime
from course_utils.evaluation import Judge
from course_utils.training import (
    LOG_EVERY,
    Objective,
    Run,
    averaged,
    batch_rows,
    epoch_order,
    fit,
    learning_rate_at,
    to_device,
    train,
    training_step,
    update_ema,
)

JOB = Path(__file__).with_name("training_job.py")
FULL = os.environ.get("COURSE_FULL") == "1"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job(*command: str | Path) -> str:
    """Standard output of a process on one thread, which must end well."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    paths = os.pathsep.join([str(runtime.ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env, command = os.environ | threads | {"PYTHONPATH": paths}, [sys.executable, *map(str, command)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr[-4000:]}"
    return done.stdout


def leaves(value: object, name: str = "") -> dict[str, object]:
    """Every tensor (as its bytes) and number of a nested state, under its path."""
    if isinstance(value, dict):
        value = {str(key): part for key, part in value.items()}
    elif isinstance(value, (list, tuple)):
        value = {str(place): part for place, part in enumerate(value)}
    elif isinstance(value, Tensor):
        return {name: (value.dtype, tuple(value.shape), value.detach().contiguous().numpy().tobytes())}
    else:
        return {name: value}
    return {path: leaf for key, part in value.items() for path, leaf in leaves(part, f"{name}/{key}").items()}


def differing(one: dict, other: dict) -> list[str]:
    """Paths at which two states are not the same to the bit."""
    one, other = leaves(one), leaves(other)
    return sorted(path for path in one | other if one.get(path) != other.get(path))


def noisy_run(folder: Path | None = None, **changes: object) -> Run:
    """A run in which everything that can be random is: rows, augmentation, noise and dropout."""
    return train(small_model(), noisy_loss, Points(), folder=folder, **(SIZE | {"save_seconds": 0} | changes))


@pytest.fixture(scope="module")
def whole() -> dict:
    """What `noisy_run` ends with when nothing interrupts it."""
    torch.set_num_threads(1)
    return final(noisy_run())


def test_states_that_differ_in_one_bit_are_told_apart():
    one = {"model": {"w": torch.tensor([0.0, 1.0])}, "history": [{"loss": 0.5}]}
    assert differing(one, one | {"model": {"w": torch.tensor([0.0, 1.0])}}) == []
    assert differing(one, one | {"model": {"w": torch.tensor([-0.0, 1.0])}}) == ["/model/w"]
    assert differing(one, one | {"history": []}) == ["/history/0/loss"]


# ----------------------------------------------------------------------------------------- killed and resumed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_at_any_moment_it_ends_bit_for_bit_where_it_would_have_ended(tmp_path: Path):
    seed = int(os.environ.get("COURSE_TEST_SEED") or random.SystemRandom().randrange(10**6))
    kills = 10 if FULL else 3
    met = json.loads(job(JOB, "killed", tmp_path, kills, seed))
    told = f"with COURSE_TEST_SEED={seed}; kills: {met}"
    assert len(met) == kills, told
    assert sum(0 < kill["newest"] < STEPS for kill in met) >= 2, f"too few kills in the middle {told}"
    assert sum(kill["unfinished"] is not None for kill in met) >= 2, f"too few kills of a save {told}"

    uninterrupted, resumed = (torch.load(tmp_path / name) for name in ("whole.pt", "killed.pt"))
    assert len(uninterrupted["history"]) == STEPS
    losses = [row["loss"] for row in uninterrupted["history"]]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert differing(uninterrupted, resumed) == [], told


def interrupted(folder: Path, at: int) -> list[Path]:
    """The checkpoints of a run that was stopped just before it saved step `at`, newest last."""
    with pytest.raises(Stop):
        noisy_run(folder, callbacks=(stop_at(at),))
    return sorted(folder.glob("step-*.pt"))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(tmp_path: Path, whole: dict):
    assert checkpoint_steps(tmp_path) == [] and len(interrupted(tmp_path, 40)) == 2
    data = Points()
    run = train(small_model(), noisy_loss, data, folder=tmp_path, save_seconds=0, **SIZE)
    assert len(data.asked) == SIZE["steps"] - 30
    assert differing(final(run), whole) == []
    assert checkpoint_steps(tmp_path) == [50, 60]


def test_started_again_after_its_end_it_trains_no_further(tmp_path: Path, whole: dict):
    first = noisy_run(tmp_path)

    def forbidden(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        raise AssertionError("trained again")

    again = train(small_model(), forbidden, Points(), folder=tmp_path, **SIZE)
    assert differing(final(again), whole) == [] and again.seconds == first.seconds > 0


@pytest.mark.parametrize("damage", [cut_short, flip_a_byte, empty])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, tmp_path: Path, whole: dict):
    before, newest = interrupted(tmp_path, 40)
    assert (before.stem, newest.stem) == ("step-0000020", "step-0000030")
    damage(newest)
    data = Points()
    with pytest.warns(UserWarning, match=rf"{newest.name}.*damaged.*delete") as warned:
        run = train(small_model(), noisy_loss, data, folder=tmp_path, save_seconds=0, **SIZE)
    assert len([w for w in warned if "damaged" in str(w.message)]) == 1
    assert len(data.asked) == SIZE["steps"] - 20
    assert differing(final(run), whole) == []


def test_with_every_checkpoint_damaged_it_starts_from_scratch(tmp_path: Path, whole: dict):
    for path in interrupted(tmp_path, 40):
        flip_a_byte(path)
    data = Points()
    with pytest.warns(UserWarning) as warned:
        run = train(small_model(), noisy_loss, data, folder=tmp_path, save_seconds=0, **SIZE)
    named = [str(w.message) for w in warned if "damaged" in str(w.message)]
    assert ["step-0000030.pt" in named[0], "step-0000020.pt" in named[1], len(named)] == [True, True, 2]
    assert len(data.asked) == SIZE["steps"]
    assert differing(final(run), whole) == []


@pytest.mark.filterwarnings("ignore:.*damaged")
def test_new_checkpoints_outlive_damaged_ones_of_later_steps(tmp_path: Path, whole: dict):
    for path in interrupted(tmp_path, 60):
        flip_a_byte(path)
    assert checkpoint_steps(tmp_path) == [40, 50]
    interrupted(tmp_path, 30)
    data = Points()
    run = train(small_model(), noisy_loss, data, folder=tmp_path, save_seconds=0, **SIZE)
    assert len(data.asked) == SIZE["steps"] - 20, "the progress since the damaged checkpoints was lost"
    assert differing(final(run), whole) == []


@pytest.mark.filterwarnings("error:.*damaged")
def test_a_left_over_unfinished_file_is_harmless(tmp_path: Path, whole: dict):
    newest = interrupted(tmp_path, 40)[-1]
    (tmp_path / "unfinished").write_bytes(newest.read_bytes()[:1000])
    data = Points()
    run = train(small_model(), noisy_loss, data, folder=tmp_path, save_seconds=0, **SIZE)
    assert len(data.asked) == SIZE["steps"] - 30
    assert differing(final(run), whole) == [] and not (tmp_path / "unfinished").exists()


def test_a_checkpoint_that_is_deleted_takes_no_room_in_a_bin(tmp_path: Path):
    oldest, _ = interrupted(tmp_path, 40)
    os.link(oldest, tmp_path / "bin")
    noisy_run(tmp_path)
    assert not oldest.exists() and (tmp_path / "bin").stat().st_size == 0


def test_without_time_passing_only_the_end_is_saved(tmp_path: Path):
    noisy_run(tmp_path, save_seconds=3600)
    assert checkpoint_steps(tmp_path) == [SIZE["steps"]]


# ------------------------------------------------------------------------------------------- wrong and broken


@pytest.mark.parametrize(
    "name, other", [("steps", 70), ("batch_size", 8), ("learning_rate", 2e-3), ("seed", 4), ("rows", 90)]
)
def test_other_settings_in_the_same_folder_are_refused_by_name(name: str, other: float, tmp_path: Path):
    interrupted(tmp_path, 30)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    changes = SIZE | {name: other}
    data = Points(changes.pop("rows", ROWS))
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*{name}.*delete") as refused:
        train(small_model(), noisy_loss, data, folder=tmp_path, **changes)
    same = {"steps", "batch_size", "learning_rate", "seed", "rows"} - {name}
    assert not [word for word in same if word in str(refused.value)]
    assert data.asked == [] and files == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": -5}, "steps=-5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -16}, "batch_size=-16"),
        ({"batch_size": 15, "accumulate": 2}, "batch_size=15.*2"),
        ({"batch_size": 2, "accumulate": 4}, "batch_size=2.*4"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"accumulate": -2}, "accumulate=-2"),
        ({"rows": 0}, "0 rows"),
        ({"learning_rate": -1e-3}, "learning rate.*-0.001"),
        ({"weight_decay": -0.1}, "weight_decay.*-0.1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_sentence(changes: dict, named: str):
    changes = SIZE | changes
    data = Points(changes.pop("rows", ROWS))
    with pytest.raises(ValueError, match=named) as refused:
        train(small_model(), noisy_loss, data, **changes)
    assert "\n" not in str(refused.value) and data.asked == []


def nan_loss(model: nn.Module, loss: Tensor) -> Tensor:
    return loss * float("nan")


def nan_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """The loss as it is, with a gradient that is not a number: d sqrt(w) / dw at 0 times 0."""
    return loss + (model[0].weight.sum() * 0).sqrt()


@pytest.mark.parametrize("at", [27, 30])
@pytest.mark.parametrize("spoil", [nan_loss, nan_gradient])
def test_a_loss_that_is_no_number_spares_the_checkpoints(spoil, at: int, tmp_path: Path, whole: dict):
    calls = 0

    def spoilt(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        loss = noisy_loss(model, batch)
        return spoil(model, loss) if calls == at else loss

    with pytest.raises(RuntimeError, match=rf"nan.*step {at}.*learning_rate=0.001") as stopped:
        train(small_model(), spoilt, Points(), folder=tmp_path, save_seconds=0, **SIZE)
    assert "\n" not in str(stopped.value) and calls == 30
    assert checkpoint_steps(tmp_path) == [10, 20]
    assert differing(final(noisy_run(tmp_path)), whole) == []


# ------------------------------------------------------------------------------------ the same as plain torch


@pytest.mark.parametrize("clip", [0.1, 100.0])
def test_losses_and_weights_are_those_of_the_same_steps_in_plain_torch(clip: float):
    run = noisy_run(learning_rate=3e-3, weight_decay=0.1, clip=clip, ema=0.9, seed=5)

    data, model, losses, norms = Points(), small_model().train(), [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in range(60):
        warm = 3e-3 * (step + 1) / 10
        rate = warm if step < 10 else 3e-3 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 50))
        optimizer.param_groups[0]["lr"] = rate
        if step % LOG_EVERY == 0:
            runtime.seed_all(1_000_003 * 5 + step)
        batch = data[batch_rows(step, BATCH, ROWS, 5)]
        optimizer.zero_grad()
        loss = noisy_loss(model, batch)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        losses.append(loss.item())
        decay = min(0.9, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()

    assert [row["loss"] for row in run.history] == losses
    assert [row["grad_norm"] for row in run.history] == norms
    assert min(norms) > 0.1 if clip == 0.1 else max(norms) < 100
    assert differing(run.model.state_dict(), model.state_dict()) == []
    assert differing(run.optimizer.state_dict(), optimizer.state_dict()) == []
    assert set(run.ema) == set(average) and not any(value.requires_grad for value in run.ema.values())
    for name, value in average.items():
        torch.testing.assert_close(run.ema[name], value, rtol=1e-5, atol=1e-6)


def close(one: dict, other: dict) -> None:
    """History, weights and EMA equal to 1e-5."""
    for row, expected in zip(one["history"], other["history"], strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for part in ("model", "ema"):
        for name, value in other[part].items():
            torch.testing.assert_close(one[part][name], value, rtol=1e-5, atol=1e-5)


def plain_run(steps: int = 40, **changes: object) -> Run:
    """A run whose loss is a function of weights and rows alone."""
    model, data = small_model(0, norm=False), Points(augment=False)
    return train(model, plain_loss, data, **(SIZE | {"steps": steps} | changes))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_parts_make_the_same_step(accumulate: int):
    close(final(plain_run(accumulate=accumulate)), final(plain_run()))


def test_two_processes_train_as_one(tmp_path: Path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    job(*launch, JOB, "shared", tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert [rank["world"] for rank in ranks] == [2, 2]
    assert [rank["stopped"] for rank in ranks] == [[10], [10]], "it was not stopped and started again"

    alone = plain_run()
    for rank in ranks:
        close(rank, final(alone))
    assert differing(ranks[0]["model"], ranks[1]["model"]) == []
    for step, halves in enumerate(zip(*(rank["rows"] for rank in ranks), strict=True), start=10):
        assert [len(half) for half in halves] == [BATCH // 2] * 2
        assert sorted(chain(*halves)) == sorted(batch_rows(step, BATCH, ROWS, 3).tolist())
    for one, other in zip(ranks[0]["drawn"], ranks[1]["drawn"], strict=True):
        assert one != other, "both processes draw the same noise"


# ---------------------------------------------------------------------------------------- rows, rate, average


@pytest.mark.parametrize("batch_size, rows", [(4, 12), (5, 12), (12, 12), (7, 3), (16, 5), (1, 1), (3, 1)])
def test_each_epoch_sees_every_row_once(batch_size: int, rows: int):
    steps = math.ceil(3 * rows / batch_size)
    batches = [batch_rows(step, batch_size, rows, seed=2) for step in range(steps)]
    assert {(batch.dtype, tuple(batch.shape)) for batch in batches} == {(torch.int64, (batch_size,))}
    seen = torch.cat(batches)
    for epoch in range(3):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))


def test_rows_are_a_function_of_seed_and_step_alone():
    steps = list(range(30))
    forward = {step: batch_rows(step, 16, 50, 1).tolist() for step in steps}
    state = torch.get_rng_state()
    epoch_order.cache_clear()
    for step in reversed(steps):
        assert batch_rows(step, 16, 50, 1).tolist() == forward[step]
    assert torch.equal(torch.get_rng_state(), state)
    assert batch_rows(0, 50, 50, 1).tolist() != batch_rows(1, 50, 50, 1).tolist() != list(range(50))
    orders = {tuple(batch_rows(0, 50, 50, seed).tolist()) for seed in range(8)}
    assert len(orders) == 8


def test_a_callers_change_to_its_rows_changes_no_other_step():
    for step in range(2):
        expected = batch_rows(step, 4, 12, 9).clone()
        batch_rows(step, 4, 12, 9).zero_()
        assert torch.equal(batch_rows(step, 4, 12, 9), expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_sees_every_row_once_an_epoch(accumulate: int):
    data = Points(rows=40)
    train(small_model(), noisy_loss, data, accumulate=accumulate, **(SIZE | {"steps": 15}))
    assert {len(rows) for rows in data.asked} == {BATCH // accumulate}
    seen = list(chain(*data.asked))
    assert len(seen) == 6 * 40
    for epoch in range(6):
        assert sorted(seen[epoch * 40 : (epoch + 1) * 40]) == list(range(40))


@pytest.mark.parametrize("steps, warmup", [(100, 10), (1000, 100), (11, 1)])
def test_learning_rate_is_the_closed_form(steps: int, warmup: int):
    def rate(step: int) -> float:
        return learning_rate_at(step, steps, 0.4, warmup)

    assert rate(0) == pytest.approx(0.4 / warmup)
    assert rate(warmup - 1) == rate(warmup) == 0.4
    assert rate((steps + warmup) // 2) == pytest.approx(0.2) or (steps + warmup) % 2
    assert rate(steps - 1) == pytest.approx(0.4 * math.sin(math.pi / 2 / (steps - warmup)) ** 2)
    falling = [rate(step) for step in range(warmup, steps)]
    assert falling == sorted(falling, reverse=True)
    assert [row["lr"] for row in plain_run(40, warmup=10).history][9:11] == [1e-3, 1e-3]


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 100), (7, 7), (7, 6), (50, 0), (50, 100), (50, 20)])
def test_learning_rate_is_positive_and_never_above_its_peak(steps: int, warmup: int):
    rates = [learning_rate_at(step, steps, 0.3, warmup) for step in range(steps)]
    assert min(rates) > 0 and max(rates) <= 0.3


def test_the_average_is_the_plain_recurrence():
    torch.manual_seed(0)
    walk = torch.randn(200, 2, 5, dtype=torch.float64).cumsum(0)
    ema, average = {"a": walk[0, 0].clone(), "b": walk[0, 1].clone()}, walk[0].clone()
    for step in range(200):
        update_ema(ema, [nn.Parameter(walk[step, 0]), nn.Parameter(walk[step, 1])], step, decay=0.95)
        decay = min(0.95, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * walk[step]
        torch.testing.assert_close(torch.stack([ema["a"], ema["b"]]), average, rtol=1e-12, atol=1e-12)
    assert (1 + 199) / (10 + 199) > 0.95 > 1 / 10
    assert not any(value.requires_grad for value in ema.values()), "the average keeps every step in its graph"


def weights(run: Run) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("raises", [True, False])
def test_averaged_swaps_and_gives_back(training: bool, raises: bool):
    run = noisy_run(steps=20)
    run.model.train(training)
    own, average = weights(run), {name: value.clone() for name, value in run.ema.items()}
    assert len(differing(own, average)) == len(own)
    try:
        with averaged(run) as model:
            assert model is run.model and not any(part.training for part in model.modules())
            assert differing(weights(run), average) == []
            model(torch.randn(4, 6))
            if raises:
                raise Stop
    except Stop:
        assert raises
    assert differing(weights(run), own) == [] and differing(run.ema, average) == []
    assert all(part.training == training for part in run.model.modules())


def test_a_model_left_in_eval_mode_is_trained_in_train_mode(whole: dict):
    run = train(small_model().eval(), noisy_loss, Points(), **SIZE)
    assert differing(final(run), whole) == []


def test_frozen_parameters_stay_and_have_no_average():
    model = small_model()
    model[0].requires_grad_(False)
    frozen = {name: value.detach().clone() for name, value in model[0].named_parameters()}
    run = train(model, noisy_loss, Points(), **(SIZE | {"weight_decay": 0.5, "learning_rate": 1e-2}))
    assert differing(dict(model[0].named_parameters()), frozen) == []
    learnt = {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert set(run.ema) == learnt and len(run.optimizer.state) == len(learnt)
    with averaged(run):
        assert torch.equal(model[0].weight, frozen["weight"])
        assert torch.equal(model[4].weight, run.ema["4.weight"])


def test_seeds_reach_python_numpy_and_torch_and_differ_by_process():
    def draw(seed: int, process: int = 0) -> list[float]:
        runtime.seed_all(seed, process)
        return [random.random(), np.random.rand(), torch.rand(()).item()]

    assert draw(5) == draw(5)
    for other in (draw(6), draw(5, process=1)):
        assert all(a != b for a, b in zip(draw(5), other, strict=True))


# ------------------------------------------------------------------------------ devices, precision, callbacks


META = torch.device("meta")


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_stays_on_the_models_device(parts: int):
    accelerator = Accelerator(cpu=True, mixed_precision="no", device_placement=False)
    model = small_model().to(META)
    optimizer = torch.optim.AdamW(model.parameters(), fused=False)
    ema = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    objective, optimizer = accelerator.prepare(Objective(model, noisy_loss), optimizer)
    batches = [to_device({"x": torch.randn(8, 6), "y": torch.randn(8, 3)}, META)] * parts
    news = training_step(objective, batches, optimizer, accelerator, 1.0)
    update_ema(ema, list(model.parameters()), 0, 0.9)
    assert [(value.device, value.dtype, value.shape) for value in news] == [(META, torch.float32, ())] * 2
    assert {parameter.device for parameter in [*model.parameters(), *ema.values()]} == {META}
    with averaged(Run(model, ema, optimizer)) as swapped:
        assert swapped(batches[0]["x"]).device == META


def test_to_device_keeps_the_form_of_a_batch():
    one, two = torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64)
    moved = to_device({"image": one, "concept": two}, META)
    assert list(moved) == ["image", "concept"] and {value.device for value in moved.values()} == {META}
    for pair in (to_device((one, two), META), to_device([one, two], META)):
        assert [(value.device, value.dtype) for value in pair] == [(META, one.dtype), (META, two.dtype)]
    assert to_device(one, META).device == META and to_device(one, META).shape == (2, 3)


@pytest.mark.parametrize("training", [True, False])
def test_the_judge_runs_on_its_inputs_device(training: bool):
    judge = Judge().to(META).train(training)
    logits = judge(torch.zeros(2, 3, 64, 64, device=META))
    shapes = {name: tuple(value.shape) for name, value in logits.items()}
    assert shapes == {"concept": (2, 1563), "category": (2, 9), "style": (2, 4)}
    assert {value.device for value in logits.values()} == {META}
    sum(value.sum() for value in logits.values()).backward()
    assert all(parameter.grad is not None for parameter in judge.parameters())


def test_bf16_learns_and_keeps_float32_weights():
    kinds = []

    def watched(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        output = model(batch["x"])
        kinds.append(output.dtype)
        return F.mse_loss(output.float(), batch["y"])

    def losses(precision: str) -> list[float]:
        kinds.clear()
        changes = SIZE | {"precision": precision, "learning_rate": 1e-2}
        run = train(small_model(0), watched, Points(augment=False), **changes)
        assert {value.dtype for value in [*run.model.parameters(), *run.ema.values()]} == {torch.float32}
        return [row["loss"] for row in run.history]

    whole = losses("no")
    assert set(kinds) == {torch.float32}
    half = losses("bf16")
    assert set(kinds) == {torch.bfloat16}
    assert np.mean(half[-10:]) < 0.3 * np.mean(half[:5])
    assert half != whole and half == pytest.approx(whole, rel=0.2)
    assert losses("no") == whole, "the precision of the run before was kept"


def test_each_training_looks_for_its_device_anew():
    train(small_model(0), plain_loss, Points(augment=False), **SIZE)
    PartialState._shared_state["device"] = META  # as if the first training had been elsewhere
    train(small_model(0), plain_loss, Points(augment=False), **SIZE)
    assert PartialState().device.type == "cpu"


def test_callbacks_see_an_up_to_date_run():
    seen = []

    def look(run: Run) -> None:
        assert len(run.history) == run.step and run.seconds > 0
        assert set(run.history[-1]) == {"loss", "grad_norm", "lr"}
        assert run.history[-1]["lr"] == learning_rate_at(run.step - 1, 25, 1e-3, 10)
        seen.append((run.step, run.history[-1]["loss"], run))

    run = plain_run(25, callbacks=(look, look))
    assert [step for step, _, _ in seen] == [10, 10, 20, 20, 25, 25]
    assert all(loss == run.history[step - 1]["loss"] and same is run for step, loss, same in seen)


def test_a_callback_that_samples_and_draws_changes_nothing(whole: dict):
    def sample(run: Run) -> None:
        with averaged(run) as model, torch.no_grad():
            model(torch.randn(5, 6))
        random.random(), np.random.rand()

    assert differing(final(noisy_run(callbacks=(sample,))), whole) == []


# ------------------------------------------------------------------------------------- a lesson's model


def test_fit_loads_what_is_shipped_or_trains_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COURSE_RUNS", raising=False)
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained.load_checkpoint, "__defaults__", (None, "cpu", tmp_path))
    runs, cpu = tmp_path / "cache" / "runs", torch.device("cpu")
    training_here, loading_here = (runtime.Runtime("lesson", "laptop", cpu, retrain) for retrain in (True, False))

    def fitted(loss) -> tuple[nn.Module, dict]:
        return fit(training_here, "tiny", small_model(), loss, Points(augment=False), **SIZE)

    trained, about = fitted(plain_loss)
    assert about["steps"] == SIZE["steps"] and not trained.training
    again, card = fitted(plain_loss)
    assert card["seconds"] == about["seconds"] and len(list(runs.iterdir())) == 1  # it was not trained anew
    fitted(noisy_loss)
    assert len(list(runs.iterdir())) == 2  # another loss does not go on with the old run
    points = Points(augment=False)
    points.recipe = "made by another network"
    fit(training_here, "tiny", small_model(), plain_loss, points, **SIZE)
    assert len(list(runs.iterdir())) == 3

    facts = {"lesson": "lesson", "config": {}, "steps": 60, "seconds": 1.0, "device": "cpu", "seed": 0, "metrics": {}}
    pretrained.save_checkpoint("tiny", trained, **facts, dtype=None, folder=tmp_path)
    loaded, card = fit(loading_here, "tiny", small_model(), plain_loss, Points())
    assert card["steps"] == 60 and not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
