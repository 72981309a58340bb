"""The network of the `cifar10` preset is Ho et al. 2020's: compared with a second rendering of it.

HoUNet below is that network in plain torch. It was written for this test from the paper (appendix
B) and from a description of what the authors' TensorFlow code does (hojonathanho/diffusion,
diffusion_tf/models/unet.py and nn.py), independently of diffusers and with no line of either. With
the same random weights in every layer both must compute the same function, and with any one of
stock's defaults they must not.
"""

import inspect
import math
import re

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ddpm_hf.presets import PRESETS, build_unet, unet_config

# The arguments of HoUNet in the authors' scripts; the large network is in the paper only.
HO_NETWORKS = {
    "cifar10": dict(ch=128, multipliers=(1, 2, 2, 2), side=32, dropout=0.1),
    "lsun": dict(ch=128, multipliers=(1, 1, 2, 2, 4, 4), side=256, dropout=0.0),
    "lsun-large": dict(ch=192, multipliers=(1, 1, 2, 2, 4, 4), side=256, dropout=0.0),
}
BLOCKS = 2  # residual blocks a level on the way down, one more on the way up
ATTENTION_SIDE = 16
TIMESTEPS = torch.tensor([0, 1, 500, 999])


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)  # the defaults of TensorFlow's group_norm


def conv(width_in: int, width_out: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1)


