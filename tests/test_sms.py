"""SMs, dtypes and lowerings of GPU targets in a configuration: what is refused names the limit and the
choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_export.config import BuildConfig, load_config_file, merge
from moe_export.costs.moe_kernels import TRT_MOE_SMS
from moe_export.errors import UsageError
from moe_export.sms import FIRST_SM, GPU_TARGETS, SMS, sms_of

RTX: dict[str, Any] = {"target": "tensorrt-rtx"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**RTX, "sm": (81,)}, "sm: unknown value 81; choices: 75, 80, 86, 89, 120, 121"),
        ({**RTX, "sm": (90,)}, r"no SM90 \(H100, H200\); choices: .*; target tensorrt has it"),
        ({**RTX, "sm": (80, 80)}, "sm: 80 is named twice"),
        ({**RTX, "sm": ()}, "sm: an empty list"),
        ({**RTX, "sm": 80}, r"sm: expected a list of whole numbers, as in \[80, 89\], got 80"),
        ({**RTX, "sm": ("80",)}, "sm: expected whole numbers"),
        ({"sm": (80,)}, "target onnxruntime builds for no GPU; .*tensorrt-rtx, tensorrt"),
        ({**RTX, "sm": (75, 89), "dtype": "bfloat16"}, r"SM75 \(T4.* bfloat16, which needs SM80"),
        ({**RTX, "sm": (75,)}, r"SM75 \(T4.* float32, which needs SM80 .*; dtypes of SM75: float16"),
        ({**RTX, "sm": (80,), "dtype": "float8"}, "SM80 .* does not compute in float8, which needs SM89"),
        ({**RTX, "sm": (89,), "dtype": "nvfp4"}, "nvfp4, which needs SM120 or later"),
        ({**RTX, "sm": (89,), "dtype": "float8"}, "writes no float8 .*choices: float32, float16"),
        ({**RTX, "dtype": "fp16"}, "dtype: unknown value 'fp16'"),
        ({**RTX, "expert_lowering": "fused"}, "fused is for onnxruntime, portable; .* auto, native, plugin"),
        ({"expert_lowering": "plugin"}, "plugin is for tensorrt-rtx, tensorrt; .* auto, fused"),
        ({**RTX, "quantize": "int8"}, "quantize: int8 needs target onnxruntime"),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BuildConfig(**changes)


def test_accepted() -> None:
    assert BuildConfig(target="tensorrt-rtx", sm=[120, 80]).sm == (80, 120)  # type: ignore[arg-type]
    assert BuildConfig(target="tensorrt", sm=(90, 100), dtype="bfloat16", expert_lowering="plugin").sm == (
        90,
        100,
    )
    assert BuildConfig(target="tensorrt-rtx").sm is None
    assert set(TRT_MOE_SMS) <= set(sms_of("tensorrt")), "where TensorRT's MoE layer can be asked for"


def test_a_file_may_leave_the_target_to_a_flag(tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    path.write_text('[build]\nsm = [80]\nexpert_lowering = "native"\n')
    assert merge(load_config_file(path), {"target": "tensorrt"}).sm == (80,)
    with pytest.raises(UsageError, match="builds for no GPU"):
        merge(load_config_file(path), {})
    path.write_text('[build]\ntarget = "tensorrt-rtx"\nsm = [90]\n')
    with pytest.raises(UsageError, match=r"b.toml: sm in \[build\]: target tensorrt-rtx has no SM90"):
        load_config_file(path)


def test_every_target_has_sms_and_every_dtype_a_first_one() -> None:
    for target in GPU_TARGETS:
        assert sms_of(target) == tuple(sorted(sms_of(target)))
        assert set(FIRST_SM[target].values()) <= set(SMS)
    assert set(sms_of("tensorrt-rtx")) < set(sms_of("tensorrt"))
