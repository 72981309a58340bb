"""The networks of other trainers, rendered a second time in plain torch, to compare conversions.

Written for these tests from a description of what each computes, with no line of the originals; the
names of modules are theirs, since checkpoints consist of them. pesser's network is HoUNet of
test_ho_unet under other names. Weights are random.
"""

import math
import re
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .test_ho_unet import HoUNet


def randomise(network: nn.Module) -> nn.Module:
    """Random float32 weights in every layer, such that outputs are of order 1; tables stay."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif parameter.requires_grad:
            nn.init.normal_(parameter, mean=parameter[0].item(), std=0.3)
    return network.eval().requires_grad_(False)


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-5)


def conv3(width_in: int, width_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, stride, padding=1)


def double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def halve(x: Tensor) -> Tensor:
    return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))


def angles(t: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """t times width / 2 frequencies from 1 down to, but without, 1 / 10000."""
    return t.to(dtype)[:, None] * 10000 ** -(torch.arange(0, width, 2, dtype=dtype) / width)


# improved-diffusion and guided-diffusion


class OpenAIResidual(nn.Module):
    """The time adds to the first convolution, or scales and shifts the second norm."""

    def __init__(self, width_in, width_out, time_width, scale_shift, resample=None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample or (lambda x: x)
        self.in_layers = nn.Sequential(norm(width_in), nn.SiLU(), conv3(width_in, width_out))
        twice = 2 if scale_shift else 1
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, twice * width_out))
        self.out_layers = nn.Sequential(
            norm(width_out), nn.SiLU(), nn.Identity(), conv3(width_out, width_out)
        )
        self.skip_connection = (
            nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)
        )

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        time = self.emb_layers(temb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + time)
        return self.skip_connection(self.resample(x)) + h


class OpenAIAttention(nn.Module):
    """q, k and v of each head side by side, or in the new order all q, all k and all v."""

    def __init__(self, width, heads, new_order):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm, self.qkv = norm(width), nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x.flatten(2)))
        if self.new_order:
            qkv = qkv.unflatten(1, (3, self.heads, -1)).transpose(1, 2)
        else:
            qkv = qkv.unflatten(1, (self.heads, 3, -1))
        q, k, v = qkv.unbind(2)  # (B, heads, channels, pixels)
        attention = (q.mT @ k / math.sqrt(q.shape[2])).softmax(dim=-1)
        h = (v @ attention.mT).flatten(1, 2)
        return x + self.proj_out(h).reshape(x.shape)


class OpenAIResample(nn.Module):
    def __init__(self, width, up):
        super().__init__()
        if up:
            self.conv = conv3(width, width)
        else:
            self.op = conv3(width, width, stride=2)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.conv(double(x)) if hasattr(self, "conv") else self.op(x)


class OpenAIUNet(nn.Module):
    """`attention` names levels; one of `heads` and `head_channels` is given."""

    def __init__(
        self, multipliers=(1, 2), layers=1, attention=(1,), *, base=32, channels=3, out=None,
        heads=None, head_channels=None, new_order=False, scale_shift=False, updown=False,
        classes=None, time_scale=1.0, first=None,
    ):  # fmt: skip
        super().__init__()
        self.base, self.time_scale, time = base, time_scale, 4 * base
        widths = [base * m for m in multipliers]
        first = first or base

        def residual(width_in, width_out, resample=None):
            return OpenAIResidual(width_in, width_out, time, scale_shift, resample)

        def attend(level):
            size = widths[level] // (head_channels or widths[level] // heads)
            return OpenAIAttention(widths[level], size, new_order)

        def resample(width, up):
            if updown:
                return residual(width, width, double if up else halve)
            return OpenAIResample(width, up)

        self.time_embed = nn.Sequential(nn.Linear(base, time), nn.SiLU(), nn.Linear(time, time))
        if classes:
            self.label_emb = nn.Embedding(classes, time)
        blocks, skips = [[conv3(channels, first)]], [first]
        for level, width in enumerate(widths):
            for _ in range(layers):
                blocks.append([residual(skips[-1], width)])
                blocks[-1] += [attend(level)] if level in attention else []
                skips.append(width)
            if level < len(widths) - 1:
                blocks.append([resample(width, up=False)])
                skips.append(width)
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        last = widths[-1]
        self.middle_block = nn.ModuleList(
            [residual(last, last), attend(len(widths) - 1), residual(last, last)]
        )
        blocks = []
        for level, width in reversed(list(enumerate(widths))):
            for i in range(layers + 1):
                blocks.append([residual(last + skips.pop(), width)])
                blocks[-1] += [attend(level)] if level in attention else []
                blocks[-1] += [resample(width, up=True)] if level and i == layers else []
                last = width
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        self.out = nn.Sequential(norm(last), nn.SiLU(), conv3(last, out or channels))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        angle = angles(t * self.time_scale, self.base, x.dtype)
        temb = self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=1))
        if y is not None:
            temb = temb + self.label_emb(y)
        skips = [h := self.input_blocks[0][0](x)]
        for block in self.input_blocks[1:]:
            for module in block:
                h = module(h, temb)
            skips.append(h)
        for module in self.middle_block:
            h = module(h, temb)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            for module in block:
                h = module(h, temb)
        return self.out(h)


# w86763777/pytorch-ddpm


class W86Residual(nn.Module):
    def __init__(self, width_in, width_out, time_width, attend):
        super().__init__()
        self.block1 = nn.Sequential(norm(width_in), nn.SiLU(), conv3(width_in, width_out))
        self.temb_proj = nn.Sequential(nn.SiLU(), nn.Linear(time_width, width_out))
        self.block2 = nn.Sequential(
            norm(width_out), nn.SiLU(), nn.Identity(), conv3(width_out, width_out)
        )
        self.shortcut = (
            nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)
        )
        self.attn = nn.ModuleDict()
        if attend:
            self.attn["group_norm"] = norm(width_out)
            for name in ("proj_q", "proj_k", "proj_v", "proj"):
                self.attn[name] = nn.Conv2d(width_out, width_out, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.block2(self.block1(x) + self.temb_proj(temb)[:, :, None, None]) + self.shortcut(x)
        if not self.attn:
            return h
        pixels = self.attn["group_norm"](h)
        q, k, v = (self.attn[f"proj_{name}"](pixels).flatten(2).mT for name in "qkv")
        seen = scaled_dot_product_attention(q, k, v)  # one head, as wide as the image
        return h + self.attn["proj"](seen.mT.reshape(h.shape))


class W86Resample(nn.Module):
    def __init__(self, width, up):
        super().__init__()
        self.up, self.main = up, conv3(width, width, stride=1 if up else 2)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.main(double(x) if self.up else x)


class W86UNet(nn.Module):
    """Timesteps stand in a table of T rows, sin and cos in turn."""

    def __init__(self, multipliers=(1, 2), layers=1, attention=(1,), base=32, steps=1000):
        super().__init__()
        widths, time = [base * m for m in multipliers], 4 * base
        angle = angles(torch.arange(steps), base, torch.float32)
        table = torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)
        self.time_embedding = nn.ModuleDict()
        self.time_embedding["timembedding"] = nn.Sequential(
            nn.Embedding.from_pretrained(table), nn.Linear(base, time), nn.SiLU(),
            nn.Linear(time, time),
        )  # fmt: skip
        self.head, skips = conv3(3, base), [base]
        self.downblocks, self.upblocks = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(layers):
                self.downblocks.append(W86Residual(skips[-1], width, time, level in attention))
                skips.append(width)
            if level < len(widths) - 1:
                self.downblocks.append(W86Resample(width, up=False))
                skips.append(width)
        last = widths[-1]
        self.middleblocks = nn.ModuleList(
            [W86Residual(last, last, time, True), W86Residual(last, last, time, False)]
        )
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(layers + 1):
                self.upblocks.append(
                    W86Residual(last + skips.pop(), width, time, level in attention)
                )
                last = width
            if level:
                self.upblocks.append(W86Resample(width, up=True))
        self.tail = nn.Sequential(norm(last), nn.SiLU(), conv3(last, 3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb = self.time_embedding["timembedding"](t)
        skips = list(accumulate(self.downblocks, lambda h, m: m(h, temb), initial=self.head(x)))
        h = skips[-1]
        for module in self.middleblocks:
            h = module(h, temb)
        for module in self.upblocks:
            h = module(
                h if isinstance(module, W86Resample) else torch.cat([h, skips.pop()], 1), temb
            )
        return self.tail(h)

    def checkpoint(self) -> dict:
        """As their trainer saves it: two sets of weights among other things."""
        state = self.state_dict()
        return {
            "net_model": state | {"head.weight": state["head.weight"] / 2},
            "ema_model": state,
            "sched": {"base_lrs": [2e-4], "last_epoch": 1, "lr_lambdas": [None]},
            "optim": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 2e-4}]},
            "step": 5000,
            "x_T": torch.zeros(2, 3, 8, 8),
        }


# pesser/pytorch_diffusion

PESSER_NAMES = (
    (r"^dense(\d)\.", r"temb.dense.\1."),
    (r"^mid\.(block|attn)\.0\.", r"mid.\1_1."),
    (r"^mid\.block\.1\.", "mid.block_2."),
    (r"^(down|up)(.*)\.resample\.", r"\1\2.\1sample.conv."),
)


def pesser_state(ho: HoUNet) -> dict[str, Tensor]:
    """The weights of HoUNet under the names of pesser's, where attention is of 1x1 convolutions and
    the way up is numbered by resolution."""
    state = {}
    for name, tensor in ho.state_dict().items():
        if match := re.match(r"up\.(\d+)", name):
            name = f"up.{len(ho.up) - 1 - int(match[1])}{name[match.end() :]}"
        for pattern, replacement in PESSER_NAMES:
            name = re.sub(pattern, replacement, name)
        attention = re.search(r"\.attn.*\.(q|k|v|proj_out)\.weight", name)
        state[name] = tensor[:, :, None, None] if attention else tensor
    return state


# lucidrains/denoising-diffusion-pytorch


def lucidrains_checkpoint() -> dict:
    """The names that its trainer's checkpoints have, some of each kind; shapes do not matter."""
    names = (
        "init_conv.weight", "time_mlp.1.weight", "downs.0.0.mlp.1.weight",
        "downs.0.0.block1.proj.weight", "downs.0.0.block1.norm.g", "downs.0.2.mem_kv",
        "downs.0.2.to_out.1.g", "mid_block1.block1.proj.weight",
        "final_res_block.block1.proj.weight", "final_conv.weight",
    )  # fmt: skip
    model = {f"model.{name}": torch.ones(2) for name in names}
    average = {f"ema_model.{name}": tensor for name, tensor in model.items()}
    facts = {"initted": torch.tensor(True), "step": torch.tensor(9)}
    return {"step": 9, "model": model, "opt": {}, "ema": average | facts, "version": "2.2.5"}
