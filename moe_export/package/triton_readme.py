"""The README of a Triton model repository: how to start the server, and what a request must hold."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from moe_export.files import bytes_text
from moe_export.package.base import PackageOptions
from moe_export.package.cpu_library import CpuLibrary
from moe_export.schema import Manifest, TensorSpec

_SIZES = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "float16": 2, "bfloat16": 2, "uint32": 4,
    "int32": 4, "float32": 4, "uint64": 8, "int64": 8, "float64": 8,
}  # fmt: skip
_MEANING = {
    "token_ids": "the new tokens",
    "mask": "1 for every token of past and present, 0 for padding (on the left)",
    "positions": "of the new tokens, counted from 0 without padding",
    "capacity": "its length is the rows per expert's bucket; its values do not matter",
    "load": "tokens of the fullest expert",
    "logits": "of every new token",
    "hidden": "of every new token",
}
_CLIENT_ROLES = {"token_ids", "mask", "positions", "cache", "capacity"}


def has_client(manifest: Manifest) -> bool:
    """Whether ``client.py`` can run this model: one input of token ids, logits, and what it knows beside."""
    roles = [spec.role for spec in manifest.io.inputs]
    outputs = [spec.role for spec in manifest.io.outputs]
    return roles.count("token_ids") == 1 and set(roles) <= _CLIENT_ROLES and "logits" in outputs


def text(
    manifest: Manifest,
    model: str,
    backend: str,
    notes: tuple[str, ...],
    options: PackageOptions,
    library: CpuLibrary | None,
) -> str:
    """The page."""
    return "\n".join(_parts(manifest, model, backend, notes, options, library)) + "\n"


def _parts(
    manifest: Manifest,
    model: str,
    backend: str,
    notes: tuple[str, ...],
    options: PackageOptions,
    library: CpuLibrary | None,
) -> Iterator[str]:
    gpu = backend == "tensorrt"
    yield f"# `{model}`: model repository for Triton Inference Server"
    yield ""
    yield (
        f"Written by moe-export from a bundle of a {manifest.source.class_name} (target {manifest.target}, "
        f"{manifest.dtype}). The server was not run where this was written."
    )
    yield ""
    yield "## Start"
    yield "In this folder, with `IMAGE` an image of Triton Inference Server:"
    yield "```bash"
    yield (
        f"docker run --rm {'--gpus all ' if gpu else ''}--shm-size=1g -p 8000:8000 -p 8001:8001 -p 8002:8002 "
        "\\"
    )
    yield f'  -v "$PWD":{options.server_path}:ro "$IMAGE" \\'
    yield f"  tritonserver --model-repository={options.server_path} --disable-auto-complete-config"
    yield "```"
    yield (
        "`config.pbtxt` says everything, so nothing is left to complete. Without docker: the same "
        "`tritonserver` line"
        f"{', with the path below that config.pbtxt names' if library else ''}."
    )
    yield ""
    yield from _needs(manifest, backend, options, model, library)
    yield from (f"- {note[:1].upper()}{note[1:]}." for note in notes)
    yield ""
    yield from _requests(manifest)
    if has_client(manifest):
        yield "## Client"
        yield "```bash"
        yield "pip install numpy 'tritonclient[grpc]'"
        yield "python client.py --ids 1,2,3 --new 16"
        yield "```"
        yield "generates greedily, one sequence at a time, and is written to be read."
        yield ""
    yield "## Files"
    yield f"- `{model}/config.pbtxt`: the model's configuration."
    yield f"- `{model}/1/`: the model. Large files are hard links to the bundle's own."
    yield f"- `{model}/1/moe-export/`: the bundle's manifest and tokenizer; the server does not read them."
    yield "- `package.json`: all files with their SHA-256. Only folders here are models to the server."


def _needs(
    manifest: Manifest, backend: str, options: PackageOptions, model: str, library: CpuLibrary | None
) -> Iterator[str]:
    yield "## What the server needs"
    if library is not None:
        where = f"{options.server_path.rstrip('/')}/{model}/1/{library.path.name}"
        yield f"- For the op library `{library.path.name}`: {library.needs}."
        yield (
            f"- The library at `{where}`: `config.pbtxt` names it by that path, so the repository must be "
            "mounted at "
            f"`{options.server_path}`. Elsewhere: package again with `--server-path`."
        )
    if backend == "onnxruntime":
        built = manifest.tools.get("onnxruntime", "")
        yield (
            f"- ONNX Runtime {built or 'of the version that built the bundle'} or later: with that version "
            "the bundle "
            "was built and verified; Triton's release notes name the server's. With an older one the model "
            "may load, "
            "and nothing was verified."
        )


def _requests(manifest: Manifest) -> Iterator[str]:
    io, limits = manifest.io, manifest.limits
    yield "## Requests"
    yield "Triton needs every input in every request, and the names and types below."
    yield ""
    yield "| input | type | shape | |"
    yield "|---|---|---|---|"
    yield from (_row(spec) for spec in io.inputs)
    yield ""
    yield "| output | type | shape | |"
    yield "|---|---|---|---|"
    yield from (_row(spec, output=True) for spec in io.outputs)
    yield ""
    largest = [f"at most {limits.max_batch} sequences" if limits.max_batch else ""]
    largest.append(f"at most {limits.max_sequence} tokens, past and new" if limits.max_sequence else "")
    asked = " and ".join(part for part in largest if part)
    if asked:
        yield f"The model takes {asked}. The server does not check that for you."
        yield ""
    yield (
        "`max_batch_size` is 0 and the batch an ordinary dimension (-1): Triton's own batching stacks "
        "requests whose "
        "other dimensions are equal, and sequences of different lengths have masks and caches of different "
        "lengths. "
        "A client that wants a batch pads on the left, masks the padding, and sends one request."
    )
    yield ""
    if io.cache_inputs:
        yield from _cache(io.cache_inputs)
    if any(spec.role == "capacity" for spec in io.inputs):
        yield from _buckets(io.inputs, io.outputs)
    if manifest.rows_apart:
        yield "**Several new tokens after a past**: one sequence per request; more are answered by an error."
        yield ""


def _row(spec: TensorSpec, output: bool = False) -> str:
    meaning = _MEANING.get(spec.role, "")
    if spec.role == "cache":
        when = "the next request's" if output else "cache: the last answer's"
        meaning = f"{when} `{spec.pair}`"
    shape = ", ".join(str(d) for d in spec.shape)
    return f"| `{spec.name}` | {spec.dtype} | [{shape}] | {meaning} |"


def _cache(specs: tuple[TensorSpec, ...]) -> Iterator[str]:
    grows = [spec for spec in specs if "past" in spec.shape]
    states = [spec for spec in specs if "past" not in spec.shape]
    yield "**First request of a sequence (prefill).** The cache inputs are not optional:"
    if grows:
        shape = ["batch" if d == "batch" else 0 if d == "past" else d for d in grows[0].shape]
        yield (
            f"- {_names(grows)}: a past of length 0, an array without elements of shape "
            f"[{', '.join(map(str, shape))}] in the case of `{grows[0].name}`. Triton's own tests send such "
            "inputs to "
            "its ONNX Runtime backend; for the TensorRT backend they do not, so try it first."
        )
    if states:
        yield f"- {_names(states)}: zeros of the shape above."
    yield ""
    yield (
        "**Every later request (decode)**: the new tokens (usually one), the outputs of the request before "
        "as cache "
        "inputs, the mask for past and new tokens."
    )
    yield ""
    each = sum(_bytes(spec) for spec in grows)
    fixed = sum(_bytes(spec) for spec in states)
    size = [f"{bytes_text(each)} per token of the past" if each else "", bytes_text(fixed) if fixed else ""]
    yield (
        f"The cache ({' and '.join(part for part in size if part)}, per sequence) thus travels both ways "
        "with each "
        "request. Beside the server, register it as system or CUDA shared memory; over a network it decides "
        "the speed."
    )
    yield ""


def _buckets(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Iterator[str]:
    marker = next(spec.name for spec in inputs if spec.role == "capacity")
    load = next((spec.name for spec in outputs if spec.role == "load"), "")
    yield (
        f"**Buckets.** `{marker}` is an array whose length is the room per expert, in tokens. An answer is "
        "valid only "
        f"when the largest value of `{load}` is not more than that length; else some tokens found no room, "
        "all of its "
        "outputs are void, and the client must send the request again with at least that length. As many as "
        "there "
        "are tokens always suffice, and cost the most."
    )
    yield ""


def _names(specs: list[TensorSpec]) -> str:
    names = [f"`{spec.name}`" for spec in specs]
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:2])}, ..., {names[-1]}"


def _bytes(spec: TensorSpec) -> int:
    """Of one sequence and, where it grows, one token."""
    return prod(d for d in spec.shape if isinstance(d, int)) * _SIZES.get(spec.dtype, 4)
