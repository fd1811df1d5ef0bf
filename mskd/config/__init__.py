"""What a run is and where it runs: the configuration, its phases, the machine's hardware, the recipes."""

from mskd.config.problems import ConfigError
from mskd.config.schema import (
    RECIPES,
    Batching,
    Config,
    DataConfig,
    DataSettings,
    EvalConfig,
    EvaluateConfig,
    ModelConfig,
    Precision,
    RunConfig,
    TrainConfig,
    all_paths,
    load,
    parse,
    recipes,
)
from mskd.config.toml import to_toml, toml_value

__all__ = [
    "RECIPES", "Batching", "Config", "ConfigError", "DataConfig", "DataSettings", "EvalConfig", "EvaluateConfig",
    "ModelConfig", "Precision", "RunConfig", "TrainConfig", "all_paths", "load", "parse", "recipes", "to_toml",
    "toml_value",
]  # fmt: skip
