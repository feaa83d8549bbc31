"""The model in training: transformers' own Switch, its sparse blocks in place of a loop over experts two batched products.

A token over an expert's capacity passes by while training; the stock model never drops one. `export` writes the stock
model's checkpoint.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from switch.constants import EOS, PAD, Recipe, Shape


def make_config(shape: Shape, experts: int | None = None) -> SwitchTransformersConfig:
    """The stock configuration, every feed-forward block sparse."""
    return SwitchTransformersConfig(
        vocab_size=shape.vocabulary, d_model=shape.hidden, d_kv=shape.head_dim, d_ff=shape.width, num_heads=shape.heads,
        num_layers=shape.layers, num_decoder_layers=shape.layers, num_sparse_encoder_layers=shape.layers,
        num_sparse_decoder_layers=shape.layers, num_experts=experts or shape.experts, dropout_rate=0.0,
        router_jitter_noise=0.0, decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=EOS,
    )  # fmt: skip


class GroupedExperts(nn.Module):
    """A sparse block: tokens sorted to their experts in equal rooms, two batched products."""

    def __init__(self, shape: Shape, capacity: float) -> None:
        """Draw the weights."""
        super().__init__()
        self.experts, self.capacity = shape.experts, capacity
        self.router = nn.Parameter(torch.empty(shape.experts, shape.hidden).normal_(std=0.02))
        self.wi = nn.Parameter(torch.empty(shape.experts, shape.width, shape.hidden).normal_(std=shape.hidden**-0.5))
        self.wo = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.width).normal_(std=shape.width**-0.5))
        self.balance = torch.zeros(())
        self.load = torch.zeros(shape.experts)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, S, H]` to the same."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        chances = functional.softmax(tokens.float() @ self.router.float().t(), dim=-1)
        weight, expert = chances.max(dim=-1)
        hot = functional.one_hot(expert, self.experts)
        self.load = hot.sum(dim=0).float() / len(tokens)
        self.balance = self.experts * (self.load * chances.mean(dim=0)).sum()
        room = math.ceil(len(tokens) / self.experts * self.capacity)
        place = (hot.cumsum(dim=0) - 1).gather(1, expert[:, None])[:, 0]
        target = torch.where(place < room, expert * room + place, self.experts * room)
        padded = tokens.new_zeros(self.experts * room + 1, tokens.shape[1]).index_copy(0, target, tokens)
        inner = functional.relu(torch.bmm(padded[:-1].view(self.experts, room, -1), self.wi.transpose(1, 2)))
        out = torch.bmm(inner, self.wo.transpose(1, 2)).reshape(self.experts * room, -1)
        out = torch.cat([out, out.new_zeros(1, out.shape[1])])
        return (out[target] * weight[:, None].to(out.dtype)).view_as(hidden)


def build(
    shape: Shape, recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> SwitchTransformersForConditionalGeneration:
    """A fresh seeded model in training."""
    torch.manual_seed(recipe.seed)
    with torch.device(device):
        model = SwitchTransformersForConditionalGeneration(make_config(shape, experts=1))
        for path, module in list(model.named_modules()):
            if isinstance(module, SwitchTransformersSparseMLP):
                model.set_submodule(path, GroupedExperts(shape, recipe.capacity).to(dtype))
    return model.to(device=device, dtype=dtype).train()


def grouped(model: nn.Module) -> list[GroupedExperts]:
    """The sparse blocks in order."""
    return [module for module in model.modules() if isinstance(module, GroupedExperts)]


def loss_of(model: nn.Module, read: Tensor, fed: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the decoder's output, and the mean balance loss of all blocks."""
    logits = model(input_ids=read, decoder_input_ids=fed, use_cache=False).logits
    loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), written.reshape(-1))
    return loss, torch.stack([block.balance for block in grouped(model)]).mean()


def _stock_tensors(model: SwitchTransformersForConditionalGeneration) -> dict[str, Tensor]:
    """Every tensor under the name that the stock model's checkpoint has for it."""
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        block, _, last = name.rpartition(".")
        if name in tied:
            continue
        if not isinstance(model.get_submodule(block), GroupedExperts):
            found[name] = tensor
        elif last == "router":
            found[f"{block}.router.classifier.weight"] = tensor
        else:
            for number in range(len(tensor)):
                found[f"{block}.experts.expert_{number}.{last}.weight"] = tensor[number]
    return found


def export(
    model: SwitchTransformersForConditionalGeneration, shape: Shape, folder: Path, recipe: Recipe
) -> dict[str, int]:
    """Write the stock model's checkpoint, shards side by side.

    Returns:
        Parameters and bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    tensors = _stock_tensors(model)
    for name, tensor in tensors.items():
        if size + tensor.nbytes > recipe.shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]

    def write(item: tuple[str, dict[str, Tensor]]) -> None:
        name, shard = item
        save_file(
            {key: t.detach().cpu().contiguous().clone() for key, t in shard.items()}, folder / name, {"format": "pt"}
        )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, zip(names, shards, strict=True)))
    weights = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = make_config(shape)
    config.architectures = ["SwitchTransformersForConditionalGeneration"]
    config.dtype = next(model.parameters()).dtype
    config.save_pretrained(folder)
    GenerationConfig(decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=EOS).save_pretrained(folder)
    return {"parameters": sum(tensor.numel() for tensor in tensors.values()), "bytes": total}
