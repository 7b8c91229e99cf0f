"""Weights in and out: files (safetensors, pickles), layouts (Hugging Face, Meta), export."""
from weights.export import save_pretrained
from weights.files import (Source, Weights, check_beside, check_sum, read_safetensors, stored_sum,
                           write_safetensors)
from weights.layouts import read_config, read_weights
from weights.loading import check_weights, load_pretrained, materialize, stored_dtype
