"""Pictures of many images."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from PIL import Image
from torch import Tensor


def image_grid(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Images of one size side by side on white; small ones enlarged to at least 56 pixels.

    As many columns as rows, or as asked for.
    """
    columns = columns or int(np.ceil(len(images) ** 0.5))
    width, height = images[0].size
    zoom = max(1, -(-56 // max(width, height)))
    cell_w, cell_h = width * zoom + 2, height * zoom + 2
    mode = images[0].mode if images[0].mode == "L" else "RGB"
    grid = Image.new(mode, (columns * cell_w + 2, -(-len(images) // columns) * cell_h + 2), "white")
    for k, image in enumerate(images):
        tile = image.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        grid.paste(tile, (k % columns * cell_w + 2, k // columns * cell_h + 2))
    return grid


def save_image_grid(images: Any, path: str | Path, columns: int | None = None) -> Path:
    """Save images as one picture; a file name's ending chooses the format.

    Args:
        images: PIL images, or a tensor (B, C, H, W) in [-1, 1].
        path: The file; its folder is made.
        columns: Images in a row; as many as rows when not given.
    """
    if isinstance(images, Tensor):
        pixels = ((images.float() / 2 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).cpu().numpy()
        images = diffusers.DDPMPipeline.numpy_to_pil(pixels)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, columns).save(path)
    return path
