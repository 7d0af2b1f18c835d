"""Shares: every example of a batch is in one of them, they are even, and shards are read by their own rank alone."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from privet.errors import ConfigurationError
from privet.noise import NoiseKey
from privet.sampling import Poisson, ShardedDataset, loader_for, privatize_loader
from privet.sampling.sampler import LogicalBatches
from privet.sampling.shards import share_of
from privet.sampling.share import WHOLE, Share

SIZES = [7, 1, 30, 12, 50]


def shares(dataset, ranks):
    return [share_of(dataset, Share(rank, ranks)) for rank in range(ranks)]


def key():
    return NoiseKey.from_generator(torch.Generator().manual_seed(3))


def opened(shard):
    return torch.full((SIZES[shard],), float(shard))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("dataset", [None, ShardedDataset(SIZES, opened)], ids=["even", "shards"])
def test_each_example_of_a_batch_is_in_one_share(dataset, ranks):
    batch = [0, 3, 7, 8, 9, 37, 38, 60, 99]
    found = [share.of(batch) for share in shares(dataset, ranks)]
    assert sorted(example for each in found for example in each) == batch
    if dataset is None:
        assert max(map(len, found)) - min(map(len, found)) <= 1
    assert all(share.of([]) == [] for share in shares(dataset, ranks))


@pytest.mark.parametrize("dataset", [TensorDataset(torch.arange(100.0)), ShardedDataset(SIZES, opened)])
@pytest.mark.parametrize("poisson", [True, False])
def test_the_batches_of_all_ranks_together_are_those_of_one_process(dataset, poisson):
    user = DataLoader(dataset, batch_size=9, shuffle=True)

    def batches(share):
        loader = privatize_loader(user, poisson=poisson, key=key(), share=share)
        listed = loader._batches
        return [listed.share.of(listed.examples(1, i)) for i in range(len(listed))]

    whole = batches(WHOLE)
    for ranks in (2, 4):
        parts = [batches(Share(rank, ranks)) for rank in range(ranks)]
        together = [sorted(e for part in parts for e in part[i]) for i in range(len(whole))]
        assert together == [sorted(batch) for batch in whole]


def test_a_rank_opens_no_shard_of_another_rank():
    for rank in range(3):
        touched = set()
        data = ShardedDataset(SIZES, lambda shard, touched=touched: (touched.add(shard), opened(shard))[1])
        loader = loader_for(data, sampling=Poisson(0.3), key=key(), share=Share(rank, 3))
        loader.expect_resampling()  # an empty share is loaded too
        seen = [float(value) for batch in loader for value in batch]
        assert len(seen) > 0
        assert touched <= {shard for shard in range(len(SIZES)) if shard % 3 == rank}


def test_the_digest_is_of_the_whole_batch_and_of_no_other():
    batch = [1, 5, 8]
    assert {Share(rank, 3).digest(batch) for rank in range(3)} == {Share(0, 2).digest(batch)}
    assert Share(0, 2).digest(batch) != Share(0, 2).digest([1, 5, 9])
    assert 0 <= Share(0, 2).digest(batch) < 2**63
    assert WHOLE.digest(batch) == 0


def test_what_makes_no_share_is_refused():
    with pytest.raises(ConfigurationError, match="rank must be below the number of ranks, 2, got 2"):
        Share(2, 2)
    with pytest.raises(ConfigurationError, match="2 shards cannot be dealt to 3 ranks"):
        share_of(ShardedDataset([4, 4], opened), Share(0, 3))
    for sizes in ([], [0], [1.5]):
        with pytest.raises(ConfigurationError):
            ShardedDataset(sizes, opened)
    with pytest.raises(IndexError):
        ShardedDataset([4], opened)[4]


def test_shares_that_go_together_are_taken_in_as_many_parts_on_every_rank():
    for number in range(8):
        parts = []
        for rank in range(3):
            batches = LogicalBatches(
                Poisson(0.3),
                key=NoiseKey.from_generator(torch.Generator().manual_seed(number)),
                size=20,
                steps=4,
                share=Share(rank=rank, ranks=3, together=True),
            )
            begun = batches.begin()
            begun.most = lambda: 1
            list(begun.draw())
            parts.append([(each.place, each.first, each.last) for each in begun.drawn])
        assert parts[0] == parts[1] == parts[2]
        assert any(not first for _, first, _ in parts[0])
