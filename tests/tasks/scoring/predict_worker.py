# SPDX-License-Identifier: Apache-2.0
"""Four processes of a layout test: what predict_evo2's runner gives for a FASTA file under several layouts.

Run by test_predict_distributed.py: ``predict_worker.py CHECKPOINT FASTA FOLDER`` saves a file for each layout.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch

from evo2_megatron.runtime.distributed import process_groups
from model.layout_worker import LAYOUTS
from processes import fork

LOADS = ("evo2_megatron.checkpoint.load", "evo2_megatron.model.provider", "evo2_megatron.tasks.scoring.predict")


def predictions(checkpoint, fasta, parallel):
    """Everything that depends on the layout: split logits, gathered logits, pieces, split hidden states."""
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.data.fasta_dataset import FastaDataset
    from evo2_megatron.tasks.scoring.prediction_runner import Runner
    from evo2_megatron.tasks.scoring.prediction_settings import Output, Window

    items = list(FastaDataset(fasta, prepend_bos=True))
    with process_groups(parallel):
        loaded = load_model(checkpoint, parallel=parallel)
        assert loaded.provider.sequence_parallel == parallel.splits_activations
        runner = partial(Runner, loaded.model, precision=loaded.precision)
        per_token = Output(log_probs="per_token", base_values=("log_prob", "entropy"))
        embedding = Output(embedding_layers=(-1,))
        return {
            "log_probs": runner(per_token)(items),
            "log_probs_in_pieces": runner(per_token, chunk_length=15)(items),
            "logits": runner(Output())(items),
            "embeddings": runner(embedding, layers=[3])(items),
            "embeddings_in_pieces": runner(embedding, layers=[3], chunk_length=15)(items),
            "pooled": runner(Output(embedding_layers=(3,), pooling=Window(2, 7)), layers=[3])(items),
            "padded": runner(Output(), min_length=100)(items),
        } | {"int8": _in_8_bits(checkpoint, parallel, items)}


def _in_8_bits(checkpoint, parallel, items):
    """Per-base log-probabilities of the model with weights in 8 bits."""
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.tasks.scoring.prediction_runner import Runner
    from evo2_megatron.tasks.scoring.prediction_settings import Output

    loaded = load_model(checkpoint, parallel=parallel, provider_overrides={"quantize_weights": "int8"})
    return Runner(loaded.model, Output(log_probs="per_token"), precision=loaded.precision)(items)


def save(checkpoint, fasta, parallel, output):
    results = predictions(checkpoint, fasta, parallel)
    # the last pipeline stage has them, and of its processes every one
    if results["logits"] is not None:
        partial = output.with_suffix(f".{os.getpid()}")
        torch.save(results, partial)
        partial.replace(output)


if __name__ == "__main__":
    for name, layout in LAYOUTS.items():
        fork(4, save, Path(sys.argv[1]), Path(sys.argv[2]), layout, Path(sys.argv[3]) / f"{name}.pt", loads=LOADS)
