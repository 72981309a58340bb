#!/usr/bin/env python
"""Train a denoising diffusion model of images.

    accelerate launch train_accelerate.py                                  # five minutes, images
    included accelerate launch train_accelerate.py --train_data_dir my_images --resolution 64
    --random_flip accelerate launch train_accelerate.py --recipe cifar10                 # Ho et al.
    2020, as published accelerate launch --config_file accelerate_configs/8_gpus.yaml
    train_accelerate.py --recipe lsun-bedroom torchrun --nproc_per_node 2 train_accelerate.py
    # two processes on a CPU

`--help` lists every flag, `--dry_run` prints what they resolve to. `ddpm-hf train` is the same
program.
"""

import sys

from ddpm_hf.cli import run, train_command

if __name__ == "__main__":
    sys.exit(run(train_command, sys.argv[1:], "train_accelerate.py"))
