"""Vestibular schwannoma, ceT1 <-> hrT2: the TCIA set Vestibular-Schwannoma-SEG, or crossMoDA 2021, 2022, 2023.

Expected tree (-i): ONE of these, recognised by its names; folders above it may be given instead.

    TCIA         Vestibular-Schwannoma-SEG/VS-SEG-001/<study>/<series>/*.dcm        MR, RTSTRUCT (RTPLAN, RTDOSE unused)
    convenient   vs_gk_1_t1/{IMG*.dcm,RTSS.dcm,contours.json}   vs_gk_1_t2/...       RTSS.dcm is used where both are
    converted    vs_gk_1/{vs_gk_t1_refT1,vs_gk_seg_refT1,vs_gk_t2_refT2,vs_gk_seg_refT2}.nii.gz
    crossMoDA    {source_training,training_source,TrainingSource}/crossmoda_1_{ceT1,Label}.nii.gz
                 {target_training,training_target,TrainingTarget}/crossmoda_106_hrT2.nii.gz
                 {target_validation,validation,crossmoda23_validation}/crossmoda_211_hrT2.nii.gz
                 (2022: crossmoda2021_ldn_1_..., crossmoda2022_etz_1_...; 2023: crossmoda2023_etz_1_..., T2 for hrT2)

Data: https://doi.org/10.7937/TCIA.9YTJ-5Q73 (Vestibular-Schwannoma-SEG, CC BY 4.0);
https://zenodo.org/records/6504722 (crossMoDA 2021 and 2022) and https://www.synapse.org/Synapse:syn51236108 (2023),
CC BY-NC-SA 4.0. Please cite Shapey et al., Scientific Data 8, 2021; Dorent et al., Medical Image Analysis 83, 2023.
The 242 patients of the TCIA set are numbered 1 to 250 with gaps; crossMoDA's London patients are the same people.

The tumour is found by its structure's name: TV, TVT1, AN, Rt AN, Lt AN, VS, tumour or tumor, whatever the case of the
letters. Exactly one is expected; the others, as Brainstem, Modiolus, cochlea, Test, Men (a meningioma) and volumes of
other dates, are left out. Where none or several have such a name the conversion stops and says what it found: name
the right one with -tumour (used for such cases alone, so that it cannot replace a TV elsewhere), or leave the patient
out with -exclude. Contours are drawn on the voxels of the series that the RTSTRUCT refers to; contours.json does not
say which. Between slices nothing is interpolated.

Repaired, and listed in the summary:
  between slices    contours that do not lie on a slice are drawn on the nearest one
  holes             a contour inside another one of its plane is cut out of it; one inside that is an island

Protocols:
  uuds        for the trees of 242 patients with both modalities, drawn with -seed; a patient is in one group only:
                100 source        imagesTr and labelsTr, "train" of splits_final.json
                 14 validation    source scans to imagesTr and labelsTr, "val" of splits_final.json (one fold: train
                                  with fold 0). The paper tuned on these patients' target scans with labels; here the
                                  target's labels choose nothing, and these target scans are not converted.
                100 target        imagesTu, without labels
                 28 test          target scans to imagesTs and labelsTs
              Other numbers of patients are split in these proportions, with a warning; -test_ids names the test
              patients instead. A patient without one of the scans is left out before the split, with a warning, or
              refused with --strict.
  crossmoda   the vendor's groups, ceT1 to hrT2 only: source training to imagesTr and labelsTr in 5 seeded folds, target
              training to imagesTu, target validation to imagesTs (its labels are not public: with labels of your own
              beside the scans, as crossmoda_211_Label.nii.gz, it can be evaluated).

-structures vs (default) or vs cochlea, of crossMoDA alone. crossMoDA 2021 and 2022 have 1 VS, 2 cochlea; 2023 has the
tumour's two parts inside and outside the meatus as 1 and 2, taken together here, and 3 cochlea.

Voxels and orientation are the vendor's; nnU-Net z-scores each scan, as the paper does. Intensities are clipped at the
percentiles 0.5 and 99.5 of each scan before; with -protocol, as in the paper, only where -source_intensities or
-target_intensities are given. Target labels are read for labelsTs alone. With --upper_bound they ARE used for training:
it writes the supervised upper bound's dataset, target and validation patients' target scans WITH their labels as
imagesTr and labelsTr, to be trained with a plain trainer and tested on the same test patients.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import SimpleITK as sitk

from nnunet_uda.dataset_conversion.case import Case, Group, class_map, matched
from nnunet_uda.dataset_conversion.dataset import skip_or_refuse
from nnunet_uda.dataset_conversion.options import add_directions, intensity_request, run_alone
from nnunet_uda.dataset_conversion.protocols import (
    Arrangement,
    arrange_patients,
    ids,
    refuse_unknown,
    split_patients,
    write,
)
from nnunet_uda.dataset_conversion.splits import source_folds
from nnunet_uda.errors import UDAError
from nnunet_uda.images.dicom import Header, by_name, dicom_in, read_header, read_series
from nnunet_uda.images.geometry import on_grid
from nnunet_uda.images.intensities import DEFAULT
from nnunet_uda.images.listing import contents, files_in, folders_below, folders_in, folders_named, nifti_files
from nnunet_uda.images.reading import LabelMap
from nnunet_uda.images.rtstruct import Structures, rasterise, read_contours_json, read_rtstruct, referenced_series

EXAMPLE = "nnUNetUDA_convert vs -i Vestibular-Schwannoma-SEG -d 507 -source cet1 -target hrt2"

MODALITIES = {"cet1": "ceT1", "hrt2": "hrT2"}
WEIGHTING = {"cet1": "t1", "hrt2": "t2"}
"""As in the names of files, folders and series descriptions."""
TUMOUR = ("tv", "tvt1", "an", "rt an", "lt an", "vs", "tumour", "tumor")
"""Names of the tumour's structure in lower case."""
PATIENTS = {"source": 100, "validation": 14, "target": 100, "test": 28}
"""UUDS, section 4.1: 200 / 14 / 28 patients for training / validation / test, of the 200 one half for each modality."""
FOLDS = 5
ROLES = {
    "sourcetraining": "source", "trainingsource": "source", "targettraining": "target", "trainingtarget": "target",
    "targetvalidation": "validation", "validation": "validation", "crossmodavalidation": "validation",
}  # fmt: skip
"""crossMoDA's folders by the letters of their name."""
TCIA, CONVENIENT, CONVERTED, CROSSMODA = "the TCIA tree", "vs_gk_<n>_t1 and _t2", "vs_gk_<n>", "crossMoDA"
SCANS = {
    TCIA: "<study>/<series>/*.dcm of Modality MR with t1 in one SeriesDescription and t2 in the other",
    CONVENIENT: "IMG*.dcm in vs_gk_<n>_t1 and in vs_gk_<n>_t2",
    CONVERTED: "vs_gk_t1_refT1.nii.gz and vs_gk_t2_refT2.nii.gz in each",
}
"""Both scans of a patient, by layout."""
TCIA_PAGE = {
    "reference": "https://doi.org/10.7937/TCIA.9YTJ-5Q73",
    "licence": "CC BY 4.0, Vestibular-Schwannoma-SEG of The Cancer Imaging Archive",
}
CROSSMODA_PAGE = {"reference": "https://zenodo.org/records/6504722", "licence": "CC BY-NC-SA 4.0, crossMoDA"}
RULE = "one of the trees that -h shows (VS-SEG-001, vs_gk_1_t1, vs_gk_1, or source_training and target_training)"

