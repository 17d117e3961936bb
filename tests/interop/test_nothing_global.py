"""Fusing changes nothing global: no generator, forced backend or other thread."""

from __future__ import annotations

import concurrent.futures
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign.torchvision_twin import FeaturePyramidNetwork
from torch import Tensor, nn
from twins import CHANNELS, WIDTH, maps

import fpn_kernels
from fpn_kernels.interop.equivalence import OwnRandomNumbers
from fpn_kernels.interop.swapping import is_fused
from fpn_kernels.operators import dispatch


def test_the_generators_do_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("one of the user's generators was set")

    network = FeaturePyramidNetwork(CHANNELS, WIDTH)
    network.layer_blocks[1].append(nn.Dropout(0.5))
    x, state = maps(), torch.get_rng_state()
    with monkeypatch.context() as patch:  # another thread would see this
        patch.setattr(torch, "manual_seed", fail)
        patch.setattr(torch, "set_rng_state", fail)
        fpn_kernels.fuse(network, verify=x)
    assert is_fused(network) and torch.equal(torch.get_rng_state(), state)


def test_two_runs_draw_the_same_and_the_operators_keep_their_meaning() -> None:
    def draw() -> list[Tensor]:
        x = torch.ones(4000)
        values = [F.dropout(x, 0.25), torch.native_dropout(x, 0.25, True)[0], torch.rand(4000), torch.rand_like(x)]
        values += [torch.randn(4000), torch.randn_like(x), torch.bernoulli(0.5 * x), torch.randperm(4000).float()]
        values += [x.clone().uniform_(), x.clone().normal_(), torch.randint(0, 2, (4000,)).float()]
        return [*values, F.alpha_dropout(x, 0.25, True), F.dropout2d(x.view(1, 4000, 1, 1), 0.25).flatten()]

    state = torch.get_rng_state()
    with OwnRandomNumbers():
        first = draw()
    with OwnRandomNumbers():
        second = draw()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    for one, other, usual in zip(first, second, draw(), strict=True):
        assert torch.equal(one, other) and not torch.equal(one, usual)
        torch.testing.assert_close(one.mean(), usual.mean(), rtol=0, atol=0.1)
        torch.testing.assert_close(one.std(), usual.std(), rtol=0.1, atol=0.05)


def test_threads_that_fuse_leave_no_forced_backend() -> None:
    cls = type("FeaturePyramidNetwork", (FeaturePyramidNetwork,), {})
    networks = [cls(CHANNELS, WIDTH) for _ in range(4)]
    seen: set[str | None] = set()

    def compute(done: threading.Event) -> None:
        top, lateral = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 16, 16)
        while not done.is_set():
            seen.add(dispatch.forced_by()[0])
            fpn_kernels.upsample_add(top, lateral)

    done = threading.Event()
    other = threading.Thread(target=compute, args=(done,))
    other.start()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda network: fpn_kernels.fuse(network, verify=maps()), networks))
    done.set()
    other.join()
    assert len({type(network) for network in networks}) == 1 and all(map(is_fused, networks))
    assert seen == {None} and dispatch.forced_by()[0] is None


def test_blocks_of_use_backend_may_overlap() -> None:
    first, second = (fpn_kernels.use_backend("eager").__enter__() for _ in range(2))
    first.__exit__(None, None, None)
    assert dispatch.forced_by()[0] == "eager"
    second.__exit__(None, None, None)
    assert dispatch.forced_by()[0] is None
    for _ in range(100):
        fpn_kernels.use_backend("eager")
    with fpn_kernels.use_backend(None):
        assert dispatch.forced_by()[0] is None
    assert dispatch.forced_by()[0] == "eager" and len(dispatch._requests) <= 2
    fpn_kernels.use_backend(None)
    assert dispatch.forced_by()[0] is None
