"""Lesson 08's latent diffusion beside two peers that draw in pixels: minutes to the same quality on the same cores.

Each system learns from the same 5,452 drawings, moved by up to three pixels, for the same wall-clock time, on the same
threads, in bfloat16 where the chip has it, with about as many parameters (10 to 12 million), by its own recipe:

- ours: autoencoder, latents, painter, all inside the time; so are its captions' states and the steps that tell how
  many steps fit. The painter reads captions alone (no CLIP, which learnt outside the time). The inks, a count of
  colours, are lesson 05's.
- ddp: `denoising-diffusion-pytorch` with its classifier-free guidance, told one label for concept and style together.
  The README's model at half its width; its Trainer's Adam, clipping and moving average. It cannot know the labels of
  held-out pairs: its columns there are no reproach.
- diffusers: `UNet2DConditionModel` told MiniLM's token states, as `examples/text_to_image` trains it: noise as the
  target, DDPM's schedule, AdamW at a constant 1e-4, moving average; one caption in ten is left empty.

The averaged weights are kept every few minutes; the clock stands still meanwhile. Afterwards each snapshot draws the
same captions in as many steps at the same guidance, and is judged. What is judged stands in the file: started again,
the script goes on there (a training that was stopped begins anew), and a whole file is only printed. How many times as
fast: the minutes after which the faster peer was as good as ours at its first snapshot that is better than a guess,
over ours then; between snapshots nothing is interpolated, and where no peer was ever as good, all their minutes count
and the ratio is at least that. Drawing in pixels is slow, so judging takes longer than learning. ddp is not among the
course's packages:

    pip install --no-deps denoising-diffusion-pytorch==2.3.4 ema-pytorch==0.8.3
    python tests/benchmarks/diffusion_vs_peers.py [--minutes 30] [--peer-minutes 30] [--every 10] [--evaluate 100]
"""

import argparse
import copy
import importlib.util
import itertools
import json
import math
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import Dataset

from course_utils import data, evaluation, pretrained, runtime
from course_utils.grading import write_whole
from course_utils.models.diffusion import guided
from course_utils.models.text_to_image import Autoencoder, Painter, euler, flow_loss, read
from course_utils.training import Run, batch_rows, train

Rows = list[dict[str, float | int | str]]
Weights = dict[str, Tensor]
Draw = Callable[[data.Drawings], Tensor]
MEASURES = {"concept_top5": 1, "style": 1, "kid_lite0": -1}  # is more better, or less?
SPLITS = ("train", "pairs")
GUESS = 5 / 1563  # concept_top5 of a guess
CPU = torch.device("cpu")


def half() -> torch.autocast:
    """bfloat16 where the chip has it, for all systems alike."""
    return torch.autocast("cpu", torch.bfloat16, enabled=runtime.precision(CPU) == "bf16")


class Watch:
    """The clock of one system's training, and its snapshots: every `every` minutes, and when `limit` is reached."""

    def __init__(self, folder: Path, limit: float, every: float):
        self.folder, self.limit, self.every, self.next = folder, limit, every, every
        self.rows: Rows = []
        self.started = time.perf_counter()

    @property
    def minutes(self) -> float:
        return (time.perf_counter() - self.started) / 60

    def tick(self, drawings: int, weights: Callable[[], Weights]) -> bool:
        """Keep the weights where a snapshot is due, after so many drawings; is the time up?"""
        now = self.minutes
        if now >= min(self.next, self.limit):
            self.keep(drawings, weights())
            self.next = (now // self.every + 1) * self.every
        return now >= self.limit

    def keep(self, drawings: int, weights: Weights) -> None:
        """Write a snapshot, unless the last one is as old; the clock stands still."""
        if self.rows and self.rows[-1]["drawings"] == drawings:
            return
        stopped, name = time.perf_counter(), f"{len(self.rows):02d}.pt"
        self.rows.append({"minutes": round(self.minutes, 2), "drawings": drawings, "snapshot": name})
        torch.save(weights, self.folder / name)
        self.started += time.perf_counter() - stopped


class TimeUp(Exception):
    """Ends the course's loop, which has no other way out."""


def caption_states(minilm: pretrained.SentenceEncoder, texts: list[str]) -> Tensor:
    """MiniLM's states of the texts' tokens, (N, T, 384) in half precision, zero where there is no token."""
    parts = []
    for start in range(0, len(texts), 64):
        with half():
            parts.append(read(minilm.tokenizer, minilm.model, texts[start : start + 64]).half())
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])