Patients = dict[int, dict[str, Case]]
"""Number -> modality -> scan."""


# --- reading ----------------------------------------------------------------------------------------------------------


def read_dicom(folder: Path) -> sitk.Image:
    """The image series of a folder: its IMG files where it has such, as RTSTRUCTs lie beside them."""
    return read_series(image_files(folder) or folder)


def image_files(folder: Path) -> list[Path]:
    """The files ``IMG*.dcm`` of the convenient layout."""
    return [path for path in dicom_in(folder) if path.name.upper().startswith("IMG")]


def file_named(folder: Path, name: str) -> Path | None:
    """The file of this name, whatever the case of the letters; None where there is none."""
    return next((path for path in files_in(folder) if path.name.lower() == name.lower()), None)


def choose_tumour(structures: Structures, further: Sequence[str]) -> str:
    """Name of the one structure that is the tumour: by ``TUMOUR``, and where that does not decide, by ``further``."""
    names = [name for name, _ in structures.named]
    known = [name for name in names if name.strip().lower() in TUMOUR]
    wanted = {name.strip().lower() for name in further}
    chosen = known if len(known) == 1 else [n for n in known or names if n.strip().lower() in wanted]
    if len(chosen) != 1:
        what = f"{len(chosen or known)} of its structures are named as a tumour" if known else "no tumour"
        raise UDAError(
            f"{structures.path}: {what} (found: {', '.join(names) or 'no structure at all'}); expected exactly one "
            f"named {', '.join((*TUMOUR, *further))}. Name the right one with -tumour, or leave the patient out with "
            "-exclude."
        )
    return chosen[0]


