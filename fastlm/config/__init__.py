"""Configuration: frozen dataclasses of plain values, one for each command, and the presets."""

from fastlm.config.commands import (
    ChatConfig,
    DataInspectConfig,
    DataPrepareConfig,
    DoctorConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    KernelsConfig,
    LmEvalConfig,
    PipelineConfig,
    PlanConfig,
    ReportConfig,
    Sampling,
    WatchConfig,
)
from fastlm.config.model import PRESETS, ModelConfig
from fastlm.config.training import (
    DpoConfig,
    OptimConfig,
    PretrainConfig,
    SftConfig,
    StageConfig,
    TuningConfig,
)

__all__ = [
    "PRESETS",
    "ChatConfig",
    "DataInspectConfig",
    "DataPrepareConfig",
    "DoctorConfig",
    "DpoConfig",
    "EvalConfig",
    "ExportConfig",
    "GenerateConfig",
    "ImportConfig",
    "KernelsConfig",
    "LmEvalConfig",
    "ModelConfig",
    "OptimConfig",
    "PipelineConfig",
    "PlanConfig",
    "PretrainConfig",
    "ReportConfig",
    "Sampling",
    "SftConfig",
    "StageConfig",
    "TuningConfig",
    "WatchConfig",
]
