# SPDX-License-Identifier: Apache-2.0
"""One process of a layout test: what the runner of predict_evo2 gives for a FASTA file, saved by rank 0.

Run by test_predict_distributed.py under torchrun: ``predict_worker.py CHECKPOINT FASTA OUTPUT``.
"""

import sys
from pathlib import Path

import torch

from evo2_megatron.config import ParallelConfig
from evo2_megatron.runtime.distributed import process_groups, rank, world_size


def predictions(checkpoint, fasta, parallel):
    """Everything that depends on the layout: split logits, gathered logits, pieces, split hidden states."""
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.data.fasta_dataset import FastaDataset
    from evo2_megatron.tasks.prediction_runner import Output, Runner

    items = list(FastaDataset(fasta, prepend_bos=True))
    with process_groups(parallel):
        loaded = load_model(checkpoint, parallel=parallel)
        assert loaded.provider.sequence_parallel == (parallel.tensor > 1)
        return {
            "log_probs": Runner(loaded, Output(log_probs="per_token"))(items),
            "log_probs_in_pieces": Runner(loaded, Output(log_probs="per_token"), chunk_length=15)(items),
            "logits": Runner(loaded, Output())(items),
            "embeddings": Runner(loaded, Output(embedding_layer=-1))(items),
            "embeddings_in_pieces": Runner(loaded, Output(embedding_layer=-1), chunk_length=15)(items),
        }


if __name__ == "__main__":
    results = predictions(Path(sys.argv[1]), Path(sys.argv[2]), ParallelConfig(tensor=world_size()))
    if rank() == 0:
        torch.save(results, sys.argv[3])