def batches(part: data.Drawings, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Endless: how many drawings will have been seen, rows (B,), and the drawings there (B, 3, 64, 64), moved."""
    for step in itertools.count():
        rows = batch_rows(step, size, len(part), seed=0)
        yield (step + 1) * size, rows, data.moved(part[rows]["image"])


def step_down(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step with the gradient's norm clipped to 1, as all three recipes do it."""
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


# Ours


def autoencoder_loss(model: Autoencoder, batch: dict[str, Tensor]) -> Tensor:
    """Lesson 08's: -ELBO with sigma = 0.05, without its constant, and the style's nats; per pixel value."""
    mirrored = torch.rand(len(batch["image"]), 1, 1, 1) < 0.5
    images = torch.where(mirrored, batch["image"].flip(3), batch["image"])
    drawn, _, kl, style = model(images)
    error = (drawn - images).square().flatten(1).sum(1).mean() / (2 * 0.05**2)
    return (error + kl + 5000 * F.cross_entropy(style, batch["style"])) / images[0].numel()


def painter_loss(model: Painter, batch: dict[str, Tensor]) -> Tensor:
    """Lesson 08's flow, told the caption alone, and nothing in one of ten."""
    told = torch.rand(len(batch["z"]), 1, 1) >= 0.1
    return flow_loss(model, batch["z"], states=batch["states"] * told)


class Stock(Dataset):
    """Drawings as latents in several views, the first as they stand and the others moved, with captions' states."""

    def __init__(self, part: data.Drawings, autoencoder: Autoencoder, states: Tensor, views: int):
        self.states = states
        self.z = torch.stack([latents(part, autoencoder, view > 0) for view in range(views)], 1)

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, rows: Tensor) -> dict[str, Tensor]:
        view = torch.randint(self.z.shape[1], rows.shape) * (torch.rand(rows.shape) < 0.75)
        states = self.states[rows].float()
        longest = int((states != 0).any(2).sum(1).max())
        return {"z": self.z[rows, view].float(), "states": states[:, :longest]}


@torch.no_grad()
def latents(part: data.Drawings, autoencoder: Autoencoder, move: bool) -> Tensor:
    """Standardised latents (N, 16, 8, 8) in half precision."""
    found = []
    for rows in torch.arange(len(part)).split(200):
        images = part[rows]["image"]
        with half():
            found.append(autoencoder.encode(data.moved(images) if move else images).half())
    return torch.cat(found)


