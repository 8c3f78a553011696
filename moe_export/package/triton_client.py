"""Greedy generation by a packaged model on a running Triton Inference Server.

    python client.py --ids 1,5,9 --new 16
    python client.py --text "def f(" --new 32 --url localhost:8001        (needs tokenizers, too)

Needs numpy and tritonclient[grpc]; the model's inputs are in the manifest beside its files. Also to read: it
shows what a client sends first (an empty past), what it keeps between steps (the cache), and when an answer
is void (experts' buckets that were too small).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

DTYPES = {  # the client's arrays; bfloat16 travels as such and is float32 here
    "int64": ("INT64", np.int64), "int32": ("INT32", np.int32), "bool": ("BOOL", np.bool_),
    "float32": ("FP32", np.float32), "float16": ("FP16", np.float16), "bfloat16": ("BF16", np.float32),
}  # fmt: skip


class Model:
    """A model of the repository on the server at ``url``. One sequence at a time."""

    def __init__(self, repository: Path, url: str) -> None:
        self.name = json.loads((repository / "package.json").read_text(encoding="utf-8"))["model"]
        self.own = repository / self.name / "1" / "moe-export"
        manifest = json.loads((self.own / "manifest.json").read_text(encoding="utf-8"))
        self.inputs = manifest["io"]["inputs"]
        self.outputs = manifest["io"]["outputs"]
        self.text = manifest["text"]
        self.longest = manifest["limits"]["max_sequence"]
        self.share = max((x["top_k"] / x["num_experts"] for x in manifest["moe_layers"]), default=1.0)
        self.client = triton.InferenceServerClient(url)

    def generate(self, ids: list[int], count: int) -> list[int]:
        """The ``count`` most probable tokens after ``ids``, one after the other; fewer where the model "
        "ends."""
        if self.longest is not None and len(ids) + count > self.longest:
            raise SystemExit(f"{len(ids)} + {count} tokens are more than the model's {self.longest}")
        cache = {spec["name"]: empty(spec) for spec in self.inputs if spec["role"] == "cache"}
        new, past = list(ids), 0
        made: list[int] = []
        while len(made) < count:
            results = self.run(np.array([new], np.int64), past, cache)
            past += len(new)
            cache = {
                spec["name"]: results[spec["pair"]] for spec in self.inputs if spec["role"] == "cache"
            }
            made.append(int(results["logits"][0, -1].argmax()))
            if made[-1] in self.text["eos_token_ids"]:
                break
            new = made[-1:]
            if not cache:  # a model without a cache reads everything again
                new, past = [*ids, *made], 0
        return made

    def run(self, ids: Any, past: int, cache: dict[str, Any]) -> dict[str, Any]:
        """All outputs for ``ids`` [1, new] after ``past`` tokens."""
        tokens = ids.shape[1]
        feeds = dict(cache)
        for spec in self.inputs:
            if spec["role"] == "token_ids":
                feeds[spec["name"]] = ids
            elif spec["role"] == "mask":
                feeds[spec["name"]] = np.ones((1, past + tokens))
            elif spec["role"] == "positions":
                feeds[spec["name"]] = np.arange(past, past + tokens)[None]
        marker = next((spec["name"] for spec in self.inputs if spec["role"] == "capacity"), None)
        load = next((spec["name"] for spec in self.outputs if spec["role"] == "load"), None)
        if marker is None or load is None:
            return self.send(feeds)
        capacity = min(tokens, 8 + int(2 * tokens * self.share))
        while True:
            results = self.send({**feeds, marker: np.zeros(capacity)})
            most = int(results[load].max())
            if most <= capacity:
                return results
            capacity = min(tokens, max(most, 2 * capacity))

    def send(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """One request."""
        inputs = []
        for spec in self.inputs:
            kind, dtype = DTYPES[spec["dtype"]]
            array: Any = np.ascontiguousarray(feeds[spec["name"]], dtype)
            value = triton.InferInput(spec["name"], list(array.shape), kind)
            value.set_data_from_numpy(array)
            inputs.append(value)
        wanted = [triton.InferRequestedOutput(spec["name"]) for spec in self.outputs]
        answer = self.client.infer(self.name, inputs, outputs=wanted)
        return {spec["name"]: answer.as_numpy(spec["name"]) for spec in self.outputs}


def empty(spec: dict[str, Any]) -> Any:
    """The first value of a cache: no tokens of keys and values, zeros of a state."""
    sizes = {"batch": 1, "past": 0}
    shape = [d if isinstance(d, int) else sizes[d] for d in spec["shape"]]
    return np.zeros(shape, DTYPES[spec["dtype"]][1])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="localhost:8001", help="gRPC address of the server")
    parser.add_argument("--new", type=int, default=16, help="tokens to make")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--ids", help="token ids of the prompt, as in 1,5,9")
    given.add_argument("--text", help="the prompt; needs the package tokenizers and a model with a tokenizer")
    asked = parser.parse_args()
    model = Model(Path(__file__).resolve().parent, asked.url)
    if asked.ids is not None:
        made = model.generate([int(part) for part in asked.ids.split(",")], asked.new)
        print(",".join(map(str, made)))
        return 0
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.own / "tokenizer" / "tokenizer.json"))
    made = model.generate(tokenizer.encode(asked.text).ids, asked.new)
    print(tokenizer.decode(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
