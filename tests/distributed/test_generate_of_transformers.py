"""``generate`` of a Hugging Face model, made from a tiny configuration, under DDP and FSDP."""

import warnings
from typing import Any

import pytest
import torch

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool, RankRaised

pytest.importorskip("transformers", reason="transformers, a test dependency, is not installed")


def _model() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return LlamaForCausalLM(config)


def _tokens() -> torch.Tensor:
    return torch.tensor([[1, 5, 7], [1, 9, 3]])


def _generate(strategy: str, devices: int, marked: bool) -> tuple[list[Any], float]:
    with Fabric(accelerator="cpu", strategy=strategy, devices=devices) as fabric:
        fabric.launch()
        raw = _model()
        model, optimizer = fabric.setup(raw, torch.optim.SGD(raw.parameters(), lr=0.1))
        for _ in range(2):
            loss = model(_tokens(), labels=_tokens()).loss
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if marked:
            model.mark_forward_method("generate")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about itself, such as unused settings
            with torch.no_grad():
                produced = model.generate(_tokens(), max_new_tokens=4, do_sample=False)
        return produced.tolist(), model(_tokens(), labels=_tokens()).loss.item()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_generate_works_when_marked(strategy: str, two_ranks: RankPool) -> None:
    """A marked ``generate`` gives what it gives in one process, after the same training."""
    tokens, loss = _generate("single_device", 1, marked=False)
    assert len(tokens[0]) == 7
    for got, got_loss in two_ranks.run(_generate, strategy, 2, True):
        assert got == tokens
        assert got_loss == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_generate_says_so_when_not_marked(strategy: str, two_ranks: RankPool) -> None:
    """An unmarked ``generate`` is refused before it computes, with the line to write."""
    with pytest.raises(RankRaised, match=r"mark_forward_method\('generate'\)"):
        two_ranks.run(_generate, strategy, 2, False)
