"""A whole run as one frozen value."""

from pydantic import Field

from lmscale.config.cluster import ClusterConfig
from lmscale.config.corpora import DataConfig, EvalConfig
from lmscale.config.fields import Section
from lmscale.config.sections import (
    CheckpointConfig,
    EngineConfig,
    LogConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)


class RunConfig(Section):
    """Everything a run is. Made by lmscale.config.load.load, which also checks and resolves it."""

    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)


SECTIONS = tuple(RunConfig.model_fields)
