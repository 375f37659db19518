"""Converters: a vendor's tree becomes an nnU-Net raw dataset with an unlabelled target. One module a dataset."""
