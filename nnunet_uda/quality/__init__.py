"""Whether to trust a segmentation, case by case, without a label of its domain."""
