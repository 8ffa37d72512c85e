"""A torch DiT for parity tests and the benchmark of speed: the published architecture, written afresh, with the
official names."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbedding(nn.Module):
    def __init__(self, channels: int, hidden: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


class TimeEmbedding(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, time: Tensor) -> Tensor:
        angle = time[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=time.device) / 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class LabelEmbedding(nn.Module):
    def __init__(self, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        head_dim = hidden // self.heads
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, hidden))


class Mlp(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, 4 * hidden)
        self.fc2 = nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def adaptive_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(hidden, heads)
        self.mlp = Mlp(hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_1[:, None] * self.attn(adaptive_norm(x, shift_1, scale_1))
        return x + gate_2[:, None] * self.mlp(adaptive_norm(x, shift_2, scale_2))


class FinalLayer(nn.Module):
    def __init__(self, hidden: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(adaptive_norm(x, *self.adaLN_modulation(c).chunk(2, dim=1)))


class TorchDiT(nn.Module):
    """Square inputs [B, C, size, size] to [B, 2 C, size, size]; the null class is the label num_classes."""

    def __init__(
        self, size: int, channels: int, patch: int, hidden: int, depth: int, heads: int, num_classes: int
    ) -> None:
        super().__init__()
        self.patch, self.grid, self.out_channels = patch, size // patch, 2 * channels
        self.x_embedder = PatchEmbedding(channels, hidden, patch)
        self.t_embedder = TimeEmbedding(hidden)
        self.y_embedder = LabelEmbedding(num_classes, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden, patch**2 * self.out_channels)
        # x runs along columns; the first half of the vector is its sine and cosine.
        omega = 10000 ** (-torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))
        y, x = torch.meshgrid(torch.arange(self.grid), torch.arange(self.grid), indexing="ij")
        x_angle, y_angle = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega
        position = torch.cat([x_angle.sin(), x_angle.cos(), y_angle.sin(), y_angle.cos()], dim=1)
        self.pos_embed = nn.Parameter(position.float()[None], requires_grad=False)

    def tokens(self, x: Tensor) -> Tensor:
        return self.x_embedder(x) + self.pos_embed

    def conditioning(self, time: Tensor, labels: Tensor) -> Tensor:
        return self.t_embedder(time) + self.y_embedder(labels)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        c = self.conditioning(time, labels)
        y = self.tokens(x)
        for block in self.blocks:
            y = block(y, c)
        y = self.final_layer(y, c).view(-1, self.grid, self.grid, self.patch, self.patch, self.out_channels)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out_channels, *x.shape[2:])
