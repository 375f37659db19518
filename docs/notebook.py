# %% [markdown]
# # From two folders of scans to a picture, in Python
#
# The same road as the tutorial's commands. This notebook is made from `docs/notebook.py` by `docs/make_notebook.py`.
# The scans are made-up blobs, so that it runs anywhere; point the paths to folders of your own.

# %%
import os
import tempfile
from pathlib import Path

work = Path(os.environ.get("WORK", tempfile.mkdtemp()))
for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    (work / name).mkdir(exist_ok=True)
    os.environ[name] = str(work / name)  # before anything of nnU-Net is imported

# %% [markdown]
# ## Scans
#
# Bright blobs on grey in one domain, dark blobs on grey in the other. Leave this cell out for scans of your own.
# %%
import numpy as np  # noqa: E402
import SimpleITK as sitk  # noqa: E402

from nnunet_uda import UDAError, configure, convert, evaluate, plan, predict, train  # noqa: E402


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((2.0, 2.0, 4.0))
    sitk.WriteImage(image, str(path))


random = np.random.default_rng(0)
for index in range(6):
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (10, 48, 48)), indexing="ij")
    shift = random.uniform(-0.3, 0.3, 2)
    label = ((x - shift[0]) ** 2 + (y - shift[1]) ** 2 + z**2 < 0.25).astype(np.uint8)
    noise = random.normal(0, 20, label.shape)
    write(work / "bright" / f"{index}.nii.gz", (300 + 400.0 * label + noise).astype(np.float32))
    write(work / "dark" / f"{index}.nii.gz", (700 - 400.0 * label + noise).astype(np.float32))
    write(work / "labels" / f"{index}.nii.gz", label)

# %% [markdown]
# ## Convert, plan, configure

# %%
raw = convert(
    "folders", dataset_id=541, name="Blobs", source="bright", target="dark", source_images=work / "bright",
    source_labels=work / "labels", target_images=work / "dark", target_labels=work / "labels", labels={"blob": 1}, np=1,
)  # fmt: skip
plan(541, num_processes=1)
configure(541, "nnUNetPlansCPU", {"num_epochs": 3, "iterations_per_epoch": 20, "seed": 0}, preset="cpu")

# %% [markdown]
# What is wrong is a `UDAError` that says what to do:

# %%
try:
    configure(541, "nnUNetPlansTypo", {"num_epohs": 3})
except UDAError as error:
    print(error)

# %% [markdown]
# ## Train and predict

# %%
fold = train(541, "2d", "all", trainer="CASTTrainer", plans="nnUNetPlansCPU", device="cpu")
predictions = predict(541, raw / "imagesTu", work / "predictions", plans="nnUNetPlansCPU", folds=("all",), device="cpu")

# %% [markdown]
# ## Scores and pictures
#
# `evaluation.html` in the same folder has all slices.

# %%
scores = evaluate({"CAST": predictions}, work / "evaluation", dataset=541, r=raw / "labelsTs", i=raw / "imagesTu", np=1)
print(scores["summary"]["CAST"]["blob"])

# %%
import matplotlib.pyplot as plt  # noqa: E402

picture = sorted((fold / "pictures").glob("epoch_*.png"))[-1]
plt.figure(figsize=(12, 6))
plt.imshow(plt.imread(picture))
plt.axis("off")
