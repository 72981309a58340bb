"""What a network trains fastest with on this machine, measured; and how near that is to its peak.

What is fast differs by network: on one CPU bf16 with channels_last doubled the speed of the
CIFAR-10 U-Net and slowed a small one down (docs/log.md). So `auto` settings are measured, once a
run, on a throw-away network. What was faster on every network is no choice and not measured: the
fused optimiser, and EMA and clipping over all parameters at once.
"""

import gc
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from diffusers import UNet2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .config import TrainingConfig
from .devices import on_main
from .errors import InputError
from .optimization import build_optimizer

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

GAIN = 1.05
"""What is less plain must be so many times faster: timings repeat to a few per cent."""
SECONDS_EACH, BUDGET_SECONDS = 1.0, 20.0
"""Time for one candidate after its first step, and after which no further one is tried."""
MIN_RUN_SECONDS, MIN_COMPILED_RUN_SECONDS = 60.0, 3600.0
"""A run shorter than a minute takes what is plain, one shorter than an hour is not compiled:
compiling the CIFAR-10 U-Net takes 70 to 140 seconds on a CPU, and the same again in the run."""
CPU_BATCH = 8
"""Images a step on a CPU: precisions and layouts rank there as at 16 (2 and 4 are too few)."""


class Speed(NamedTuple):
    """How the network computes. Dropout draws other masks compiled than eager.

    Attributes:
        mixed_precision: `no`, `bf16` or `fp16`. On CUDA `no` leaves TF32 as torch has it: on in
            convolutions, off in matrix products.
        memory_format: `contiguous` or `channels_last`, of the network's weights.
        compile: Whether the whole network is compiled; diffusers marks no repeated blocks in it.
        measured: What was tried: its name and images/s, or why it did not run.
    """

    mixed_precision: str
    memory_format: str
    compile: bool = False
    measured: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`bf16, channels_last, compiled`."""
        precision = "fp32" if self.mixed_precision == "no" else self.mixed_precision
        words = [precision, self.memory_format, "compiled" if self.compile else "eager"]
        return ", ".join(words)

    def describe(self) -> str:
        """One line: the choice, and what it was chosen from."""
        tried = f" (images/s tried: {'; '.join(self.measured)})" if self.measured else ""
        return f"Computing in {self.name}{tried}"


def choose_speed(
    unet_config: dict[str, Any],
    config: TrainingConfig,
    device: torch.device,
    *,
    batch_size: int,
    num_images: int,
) -> Speed:
    """Take what is set, measure what is `auto`; a few seconds, or minutes where it compiles.

    Leaves all random states alone. A launcher's bf16 or fp16 counts as set.

    Args:
        unet_config: Configuration of a UNet2DModel, with its sample_size.
        config: Its mixed_precision, memory_format and compile are the question.
        device: Where the run computes.
        batch_size: Images per device and micro-step.
        num_images: Images that the run will take, per device.

    Raises:
        InputError: fp16 on a CPU, or a launcher's fp8.
    """
    options = candidates(config, device)
    if len(options) == 1 and config.compile != "auto":
        return options[0]._replace(compile=config.compile == "yes")
    batch = min(batch_size, CPU_BATCH) if device.type == "cpu" else batch_size
    measure = partial(images_per_second, unet_config, config, device, batch)
    return compare(options, measure, num_images, config.compile)


def compare(
    options: list[Speed], measure: Callable[[Speed], float], num_images: int, compiling: str
) -> Speed:
    """The plainest option that none beats by GAIN; compiled, if set or in a long run faster.

    Args:
        options: What to choose from, the plainest first, none compiled.
        measure: Images a second of an option.
        num_images: Images that the run will take, per device.
        compiling: `yes`, `no` or `auto`.
    """
    notes: list[str] = []

    def rate(option: Speed) -> float:
        expected = RuntimeError if option.compile else torch.OutOfMemoryError
        try:
            found = measure(option)
        except expected as error:
            notes.append(f"{option.name}: failed ({first_line(error)})")
            return 0.0
        notes.append(f"{option.name}: {found:.3g}")
        return found

    stop = time.perf_counter() + BUDGET_SECONDS
    best, best_rate = options[0], rate(options[0])
    for option in options[1:]:
        too_short = best_rate and num_images / best_rate < MIN_RUN_SECONDS
        if too_short or time.perf_counter() > stop:
            break
        found = rate(option)
        if found > GAIN * best_rate:
            best, best_rate = option, found
    compiled = best._replace(compile=True)
    if compiling == "yes":
        best = compiled
    elif compiling == "auto" and best_rate and num_images / best_rate > MIN_COMPILED_RUN_SECONDS:
        best = compiled if rate(compiled) > GAIN * best_rate else best
    return best._replace(measured=tuple(notes))


def agree(choose: Callable[[], Speed]) -> Speed:
    """Rank 0's choice, on every process. The process group has to be there: `PartialState`.

    Raises:
        InputError: rank 0's, on every process, so that none waits for it; or torch.compile does
            not work here.
    """
    answer = on_main(choose)
    if answer.compile:
        check_compiler(PartialState().device)
    return answer


def candidates(config: TrainingConfig, device: torch.device) -> list[Speed]:
    """Precisions x memory formats to choose from, the plainest first; none compiled.

    Raises:
        InputError: fp16 on a CPU, or a launcher's fp8.
    """
    precision = config.mixed_precision
    # `accelerate launch` always exports a precision; its "no" cannot be told from no choice.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "auto" and launched != "no":
        precision = launched
    if precision == "fp8":
        raise InputError("mixed_precision fp8 is not supported: use bf16")
    if precision == "fp16" and device.type == "cpu":
        raise InputError("mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    precisions = [precision]
    if precision == "auto":  # fp16 only where asked for
        precisions = ["no", "bf16"] if computes_bf16(device) else ["no"]
    layouts = list(LAYOUTS) if config.memory_format == "auto" else [config.memory_format]
    return [Speed(precision, layout) for layout, precision in product(layouts, precisions)]


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16; emulation is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private in torch, and not in every build of it.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in checks)


def images_per_second(
    unet_config: dict[str, Any],
    config: TrainingConfig,
    device: torch.device,
    batch_size: int,
    speed: Speed,
) -> float:
    """Images a second of the fastest of some training steps of a throw-away network."""
    seconds: list[float] = []
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            step = build_step(unet_config, config, device, batch_size, speed)
            step()
            while len(seconds) < 2 or sum(seconds) < SECONDS_EACH:
                started = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - started)
            del step
    finally:
        if speed.compile:
            torch.compiler.reset()
        gc.collect()
        if device.type in ("cuda", "mps"):
            getattr(torch, device.type).empty_cache()
    return batch_size / min(seconds)


def build_step(
    unet_config: dict[str, Any],
    config: TrainingConfig,
    device: torch.device,
    batch_size: int,
    speed: Speed,
) -> Callable[[], None]:
    """A training step on noise: forward, backward, optimiser; returns when the device is done."""
    unet = UNet2DModel.from_config(unet_config)
    unet = unet.to(device, memory_format=LAYOUTS[speed.memory_format]).train()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if speed.compile:
        unet.compile()
    optimizer = build_optimizer(unet, config)
    x_t, t, labels = inputs(unet, batch_size, device)
    autocast = torch.autocast(
        device.type, DTYPES[speed.mixed_precision], enabled=speed.mixed_precision != "no"
    )

    def step() -> None:
        with autocast:
            output = unet(x_t, t, class_labels=labels).sample
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return step


def inputs(
    unet: UNet2DModel, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Noise (B, C, H, W) of the network's size, timesteps (B,), and classes (B,) if it has any."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    x_t = torch.randn(batch_size, unet.config.in_channels, height, width, device=device)
    t = torch.zeros(batch_size, dtype=torch.long, device=device)
    return x_t, t, t if unet.config.num_class_embeds else None


def check_compiler(device: torch.device) -> None:
    """Compile one sum: seconds, against the minutes of a network.

    Raises:
        InputError: torch.compile does not work here.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except RuntimeError as error:
        raise InputError(
            f"compile yes: torch.compile does not work here ({first_line(error)}): install a C++ "
            "compiler, or choose --compile no"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message; torch's have dozens."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def count_flops(unet_config: dict[str, Any]) -> int:
    """Floating-point operations of one image's forward and backward pass; nothing is computed.

    Products of convolutions, linear layers and attention only, two operations a multiply-add.

    Args:
        unet_config: Configuration of a UNet2DModel, with its sample_size.
    """
    with torch.device("meta"):
        unet = UNet2DModel.from_config(unet_config)
        x_t, t, labels = inputs(unet, 1, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        unet(x_t, t, class_labels=labels).sample.sum().backward()
    return counter.get_total_flops()


def peak_flops(device: torch.device, mixed_precision: str) -> float:
    """Operations a second of a large matrix product: what this device reaches, not its data sheet.

    So model FLOP/s utilisation is images/s x `count_flops` / `peak_flops`, per device. fp32 may use
    TF32 on CUDA here, since convolutions do.
    """
    size = 2048 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=DTYPES[mixed_precision])
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    seconds: list[float] = []
    try:
        while len(seconds) < 3 or sum(seconds) < 0.3:
            started = time.perf_counter()
            a @ a
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds.append(time.perf_counter() - started)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / min(seconds)
