"""Models: weights in and out. Where they come from, 8 bits, cutting, student and teacher, saving."""

from mskd.models.batch import SequenceBatch
from mskd.models.folder.saving import save_model
from mskd.models.heads import (
    FAMILIES,
    Family,
    Head,
    backbone,
    check_positions,
    decoder_of,
    family_of,
    head_of,
    layers_of,
)
from mskd.models.load import copy_as, load_model
from mskd.models.size import Size, num_layers, num_parameters, size_of
from mskd.models.sources import content_hash, resolve_source
from mskd.models.student import Student
from mskd.models.teacher import Teacher, check_offload, check_precision, load_teacher
from mskd.models.tokenizer import check_ids, check_same_tokenizer, load_tokenizer

__all__ = [
    "FAMILIES", "Family", "Head", "SequenceBatch", "Size", "Student", "Teacher", "backbone", "check_ids",
    "check_offload", "check_positions", "check_precision", "check_same_tokenizer", "content_hash", "copy_as",
    "decoder_of", "family_of", "head_of", "layers_of", "load_model", "load_teacher", "load_tokenizer", "num_layers",
    "num_parameters", "resolve_source", "save_model", "size_of",
]  # fmt: skip
