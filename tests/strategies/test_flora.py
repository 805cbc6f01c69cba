"""`FLoRA`: the stack of the sites' factors."""

from strategies.flora import FLoRA
from tests.toys.adapters import WIDE, adapter, dense, distance, moved, random_tensors, update, wide


def test_flora_stacks_without_loss_until_its_rank_is_full() -> None:
    """FLoRA (arXiv 2409.05976): Σ p_i B_i A_i as [p_1 B_1 | …][A_1; …], of rank N r; then the best approximation."""
    parent = wide(1, 4)
    untrained = adapter({name: 0 * array if "lora_B" in name else array for name, array in parent.tensors.items()})
    updates = [update(f"site-{index}", untrained, random_tensors(index, rank=4, shapes=WIDE)) for index in range(3)]
    whole, tight = FLoRA(stack_rank=16).aggregate(untrained, updates), FLoRA(stack_rank=8).aggregate(untrained, updates)
    assert adapter(whole.tensors).rank == 12
    assert adapter(tight.tensors).rank == 8
    for module in WIDE:
        wanted = sum(dense(random_tensors(index, rank=4, shapes=WIDE))[module] for index in range(3)) / 3
        assert whole.certificate[module] < 1e-6
        assert distance(dense(whole.tensors)[module], wanted) < 1e-5
        assert abs(distance(dense(tight.tensors)[module], wanted) - tight.certificate[module]) < 1e-5
    grown = adapter(whole.tensors)
    again = FLoRA(stack_rank=16).aggregate(grown, [update("a", grown.at_rank(4), moved(grown.at_rank(4), 1))])
    assert adapter(again.tensors).rank == 16
    for module, now in dense(again.tensors).items():
        change = dense(moved(grown.at_rank(4), 1))[module] - dense(grown.at_rank(4).tensors)[module]
        assert distance(now, dense(grown.tensors)[module] + change) <= again.certificate[module] + 1e-5
