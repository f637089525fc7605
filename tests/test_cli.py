"""The command line, offline: options, errors, the doctor, and the demo on a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aat_hf import cli, compare, demo, doctor, picture
from aat_hf.data import ModelUnavailableError


@pytest.fixture
def tiny() -> Iterator[LlamaForCausalLM]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    yield LlamaForCausalLM(config).eval()


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("demo", "doctor", "bench"))


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        cli.main([])
    assert left.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_errors_for_the_user_take_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fail(name: object) -> None:
        raise ModelUnavailableError("no network: plug it in")

    monkeypatch.setattr(demo, "resolve_model", fail)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "aat: no network: plug it in\n"


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch):
    def fail(name: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(demo, "resolve_model", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["demo"])


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--tokens", "1", "two tokens"),
        ("--tolerance", "1.5", "tolerance"),
        ("--tolerance", "much", "much"),
        ("--json", "no/such/folder/x.json", "folder that exists"),
    ],
)
def test_demo_refuses_bad_options_at_once(capsys: pytest.CaptureFixture[str], option: str, value: str, said: str):
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", option, value])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_demo_on_a_random_model(
    tiny: LlamaForCausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def tokenize(text: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) % 61 for letter in text])

    monkeypatch.setattr(demo, "load_model", lambda name, device: (tiny, tokenize))
    written = tmp_path / "out.json"
    assert cli.main(["demo", "--tokens", "600", "--json", str(written)]) == 0
    shown = capsys.readouterr()
    assert "ends at 512 tokens" in shown.err
    assert "KL(dense" in shown.out and "tolerance 0.05" in shown.out
    found = json.loads(written.read_text())
    assert found["tokens"] == 512
    assert sum(found["paths"].values()) == 2
    assert found["quality"]["kl"] == pytest.approx(0, abs=1e-3)


def test_demo_names_a_missing_folder(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["demo", "--model", "./nowhere"]) == 1
    assert "no folder ./nowhere" in capsys.readouterr().err


def test_bench_lists_and_refuses(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench"]) == 0
    assert "benchmarks:" in capsys.readouterr().out
    assert cli.main(["bench", "nonsense"]) == 2
    assert "'nonsense'" in capsys.readouterr().err


def test_doctor_prints_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("AAT_CACHE", str(tmp_path / "cache"))
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("versions", "devices", "backends", "caches", torch.__version__, str(tmp_path)):
        assert word in shown
    assert "Nothing to mend." in shown
    assert not (tmp_path / "cache").exists()


def test_doctor_gives_the_line_that_mends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    real = doctor._version
    versions = {"numba": None, "transformers": "4.57.3", "gguf": None}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, real(name)))
    assert cli.main(["doctor", "--json"]) == 1
    findings = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert findings["numba"]["fix"] == "pip install numba"
    assert findings["transformers"]["fix"] == "pip install -U 'transformers>=5.17'"
    assert findings["transformers"]["status"] == doctor.MISSING
    assert findings["gguf"]["status"] == doctor.OPTIONAL
    assert "aat-hf[demo]" in findings["gguf"]["fix"]


def test_doctor_survives_a_broken_look(monkeypatch: pytest.MonkeyPatch):
    def broken() -> list[doctor.Finding]:
        raise OSError("libcuda is gone")

    monkeypatch.setattr(doctor, "_devices", broken)
    findings = doctor.examine()
    assert any("libcuda is gone" in finding.detail for finding in findings)
    assert {finding.group for finding in findings} == {"versions", "devices", "backends", "caches"}


def test_clock_counts_and_leaves_no_trace(tiny: LlamaForCausalLM):
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    seen: list[int] = []
    done = compare.run_pass(tiny, torch.arange(13)[None], "sdpa", seen.append)
    assert seen == [1, 2]
    assert done.hidden.shape == (13, 32)
    assert 0 < done.attention_seconds < done.total_seconds
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_quality_equals_the_whole_computation(tiny: LlamaForCausalLM):
    ids = torch.randint(0, 61, (1, 123))
    first = compare.run_pass(tiny, ids, "sdpa").hidden
    second = first + 0.1 * torch.randn_like(first)
    found = compare.quality(tiny, ids, first, second, chunk=50)
    with torch.inference_mode():
        dense = tiny.lm_head(first[:-1]).log_softmax(-1)
        aat = tiny.lm_head(second[:-1]).log_softmax(-1)
        loss = tiny(ids, labels=ids).loss.item()
    assert found.positions == 122
    assert found.nll_dense == pytest.approx(loss, abs=1e-5)
    kl = torch.nn.functional.kl_div(aat, dense, log_target=True, reduction="batchmean").item()
    assert found.kl == pytest.approx(kl, abs=1e-5)
    agreement = (dense.argmax(-1) == aat.argmax(-1)).float().mean().item()
    assert found.top1_agreement == pytest.approx(agreement)


def test_changed_logits_are_noticed(tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch):
    head_logits = compare.head_logits
    monkeypatch.setattr(compare, "head_logits", lambda model, h: head_logits(model, h) + 1)
    with pytest.raises(compare.ComparisonError, match="LlamaForCausalLM changes its logits"):
        compare.run_pass(tiny, torch.arange(13)[None], "sdpa")


def test_picture_of_a_map():
    states = torch.tensor([[2, 0, 0], [2, 2, 0], [0, 1, 2]])
    allowed = torch.ones(3, 3).tril().bool()
    assert picture.draw_tiles(states, allowed) == "█▄\n·░▀"
    assert picture.draw_tiles(states, allowed, plain=True) == "##\n.+#"
    pooled = picture.draw_tiles(torch.eye(123) * 2, torch.ones(123, 123).bool(), width=62)
    assert len(pooled.splitlines()) == 31
    assert max(map(len, pooled.splitlines())) == 62


class FakeMap:
    query_tile, key_tile = 128, 64

    def to_dense(self) -> torch.Tensor:
        return torch.tensor([[2, 0], [2, 2]]).expand(1, 4, 2, 2)

    def allowed(self) -> torch.Tensor:
        return torch.ones(1, 4, 2, 2).bool()


def test_map_is_chosen_and_its_absence_told():
    density = torch.tensor([0.1, 0.4, 0.5, 1.0])
    record = SimpleNamespace(name="layer.3", layer_idx=3, density=density, tile_map=FakeMap())
    other = SimpleNamespace(name="layer.0", layer_idx=0, density=density, tile_map=None)
    report = SimpleNamespace(layers=[other, record])
    assert picture.render_map(report).startswith("layer.3, head 2: density 0.500")
    assert picture.render_map(report, head=1).startswith("layer.3, head 1: density 0.400")
    assert picture.render_map(report, layer=0) == "No tile map: layer 0 was not tiled."
    assert picture.render_map(report, head=4) == "No head 4: the model has heads 0 to 3."
    empty = SimpleNamespace(layers=[other])
    assert picture.render_map(empty) == "No tile map: no layer was tiled."
