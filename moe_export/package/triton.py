"""Model repositories of Triton Inference Server.

Sources for every field: Triton's ``model_config.proto``; the ONNX Runtime backend (custom op libraries by
``model_operations``); the TensorRT backend's ``docs/multi_device.md`` and the code beside it (one plan per
rank: ``model.plan.rank<r>``, ``KIND_MODEL``, one optimisation profile, the same inputs for every rank, output
of rank 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe_export.errors import BundleError, EnvironmentLacksError, UsageError
from moe_export.package import triton_readme
from moe_export.package.base import PackageFormat, PackageOptions, Plan, check_name
from moe_export.package.cpu_library import CpuLibrary, cpu_library
from moe_export.package.text_format import Enum, Message, to_text
from moe_export.schema import EngineFile, Manifest, TensorSpec

if TYPE_CHECKING:
    from moe_export.bundle import Bundle

VERSION = "1"
"""The only version of the model. All files lie in its folder: Triton takes other folders for versions."""
OWN = f"{VERSION}/moe-export"
"""Manifest and tokenizer; the server reads neither."""
TYPES = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32",
    "int64": "TYPE_INT64", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
}  # fmt: skip
_CPU_RANKS = (
    "is divided over {ranks} ranks that exchange by MPI, and Triton starts no MPI ranks; serve it with "
    "`mpiexec "
    "-n {ranks} moe-export run {path}`, or build it for Triton with --ep 1, or with --target tensorrt (one "
    "GPU per rank, exchange by NCCL)"
)


class TritonFormat(PackageFormat):
    """A repository with one model."""

    name = "triton"
    summary = "model repository of Triton Inference Server: ONNX Runtime, TensorRT, TensorRT on several GPUs"

    def plan(self, bundle: Bundle, options: PackageOptions) -> Plan:
        """What the repository holds. See :meth:`PackageFormat.plan`."""
        manifest = bundle.manifest
        model = options.name or check_name(bundle.path.resolve().name)
        _check_target(bundle)
        if manifest.target == "onnxruntime":
            return _onnx_plan(bundle, model, options)
        ranks = manifest.expert_parallel
        return (
            _tensorrt_plan(bundle, model, options)
            if ranks is None
            else _ranks_plan(bundle, model, options, ranks.ranks)
        )


def _check_target(bundle: Bundle) -> None:
    manifest, path = bundle.manifest, bundle.path
    if manifest.target == "portable":
        raise UsageError(
            f"bundle {path} is portable, so lowered for no runtime: it would be slow without saying so; "
            "build the "
            "model with --target onnxruntime or --target tensorrt"
        )
    if manifest.target == "tensorrt-rtx":
        raise UsageError(
            f"bundle {path} has plans of TensorRT for RTX, and Triton's TensorRT backend loads those of "
            "TensorRT "
            "only; build the model with --target tensorrt"
        )
    if manifest.target not in ("onnxruntime", "tensorrt"):
        raise UsageError(
            f"bundle {path} is for target {manifest.target!r}; Triton has backends for onnxruntime, tensorrt"
        )
    if manifest.expert_parallel is not None and manifest.target == "onnxruntime":
        text = _CPU_RANKS.format(ranks=manifest.expert_parallel.ranks, path=path)
        raise UsageError(f"bundle {path} {text}")
    if manifest.state != "ready":
        raise EnvironmentLacksError(
            f"bundle {path} has no finished plans yet; finish it first, on a machine with the GPU: python "
            "build_engine.py in its folder"
        )


def _onnx_plan(bundle: Bundle, model: str, options: PackageOptions) -> Plan:
    manifest = bundle.manifest
    for asked, value in (("gpus", options.gpus), ("sm", options.sm)):
        if value is not None:
            raise UsageError(f"{asked}: bundle {bundle.path} runs on CPUs; leave {asked} out")
    if manifest.model_file != "model.onnx":
        raise BundleError(f"bundle {bundle.path}: model_file is {manifest.model_file!r}, expected model.onnx")
    files = {f"{model}/{VERSION}/{path}": bundle.path / path for path in _model_files(manifest)}
    library, notes = cpu_library(bundle.model_path)
    head: Message = [
        ("platform", "onnxruntime_onnx"),
        ("backend", "onnxruntime"),
        ("default_model_filename", "model.onnx"),
    ]
    tail: Message = [("instance_group", [("count", 1), ("kind", Enum("KIND_CPU"))])]
    # ONNX Runtime would keep a memory plan for every input shape, and decoding makes a new one each step.
    tail.append(_parameter("enable_mem_pattern", "0"))
    if library is not None:
        inside = f"{model}/{VERSION}/{library.path.name}"
        files[inside] = library.path
        where = f"{options.server_path.rstrip('/')}/{inside}"
        tail.append(("model_operations", [("op_library_filename", where)]))
    notes += tuple(_notes(manifest))
    return _finish(bundle, model, "onnxruntime", files, {}, (head, tail), notes, options, library)


def _tensorrt_plan(bundle: Bundle, model: str, options: PackageOptions) -> Plan:
    manifest = bundle.manifest
    if options.sm is not None:
        raise UsageError("sm: a repository of one rank holds the plans of all SMs; leave sm out")
    files: dict[str, Path] = {}
    head: Message = [("platform", "tensorrt_plan"), ("backend", "tensorrt")]
    for engine in manifest.engines:
        name = Path(engine.file).name
        files[f"{model}/{VERSION}/{name}"] = bundle.path / engine.file
        capability = f"{engine.sm // 10}.{engine.sm % 10}"
        head.append(("cc_model_filenames", [("key", capability), ("value", name)]))
    if not files:
        raise BundleError(f"bundle {bundle.path} lists no plans; build it again")
    group: Message = [("count", 1), ("kind", Enum("KIND_GPU"))]
    if options.gpus is not None:
        group.append(("gpus", options.gpus))
    profiles = _profiles(manifest.engines)
    if profiles > 1:  # unnamed, Triton would use the first only, which takes one new token
        group += [("profile", str(index)) for index in range(profiles)]
    tail: Message = [("instance_group", group)]
    notes = (*_versions(manifest.engines), *_notes(manifest))
    return _finish(bundle, model, "tensorrt", files, {}, (head, tail), notes, options)


def _profiles(engines: tuple[EngineFile, ...]) -> int:
    """Profiles that every plan has; Triton's configuration names them for all plans at once."""
    counts = {len(engine.profiles) for engine in engines}
    if len(counts) > 1:
        text = ", ".join(f"SM{engine.sm} has {', '.join(engine.profiles)}" for engine in engines)
        raise UsageError(
            f"the plans have different profiles ({text}), and Triton's configuration names profiles for all "
            "plans "
            "at once; build a bundle for each SM"
        )
    return counts.pop()


