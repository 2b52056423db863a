"""The one training loop of the course.

The random numbers of a step are a function of (seed, step): which rows it sees, and the noise, dropout and
augmentation it draws. (The generators start anew every LOG_EVERY steps, and only there is a run saved.) So a checkpoint
needs no hidden state: a run that is killed at any moment and started again ends bit for bit where the uninterrupted
run ends. Devices, mixed precision and several processes come from
Hugging Face `accelerate`; nothing in this file knows what is being trained.
"""

import hashlib
import inspect
import io
import math
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from course_utils import pretrained, runtime

Batch = Tensor | dict[str, Tensor] | tuple[Tensor, ...] | list[Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
LOG_EVERY = 10


@dataclass
class Run:
    """A training run: what is learnt and how far it is, `step` of `steps`.

    `ema` holds the moving average of every learnt parameter under its name, `history` one row per step with its
    loss, the gradient's norm before clipping and the learning rate.
    """

    model: nn.Module
    ema: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    steps: int = 0
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


class Objective(nn.Module):
    """Model and loss as one module, so that autocast and several processes see a single forward."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.model, batch)


@lru_cache(maxsize=4)
def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    # the prime is so large that no other seed and epoch give the same number
    return torch.randperm(rows, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def batch_rows(step: int, batch_size: int, rows: int, seed: int, count: int = 1) -> Tensor:
    """Rows of the data that `count` steps from `step` on see, (count * batch_size,) int64.

    Each epoch shuffles anew, and none is left out.
    """
    first, place = divmod(step * batch_size, rows)
    last = ((step + count) * batch_size - 1) // rows
    orders = torch.cat([epoch_order(rows, seed, epoch) for epoch in range(first, last + 1)])
    return orders[place : place + count * batch_size]


def learning_rate_at(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down towards zero (Loshchilov and Hutter, 2017)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], parameters: list[Tensor], step: int, decay: float) -> None:
    """Move the average towards `parameters`; a young average forgets faster, so that it does not keep the start."""
    # ema += (1 - decay) * (weights - ema)
    torch._foreach_lerp_(list(ema.values()), parameters, 1 - min(decay, (1 + step) / (10 + step)))


@contextmanager
def averaged(run: Run) -> Iterator[nn.Module]:
    """The model in eval mode with the averaged weights in place of its own, for as long as the block lasts."""
    own = {name: parameter for name, parameter in run.model.named_parameters() if name in run.ema}
    kept = {name: parameter.detach().clone() for name, parameter in own.items()}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(run.ema[name])
    was_training = run.model.training
    try:
        yield run.model.eval()
    finally:
        run.model.train(was_training)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(kept[name])


def to_device(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, dict):
        return {name: value.to(device) for name, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else tuple(value.to(device) for value in batch)


def save_run(run: Run, folder: Path, settings: dict) -> None:
    """Write a checkpoint that is either whole or not there: sha256 first, then the state; keep it and the one before.

    Later checkpoints are deleted too: they are damaged, or the run would have resumed from them.
    """
    state = {
        "settings": settings,
        "step": run.step,
        "seconds": run.seconds,
        "history": run.history,
        "ema": run.ema,
    }
    state |= {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "unfinished"
    with open(unfinished, "wb") as file:
        file.write(hashlib.sha256(buffer.getbuffer()).digest())
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    newest = folder / f"step-{run.step:07d}.pt"
    unfinished.replace(newest)
    earlier = sorted(path for path in folder.glob("step-*.pt") if path < newest)
    for old in set(folder.glob("step-*.pt")) - {newest, *earlier[-1:]}:
        os.truncate(old, 0)  # Google Drive keeps what is deleted in its bin, where it counts as full
        old.unlink()


def restore_run(run: Run, folder: Path, settings: dict) -> None:
    """Go on from the newest whole checkpoint in `folder`; a damaged one is named and passed over.

    Raises ValueError where the folder holds a run with other steps, batch_size, learning_rate, seed or rows of data.
    """
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            warnings.warn(f"{path} is damaged and was not used: delete it; the one before it is tried.", stacklevel=3)
            continue
        state = torch.load(io.BytesIO(content[32:]), weights_only=True)
        if state["settings"] != settings:
            other = {name: value for name, value in state["settings"].items() if value != settings.get(name)}
            raise ValueError(f"{folder} holds a run with {other}: delete it or name another folder.")
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        for name, value in run.ema.items():
            value.copy_(state["ema"][name])
        run.step, run.seconds, run.history = state["step"], state["seconds"], state["history"]
        return


def training_step(
    objective: nn.Module,
    parts: list[Batch],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """One step down the mean loss of `parts`.

    Returns loss and gradient norm as tensors, so that a GPU need not be waited for.
    """
    losses = []
    for part in parts:
        loss = objective(part) if len(parts) == 1 else objective(part) / len(parts)
        losses.append(loss.detach())
        (loss if accelerator.scaler is None else accelerator.scaler.scale(loss)).backward()
    if accelerator.scaler is not None:
        accelerator.unscale_gradients(optimizer)
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()
    optimizer.zero_grad()
    return losses[0] if len(losses) == 1 else sum(losses), norm


def train(
    model: nn.Module,
    loss: Loss,
    data: Dataset,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: int = 100,
    clip: float = 1.0,
    ema: float = 0.999,
    accumulate: int = 1,
    precision: str | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    folder: Path | None = None,
    save_seconds: float = 60.0,
    callbacks: tuple[Callable[[Run], None], ...] = (),
) -> Run:
    """Minimise `loss(model, batch)` with AdamW, where a batch is `data[rows]` for a tensor of row numbers.

    `batch_size` is what one step sees in all, over `accumulate` parts and all processes. `precision` is "no", "bf16"
    or "fp16", and by default what the device does well. With a `folder` the run is saved about every `save_seconds`
    and at its end, and goes on from there when it is started again. Callbacks are called every LOG_EVERY steps.
    Raises ValueError for sizes that do not fit, and RuntimeError where the loss is no longer a number.
    """
    device = torch.device(device or runtime.device())
    # a notebook trains more than once, not always on the same device or in the same precision
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    precision = precision or runtime.precision(device)
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=device.type == "cpu",
        device_placement=False,
    )
    share = accelerator.num_processes * accumulate
    if min(steps, batch_size, accumulate, len(data)) < 1 or batch_size % share:
        sizes = f"steps={steps}, accumulate={accumulate} and the {len(data)} rows of data"
        raise ValueError(f"{sizes} must be positive and batch_size={batch_size} a positive multiple of {share}.")

    model.to(device).train()
    learnt = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = list(learnt.values())
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=weight_decay, fused=device.type in ("cpu", "cuda")
    )
    run = Run(model, {name: parameter.detach().clone() for name, parameter in learnt.items()}, optimizer, steps)
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "rows": len(data),
    }
    if folder is not None:
        restore_run(run, folder, settings)
    objective = accelerator.prepare(Objective(model, loss))
    if accelerator.scaler is not None:  # only fp16 needs accelerate's own optimizer, which takes 0.1 ms per step
        optimizer = accelerator.prepare(optimizer)

    started, saved = time.monotonic() - run.seconds, time.monotonic()
    first, every = accelerator.process_index, accelerator.num_processes
    with tqdm(total=steps, initial=run.step, disable=not accelerator.is_main_process) as bar:
        while run.step < steps:
            # the prime is so large that no other seed and step give the same number
            runtime.seed_all(1_000_003 * seed + run.step, accelerator.process_index)
            block, news = range(run.step, min(run.step + LOG_EVERY, steps)), []
            order = batch_rows(run.step, batch_size, len(data), seed, len(block))
            for step, rows in zip(block, order.split(batch_size), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(step, steps, learning_rate, warmup)
                parts = [to_device(data[part], device) for part in rows[first::every].chunk(accumulate)]
                news.append(training_step(objective, parts, optimizer, accelerator, clip))
                update_ema(run.ema, parameters, step, ema)
            run.step = block.stop

            both = torch.stack([torch.stack(values).float() for values in zip(*news, strict=True)], dim=1)
            for step, (value, norm) in zip(block, accelerator.reduce(both, "mean").tolist(), strict=True):
                rate = learning_rate_at(step, steps, learning_rate, warmup)
                run.history.append({"loss": value, "grad_norm": norm, "lr": rate})
                # fp16's scaler leaves out a step whose gradient is not finite
                if not math.isfinite(value if precision == "fp16" else value + norm):
                    what = f"The loss is {value} and its gradient {norm} at step {step + 1}"
                    raise RuntimeError(f"{what}: lower learning_rate={learning_rate}.")
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            bar.update(len(block))
            run.seconds = time.monotonic() - started
            for callback in callbacks:
                callback(run)
            due = time.monotonic() - saved >= save_seconds or run.step == steps
            if folder is not None and due and accelerator.is_main_process:
                save_run(run, folder, settings)
                saved = time.monotonic()
    return run


def fit(
    here: runtime.Runtime, name: str, model: nn.Module, loss: Loss, data: Dataset, **sizes
) -> tuple[nn.Module, dict]:
    """A lesson's model in eval mode, with what a card says of its training: shipped, or trained here with `sizes`.

    It is trained with a GPU, and where COURSE_RETRAIN=1 asks for it; else the checkpoint `name` is loaded. A run that
    was stopped goes on; one whose model, loss or sizes were edited starts anew, for a hash of them names its folder.
    Data that another network made say which in `data.recipe`, which is hashed too.
    """
    if not (here.retrain or here.profile == "gpu"):
        model, card = pretrained.load_checkpoint(name, model, here.device)
        return model.eval().requires_grad_(False), card
    recipe = f"{model!r}{inspect.getsource(loss)}{sizes}{getattr(data, 'recipe', '')}"
    folder = runtime.cache_dir("runs") / f"{name}-{zlib.crc32(recipe.encode()):08x}"
    run = train(model, loss, data, folder=folder, **sizes)
    model.load_state_dict(model.state_dict() | run.ema)
    about = {"steps": run.step, "seconds": run.seconds, "device": str(here.device), "seed": 0, "lesson": here.lesson}
    return model.eval().requires_grad_(False), about
