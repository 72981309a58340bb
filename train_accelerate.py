#!/usr/bin/env python
r"""Train a denoising diffusion model of images.

Three to ten minutes on two CPU cores, images included:
    accelerate launch train_accelerate.py
Your own images:
    accelerate launch train_accelerate.py --train_data_dir my_images --resolution 64 --random_flip
Ho et al. 2020, as published, on one GPU, and on eight:
    accelerate launch train_accelerate.py --recipe cifar10
    accelerate launch --multi_gpu --num_processes 8 train_accelerate.py --recipe cifar10
Two processes on a CPU:
    torchrun --nproc_per_node 2 train_accelerate.py

`--help` lists every flag, `--dry_run` prints what they resolve to; `ddpm-hf train` is the same.
"""

import sys
from functools import partial

from ddpm_hf.cli import run, train_command

if __name__ == "__main__":
    name = "train_accelerate.py"
    sys.exit(run(partial(train_command, prog=name), sys.argv[1:], name))
