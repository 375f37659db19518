"""A trained nnU-Net and scans of another domain, without the data that it was trained on."""
