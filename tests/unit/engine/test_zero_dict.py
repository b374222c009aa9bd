"""Every key that DeepSpeed is told."""

import json
from pathlib import Path

import pytest

from lmscale.config.sections import EngineConfig
from lmscale.engine.zero_dict import zero_dict

GOLDEN = Path(__file__).parents[2] / "golden" / "deepspeed_bf16.json"


def test_the_deepspeed_dict_is_the_recorded_one():
    engine = EngineConfig(kind="deepspeed", precision="bf16")
    assert zero_dict(engine, parameters=7_000_000_000) == json.loads(GOLDEN.read_text())


def test_fp32_differs_in_one_key():
    fp32 = zero_dict(EngineConfig(kind="deepspeed", precision="fp32"), parameters=7_000_000_000)
    golden = json.loads(GOLDEN.read_text())
    assert {key for key in golden if golden[key] != fp32[key]} == {"bf16"}


@pytest.mark.parametrize(("parameters", "bucket"), [(1, 2), (1001, 1000), (10**9, 1 << 24)])
def test_buckets_are_even_and_no_larger_than_the_model(parameters, bucket):
    zero = zero_dict(EngineConfig(kind="deepspeed"), parameters=parameters)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket
