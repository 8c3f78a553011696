"""Train the byte-level Mixtral that ships in ``examples/byte-mixtral``: 3.4 M parameters, minutes on 2 cores.

Trained on the source of Python's own standard library; measured on the files that were held out
(``tools/heldout_text.py``). Writes weights in bfloat16, configs, a byte tokenizer and ``metrics.json``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from heldout_text import heldout_text, stdlib_sources

from moe_export.errors import MoeExportError, UsageError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import MixtralConfig, MixtralForCausalLM

PAD, BOS, EOS = 256, 257, 258
SPECIALS = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}
CONTEXT = 2048
"""``max_position_embeddings``: the longest sequence the model was trained for."""
AUX_LOSS = 0.15
EVAL_CHARS, EVAL_SEED, EVAL_WINDOW = 65_536, 0, 512
"""``metrics.json`` is about ``heldout_text(EVAL_CHARS, EVAL_SEED)`` in windows of so many tokens."""
QUICK_CHARS = 8_192
"""Length of its beginning that a quick check measures."""


@dataclass(frozen=True)
class Stage:
    """A part of the training: ``share`` of the steps on ``rows`` windows of ``length`` tokens."""

    share: float
    rows: int
    length: int


STAGES = (Stage(0.75, 8, 256), Stage(0.20, 2, 1024), Stage(0.05, 1, CONTEXT))
"""Short windows first, because they are cheap; long ones last, so that every position is trained."""


def byte_tokenizer() -> Tokenizer:
    """256 byte tokens (id = byte) and three special ids that no text encodes to; ``<bos>`` is put in front.

    The specials are entries of the vocabulary and not *added tokens*: a text that contains ``<eos>`` encodes
    to its five bytes and comes back unchanged. Decoding drops them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {char: byte for byte, char in bytes_to_unicode().items()} | SPECIALS
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    drop = [decoders.Replace(special, "") for special in SPECIALS]
    tokenizer.decoder = decoders.Sequence([*drop, decoders.ByteLevel()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": CONTEXT,
    "padding_side": "left",
    "split_special_tokens": True,
}


def model_config() -> MixtralConfig:
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=256 + len(SPECIALS),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=AUX_LOSS,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        sliding_window=None,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def token_stream(sources: dict[str, str]) -> torch.Tensor:
    """All files one after the other, each closed by ``<eos>``: int16 [bytes + files]."""
    import numpy as np
    import torch

    end = np.array([EOS], dtype=np.int16)
    parts: list[Any] = []
    for text in sources.values():
        parts += [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int16), end]
    return torch.from_numpy(np.concatenate(parts))