def train_until(
    minutes: float, watch: Watch, model: nn.Module, loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    part: Dataset, callbacks: tuple[Callable[[Run], None], ...] = (), **sizes,
) -> Run:  # fmt: skip
    """The course's loop, with as many steps as fit until then; twenty on a copy tell how many, inside the time."""
    marks: list[float] = []

    def mark(run: Run) -> None:
        marks.append(watch.minutes)

    train(copy.deepcopy(model), loss, part, steps=20, callbacks=(mark,), device=CPU, **sizes)
    a_step, left = (marks[1] - marks[0]) / 10, minutes - watch.minutes
    steps = max(10, int(0.98 * left / a_step) // 10 * 10)
    return train(model, loss, part, steps=steps, callbacks=callbacks, device=CPU, **sizes)


def learn_autoencoder(watch: Watch, part: data.Drawings, asked: argparse.Namespace) -> Autoencoder:
    """Lesson 08's, for its share of the time, with averaged weights and its latents' scale."""
    model, known = Autoencoder(), pretrained.load_checkpoint("tokens_fsq")[0]
    model.inks.copy_(known["inks"])
    model.prints.copy_(known["prints"])
    sizes = {"batch_size": asked.batch_size or 64, "learning_rate": 2e-3, "ema": 0.998}
    run = train_until(asked.autoencoder_minutes, watch, model, autoencoder_loss, part, **sizes)
    model.load_state_dict(model.state_dict() | run.ema)
    model.eval().requires_grad_(False)
    with half():
        model.measure(part.images.float() / 255)
    return model


def learn_ours(watch: Watch, asked: argparse.Namespace, minilm: pretrained.SentenceEncoder) -> None:
    """Autoencoder, stock of latents, painter: there is nothing to draw with before the third."""
    part, batch = data.drawings("train"), asked.batch_size or 128
    autoencoder = learn_autoencoder(watch, part, asked)
    stock = Stock(part, autoencoder, caption_states(minilm, part.captions), asked.views)
    both = nn.ModuleDict({"painter": Painter(), "autoencoder": autoencoder})

    def weights(run: Run) -> Weights:
        return both.state_dict() | {f"painter.{name}": value for name, value in run.ema.items()}

    def look_at_watch(run: Run) -> None:
        if watch.tick(run.step * batch, lambda: weights(run)):
            raise TimeUp

    sizes = {"batch_size": batch, "learning_rate": 1e-3, "warmup": 300, "ema": 0.999, "callbacks": (look_at_watch,)}
    try:
        run = train_until(watch.limit, watch, both["painter"], painter_loss, stock, **sizes)
        watch.keep(run.step * batch, weights(run))  # it may end a little early
    except TimeUp:
        pass


def artist_ours(weights: Weights, asked: argparse.Namespace, minilm: pretrained.SentenceEncoder) -> Draw:
    """Lesson 08's walk along the flow, and its decoder."""
    both = nn.ModuleDict({"painter": Painter(), "autoencoder": Autoencoder()})
    both.load_state_dict(weights)
    both.eval()

    def draw(part: data.Drawings) -> Tensor:
        states, noise = caption_states(minilm, part.captions).float(), torch.randn(len(part), 16, 8, 8)
        with half():
            *_, z = euler(both["painter"], noise, torch.linspace(1, 0, asked.steps + 1), asked.guidance, states=states)
        return both["autoencoder"].decode(z)

    return draw


# denoising-diffusion-pytorch


@contextmanager
def stand_in(name: str, *parts: str) -> Iterator[None]:
    """Where a package is not installed, an empty one while the block lasts: for imports that are never used."""
    if importlib.util.find_spec(name) is not None:
        yield
        return
    sys.modules[name] = types.ModuleType(name)
    for part in parts:
        setattr(sys.modules[name], part, types.ModuleType(part))
    try:
        yield
    finally:
        del sys.modules[name]


@cache
def ddp_package() -> types.ModuleType:
    """Its module of classifier-free guidance; torchvision is for its Trainer, which reads folders without labels."""
    with stand_in("torchvision", "transforms", "utils"):
        return importlib.import_module("denoising_diffusion_pytorch.classifier_free_guidance")


def new_ddp(asked: argparse.Namespace) -> nn.Module:
    """As in its README, 64 x 64 and with a label for each drawing; DDIM without new noise on the way."""
    package, labels = ddp_package(), len(data.STYLES) * len(data.concepts())
    unet = package.Unet(dim=asked.ddp_dim, dim_mults=(1, 2, 4, 8), num_classes=labels, cond_drop_prob=0.5)
    sizes = {"image_size": data.SIZE, "timesteps": 1000, "sampling_timesteps": asked.steps, "ddim_sampling_eta": 0.0}
    return package.GaussianDiffusion(unet, **sizes).to(memory_format=torch.channels_last)


def labels_of(part: data.Drawings) -> Tensor:
    """One number for concept and style, (N,)."""
    return len(data.STYLES) * part.concept + part.style


def learn_ddp(watch: Watch, asked: argparse.Namespace, minilm: pretrained.SentenceEncoder) -> None:
    """Its Trainer's steps, by hand, for that knows no labels."""
    from ema_pytorch import EMA

    part, diffusion = data.drawings("train"), new_ddp(asked).train()
    labels = labels_of(part)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99), fused=True)
    average = EMA(diffusion, beta=0.995, update_every=10)
    for seen, rows, images in batches(part, asked.batch_size or 16):
        with half():
            loss = diffusion(images, classes=labels[rows])
        step_down(loss, optimizer)
        average.update()
        if watch.tick(seen, average.ema_model.model.state_dict):
            return