def read_contours(
    path: Path, image: sitk.Image, image_path: Path, *, series: str, patient: str, further: Sequence[str]
) -> tuple[sitk.Image, list[str]]:
    """The tumour of an RTSTRUCT or contours.json as 1 on the image's grid, and notes.

    Args:
        series: SeriesInstanceUID of the image; an RTSTRUCT must refer to it.
        patient: PatientID of the image; an RTSTRUCT's must be the same, where both have one.
        further: names of the tumour's structure beside ``TUMOUR``.
    """
    structures = read_contours_json(path) if path.suffix.lower() == ".json" else read_rtstruct(path)
    if path.suffix.lower() != ".json" and series not in structures.series:
        raise UDAError(
            f"{path}: it refers to the series {', '.join(structures.series) or '(none)'}, but the scan in "
            f"{image_path} is {series}; expected the RTSTRUCT of this scan. Find the one that belongs to it."
        )
    if structures.patient and patient and structures.patient != patient:
        raise UDAError(
            f"{path}: its PatientID is {structures.patient!r}, that of the scan in {image_path} is {patient!r}; "
            "expected the same patient. Find the RTSTRUCT that belongs to the scan."
        )
    name = choose_tumour(structures, further)
    contours = next(contours for n, contours in structures.named if n == name)
    mask, notes = rasterise(contours, image, path)
    if not mask.any():
        raise UDAError(
            f"{path}: the structure {name} encloses no voxel ({len(contours)} contours); expected a tumour. Name "
            "another one with -tumour, or leave the patient out with -exclude."
        )
    return on_grid(mask, image), [f"{path.name}: {note}" for note in notes]


# --- trees ------------------------------------------------------------------------------------------------------------


def recognise(tree: Path) -> tuple[str, list[Path]]:
    """The tree's layout, and its folders (of patients, or of crossMoDA's groups) sorted by name."""
    found: dict[str, list[Path]] = {}
    level = [tree] if tree.is_dir() else []
    for _ in range(4):
        below: list[Path] = []
        for folder in level:
            folders_named(folder, r"VS-SEG-\d+", "VS-SEG-001", "vs-seg-")
            folders_named(folder, r"vs_gk_\d+(_t[12])?", "vs_gk_1_t1 or vs_gk_1", "vs_gk_")
            for path in by_name(folders_in(folder)):
                layout = _layout(path)
                if layout:
                    found.setdefault(layout, []).append(path)
                else:
                    below.append(path)
        level = below
    if not found:
        raise UDAError(
            f"{tree} holds no vestibular schwannoma data (found: {contents(tree)}); expected {RULE}. Check -i."
        )
    if len(found) > 1:
        first, second = (f"{paths[0]} ({layout})" for layout, paths in list(found.items())[:2])
        raise UDAError(
            f"{first.split(' (')[0]}: two layouts in one tree, {first} and {second}; expected {RULE}, as a patient may "
            "be in both. Give one with -i."
        )
    layout, folders = found.popitem()
    return layout, folders


