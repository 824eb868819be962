"""Selection along several dimensions against numpy's open mesh."""

import numpy as np
import prunegym.pruning.indexing
import pytest
import torch
from prunegym.pruning.indexing import select


def some(size: int, count: int, seed: int, block: int = 1) -> torch.Tensor:
    chosen = np.sort(np.random.default_rng(seed).permutation(size // block)[: count // block])
    return torch.from_numpy((chosen[:, None] * block + np.arange(block)).ravel())


@pytest.mark.parametrize("chunk", [1, 50, 10**6])
@pytest.mark.parametrize("block", [1, 4, 12])
@pytest.mark.parametrize("inner", [(), (3,), (2, 3)])
def test_rows_and_columns(chunk: int, block: int, inner: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prunegym.pruning.indexing, "CHUNK", chunk)
    value = torch.arange(10 * 48 * 6).reshape(10, -1)[:, : 48 * int(np.prod(inner))].reshape(10, 48, *inner).float()
    rows, columns = some(10, 7, 1), some(48, 24, 2, block)
    expected = value.numpy()[np.ix_(rows.numpy(), columns.numpy())]
    np.testing.assert_array_equal(select(value, {0: rows, 1: columns}).numpy(), expected)
    np.testing.assert_array_equal(select(value.transpose(0, 1), {1: rows, 0: columns}).numpy(), expected.swapaxes(0, 1))


@pytest.mark.parametrize("kept", [[0], [47], [0, 1, 2, 3, 8, 9], list(range(48)), [3, 4, 5, 6, 11, 12, 13, 14]])
def test_runs_of_every_kind(kept: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prunegym.pruning.indexing, "CHUNK", 100)
    value = torch.randn(5, 48)
    got = select(value, {0: torch.tensor([0, 2, 4]), 1: torch.tensor(kept)})
    assert torch.equal(got, value[[0, 2, 4]][:, kept])


def test_other_dimensions() -> None:
    value = torch.randn(4, 5, 6)
    got = select(value, {2: torch.tensor([1, 5]), 0: torch.tensor([3])})
    assert torch.equal(got, value[[3]][:, :, [1, 5]])
    assert select(value, {}) is value or torch.equal(select(value, {}), value)