def artist_ddp(weights: Weights, asked: argparse.Namespace, minilm: pretrained.SentenceEncoder) -> Draw:
    """Its own DDIM, with its own form of guidance."""
    diffusion = new_ddp(asked).eval()
    diffusion.model.load_state_dict(weights)

    def draw(part: data.Drawings) -> Tensor:
        with half():
            return diffusion.sample(classes=labels_of(part), cond_scale=asked.guidance)

    return draw


# diffusers


def new_unet(asked: argparse.Namespace) -> UNet2DConditionModel:
    """From scratch. Places look at each other and at the words at 16 x 16 and 8 x 8; above, it would take too long."""
    sizes = {"sample_size": data.SIZE, "in_channels": 3, "out_channels": 3, "cross_attention_dim": 384}
    sizes |= {"block_out_channels": tuple(asked.widths), "layers_per_block": asked.layers}
    down = ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    unet = UNet2DConditionModel(**sizes, down_block_types=down, up_block_types=up)
    return unet.to(memory_format=torch.channels_last)


def noise_in(unet: UNet2DConditionModel, x: Tensor, times: Tensor, states: Tensor) -> Tensor:
    """The noise that the network sees in x (B, 3, 64, 64), told states (B, T, 384), zero where there is no token."""
    with half():
        return unet(x, times, states, encoder_attention_mask=(states != 0).any(2)).sample.float()


def empty_caption(minilm: pretrained.SentenceEncoder, length: int) -> Tensor:
    """The states of "", which is what diffusers' pipelines tell in place of no caption, (1, length, 384)."""
    states, _ = minilm.token_states([""])
    return F.pad(states, (0, 0, 0, length - states.shape[1]))


def learn_diffusers(watch: Watch, asked: argparse.Namespace, minilm: pretrained.SentenceEncoder) -> None:
    """The steps of examples/text_to_image/train_text_to_image.py, in pixels and from scratch."""
    part, unet, scheduler = data.drawings("train"), new_unet(asked).train(), DDPMScheduler(num_train_timesteps=1000)
    states = caption_states(minilm, part.captions)
    nothing = empty_caption(minilm, states.shape[1])
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2, fused=True)
    average, names = EMAModel(unet.parameters(), foreach=True), [name for name, _ in unet.named_parameters()]
    for seen, rows, images in batches(part, asked.batch_size or 16):
        noise, times = torch.randn_like(images), torch.randint(1000, rows.shape)
        told = torch.where(torch.rand(len(rows), 1, 1) < 0.1, nothing, states[rows].float())
        noisy = scheduler.add_noise(2 * images - 1, noise, times)
        step_down(F.mse_loss(noise_in(unet, noisy, times, told), noise), optimizer)
        average.step(unet.parameters())
        if watch.tick(seen, lambda: dict(zip(names, average.shadow_params, strict=True))):
            return


def artist_diffusers(weights: Weights, asked: argparse.Namespace, minilm: pretrained.SentenceEncoder) -> Draw:
    """The package's DDIM scheduler in the loop that its pipelines have."""
    unet, scheduler = new_unet(asked).eval(), DDIMScheduler.from_config(DDPMScheduler(num_train_timesteps=1000).config)
    unet.load_state_dict(weights)
    scheduler.set_timesteps(asked.steps)

    def draw(part: data.Drawings) -> Tensor:
        states, x = caption_states(minilm, part.captions).float(), torch.randn(len(part), 3, data.SIZE, data.SIZE)
        both = torch.cat([states, empty_caption(minilm, states.shape[1]).expand_as(states)])
        for t in scheduler.timesteps:
            told, untold = noise_in(unet, x.repeat(2, 1, 1, 1), t, both).chunk(2)
            x = scheduler.step(guided(told, untold, asked.guidance), t, x).prev_sample
        return (x + 1) / 2

    return draw


# The measuring

SYSTEMS = {
    "ours": (learn_ours, artist_ours),
    "ddp": (learn_ddp, artist_ddp),
    "diffusers": (learn_diffusers, artist_diffusers),
}