def _layout(folder: Path) -> str:
    if re.fullmatch(r"VS-SEG-\d+", folder.name, re.I):
        return TCIA
    if re.fullmatch(r"vs_gk_\d+_t[12]", folder.name, re.I):
        return CONVENIENT
    if re.fullmatch(r"vs_gk_\d+", folder.name, re.I):
        return CONVERTED
    return CROSSMODA if _role(folder) and nifti_files(folder) else ""


def _role(folder: Path) -> str | None:
    return ROLES.get(re.sub(r"[^a-z]", "", folder.name.lower()))


def find_patients(layout: str, folders: Sequence[Path], further: Sequence[str]) -> Patients:
    """Scans of each patient with their labels. Of DICOM files the first of a series and the RTSTRUCTs are looked into,
    without contours; of the others none."""
    find = {TCIA: find_series, CONVENIENT: find_folder, CONVERTED: find_nifti}[layout]
    patients: Patients = {}
    places: dict[tuple[int, str], Path] = {}
    for folder in folders:
        number = _number(folder)
        for modality, case in find(folder, number, further).items():
            if other := places.get((number, modality)):
                raise UDAError(
                    f"{folder}: the {MODALITIES[modality]} scan of patient {number} is already in {other}; expected "
                    "every patient once. Remove or rename one of them."
                )
            places[number, modality] = folder
            patients.setdefault(number, {})[modality] = case
        patients.setdefault(number, {})
    return dict(sorted(patients.items()))


def _number(folder: Path) -> int:
    return int(re.findall(r"\d+", folder.name)[0])


def find_nifti(folder: Path, number: int, further: Sequence[str]) -> dict[str, Case]:
    """``vs_gk_1/vs_gk_t1_refT1.nii.gz`` and its ``vs_gk_seg_refT1.nii.gz``, likewise T2."""
    label_map = LabelMap({1: 1}, names={1: "tumour"})
    cases = {}
    for modality, weighting in WEIGHTING.items():
        reference = f"ref{weighting.upper()}.nii.gz"
        image = file_named(folder, f"vs_gk_{weighting}_{reference}")
        label = file_named(folder, f"vs_gk_seg_{reference}")
        if image is not None:
            cases[modality] = Case(_identifier(number, modality), (image,), label, label_map)
    return cases


def find_folder(folder: Path, number: int, further: Sequence[str]) -> dict[str, Case]:
    """``vs_gk_1_t1/IMG*.dcm`` with its ``RTSS.dcm`` or ``contours.json``."""
    modality = next(m for m, weighting in WEIGHTING.items() if folder.name.lower().endswith(weighting))
    images = image_files(folder)
    if not images:
        return {}
    label = next((p for name in ("RTSS.dcm", "RTSS", "contours.json") if (p := file_named(folder, name))), None)
    header = _image_header(images[0], number)
    if _modality(header) not in (modality, None):
        raise UDAError(
            f"{images[0]}: its SeriesDescription is {header.text('SeriesDescription')!r}; expected a "
            f"{MODALITIES[modality]} scan in {folder.name}. Find the scan that belongs here."
        )
    return {modality: _dicom_case(folder, number, modality, header, label, further)}


