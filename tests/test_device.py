"""Nothing assumes the CPU: runs on a device of its own, which refuses tensors of the other, give the same bytes."""

from functools import partial

import pytest
import torch
from other_device import Elsewhere, other_device
from short_run import score, short_run
from transformers import GPT2Model

from warp_lite import BradleyTerry
from warp_lite.policies import gpt2_forward
from warp_lite.policies.gpt2_forward import GPT2Forward
from warp_lite.training import reinforce


def on_other_device(model, device):
    """The model there; where a parameter becomes another object, tied ones must be tied again."""
    model = model.to(device)
    model.tie_weights()
    return model


def test_the_other_device_refuses_what_a_gpu_refuses():
    with other_device() as device:
        there, here = torch.ones(3).to(device), torch.ones(3)
        assert there.device.type == "meta" and (there * 2).tolist() == [2.0] * 3 and (2 * there).sum().item() == 6
        for mixed in (lambda: there + here, lambda: here[there.long()], lambda: torch.stack([there, here]),
                      lambda: torch.where(here > 0, there, there)):
            with pytest.raises(RuntimeError, match="tensors on two devices"):
                mixed()
        assert (there * torch.tensor(2.0)).tolist() == [2.0] * 3 and there[torch.tensor([0])].tolist() == [1.0]
        assert here.copy_(there) is here and isinstance(torch.zeros(2, device=device), Elsewhere)


@pytest.mark.parametrize("executor, settings", [
    ("batched", {}), ("batched", {"offload": True, "micro_batch": 2, "sample_batch": 1, "logit_chunk": 4}),
    ("serial", {}), ("serial", {"offload": True, "micro_batch": 2})], ids=str)
def test_a_run_on_another_device_gives_the_same_bytes_and_leaves_its_weights_on_the_cpu(
        executor, settings, policy_of, tokenizer, monkeypatch):
    """Sampling, rewards on texts and on token ids (by a model on the CPU), training, evaluation, the front.

    By hand, the serial executor too: the library's module makes its masks in ways that this device cannot follow.
    """
    monkeypatch.setattr(reinforce, "make_forward", lambda model, executor, *options: GPT2Forward(model, *options[:2]))
    # what is computed in another way on a CPU, and rounds otherwise, is computed here as elsewhere
    monkeypatch.setattr(gpt2_forward, "gelu_", partial(torch.nn.functional.gelu, approximate="tanh"))
    monkeypatch.setattr(gpt2_forward, "SMALL", 0)
    model = policy_of("gpt2", dtype=torch.float32)
    torch.manual_seed(0)
    judge = BradleyTerry(GPT2Model(model.config), tokenizer)
    judge.trunk.eval().requires_grad_(False)
    judge.head = torch.randn(16)
    options = {"executor": executor, "iterations": 1, "reward": [score, judge], "gold": judge, **settings}
    here = short_run(model, tokenizer, **options)
    with other_device() as device:
        there = short_run(on_other_device(policy_of("gpt2", dtype=torch.float32), device), tokenizer, **options)
        front, said = there.front(etas=(0.5,)), there.completions(["this film"], 0.5)
    assert front == here.front(etas=(0.5,)) and said == here.completions(["this film"], 0.5)
    assert there.trajectories == here.trajectories
    for one, two in zip(there.iterations[0].policies + there.iterations[0].anchors + [there.iterations[0].merged],
                        here.iterations[0].policies + here.iterations[0].anchors + [here.iterations[0].merged]):
        for name in two:
            assert one[name].device.type == "cpu" and torch.equal(one[name], two[name])
