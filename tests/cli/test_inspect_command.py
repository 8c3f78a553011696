"""``moe-export inspect`` on configurations and own modules."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from moe_export.cli.main import cli

CONFIG = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 100, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def test_configuration_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    result = CliRunner().invoke(cli, ["inspect", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    parameters = found["parameters"]
    assert parameters["active"] == parameters["total"] - 2 * 2 * (3 * 16 * 32)
    assert parameters["active_without_embeddings"] == parameters["active"] - 1600
    assert [(layer["index"], layer["num_experts"], layer["top_k"]) for layer in found["moe_layers"]] == [
        (0, 4, 2),
        (1, 4, 2),
    ]
    text = CliRunner().invoke(cli, ["inspect", str(tmp_path)])
    assert text.exit_code == 0
    assert f"({parameters['total']})" in text.stdout
    assert "model.layers.1.mlp.experts" in text.stdout


def test_own_module(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Block(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.top_k = 1\n"
        "        self.gate = torch.nn.Linear(4, 3)\n"
        "        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))\n"
        "def build():\n"
        "    return Block(), {'x': torch.zeros(2, 4)}, {'x': {0: 'batch'}}\n"
    )
    result = CliRunner().invoke(cli, ["inspect", f"{tmp_path}/net.py:build", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["kind"] == "module"
    assert found["parameters"]["total"] == 15 + 3 * 20
    assert found["parameters"]["active"] == 15 + 20


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtrall"}')
    result = CliRunner().invoke(cli, ["inspect", str(tmp_path)])
    assert result.exit_code == 2
    assert "nearest: mixtral" in result.stderr
    result = CliRunner().invoke(cli, ["inspect", f"{tmp_path}/none.py:build"])
    assert result.exit_code == 2
    assert "none.py: no such file" in result.stderr