def find_series(folder: Path, number: int, further: Sequence[str]) -> dict[str, Case]:
    """``VS-SEG-001/<study>/<series>``: series by their description, RTSTRUCTs by the series that they refer to."""
    series: dict[str, tuple[Path, Header]] = {}
    contours: list[tuple[Path, tuple[str, ...]]] = []
    for inside in folders_below(folder):
        files = dicom_in(inside)
        kind = read_header(files[0], "Modality", "SOPClassUID").modality if files else None
        if kind == "RTSTRUCT":
            for path in files:
                contours.append((path, referenced_series(read_header(path, "ReferencedFrameOfReferenceSequence"))))
        elif kind in ("MR", ""):
            first = files[0]
            header = _image_header(first, number)
            modality = _modality(header)
            if modality is None or modality in series:
                other = f"{series[modality][0]} is one already" if modality else "it names neither t1 nor t2"
                raise UDAError(
                    f"{first}: an MR series described as {header.text('SeriesDescription')!r}, {other}; expected "
                    f"one T1 and one T2 series in {folder}. Remove what does not belong to the set."
                )
            series[modality] = inside, header
    uids = {header.text("SeriesInstanceUID"): modality for modality, (_, header) in series.items()}
    labels: dict[str, Path] = {}
    for path, refers_to in contours:
        belongs = {uids[uid] for uid in refers_to if uid in uids}
        if len(belongs) != 1:
            raise UDAError(
                f"{path}: it refers to the series {', '.join(refers_to) or '(none)'}; expected one of this patient's, "
                f"{', '.join(f'{uid} ({MODALITIES[m]})' for uid, m in uids.items()) or 'of which there is none'}. "
                "Find the scan that it was drawn on, or remove it."
            )
        modality = belongs.pop()
        if modality in labels:
            raise UDAError(
                f"{path}: {labels[modality]} is an RTSTRUCT of the same series; expected one. Remove one of them."
            )
        labels[modality] = path
    return {
        modality: _dicom_case(inside, number, modality, header, labels.get(modality), further)
        for modality, (inside, header) in series.items()
    }


def _image_header(path: Path, number: int) -> Header:
    """What is needed of a series' first slice; its PatientID must be that of the folder."""
    header = read_header(path, "SeriesInstanceUID", "PatientID", "SeriesDescription")
    named = re.fullmatch(r"VS-SEG-(\d+)", header.text("PatientID"))
    if named and int(named[1]) != number:
        raise UDAError(
            f"{path}: its PatientID is {named[0]}, but it lies in the folder of patient {number}; expected the "
            "same patient. Move it to the folder where it belongs."
        )
    if not header.text("SeriesInstanceUID"):
        raise UDAError(f"{path}: without SeriesInstanceUID; expected a slice of an MR series. Get the series again.")
    return header


def _modality(header: Header) -> str | None:
    description = header.text("SeriesDescription").lower()
    found = [modality for modality, weighting in WEIGHTING.items() if weighting in description]
    return found[0] if len(found) == 1 else None


def _dicom_case(
    folder: Path, number: int, modality: str, header: Header, label: Path | None, further: Sequence[str]
) -> Case:
    reader = functools.partial(
        read_contours, series=header.text("SeriesInstanceUID"), patient=header.text("PatientID"), further=tuple(further)
    )
    return Case(_identifier(number, modality), (folder,), label, LabelMap({1: 1}), read_dicom, reader)


def _identifier(number: int, modality: str) -> str:
    return f"vs_gk_{number}_{WEIGHTING[modality]}"


