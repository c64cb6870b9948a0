"""The codebook's losses and moving averages by hand; dead vectors; micro-batches, ranks, checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.autoencoder import AutoencoderConfig, Codebook, VQModel
from ldm.training.losses.codebook import MovingCodebook, codebook_losses


def codebook(vectors: list[list[float]]) -> Codebook:
    made = Codebook(len(vectors), len(vectors[0]))
    made.embedding.weight.data = torch.tensor(vectors)
    return made


def latents(*vectors: list[float]) -> Tensor:
    """One image, one row: (1, D, 1, N)."""
    return torch.tensor(vectors).T.view(1, -1, 1, len(vectors))


def test_losses_by_hand() -> None:
    book = codebook([[0.0, 0.0], [1.0, 1.0]])
    z = latents([0.2, 0.0], [1.0, 2.0]).requires_grad_()
    _, index = book(z)
    vectors, commitment = codebook_losses(book, z, index)
    assert vectors.item() == commitment.item() == pytest.approx((0.04 + 0 + 0 + 1) / 4)
    vectors.backward()
    assert z.grad is None
    torch.testing.assert_close(book.embedding.weight.grad, torch.tensor([[-0.1, 0.0], [0.0, -0.5]]))
    book.embedding.weight.grad = None
    commitment.backward()
    assert book.embedding.weight.grad is None
    torch.testing.assert_close(z.grad, latents([0.1, 0.0], [0.0, 0.5]))


def test_all_gradients_of_a_model_from_one_forward_pass() -> None:
    config = AutoencoderConfig(channels=(8, 16), attention=(False,) * 2, groups=4, codebook=5, codebook_dim=3)
    model = VQModel(config)
    x = torch.rand(2, 3, 16, 16)
    reconstruction, z, index = model(x)
    assert (z.shape, index.shape) == ((2, 3, 8, 8), (2, 8, 8))
    torch.testing.assert_close(z, model.encode(x).value)
    torch.testing.assert_close(reconstruction, model.decode(z))
    vectors, commitment = codebook_losses(model.quantize, z, index)
    ((reconstruction - x).abs().mean() + vectors + 0.25 * commitment).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def step(moving: MovingCodebook, book: Codebook, z: Tensor, seed: int = 0) -> None:
    moving.add(z, book(z)[1])
    moving.update(book, torch.Generator().manual_seed(seed))


def test_moving_averages_by_hand() -> None:
    book = codebook([[0.0], [10.0], [99.0]])
    moving = MovingCodebook(book, decay=0.75)
    assert not book.embedding.weight.requires_grad
    step(moving, book, latents([1.0], [3.0], [9.0]))
    torch.testing.assert_close(book.embedding.weight, torch.tensor([[2.0], [9.0], [99.0]]))  # means, and out of use
    step(moving, book, latents([0.0], [9.0]))
    n, m = 0.75 * 0.5 + 0.25, 0.75 * 1.0  # 2 latents with sum 4 before, 1 with sum 0 now
    torch.testing.assert_close(book.embedding.weight, torch.tensor([[m / n], [9.0], [99.0]]))
    torch.testing.assert_close(moving.counts, torch.tensor([n, 0.25 * (0.75 + 1), 0.0]))


def test_usage_and_perplexity_by_hand() -> None:
    book = codebook([[0.0], [10.0], [20.0], [99.0]])
    moving = MovingCodebook(book)
    assert (moving.usage(), moving.perplexity()) == (0.0, 1.0)
    step(moving, book, latents([0.0], [0.0], [10.0], [20.0]))
    assert moving.usage() == 0.75
    assert moving.perplexity() == pytest.approx(2**1.5)  # of ½, ¼, ¼


def test_dead_vectors_become_random_latents() -> None:
    z = latents([0.0], [1.0], [2.0], [3.0])
    weights = []
    for seed in (1, 1, 2):
        book = codebook([[1.5], [70.0], [80.0], [90.0], [95.0]])
        moving = MovingCodebook(book, patience=2)
        step(moving, book, z, seed)
        assert torch.equal(book.embedding.weight, torch.tensor([[1.5], [70.0], [80.0], [90.0], [95.0]]))
        step(moving, book, z, seed)
        weights.append(book.embedding.weight.clone())
        assert book.embedding.weight[0] == 1.5
        assert set(book.embedding.weight[1:, 0].tolist()) <= {0.0, 1.0, 2.0, 3.0}
        assert moving.idle.eq(0).all()
        step(moving, book, z, seed)
        assert moving.usage() > 0.2  # they are used
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_overflow_leaves_the_vectors_alone() -> None:
    book = codebook([[0.0], [10.0]])
    moving = MovingCodebook(book)
    step(moving, book, latents([1.0], [9.0]))
    step(moving, book, latents([float("inf")], [9.0]))
    assert book.embedding.weight.tolist() == [[1.0], [9.0]]
    step(moving, book, latents([1.0], [9.0]))
    torch.testing.assert_close(book.embedding.weight, torch.tensor([[1.0], [9.0]]))


def test_micro_batches_and_ranks_give_the_same_vectors() -> None:
    z = torch.randn(4, 3, 2, 2)
    books = [codebook(torch.linspace(-1, 1, 24).view(8, 3).tolist()) for _ in range(4)]
    whole, parts, *ranks = [MovingCodebook(book) for book in books]
    step(whole, books[0], z)
    for piece in z.split([1, 3]):
        parts.add(piece, books[1](piece)[1])
    parts.update(books[1], torch.Generator())
    handed_in: list[Tensor] = []
    for moving, book, piece in zip(ranks, books[2:], z.split([3, 1]), strict=True):
        moving.add(piece, book(piece)[1])
    ranks[0].update(books[2], torch.Generator(), lambda tensor: handed_in.append(tensor) or tensor, 0, 2)
    ranks[1].update(books[3], torch.Generator(), lambda tensor: tensor + handed_in[0], 1, 2)
    for other, moving in ((books[1], parts), (books[3], ranks[1])):
        torch.testing.assert_close(other.embedding.weight, books[0].embedding.weight)
        torch.testing.assert_close(moving.state_dict(), whole.state_dict())


def test_ranks_take_turns_in_offering_latents() -> None:
    offers = []
    for rank in (0, 1):
        book = codebook([[float(number)] for number in range(100, 106)])
        moving = MovingCodebook(book)
        z = latents([1.0 + rank], [1.0 + rank])
        moving.add(z, book(z)[1])
        moving.update(book, torch.Generator(), lambda tensor: offers.append(tensor[:, -1]) or tensor, rank, 2)
    assert offers[0].tolist() == [1, 0, 1, 0, 1, 0]
    assert offers[1].tolist() == [0, 2, 0, 2, 0, 2]


def test_a_checkpoint_goes_on_exactly() -> None:
    z = torch.randn(3, 4, 3, 2, 2)
    books = [codebook(torch.linspace(-1, 1, 24).view(8, 3).tolist()) for _ in range(2)]
    moving = MovingCodebook(books[0], patience=2)
    step(moving, books[0], z[0])
    resumed = MovingCodebook(books[1], patience=2)
    resumed.load_state_dict(moving.state_dict())
    books[1].load_state_dict(books[0].state_dict())
    for batch in z[1:]:
        step(moving, books[0], batch, seed=1)
        step(resumed, books[1], batch, seed=1)
    assert torch.equal(books[0].embedding.weight, books[1].embedding.weight)
    assert list(books[0].state_dict()) == ["embedding.weight"]  # diffusers' name, and nothing else


@pytest.mark.parametrize(("options", "message"), [({"decay": 1.0}, "decay is 1.0"), ({"patience": 0}, "patience is 0")])
def test_absurd_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(LdmError, match=message):
        MovingCodebook(codebook([[0.0]]), **options)