class Exam:
    """The captions that every system is asked, the same noise each time, and the judge."""

    def __init__(self, count: int):
        self.judge, _ = evaluation.load_judge()
        parts = {split: data.drawings(split) for split in SPLITS}
        self.parts = {split: part.select(spread(len(part), count)) for split, part in parts.items()}

    @torch.no_grad()
    def measure(self, draw: Draw) -> dict[str, float]:
        found: dict[str, float] = {}
        for split, part in self.parts.items():
            torch.manual_seed(0)
            some = [draw(part.select(rows)) for rows in torch.arange(len(part)).split(50)]
            drawn, real = torch.cat(some).float().nan_to_num().clamp(0, 1), part[torch.arange(len(part))]
            seen = evaluation.judge_pictures(self.judge, drawn, real)
            found |= {f"{split}/{name}": value for name, value in seen.items()}
            found[f"{split}/kid_lite0"] = evaluation.kid_lite0(real["image"], drawn)
        return found


def spread(rows: int, count: int) -> Tensor:
    """At most `count` rows, evenly spaced."""
    return torch.linspace(0, rows - 1, min(count, rows)).long()


def open_results(path: Path, settings: dict) -> dict:
    """What the file holds: the settings, and the measurements of each system. Exits where the settings differ."""
    if not path.exists():
        return {"settings": settings, "systems": {}}
    found = json.loads(path.read_text())
    if found["settings"] != settings:
        other = {name: value for name, value in found["settings"].items() if value != settings.get(name)}
        sys.exit(f"{path} was measured with {other}: ask for the same, delete it, or name another file with --out.")
    return found


def save_results(path: Path, found: dict) -> None:
    write_whole(path, json.dumps(found, indent=1) + "\n")


def unfinished(rows: Rows | None) -> bool:
    """Is a system not trained yet, or not all of it judged?"""
    return rows is None or any("snapshot" in row for row in rows)


def learn(name: str, asked: argparse.Namespace, minilm: pretrained.SentenceEncoder, folder: Path) -> Rows:
    """Train a system; its snapshots lie in the folder then."""
    shutil.rmtree(folder)
    folder.mkdir()
    data.all_drawings()  # read once, before the clock starts
    torch.manual_seed(0)
    watch = Watch(folder, asked.minutes if name == "ours" else asked.peer_minutes, asked.every)
    SYSTEMS[name][0](watch, asked, minilm)
    return watch.rows


def judge(
    name: str, rows: Rows, asked: argparse.Namespace, minilm: pretrained.SentenceEncoder, folder: Path
) -> Iterator[str]:
    """Measure what is not yet measured; yields a line for each, once its row is whole."""
    exam = None
    for row in rows:
        if "snapshot" not in row:
            continue
        exam, path = exam or Exam(asked.evaluate), folder / row["snapshot"]
        weights = torch.load(path, weights_only=True)
        row |= {"parameters": sum(value.numel() for value in weights.values())}
        row |= exam.measure(SYSTEMS[name][1](weights, asked, minilm))
        del row["snapshot"]
        yield line(name, row)
        path.unlink()


def line(name: str, row: dict) -> str:
    """A row of the table."""
    cells = [f"{row[f'{split}/{key}']:14.3f}" for split in SPLITS for key in MEASURES]
    return f"{name:10}{row['minutes']:8.1f}{row['drawings']:10,}{''.join(cells)}"


def show_curves(systems: dict[str, Rows]) -> None:
    """The table of all that was measured."""
    heads = [f"{key:>14}" for _ in SPLITS for key in MEASURES]
    print(f"\n{'':28}{''.join(f'{split:>{14 * len(MEASURES)}}' for split in SPLITS)}")
    print(f"{'system':10}{'minutes':>8}{'drawings':>10}{''.join(heads)}")
    for name, rows in systems.items():
        print(*(line(name, row) for row in rows), sep="\n")
    sizes = [f"{name} {rows[-1]['parameters'] / 1e6:.1f} million" for name, rows in systems.items()]
    print(f"parameters: {', '.join(sizes)}; a guess has concept_top5 {GUESS:.3f}")