def find_crossmoda(folders: Sequence[Path], structures: Sequence[str]) -> tuple[str, dict[str, list[Case]]]:
    """The year, and the cases of source, target and validation."""
    by_role: dict[str, Path] = {}
    for folder in folders:
        role = str(_role(folder))
        if other := by_role.get(role):
            raise UDAError(
                f"{folder}: {other} is the {role} folder already; expected one year's tree, as 2022 and 2023 hold "
                "patients of the years before. Give one with -i."
            )
        by_role[role] = folder
    if missing := [role for role in ("source", "target") if role not in by_role]:
        raise UDAError(
            f"{folders[0].parent}: there is no {missing[0]} training folder with scans (found: "
            f"{', '.join(f.name for f in folders)}); expected source_training and target_training, as -h shows."
        )
    files: dict[str, dict[str, dict[str, Path]]] = {}
    years: dict[str, Path] = {}
    for role, folder in by_role.items():
        kinds = ("ceT1", "Label") if role == "source" else ("hrT2", "T2", "Label")[: 3 if role == "validation" else 2]
        scans = files.setdefault(role, {})
        pattern = rf"(crossmoda(\d{{4}})?(?:_[a-z]+)?_\d+)_({'|'.join(kinds)})(?i:\.nii\.gz)"
        rule = f"crossmoda_<number>_{{{','.join(kinds)}}}.nii.gz in the {role} folder"
        for match, path in matched(folder, pattern, rule):
            year = {None: "2021", "2021": "2022"}.get(match[2], match[2])
            years.setdefault("2023" if year == "2023" else "2021 or 2022", path)
            scans.setdefault(match[1], {})["label" if match[3] == "Label" else "image"] = path
    if len(years) > 1:
        first, second = years.items()
        raise UDAError(
            f"{second[1]} is named as crossMoDA {second[0]}, {first[1]} as {first[0]}; expected one year's tree, as "
            "the label values differ. Convert one year at a time."
        )
    year = next(iter(years))
    names = {1: "vs", 2: "vs", 3: "cochlea"} if year == "2023" else {1: "vs", 2: "cochlea"}
    label_map = class_map(
        names,
        structures,
        hint=f"These are the labels of crossMoDA {year}, which the file names announce. Correct the label file.",
    )
    cases: dict[str, list[Case]] = {role: [] for role in ("source", "target", "validation")}
    for role, scans in files.items():
        for name, paths in scans.items():
            if "image" not in paths:
                raise UDAError(f"{paths['label']}: its image is missing; expected it beside the label. Add it.")
            suffix = "ceT1" if role == "source" else "hrT2"
            cases[role].append(Case(f"{name}_{suffix}", (paths["image"],), paths.get("label"), label_map))
    return year, cases


# --- the split --------------------------------------------------------------------------------------------------------


def _complete(patients: Patients, folders: Sequence[Path], args: argparse.Namespace, warnings: list[str]) -> Patients:
    """Patients with both scans, without those of ``-exclude``."""
    everyone = f"some of {', '.join(map(str, patients))}"
    refuse_unknown(args.i, "-exclude", sorted(set(args.exclude or ()) - set(patients)), everyone)
    complete = {}
    for number, cases in patients.items():
        if number in (args.exclude or ()):
            continue
        missing = [name for modality, name in MODALITIES.items() if modality not in cases]
        if missing:
            own = (folder for folder in folders if _number(folder) == number)
            place = next((case.images[0] for case in cases.values()), next(own))
            skip_or_refuse(
                f"{place}: patient {number} has no {' and no '.join(missing)} scan", args.strict, warnings,
                "this patient is left out",
            )  # fmt: skip
        else:
            complete[number] = cases
    return complete


# --- command ----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", type=Path, required=True, metavar="VENDOR_TREE", help="one of the trees above")
    add_directions(parser, MODALITIES)
    parser.add_argument(
        "-structures", nargs="+", choices=("vs", "cochlea"), default=["vs"], help="classes 1, 2; see above [vs]"
    )
    parser.add_argument("-protocol", choices=("uuds", "crossmoda"), help="split, see above [as the tree has it]")
    parser.add_argument(
        "-tumour", nargs="+", default=[], metavar="NAME", help="further structure names that mean the tumour"
    )
    parser.add_argument("-exclude", nargs="+", type=int, metavar="NUMBER", help="patients to leave out, e.g. 63")
    parser.add_argument("-test_ids", nargs="+", type=int, metavar="NUMBER", help="test patients instead of drawn ones")


