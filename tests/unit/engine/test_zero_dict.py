"""Every key that DeepSpeed is told."""

import json
from pathlib import Path

import pytest

from lmscale.base.errors import ConfigError
from lmscale.config.schema import EngineConfig
from lmscale.engine.deepspeed.setup import start_deepspeed, zero_dict

GOLDEN = Path(__file__).parents[2] / "golden"
SEVEN_BILLION = 7_000_000_000


def told(stage: int, precision: str, offload: str = "none", parameters: int = SEVEN_BILLION):
    engine = EngineConfig(kind="deepspeed", zero_stage=stage, precision=precision, offload=offload)
    return zero_dict(engine, parameters=parameters)


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        (0, "bf16", "none"),
        (1, "bf16", "none"),
        (1, "fp32", "optimizer"),
        (2, "bf16", "none"),
        (2, "fp16", "none"),
        (2, "bf16", "optimizer"),
        (3, "bf16", "none"),
        (3, "fp32", "none"),
        (3, "bf16", "all"),
    ],
)
def test_the_deepspeed_dict_is_the_recorded_one(stage, precision, offload):
    words = [str(stage), precision] + [offload] * (offload != "none")
    golden = GOLDEN / f"deepspeed_{'_'.join(words)}.json"
    assert told(stage, precision, offload) == json.loads(golden.read_text())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_precisions_differ_in_what_is_enabled_and_nothing_else(stage):
    fp32 = told(stage, "fp32")
    for precision in ("bf16", "fp16"):
        low = told(stage, precision)
        assert {key for key in fp32 if fp32[key] != low[key]} == {precision}


def test_stage_0_computes_with_copies_that_deepspeed_knows_nothing_of():
    assert told(0, "fp32") == told(0, "bf16") == told(0, "fp16")


@pytest.mark.parametrize(("parameters", "bucket"), [(1, 2), (1001, 1000), (10**9, 1 << 24)])
def test_buckets_are_even_and_no_larger_than_the_model(parameters, bucket):
    zero = told(2, "bf16", parameters=parameters)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket


def test_nvme_is_refused_before_anything_is_built():
    with pytest.raises(ConfigError, match="libaio-dev"):
        start_deepspeed(None, None, None, EngineConfig(kind="deepspeed", offload="nvme"))
