"""Users are drawn by the law of the sampling, at most so many records of each come along, and ranks part users only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from privet import ConfigurationError, Partition, Poisson, RandomAllocation, Sampling, Users
from privet.noise import NoiseKey
from privet.sampling import Stream, loader_for
from privet.sampling.sampler import LogicalBatches
from privet.sampling.share import Share
from privet.sampling.users import UsersRecords
from tests.training.users import IDS, MOST, RATE, RECORDS, USERS, seeded


def batches_of(users: Users, sampling: Sampling, passes: int = 60) -> list[Tensor]:
    loader = loader_for(TensorDataset(torch.arange(RECORDS)), sampling=sampling, users=users)
    return [batch[0] for _ in range(passes) for batch in loader]


def test_users_are_drawn_and_their_records_with_them() -> None:
    batches = batches_of(Users(IDS, most=MOST), Poisson(RATE), passes=60)
    met, counts = torch.zeros(RECORDS), {int(user): int((user == IDS).sum()) for user in IDS.unique()}
    together = 0
    for records in batches:
        users, sizes = IDS[records].unique(return_counts=True)
        assert all(int(n) == min(MOST, counts[int(user)]) for user, n in zip(users, sizes, strict=True))
        met[records] += 1
        together += len(users)
    assert together == pytest.approx(RATE * USERS * len(batches), rel=0.15)
    for user, count in counts.items():  # all records of a user beyond the bound have their turn
        expected = RATE * len(batches) * min(MOST, count) / count
        assert (met[user == IDS] - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize(
    "sampling",
    [RandomAllocation(3), Partition(shuffled=True, batch_size=2)],
    ids=lambda sampling: type(sampling).__name__,
)
def test_other_samplings_draw_users_too(sampling: Sampling) -> None:
    batches = batches_of(Users([f"user {i}" for i in IDS.tolist()], most=8), sampling, passes=2)
    assert len(batches) == 6
    for three in (batches[:3], batches[3:]):  # each user is in one batch of a pass, with all records
        assert sorted(torch.cat(three).tolist()) == list(range(RECORDS))
        assert sum(len(IDS[records].unique()) for records in three) == USERS


def test_ranks_share_users_and_not_their_records() -> None:
    def drawn(rank: int, ranks: int) -> list[list[int]]:
        batches = LogicalBatches(
            Poisson(RATE),
            key=NoiseKey.from_generator(seeded()),
            size=USERS,
            steps=20,
            share=Share(rank, ranks),
            users=UsersRecords(Users(IDS, most=MOST), RECORDS),
        )
        run = batches.begin()
        parts = iter(run.draw())
        found: list[list[int]] = [[] for _ in range(20)]
        for records in parts:
            last = run.drawn[-1]
            found[last.place] = records
            assert last.owner is not None
            users = IDS[records]
            assert all(
                (users[i] == users[j]) == (last.owner[i] == last.owner[j]) for i in range(len(users)) for j in range(i)
            )
        assert len({one.digest for one in run.drawn}) > 10 or ranks == 1
        return found

    whole, shares = drawn(0, 1), [drawn(rank, 3) for rank in range(3)]
    for all_of_them, *parts in zip(whole, *shares, strict=True):
        assert sorted(part for rank in parts for part in rank) == sorted(all_of_them)
        users = [set(IDS[part].tolist()) for part in parts]
        assert sum(map(len, users)) == len(set().union(*users)), "each user is on one rank"


def test_a_stream_has_no_users_to_draw() -> None:
    with pytest.raises(ConfigurationError, match="reads records one by one"):
        batches_of(Users(IDS, most=MOST), Stream(batch_size=4, records=RECORDS))
