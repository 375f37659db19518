"""The former place of ``nnunet_uda.images.reading``, for scripts that import it from here."""

from nnunet_uda.images.reading import LabelMap, check_same_geometry, check_whole, read_image, read_label

__all__ = ["LabelMap", "check_same_geometry", "check_whole", "read_image", "read_label"]
