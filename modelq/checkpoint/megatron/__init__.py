"""Checkpoints of Megatron-LM and NeMo, read without torch, megatron or nemo: none of their code, and none of a file's, is executed."""
from modelq.checkpoint.megatron.checkpoint import MegatronCheckpoint, is_megatron

__all__ = ["MegatronCheckpoint", "is_megatron"]
