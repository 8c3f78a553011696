"""The shipped trained model: its files, its tokenizer, and that metrics.json says what the weights do."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

Metrics = dict[str, Any]
SPECIALS = ("<pad>", "<bos>", "<eos>")
FOLDER = Path(__file__).resolve().parents[2] / "examples" / "byte-mixtral"


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    loaded: Metrics = json.loads((FOLDER / "metrics.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def fast_tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def auto_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


PIECES = st.sampled_from([*SPECIALS, "a", " ", "\r\n", "\x00", "é", "日", "🐍"])
TEXTS = st.text() | st.lists(PIECES).map("".join)


@given(text=TEXTS)
@settings(deadline=None)
def test_every_text_round_trips_without_transformers(fast_tokenizer: Any, text: str) -> None:
    ids = fast_tokenizer.encode(text).ids
    assert ids == [257, *text.encode()]
    assert fast_tokenizer.decode(ids) == text


@given(text=TEXTS)
@settings(deadline=None)
def test_every_text_round_trips_with_transformers(auto_tokenizer: Any, text: str) -> None:
    ids = auto_tokenizer(text).input_ids
    assert ids == [257, *text.encode()]
    assert auto_tokenizer.decode(ids, skip_special_tokens=True) == text
    assert auto_tokenizer.encode(text, add_special_tokens=False) == list(text.encode())


def test_special_ids_decode_to_nothing_and_pad_on_the_left(fast_tokenizer: Any, auto_tokenizer: Any) -> None:
    assert fast_tokenizer.get_vocab_size() == len(auto_tokenizer) == 259
    assert fast_tokenizer.decode([257, 104, 105, 258, 256], skip_special_tokens=False) == "hi"
    assert [getattr(auto_tokenizer, f"{n}_token_id") for n in ("pad", "bos", "eos")] == [256, 257, 258]
    assert auto_tokenizer(["a", "abc"], padding=True).input_ids == [[256, 256, 257, 97], [257, 97, 98, 99]]


def test_a_cut_character_decodes_to_the_replacement_sign(fast_tokenizer: Any) -> None:
    assert fast_tokenizer.decode(["é".encode()[0]]) == "\N{REPLACEMENT CHARACTER}"


def test_files_are_small_complete_and_in_bfloat16(byte_mixtral: Path, metrics: Metrics) -> None:
    from safetensors import safe_open

    weights = byte_mixtral / "model.safetensors"
    assert weights.stat().st_size < 8_000_000
    parameters = 0
    with safe_open(weights, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            tensor = tensors.get_tensor(name)
            assert str(tensor.dtype) == "torch.bfloat16", name
            assert tensor.isfinite().all(), name
            parameters += tensor.numel()
    assert parameters == metrics["parameters"] == 3_413_888
    config = json.loads((byte_mixtral / "config.json").read_text())
    assert config["max_position_embeddings"] >= 2048
    generation = json.loads((byte_mixtral / "generation_config.json").read_text())
    assert [generation[f"{n}_token_id"] for n in ("pad", "bos", "eos")] == [256, 257, 258]


def test_committed_tokenizer_is_what_the_tool_writes(byte_mixtral: Path, tmp_path: Path) -> None:
    from train_example import TOKENIZER_CONFIG, byte_tokenizer

    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    for written, committed in [
        (json.loads((tmp_path / "tokenizer.json").read_text()), "tokenizer.json"),
        (TOKENIZER_CONFIG, "tokenizer_config.json"),
    ]:
        assert json.loads((byte_mixtral / committed).read_text()) == written


@pytest.mark.parametrize(
    "part", ["nats_per_byte_of_the_beginning", pytest.param("nats_per_byte", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_held_out_loss_is_what_metrics_json_says(
    byte_mixtral: Path, metrics: Metrics, dtype: str, part: str
) -> None:
    import torch
    from heldout_text import heldout_text
    from train_example import EVAL_SEED, evaluate
    from transformers import AutoModelForCausalLM

    held_out = metrics["held_out"]
    text = heldout_text(held_out["text"]["chars"], EVAL_SEED)
    same_text = hashlib.sha256(text.encode()).hexdigest() == held_out["text"]["sha256"]
    said = held_out[part][f"shipped_weights_in_{dtype}"]
    text = text[: held_out[part].get("chars")]
    # Another version of Python has another text; its loss only has to be of the same kind (untrained: 5.6).
    other_text = 0.2 if part == "nats_per_byte" else 0.6
    tolerance = (1e-3 if dtype == "float32" else 5e-3) if same_text else other_text
    model = AutoModelForCausalLM.from_pretrained(byte_mixtral, dtype=getattr(torch, dtype)).eval()
    measured = evaluate(model, text, held_out["window"])
    assert measured.nats_per_byte == pytest.approx(said, abs=tolerance)
    if part == "nats_per_byte":
        assert measured.usage_entropy == pytest.approx(
            held_out["usage_entropy"], abs=0.01 if same_text else 0.1
        )


def test_the_loss_check_notices_a_damaged_model(byte_mixtral: Path) -> None:
    import torch
    from heldout_text import heldout_text
    from train_example import evaluate
    from transformers import AutoModelForCausalLM

    text = heldout_text(4_096)
    model = AutoModelForCausalLM.from_pretrained(byte_mixtral, dtype=torch.float32).eval()
    intact = evaluate(model, text, 512).nats_per_byte
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.copy_(model.model.layers[1].mlp.gate.weight.roll(1, 0))
    assert evaluate(model, text, 512).nats_per_byte > intact + 0.2


def test_metrics_are_good_enough_to_ship(metrics: Metrics) -> None:
    held_out = metrics["held_out"]
    assert held_out["nats_per_byte"]["shipped_weights_in_float32"] <= 1.6
    assert len(held_out["usage"]) == len(held_out["usage_entropy"]) == 4
    for shares, entropy in zip(held_out["usage"], held_out["usage_entropy"], strict=True):
        assert len(shares) == 8
        assert sum(shares) == pytest.approx(1.0, abs=1e-3)
        assert 0.4 < entropy < 1.0
        assert entropy == pytest.approx(-sum(s * math.log(s) for s in shares if s) / math.log(8), abs=2e-3)


def test_readme_quotes_metrics_json(byte_mixtral: Path, metrics: Metrics) -> None:
    readme = " ".join((byte_mixtral / "README.md").read_text(encoding="utf-8").split())
    held_out, training = metrics["held_out"], metrics["training"]
    loss = held_out["nats_per_byte"]
    first, *middle, last = (f"{entropy:.2f}" for entropy in held_out["usage_entropy"])
    for quoted in (
        f"| float32, as trained | float32 | {loss['float32_weights']:.3f} |",
        f"| bfloat16, as shipped | float32 | {loss['shipped_weights_in_float32']:.3f} |",
        f"| bfloat16, as shipped | bfloat16 | {loss['shipped_weights_in_bfloat16']:.3f} |",
        f"{held_out['text']['chars']:,} characters",
        f"windows of {held_out['window']} tokens",
        f"{', '.join([first, *middle])} and {last} in layers",
        f"| {metrics['parameters']:,}, stored",
        f"Python {metrics['versions']['python']} standard library, {training['bytes'] / 1e6:.1f} MB",
        f"in {training['files']} files; {training['tokens'] / 1e6:.1f} M tokens seen",
        f"took {training['seconds']:.0f} s with one thread",
    ):
        assert quoted in readme


def test_training_tool_refuses_no_steps(tmp_path: Path) -> None:
    import sys
    from subprocess import run as run_process

    command = [sys.executable, str(FOLDER.parents[1] / "tools" / "train_example.py"), "--steps", "0", "-o"]
    refused = run_process([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--steps" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_training_tool_is_deterministic_and_leaves_other_files(tmp_path: Path) -> None:
    import torch
    from train_example import run

    threads = torch.get_num_threads()
    digests = []
    try:
        for name in ("one", "two"):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "README.md").write_text("kept")
            written = run(steps=1, seed=5, threads=threads, peak=1e-3, output=folder, eval_chars=2_100)
            digests.append(hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())
            assert (folder / "README.md").read_text() == "kept"
            assert json.loads((folder / "metrics.json").read_text()) == written
    finally:
        torch.use_deterministic_algorithms(False)
    assert digests[0] == digests[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
