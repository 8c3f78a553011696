"""The configuration names exactly the baselines that the benchmark has."""

from __future__ import annotations

from moe_export import bench, config


def test_baselines_of_the_configuration_are_those_of_the_benchmark() -> None:
    assert tuple(bench.BASELINES) == config.BASELINES