def _ranks_plan(bundle: Bundle, model: str, options: PackageOptions, ranks: int) -> Plan:
    manifest = bundle.manifest
    parallel = manifest.expert_parallel
    assert parallel is not None  # the caller looked
    if parallel.mode != "allreduce":
        raise UsageError(
            f"bundle {bundle.path} divides the sequences over its ranks (mode {parallel.mode}), and Triton "
            "gives "
            "every rank all of them and takes the answer of rank 0; build it with --ep-mode allreduce"
        )
    gpus = options.gpus if options.gpus is not None else tuple(range(ranks))
    if len(gpus) != ranks:
        raise UsageError(f"gpus: {len(gpus)} named, and the bundle has {ranks} ranks; name one for each rank")
    _require_common_load(bundle)
    sm = _one_sm(bundle, options)
    files, links = {}, {}
    for rank in range(ranks):
        folder = f"{parallel.folder(rank)}/"
        found = [e for e in manifest.engines if e.sm == sm and e.file.startswith(folder)]
        if len(found) != 1:
            raise BundleError(
                f"bundle {bundle.path} has {len(found)} plans of rank {rank} for SM{sm} in {folder}, "
                "expected one; "
                "build it again"
            )
        if len(found[0].profiles) != 1:
            raise UsageError(
                f"{found[0].file} has the profiles {', '.join(found[0].profiles)}, and Triton runs ranks "
                "with one "
                "profile only; build the bundle with one profile for all shapes"
            )
        files[f"{model}/{VERSION}/model.plan.rank{rank}"] = bundle.path / found[0].file
    # The server looks for the file of this name before the backend looks for those of the ranks.
    links[f"{model}/{VERSION}/model.plan"] = "model.plan.rank0"
    head: Message = [
        ("platform", "tensorrt_plan"),
        ("backend", "tensorrt"),
        ("default_model_filename", "model.plan"),
    ]
    tail: Message = [
        ("instance_group", [("count", 1), ("kind", Enum("KIND_MODEL"))]),
        _parameter("enable_multi_device", "true"),
        _parameter("multi_device_gpus", ",".join(map(str, gpus))),
        _parameter("multi_device_per_rank_engines", "true"),
    ]
    needs = (
        f"needs {ranks} GPUs of SM{sm} (ids {', '.join(map(str, gpus))}), TensorRT 11 or later, NCCL, and a "
        "TensorRT "
        "backend compiled with TRITON_ENABLE_TENSORRT_MULTI_DEVICE=ON",
    )
    engines = tuple(e for e in manifest.engines if e.sm == sm)
    notes = (*needs, *_versions(engines), *_notes(manifest))
    return _finish(bundle, model, "tensorrt", files, links, (head, tail), notes, options)