def windows(stream: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """``rows`` windows at random places, each ``<bos>`` and ``length - 1`` tokens: int64 [rows, length]."""
    import torch

    starts = torch.randint(0, len(stream) - length + 1, (rows, 1), generator=generator)
    text = stream[starts + torch.arange(length - 1)].long()
    return torch.cat([torch.full((rows, 1), BOS), text], dim=1)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 4 % of the steps, then half a cosine down to 2 % of the peak."""
    warm_up = max(1, round(0.04 * steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def stage_of(step: int, steps: int) -> Stage:
    """The stage that a step belongs to."""
    end = 0.0
    for stage in STAGES:
        end += stage.share
        if step < round(end * steps):
            return stage
    return STAGES[-1]


def train(
    model: MixtralForCausalLM, stream: torch.Tensor, *, steps: int, seed: int, peak: float
) -> Iterator[float]:
    """Train in place; yields the cross-entropy of every step in nats per token."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.97), eps=1e-9, fused=True)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        stage = stage_of(step, steps)
        ids = windows(stream, stage.rows, stage.length, generator)
        out = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield float(out.loss.detach() - AUX_LOSS * out.aux_loss.detach())
    model.eval()


@dataclass(frozen=True)
class HeldOut:
    """``nats_per_byte`` on a text, and per layer the share of the expert choices that each expert got."""

    nats_per_byte: float
    usage: list[list[float]]

    @property
    def usage_entropy(self) -> list[float]:
        """Per layer: entropy of the shares divided by that of equal shares (1 = all equally used)."""
        return [-sum(s * math.log(s) for s in row if s > 0) / math.log(len(row)) for row in self.usage]


def evaluate(model: MixtralForCausalLM, text: str, length: int) -> HeldOut:
    """Cross-entropy of ``text`` in windows of ``<bos>`` and ``length - 1`` bytes; the rest is left out."""
    import torch
    from torch.nn.functional import cross_entropy

    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    rows = len(data) // (length - 1)
    if rows == 0:
        raise UsageError(f"the text has {len(data)} bytes; one window takes {length - 1}")
    ids = torch.cat([torch.full((rows, 1), BOS), data[: rows * (length - 1)].view(rows, -1)], dim=1)
    experts, top_k = model.config.num_local_experts, model.config.num_experts_per_tok
    counts = torch.zeros(model.config.num_hidden_layers, experts)
    total = 0.0
    with torch.no_grad():
        for chunk in ids.split(max(1, 4096 // length)):
            out = model(input_ids=chunk, output_router_logits=True, use_cache=False)
            logits = out.logits[:, :-1].float().flatten(0, 1)
            total += float(cross_entropy(logits, chunk[:, 1:].flatten(), reduction="sum"))
            for layer, router_logits in enumerate(out.router_logits):
                counts[layer] += router_logits.topk(top_k).indices.flatten().bincount(minlength=experts)
    usage = (counts / counts.sum(1, keepdim=True)).tolist()
    return HeldOut(total / (rows * (length - 1)), usage)


def measure(model: MixtralForCausalLM, chars: int) -> dict[str, Any]:
    """The ``held_out`` part of ``metrics.json``. Leaves the model's weights in bfloat16."""
    import torch

    text = heldout_text(chars, EVAL_SEED)
    before = evaluate(model, text, EVAL_WINDOW)
    model.to(torch.bfloat16)
    in_bfloat16 = evaluate(model, text, EVAL_WINDOW)
    quick_in_bfloat16 = evaluate(model, text[:QUICK_CHARS], EVAL_WINDOW)
    model.float()
    shipped = evaluate(model, text, EVAL_WINDOW)
    quick = evaluate(model, text[:QUICK_CHARS], EVAL_WINDOW)
    by_window = {str(n): round(evaluate(model, text, n).nats_per_byte, 5) for n in (128, 256, 1024, CONTEXT)}
    model.to(torch.bfloat16)
    return {
        "text": {"chars": chars, "seed": EVAL_SEED, "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "window": EVAL_WINDOW,
        "nats_per_byte": {
            "float32_weights": round(before.nats_per_byte, 5),
            "shipped_weights_in_float32": round(shipped.nats_per_byte, 5),
            "shipped_weights_in_bfloat16": round(in_bfloat16.nats_per_byte, 5),
        },
        "nats_per_byte_of_the_beginning": {
            "chars": min(QUICK_CHARS, chars),
            "shipped_weights_in_float32": round(quick.nats_per_byte, 5),
            "shipped_weights_in_bfloat16": round(quick_in_bfloat16.nats_per_byte, 5),
        },
        "nats_per_byte_by_window": by_window,
        "usage_entropy": [round(e, 4) for e in shipped.usage_entropy],
        "usage": [[round(share, 4) for share in row] for row in shipped.usage],
    }


def save(model: MixtralForCausalLM, metrics: dict[str, Any], output: Path) -> None:
    """Write everything beside ``output`` first, then move file by file, so a failure leaves the old files."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)
            os.replace(path, output / path.name)


def run(
    steps: int, seed: int, threads: int, peak: float, output: Path, eval_chars: int = EVAL_CHARS
) -> dict[str, Any]:
    """Train, measure and save; returns what ``metrics.json`` holds."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    model = transformers.MixtralForCausalLM(model_config())
    model.set_experts_implementation("grouped_mm")
    sources = stdlib_sources("training")
    stream = token_stream(sources)
    parameters = sum(p.numel() for p in model.parameters())
    click.echo(f"{parameters} parameters; {len(sources)} files, {len(stream)} tokens; {steps} steps")
    began = time.monotonic()
    recent: list[float] = []
    for step, loss in enumerate(train(model, stream, steps=steps, seed=seed, peak=peak), start=1):
        recent = [*recent[-49:], loss]
        if step % 50 == 0 or step == steps:
            mean = sum(recent) / len(recent)
            click.echo(f"step {step:5d}  {mean:.4f} nats/byte  {time.monotonic() - began:6.1f} s")
    seconds = time.monotonic() - began
    metrics = {
        "parameters": parameters,
        "training": {
            "steps": steps,
            "seed": seed,
            "peak_learning_rate": peak,
            "threads": threads,
            "seconds": round(seconds, 1),
            "tokens": sum(stage_of(s, steps).rows * stage_of(s, steps).length for s in range(steps)),
            "files": len(sources),
            "bytes": len(stream) - len(sources),
            "sha256": hashlib.sha256(stream.numpy().tobytes()).hexdigest(),
        },
        "held_out": measure(model, eval_chars),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    save(model, metrics, output)
    return metrics


@click.command()
@click.option("--steps", default=1400, show_default=True, type=click.IntRange(min=1), help="Optimiser steps.")
@click.option("--seed", default=0, show_default=True, help="Seed of the weights and of the windows' places.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(min=1), help="CPU threads.")
@click.option("--learning-rate", "peak", default=4e-3, show_default=True, help="Peak learning rate.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False))
def main(steps: int, seed: int, threads: int, peak: float, output: Path) -> None:
    """Train the example model and write it, with its tokenizer and metrics.json, into the folder OUTPUT."""
    try:
        metrics = run(steps, seed, threads, peak, output)
    except MoeExportError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(json.dumps(metrics["held_out"]["nats_per_byte"]))
    click.echo(f"usage entropy by layer: {metrics['held_out']['usage_entropy']}")


if __name__ == "__main__":
    main()
