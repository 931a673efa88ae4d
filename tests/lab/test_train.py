"""The training loop's parts."""

from __future__ import annotations

from random import Random

from hubforge.lab.train import IGNORED, Row, batches, collate, loss_of, pack


def test_pack_lays_documents_end_to_end_and_drops_the_rest() -> None:
    assert [row.ids for row in pack([[1, 2, 3], [4, 5], [6, 7]], 3)] == [[1, 2, 3], [4, 5, 6]]


def test_batches_hold_every_row_once_and_stay_within_their_tokens() -> None:
    rows = [Row([number] * (2 + number % 7)) for number in range(100)]
    made = batches(rows, 24, Random(0), pool=40)
    assert sorted(row.ids[0] for batch in made for row in batch) == list(range(100))
    assert all(len(batch) * max(len(row.ids) for row in batch) <= 24 for batch in made)
    assert made == batches(rows, 24, Random(0), pool=40)


def test_a_row_longer_than_a_batch_goes_alone() -> None:
    assert [len(batch) for batch in batches([Row([1] * 9), Row([2] * 9)], 5, Random(0))] == [1, 1]


def test_only_the_reply_has_labels() -> None:
    ids, labels = collate([Row([7, 8, 9, 10], learn_from=2), Row([1, 2], learn_from=1)], pad=5)
    assert ids.tolist() == [[7, 8, 9, 10], [1, 2, 5, 5]]
    assert labels.tolist() == [[IGNORED, IGNORED, 9, 10], [IGNORED, 2, IGNORED, IGNORED]]


def test_the_loss_is_transformers_own() -> None:
    import torch

    from hubforge.lab.build import new_model

    torch.manual_seed(0)
    model = new_model(60)
    ids, labels = collate([Row([7, 8, 9, 10, 3], learn_from=2), Row([1, 2, 4], learn_from=1)], pad=5)
    with torch.no_grad():
        # Right padding needs no mask: no counted token sees it.
        torch.testing.assert_close(loss_of(model, ids, labels), model(input_ids=ids, labels=labels).loss)