def _require_common_load(bundle: Bundle) -> None:
    """A client sees what rank 0 says of its buckets, so that must be about the buckets of all ranks.

    Raises:
        BundleError: it is not, and a void answer would look like a good one.
    """
    name = next((spec.name for spec in bundle.manifest.io.outputs if spec.role == "load"), None)
    if name is None:
        return
    import onnx

    graph = onnx.load(bundle.model_path, load_external_data=False).graph
    made_by = {output: node for node in graph.node for output in node.output}
    node = made_by.get(name)
    while node is not None and node.op_type in ("Cast", "Identity", "Reshape"):
        node = made_by.get(node.input[0])
    if node is None or node.op_type != "DistCollective":
        raise BundleError(
            f"bundle {bundle.path}: the output {name!r} is of one rank's buckets only, and Triton returns "
            "rank 0's; "
            "build it again"
        )


def _one_sm(bundle: Bundle, options: PackageOptions) -> int:
    """Whose plans of the ranks are taken: Triton finds them by one name, whatever the GPU."""
    known = sorted({engine.sm for engine in bundle.manifest.engines})
    choices = ", ".join(str(n) for n in known) or "none"
    if options.sm is not None:
        if options.sm not in known:
            raise UsageError(f"sm: the bundle has no plans for SM{options.sm}; choices: {choices}")
        return options.sm
    if len(known) != 1:
        raise UsageError(
            f"sm: the bundle has plans for several SMs ({choices}), a repository with ranks holds those of "
            "one; "
            "say which with --sm"
        )
    return known[0]


def _model_files(manifest: Manifest) -> Iterator[str]:
    """Files of an ONNX Runtime bundle that the model is made of."""
    tokenizer = manifest.text.tokenizer if manifest.text is not None else None
    for entry in manifest.files:
        top = entry.path.partition("/")[0]
        if top not in (tokenizer, "evidence"):
            yield entry.path


def _parameter(key: str, value: str) -> tuple[str, Message]:
    return "parameters", [("key", key), ("value", [("string_value", value)])]


def _tensor(spec: TensorSpec) -> Message:
    """One input or output. Free dimensions are -1; a scalar is a tensor of one number, reshaped."""
    if spec.dtype not in TYPES:
        raise UsageError(f"{spec.name!r} is {spec.dtype}, which Triton has no type for")
    dims = tuple(-1 if isinstance(d, str) else d for d in spec.shape)
    fields: Message = [("name", spec.name), ("data_type", Enum(TYPES[spec.dtype])), ("dims", dims or (1,))]
    return fields if dims else [*fields, ("reshape", [])]


def _notes(manifest: Manifest) -> Iterator[str]:
    """What whoever serves it must know, a line each."""
    io = manifest.io
    if io.cache_inputs:
        yield (
            "every request carries the KV cache as inputs and every answer as outputs: the client keeps it, "
            "best in shared memory"
        )
    if any(spec.role == "capacity" for spec in io.inputs):
        yield (
            "an answer whose load is more than the capacity that was sent is void: the client sends the "
            "request "
            "again with a larger one, as client.py does"
        )
    if manifest.rows_apart:
        yield "several new tokens after a past: one sequence per request"


def _versions(engines: tuple[EngineFile, ...]) -> Iterator[str]:
    versions = sorted({engine.version for engine in engines})
    yield (
        f"the plans are read by the TensorRT that built them only: the server needs {', '.join(versions)}; "
        "not run "
        "on a GPU"
    )


def _finish(
    bundle: Bundle,
    model: str,
    backend: str,
    files: dict[str, Path],
    links: dict[str, str],
    fields: tuple[Message, Message],
    notes: tuple[str, ...],
    options: PackageOptions,
    library: CpuLibrary | None = None,
) -> Plan:
    """The plan with what all kinds have: configuration, manifest, tokenizer, README and client."""
    manifest = bundle.manifest
    head, tail = fields
    config: Message = [("name", model), *head, ("max_batch_size", 0)]
    config += [("input", _tensor(spec)) for spec in manifest.io.inputs]
    config += [("output", _tensor(spec)) for spec in manifest.io.outputs]
    config += tail
    files[f"{model}/{OWN}/manifest.json"] = bundle.path / "manifest.json"
    if bundle.tokenizer_path is not None:
        folder = bundle.tokenizer_path
        names = sorted(p.name for p in folder.iterdir() if p.is_file())
        files |= {f"{model}/{OWN}/tokenizer/{name}": folder / name for name in names}
    if triton_readme.has_client(manifest):
        files["client.py"] = Path(__file__).parent / "triton_client.py"
    texts = {
        f"{model}/config.pbtxt": to_text(config),
        "README.md": triton_readme.text(manifest, model, backend, notes, options, library),
    }
    return Plan(model, backend, files, texts, links, notes)
