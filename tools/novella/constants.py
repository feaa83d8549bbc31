"""Every fixed number of the Novella recipe, in two frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
END_OF_TEXT = "<|endoftext|>"
TRAIN_FILE = "train.txt.xz"
HELDOUT_FILE = "heldout.txt.xz"
HELDOUT_INDEX = "heldout.json"
TOKENIZER_DIR = "tokenizer"


@dataclass(frozen=True)
class Shape:
    """The architecture: one value object for the MoE and for the dense baseline."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 32
    top_k: int = 4
    expert_width: int = 112
    max_positions: int = 1024
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    moe: bool = True

    @property
    def dense_width(self) -> int:
        """The dense baseline's MLP width: as many active MLP parameters as the MoE has."""
        return self.top_k * self.expert_width


@dataclass(frozen=True)
class Recipe:
    """How the model is trained, and how large the result may be."""

    seed: int = 20_251
    sequence: int = 1024
    batch: int = 64
    warmup_steps: int = 150
    constant_share: float = 0.3
    matrix_lr: float = 0.012
    matrix_decay: float = 0.05
    vector_lr: float = 0.003
    vector_decay: float = 0.02
    momentum: float = 0.95
    adam_betas: tuple[float, float] = (0.9, 0.98)
    newton_schulz_steps: int = 5
    grad_clip: float = 1.0
    balance_coef: float = 0.01
    z_coef: float = 0.001
    max_epochs: float = 12.0
    checkpoint_seconds: float = 60.0
    measure_from: int = 20
    measure_steps: int = 40
    reserve_seconds: float = 45.0
    probe_every: int = 500
    curve_points: int = 300
    max_total_bytes: int = 48 * MIB
    max_file_bytes: int = 16 * MIB
    shard_size: str = "15MB"
    min_load: float = 0.2
