"""Rules that leave a part of the adapter at the sites: whole rounds, and the adapter that each site serves then."""

import numpy as np
import pytest
import torch

from client.rounds.personal import first, join, split
from strategies.dual import Dual
from strategies.fedsa import FedSA
from strategies.strategy import LoraStrategy
from tests.toys.adapters import RANK, SHAPES, adapter, dense, distance, moved, untrained, update
from umbel import peft_dir

SITES = {"a": 100, "b": 300}
"""Site → the tokens it trains on."""


@pytest.mark.parametrize("rule", [FedSA(), Dual(personal_rank=2)], ids=["fedsa", "dual"])
def test_rounds_from_join_to_join_at_two_sites(rule: LoraStrategy) -> None:
    """In the end a site serves Ā with its own B, or the global adapter plus its own."""
    personal = rule.personal
    assert personal is not None
    parent = untrained()
    parts = {site: first(parent.tensors, personal, f"0 {site}") for site in SITES}
    for number in range(1, 4):
        updates = []
        for seed, (site, count) in enumerate(SITES.items()):
            start = adapter(join(parent.tensors, parts[site], personal))
            back, parts[site] = split(moved(start, 10 * number + seed), parent.tensors, personal)
            updates.append(update(site, parent, back, held_examples=count))
        result = rule.aggregate(parent, updates)
        assert result.left_out == {}
        before, parent = parent, adapter(result.tensors)
    for site in SITES:
        joined = join(parent.tensors, parts[site], personal)
        peft_dir.validate(joined, SHAPES, rank=RANK + personal.rank, max_rank=8)
        for module, product in dense(joined).items():
            own_b = torch.from_numpy(parts[site][peft_dir.key(module, "B")].astype(np.float64))
            if personal.part == "B":
                wanted = own_b @ torch.from_numpy(parent.tensors[peft_dir.key(module, "A")].astype(np.float64))
                assert not dense(parent.tensors)[module].any(), "the registry's version equals the base"
            else:
                own_a = torch.from_numpy(parts[site][peft_dir.key(module, "A")].astype(np.float64))
                wanted = dense(parent.tensors)[module] + own_b @ own_a
            assert distance(product, wanted) < 1e-6
            assert distance(product, dense(join(before.tensors, parts[site], personal))[module]) > 1e-3