def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def timestep_embedding(t: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[sin, cos] of t times width / 2 frequencies, geometric from 1 to exactly 1 / 10000."""
    angles = t[:, None] * torch.logspace(0, -4, width // 2, dtype=dtype)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Residual(nn.Module):
    def __init__(self, width_in: int, width_out: int, temb_width: int, dropout: float):
        super().__init__()
        self.norm1, self.conv1 = norm(width_in), conv(width_in, width_out)
        self.temb_proj = nn.Linear(temb_width, width_out)
        self.norm2, self.conv2 = norm(width_out), conv(width_out, width_out)
        self.nin_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x))) + self.temb_proj(swish(temb))[:, :, None, None]
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """One head over all pixels, as wide as the image has channels."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).mT  # (B, H * W, C)
        logits = self.q(pixels) @ self.k(pixels).mT / math.sqrt(x.shape[1])
        h = self.proj_out(logits.softmax(dim=-1) @ self.v(pixels))
        return x + h.mT.reshape(x.shape)


class Level(nn.Module):
    """The blocks at one resolution, without the change to the next."""

    def __init__(self, widths_in: list, width: int, attend: bool, temb_width: int, dropout: float):
        super().__init__()
        self.block = nn.ModuleList(Residual(w, width, temb_width, dropout) for w in widths_in)
        self.attn = nn.ModuleList(Attention(width) for _ in widths_in if attend)
        self.resample = None

    def step(self, i: int, x: Tensor, temb: Tensor) -> Tensor:
        x = self.block[i](x, temb)
        return self.attn[i](x) if self.attn else x


class HoUNet(nn.Module):
    """Every output on the way down, conv_in's and the downsamplings' too, is a skip connection."""

    def __init__(
        self,
        ch: int,
        multipliers: tuple,
        side: int,
        dropout: float,
        attention_sides: tuple = (ATTENTION_SIDE,),
    ):
        super().__init__()
        self.ch, widths = ch, [ch * m for m in multipliers]
        attend = [side >> i in attention_sides for i in range(len(widths))]
        shared = dict(temb_width=4 * ch, dropout=dropout)
        self.dense0, self.dense1 = nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)
        self.conv_in, skips, last = conv(3, ch), [ch], widths[-1]
        self.down, up = nn.ModuleList(), []
        for i, width in enumerate(widths):
            self.down.append(
                Level([skips[-1]] + [width] * (BLOCKS - 1), width, attend[i], **shared)
            )
            skips += [width] * BLOCKS
            if i < len(widths) - 1:
                self.down[i].resample = nn.Conv2d(width, width, 3, stride=2)
                skips.append(width)
        self.mid = Level([last, last], last, False, **shared)
        self.mid.attn.append(Attention(last))
        for i, width in reversed(list(enumerate(widths))):
            before = [last] + [width] * BLOCKS
            up.append(Level([w + skips.pop() for w in before], width, attend[i], **shared))
            up[-1].resample, last = conv(width, width) if i else None, width
        self.up = nn.ModuleList(up)
        self.norm_out, self.conv_out = norm(ch), conv(ch, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb = self.dense1(swish(self.dense0(timestep_embedding(t, self.ch, x.dtype))))
        skips = [h := self.conv_in(x)]
        for level in self.down:
            skips += [h := level.step(i, h, temb) for i in range(BLOCKS)]
            if level.resample:  # SAME at stride 2 and even sides: one zero, at the bottom and right
                skips.append(h := level.resample(nn.functional.pad(h, (0, 1, 0, 1))))
        h = self.mid.block[1](self.mid.attn[0](self.mid.block[0](h, temb)), temb)
        for level in self.up:
            for i in range(BLOCKS + 1):
                h = level.step(i, torch.cat([h, skips.pop()], dim=1), temb)
            if level.resample:  # nearest; at a factor of 2 align_corners picks the same pixels
                h = level.resample(h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        return self.conv_out(swish(self.norm_out(h)))


STOCK_NAMES = (
    (r"^dense0\.", "time_embedding.linear_1."),
    (r"^dense1\.", "time_embedding.linear_2."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^mid\.", "mid_block."),
    (r"^(down|up)\.(\d)\.", r"\1_blocks.\2."),
    (r"^(down|up)(.*)\.resample\.", r"\1\2.\1samplers.0.conv."),
    (r"\.block\.", ".resnets."),
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.attn\.(\d)\.norm\.", r".attn.\1.group_norm."),
    (r"\.attn\.(\d)\.([qkv])\.", r".attn.\1.to_\2."),
    (r"\.attn\.(\d)\.proj_out\.", r".attn.\1.to_out.0."),
    (r"\.attn\.", ".attentions."),
)


def stock_name(name: str) -> str:
    """UNet2DModel's name of a parameter of HoUNet: the substitutions above, in their order."""
    for pattern, replacement in STOCK_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def rendering(preset: str, **changes) -> HoUNet:
    """HoUNet for a preset, without memory for its weights: they come from `share_weights`."""
    with torch.device("meta"):
        return HoUNet(**dict(HO_NETWORKS[preset], **changes)).requires_grad_(False)


def share_weights(unet: UNet2DModel, ho: HoUNet) -> HoUNet:
    """The weights of `unet` in `ho`; strict about names and shapes."""
    state = unet.state_dict()
    ho.load_state_dict({name: state[stock_name(name)] for name in ho.state_dict()}, assign=True)
    return ho


def randomise(unet: UNet2DModel) -> UNet2DModel:
    """Random float64 weights in every layer, the norms and those that start at 0 too, such that
    activations and outputs are of order 1."""
    torch.manual_seed(0)
    unet.double().requires_grad_(False)
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return unet


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(TIMESTEPS), 3, 32, 32, generator=generator, dtype=torch.float64)


def tolerance(t: Tensor) -> Tensor:
    """Largest difference of outputs of order 1, by timestep.

    Some 50 layers in float64 that sum up to 4,608 products each: a few thousand ulps, 1e-12. But
    stock embeds the timestep in float32 always: its angles, t times a frequency of up to 1, are off
    by up to t ulps of 1, 2**-23.
    """
    return 1e-12 + 2**-23 * t.double()


def narrow_config() -> dict:
    """The preset's arguments at half its width. Not less: in a group of one channel the norm would
    remove the timestep."""
    return dict(unet_config("cifar10"), block_out_channels=(64, 128, 128, 128))


def differences(unet: UNet2DModel, ho: HoUNet) -> Tensor:
    """Largest absolute difference of the outputs, of order 1, at each of TIMESTEPS."""
    with torch.no_grad():
        torch.manual_seed(2)
        theirs = unet(images(), TIMESTEPS).sample
        torch.manual_seed(2)
        ours = ho(images(), TIMESTEPS)
    assert 0.3 < theirs.std() < 3
    return (theirs - ours).abs().amax(dim=(1, 2, 3))


@pytest.mark.parametrize("preset", HO_NETWORKS)
def test_every_parameter_has_one_counterpart_of_its_shape(preset):
    with torch.device("meta"):
        unet = build_unet(preset)
    ours = [(stock_name(name), p.shape) for name, p in rendering(preset).named_parameters()]
    assert sorted(ours) == sorted((name, p.shape) for name, p in unet.named_parameters())
    assert unet.state_dict().keys() == dict(unet.named_parameters()).keys()


def test_cifar10_is_the_network_of_the_paper():
    unet = randomise(build_unet("cifar10"))
    ho = share_weights(unet, rendering("cifar10"))
    assert sum(p.numel() for p in ho.parameters()) == 35_746_307
    assert (differences(unet.eval(), ho.eval()) <= tolerance(TIMESTEPS)).all()


def test_dropout_has_the_rate_and_place_of_the_paper():
    """From one seed both draw the same masks if rates, shapes and order are the same and nothing
    else draws, once the layout in memory, which masks are filled by, is the same too."""
    unet = randomise(UNet2DModel(**narrow_config()))
    ho = share_weights(unet, rendering("cifar10", ch=64))
    evaluated = ho.eval()(images(), TIMESTEPS)
    for network in (unet.train(), ho.train()):
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_pre_hook(lambda _, args: args[0].contiguous())
    assert (differences(unet, ho) <= tolerance(TIMESTEPS)).all()
    assert (ho(images(), TIMESTEPS) - evaluated).abs().max() > 0.1


@pytest.mark.parametrize(
    "argument",
    ["attention_head_dim", "downsample_padding", "flip_sin_to_cos", "freq_shift", "norm_eps"],
)
def test_each_default_of_stock_makes_another_network(argument):
    default = inspect.signature(UNet2DModel).parameters[argument].default
    unet = randomise(UNet2DModel(**dict(narrow_config(), **{argument: default}))).eval()
    difference = differences(unet, share_weights(unet, rendering("cifar10", ch=64)).eval())
    assert (difference > 1000 * tolerance(TIMESTEPS)).any()


@pytest.fixture(scope="module")
def new_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return build_unet("cifar10").eval()


def test_new_network_outputs_zero(new_unet):
    with torch.no_grad():
        out = new_unet(images().float(), TIMESTEPS).sample
    assert torch.equal(out, torch.zeros(len(TIMESTEPS), 3, 32, 32))


def test_new_weights_are_fan_average_uniform_or_zero(new_unet):
    """Uniform with variance 1 / ((fan_in + fan_out) / 2), as TensorFlow's variance_scaling defines
    it; but 0 where the paper's code has that times 1e-10, the end of each branch and of the net."""
    zeros = 0
    for name, w in share_weights(new_unet, rendering("cifar10")).state_dict().items():
        layer, kind = name.split(".")[-2:]
        if kind == "bias":
            assert not w.any(), name
        elif layer.startswith("norm"):
            assert (w == 1).all(), name
        elif layer in ("conv2", "proj_out", "conv_out"):
            zeros += 1
            assert not w.any(), name
        else:
            limit = math.sqrt(3 / ((w[0].numel() + w[:, 0].numel()) / 2))
            # Of n uniform draws, the largest is within 20 / n of the limit but for exp(-20); their
            # standard deviation has a relative standard error of sqrt(1 / (5 n)), here times 5.
            assert limit * (1 - 20 / w.numel()) < w.abs().max() < limit * (1 + 1e-6), name
            assert w.std().item() == pytest.approx(
                limit / math.sqrt(3), rel=math.sqrt(5 / w.numel())
            ), name
    assert zeros == 22 + 6 + 1


@pytest.mark.parametrize(
    "preset", [name for name in PRESETS if PRESETS[name].parameters is not None]
)
def test_parameter_counts(preset):
    with torch.device("meta"):
        unet = build_unet(preset, image_channels=1 if preset.startswith("fashion") else 3)
    assert sum(p.numel() for p in unet.parameters()) == PRESETS[preset].parameters
