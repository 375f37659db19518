"""The folder nnU-Net searches for trainers (``nnUNet_extTrainer``): one file per paper."""
