"""Compressed embedding tables as torch modules.

:class:`Embedding` and :class:`EmbeddingBag` take the place of torch's own. They hold the codes of a table (mapped from
its file where there is one) and decode the rows that are asked for, by the compiled core or, where gradients, another
device or a compiler are at work, by plain torch.
"""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("vqrs.torch needs torch 2.4 or newer: pip install 'vqrs[torch]'") from error

from vqrs.torch import onnx
from vqrs.torch.distillation import Distillation, distill, output_loss
from vqrs.torch.embedding import Embedding, EmbeddingBag
from vqrs.torch.model import compress_, decompress_
from vqrs.torch.pretrained import from_pretrained, load_state_dict_, register_with_transformers, save_pretrained
from vqrs.torch.report import CompressedModule, CompressionReport
from vqrs.torch.tied import ScaledEmbedding, TiedLinear
from vqrs.torch.trained import TrainedEmbedding, TrainingHooks, methods
from vqrs.torch.training import EMACodebooks, Reassignment

__all__ = [
    "CompressedModule",
    "CompressionReport",
    "Distillation",
    "EMACodebooks",
    "Embedding",
    "EmbeddingBag",
    "Reassignment",
    "ScaledEmbedding",
    "TiedLinear",
    "TrainedEmbedding",
    "TrainingHooks",
    "compress_",
    "decompress_",
    "distill",
    "from_pretrained",
    "load_state_dict_",
    "methods",
    "onnx",
    "output_loss",
    "register_with_transformers",
    "save_pretrained",
]
