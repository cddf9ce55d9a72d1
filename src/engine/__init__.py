"""Speed. Takes objects of transformers and PEFT and plain numbers, imports nothing else of src. Contract: README.md."""

from src.engine.attention import ATTENTION, has_varlen, register, rows_stay_apart
from src.engine.callbacks import LogFile, SampleAnswers, TimedCheckpoints
from src.engine.decode import generate
from src.engine.faults import TrainingError
from src.engine.fuse import fused
from src.engine.planning import Plan, PlanError, plan
from src.engine.trainer import FastTrainer
from src.engine.weights import dequantize, dequantized_fits, free_cuda

__all__ = [
    "ATTENTION", "FastTrainer", "LogFile", "Plan", "PlanError", "SampleAnswers", "TimedCheckpoints", "TrainingError",
    "dequantize", "dequantized_fits", "free_cuda", "fused", "generate", "has_varlen", "plan", "register",
    "rows_stay_apart",
]  # fmt: skip

register()  # makes attn_implementation="varlen" known to transformers
