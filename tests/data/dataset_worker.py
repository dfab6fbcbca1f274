# SPDX-License-Identifier: Apache-2.0
"""One process of the test that several processes share an index: build the datasets, save this rank's samples.

Run by test_datasets.py under torchrun: ``dataset_worker.py CONFIG CACHE OUTPUT``.
"""

import sys

import torch

from evo2_megatron.config import ParallelConfig
from evo2_megatron.data.tokenizer import tokenizer_dir
from evo2_megatron.runtime.distributed import process_groups, rank
from evo2_megatron.runtime.megatron import enter


def main(config: str, cache: str, output: str) -> None:
    enter()
    from megatron.bridge.training.config import DatasetBuildContext
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    from evo2_megatron.data.providers import Evo2DatasetProvider

    settings = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer_dir(512)))
    provider = Evo2DatasetProvider(dataset_config_path=config, seq_length=64, index_cache_dir=cache)
    with process_groups(ParallelConfig()):
        train, valid, _ = provider.build_datasets(DatasetBuildContext(60, 20, 0, build_tokenizer(settings)))
    samples = [dataset[i]["labels"] for dataset in (train, valid) for i in range(len(dataset))]
    torch.save(torch.stack(samples), f"{output}.{rank()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