def minutes_to(rows: Rows, key: str, sign: int, value: float) -> float:
    """When a snapshot first was as good; infinity if none was."""
    return next((row["minutes"] for row in rows if sign * row[key] >= sign * value), math.inf)


def times_as_fast(systems: dict[str, Rows], split: str, measure: str) -> None:
    """Print how long ours took to its first quality that is no guess, and how long the faster peer took to that."""
    key, sign = f"{split}/{measure}", MEASURES[measure]
    ours = next((row for row in systems["ours"] if measure != "concept_top5" or row[key] > 5 * GUESS), None)
    if ours is None:
        print(f"{key:20} ours never did better than a guess")
        return
    peers = {name: rows for name, rows in systems.items() if name != "ours"}
    reached = {name: minutes_to(rows, key, sign, ours[key]) for name, rows in peers.items()}
    name, theirs = min(reached.items(), key=lambda pair: pair[1])
    told = f"{key:20} {ours[key]:6.3f}: ours after {ours['minutes']:.1f} minutes,"
    if theirs < math.inf:
        print(f"{told} {name} after {theirs:.1f}: {theirs / ours['minutes']:.1f} times as fast")
        return
    most = max(rows[-1]["minutes"] for rows in peers.values())
    best = ", ".join(f"{name} {sign * max(sign * row[key] for row in rows):.3f}" for name, rows in peers.items())
    print(f"{told} no peer within {most:.1f} (at best {best}): more than {most / ours['minutes']:.1f} times as fast")


def options() -> argparse.Namespace:
    """What the command line asks for, with its defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="to learn, for each system")
    parser.add_argument("--peer-minutes", type=float, help="for the peers, if not as many")
    parser.add_argument("--autoencoder-minutes", type=float, help="of ours; by default a fifth")
    parser.add_argument("--every", type=float, default=10, help="minutes between snapshots")
    parser.add_argument("--evaluate", type=int, default=100, help="captions of training, and as many held-out pairs")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="some of them, with commas")
    parser.add_argument("--batch-size", type=int, help="by default each has its recipe's: ours 64 and 128, peers 16")
    parser.add_argument("--steps", type=int, default=20, help="to draw")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--views", type=int, default=8, help="of each drawing in our stock of latents")
    parser.add_argument("--ddp-dim", type=int, default=32, help="the README's is 64")
    parser.add_argument("--widths", type=int, nargs=4, default=[32, 64, 128, 192], help="of diffusers' network")
    parser.add_argument("--layers", type=int, default=1, help="a resolution, of diffusers' network")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    asked.peer_minutes = asked.peer_minutes or asked.minutes
    asked.autoencoder_minutes = asked.autoencoder_minutes or asked.minutes / 5
    asked.systems = asked.systems.split(",")
    if unknown := set(asked.systems) - set(SYSTEMS):
        parser.error(f"there is no system {', '.join(sorted(unknown))}: choose among {', '.join(SYSTEMS)}")
    return asked


def main() -> None:
    asked = options()
    settings = {name: value for name, value in vars(asked).items() if name not in ("systems", "out")}
    found = open_results(asked.out, settings | {"precision": runtime.precision(CPU)})
    torch.set_num_threads(asked.threads)
    todo = [name for name in asked.systems if unfinished(found["systems"].get(name))]
    minilm = pretrained.load_minilm() if todo else None
    if "ddp" in todo:
        ddp_package()
    for name in todo:
        folder = runtime.cache_dir(f"benchmarks/{asked.out.stem}-{name}")
        if name not in found["systems"]:
            found["systems"][name] = learn(name, asked, minilm, folder)
            save_results(asked.out, found)
        for news in judge(name, found["systems"][name], asked, minilm, folder):
            save_results(asked.out, found)
            print(news, flush=True)
    systems = {name: found["systems"][name] for name in SYSTEMS if name in found["systems"]}
    show_curves(systems)
    if "ours" not in systems or len(systems) < 2:
        sys.exit("There is nothing to compare yet: measure ours and a peer.")
    for split, measure in itertools.product(SPLITS, MEASURES):
        times_as_fast(systems, split, measure)


if __name__ == "__main__":
    main()
