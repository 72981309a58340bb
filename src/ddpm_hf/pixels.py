"""One image: decoded, composited on a background, resized, cropped, flipped."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from .functional import moved

DECODER_VERSION = 3
"""Part of the cache key: raise it when `decode_row` or what it calls changes its result."""

SHAPE = ("channels", "height", "width", "deep")
"""Columns beside an image's pixels; `deep` is 1 where the source has more than 8 bits."""


def flatten_transparency(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any Pillow image as L, RGB or a deep grey mode, composited on `background`."""
    has_key = "transparency" in image.info
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return image
    if image.mode in ("L", "RGB") and not has_key:
        return image
    if image.mode == "1" and not has_key:
        return image.convert("L")
    grey = image.mode in ("L", "LA", "La") and len(set(background)) == 1
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or has_key:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("L" if grey else "RGB")


def deep_to_unit(image: Image.Image) -> Image.Image:
    """A grey image deeper than 8 bits (16-bit integers, floats in [0, 1]) as float32 in [-1, 1].

    Raises:
        ValueError: integers beyond 65535, or floats that are not in [0, 1].
    """
    pixels = np.asarray(image).astype(np.float32)
    limit = 1.0 if image.mode == "F" else 65535.0
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= limit):
        raise ValueError(f"pixels of mode {image.mode} must be in [0, {limit:g}]")
    return Image.fromarray(pixels / limit * 2 - 1)


def encoded_size(cell: dict[str, Any] | None) -> tuple[int, int] | None:
    """(height, width) of an image that is not decoded yet; None where it cannot be read."""
    try:
        content = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
        with Image.open(content) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            sideways = orientation >= 5 and image.format != "TIFF"  # Pillow has turned its size
            return (image.width, image.height) if sideways else (image.height, image.width)
    except Exception:  # noqa: BLE001  whatever it is, `decode_row` names it
        return None


def resize_to_cover(image: Image.Image, size: tuple[int, int], centre: bool) -> Image.Image:
    """The image scaled to just cover (height, width), antialiased; cropped to it if `centre`."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    scaled = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if image.size != scaled:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    if centre:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return image


def decode_row(
    row: dict[str, Any],
    index: int | str,
    *,
    column: str,
    label_column: str | None,
    size: tuple[int, int],
    centre: bool,
    background: tuple[int, int, int],
    version: int,
) -> dict[str, Any]:
    """One row of the image set, decoded for good: bytes, shape, class, or what is wrong with it."""
    from datasets import Image as ImageFeature

    cell = row[column]
    label = {} if label_column is None else {"label": row[label_column]}
    try:
        if cell is None:
            raise ValueError("the cell is empty")
        image = flatten_transparency(ImageFeature().decode_example(cell), background)
        deep = image.mode not in ("L", "RGB")
        image = resize_to_cover(deep_to_unit(image) if deep else image, size, centre)
        pixels = np.asarray(image)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    # Pillow raises whatever its decoders do on broken bytes; the caller names the file and what was
    # raised.
    except Exception as error:  # noqa: BLE001
        name = (cell or {}).get("path") or f"row {index}"
        # Without the address in memory of the bytes that Pillow could not read.
        reason = re.sub(r" <_io\.BytesIO object at \w+>$", "", " ".join(str(error).split()))
        fault = f"{name} ({type(error).__name__}: {reason})"
        return dict(pixels=b"", **dict.fromkeys(SHAPE), fault=fault, **label)
    if deep:  # bicubic overshoots
        pixels = pixels.clip(-1, 1)
    shape = dict(zip(SHAPE, (*pixels.shape, deep), strict=True))
    return dict(pixels=pixels.tobytes(), **shape, fault=None, **label)


# A batch of them


def crop_each(
    images: Sequence[np.ndarray],
    draws: np.ndarray,
    size: tuple[int, int],
    *,
    flip: bool,
    channels: int,
    deep: bool,
) -> Tensor:
    """Images (C, height, width) of any shapes, cropped and flipped: see `ImageSet.gather`.

    Returns:
        (B, channels, H, W), float32 in [-1, 1] if `deep`, else uint8.
    """
    out = np.empty((len(images), channels, *size), np.float32 if deep else np.uint8)
    height, width = size
    for k, (pixels, (top, left, mirror)) in enumerate(zip(images, draws, strict=True)):
        y, x = int(top * (pixels.shape[1] - height + 1)), int(left * (pixels.shape[2] - width + 1))
        crop = pixels[:, y : y + height, x : x + width]
        if flip and mirror < 0.5:
            crop = crop[..., ::-1]
        if deep and crop.dtype == np.uint8:
            crop = crop / np.float32(127.5) - 1
        if not deep and crop.dtype == np.float32:
            crop = ((crop + 1) * np.float32(127.5)).round().astype(np.uint8)
        out[k] = luma(crop) if len(crop) > channels else crop  # one channel broadcasts to three
    return torch.from_numpy(out)


def crop_equal(
    images: np.ndarray, draws: np.ndarray, size: tuple[int, int], *, flip: bool
) -> Tensor:
    """As `crop_each`, all at once, for images of one shape, (B, C, height, width), written over."""
    spare = np.array(images.shape[2:]) - size
    if spare.any():
        top, left = (draws[:, :2] * (spare + 1)).astype(np.int64).T
        windows = np.lib.stride_tricks.sliding_window_view(images, size, (2, 3))
        images = windows[np.arange(len(images)), :, top, left]
    if flip:
        mirrored = draws[:, 2] < 0.5
        images[mirrored] = images[mirrored][..., ::-1]
    return torch.from_numpy(images)


def crop_on_device(
    images: Tensor, draws: np.ndarray, size: tuple[int, int], *, flip: bool
) -> Tensor:
    """As `crop_equal`, where the images are; nothing waits for the device."""
    spare, device = np.array(images.shape[2:]) - size, images.device
    if spare.any():
        corners = (draws[:, :2] * (spare + 1)).astype(np.int64)
        top, left = moved(torch.from_numpy(corners), device).unbind(1)
        windows = images.unfold(2, size[0], 1).unfold(3, size[1], 1)
        images = windows[torch.arange(len(images), device=device), :, top, left]
    if flip:
        mirrored = moved(torch.from_numpy(draws[:, 2] < 0.5), device)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def luma(pixels: np.ndarray) -> np.ndarray:
    """RGB to grey by ITU-R 601, as Pillow does it: (..., 3, H, W) -> (..., 1, H, W)."""
    # Not a matrix product: its rounding depends on how many images there are.
    red, green, blue = np.split(pixels.astype(np.float32), 3, axis=-3)
    grey = np.float32(0.299) * red + np.float32(0.587) * green + np.float32(0.114) * blue
    return grey.round().astype(np.uint8) if pixels.dtype == np.uint8 else grey
