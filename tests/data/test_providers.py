# SPDX-License-Identifier: Apache-2.0
"""Providers as Megatron Bridge stores and calls them."""

import pytest
import yaml

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture
def providers():
    from evo2_megatron.data import providers

    return providers


def test_providers_survive_run_config_yaml(providers):
    from megatron.bridge.training.utils.config_utils import _ConfigContainerBase
    from megatron.bridge.utils.instantiate_utils import instantiate

    for provider in (
        providers.Evo2DatasetProvider(
            dataset_config_path="a.yaml", seq_length=8, dataset_dir="d", eod_mask_loss=True, num_workers=3
        ),
        providers.MockEvo2DatasetProvider(seq_length=8, random_seed=5),
    ):
        provider.tokenizer = object()  # what Bridge does; it must not get into the file
        text = yaml.safe_dump(_ConfigContainerBase._convert_value_to_dict(provider))
        assert instantiate(yaml.safe_load(text)) == provider


def test_mock_provider(providers):
    from megatron.bridge.data.utils import get_dataset_provider

    provider = providers.MockEvo2DatasetProvider(seq_length=16, random_seed=3)
    train, valid, test = get_dataset_provider(provider)([7, 5, 0], provider, tokenizer=None)

    assert (len(train), len(valid), test) == (7, 5, None)
    assert train[0]["tokens"].tolist() != valid[0]["tokens"].tolist()
    assert provider.dataloader_type == "single"
    assert provider.create_attention_mask is False