def convert(args: argparse.Namespace, warnings: list[str]) -> None:
    """Run the conversion that ``args`` (of ``add_arguments``) describe."""
    layout, folders = recognise(args.i)
    wanted = "crossmoda" if layout == CROSSMODA else "uuds"
    if args.protocol not in (None, wanted):
        raise UDAError(
            f"{folders[0]}: this tree is {layout}, which -protocol {args.protocol} cannot split; expected -protocol "
            f"{wanted}, or another tree with -i."
        )
    names = MODALITIES[args.source], MODALITIES[args.target]
    arrange, information = (_crossmoda, CROSSMODA_PAGE) if layout == CROSSMODA else (_uuds, TCIA_PAGE)
    plan = arrange(args, layout, folders, names, warnings)
    name = f"VS_{names[1]}_upper_bound" if args.upper_bound else f"VS_{names[0]}_to_{names[1]}"
    request = intensity_request(args, otherwise=None if args.protocol else DEFAULT)
    write(name, plan, args.structures, information, request, args, warnings)


def _uuds(
    args: argparse.Namespace, layout: str, folders: Sequence[Path], names: tuple[str, str], warnings: list[str]
) -> Arrangement:
    if args.structures != ["vs"]:
        raise UDAError(
            f"{folders[0]}: -structures {' '.join(args.structures)}; this tree is {layout}, where only some patients "
            "have another structure than the tumour. Expected vs, or a tree of crossMoDA."
        )
    patients = _complete(find_patients(layout, folders, args.tumour), folders, args, warnings)
    if not patients:
        raise UDAError(
            f"{args.i}: none of the {len(folders)} folders of patients ({folders[0]}, ...) has both scans; in {layout} "
            f"expected {SCANS[layout]}. Complete the tree, or check -i."
        )
    test_ids = sorted(set(args.test_ids or ()))
    everyone = f"some of {', '.join(map(str, patients))}"
    refuse_unknown(args.i, "-test_ids", [n for n in test_ids if n not in patients], everyone)
    numbers, few = split_patients(list(patients), PATIENTS, args.seed, test_ids, args.i)
    warnings += few

    def cases(group: str, modality: str) -> list[Case]:
        return [patients[number][modality] for number in numbers[group]]

    training, modality = ("target", args.target) if args.upper_bound else ("source", args.source)
    labelled, target = (cases(training, modality), cases("validation", modality)), cases("target", args.target)
    test = cases("test", args.target)
    plan = arrange_patients(names, labelled, (target, []), test, args.upper_bound, "protocol uuds")
    return replace(plan, description=f"Vestibular-Schwannoma-SEG, {plan.description}")


def _crossmoda(
    args: argparse.Namespace, layout: str, folders: Sequence[Path], names: tuple[str, str], warnings: list[str]
) -> Arrangement:
    if args.target != "hrt2" or args.upper_bound:
        raise UDAError(
            f"{folders[0]}: crossMoDA has labels of ceT1 alone; expected -source cet1 -target hrt2 without "
            "--upper_bound. For the other direction convert the TCIA set."
        )
    if args.exclude or args.test_ids:
        raise UDAError("-exclude and -test_ids go with -protocol uuds; crossMoDA's groups are the vendor's.")
    year, cases = find_crossmoda(folders, args.structures)
    labelled = "labelsTs" if any(case.label for case in cases["validation"]) else None
    groups = [
        Group("ceT1", cases["source"], "imagesTr", "labelsTr"),
        Group("hrT2", cases["target"], "imagesTu"),
        Group("hrT2", cases["validation"], "imagesTs", labelled),
    ]
    splits = source_folds(ids(cases["source"]), FOLDS, args.seed, warnings)
    return Arrangement(groups, splits, None, f"crossMoDA {year}, ceT1 to hrT2, the vendor's groups")


if __name__ == "__main__":
    run_alone(__doc__, add_arguments, convert)
