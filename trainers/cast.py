"""CAST: contrastive translation, augmentation, self-training, in one plain nnU-Net network.

A generator translates source images to the target as in CISFA (Hu, Wang and Shi): least-squares GAN and label-weighted
PatchNCE; a random style code makes one image many translations. It has skips, and the student's segmentation loss on
translations reaches it (semantic consistency, Hoffman et al. 2018, CyCADA), so that structures stay what their labels
say. The student learns from source images and translations in random styles (``RandomStyleTrainer``'s). The teacher is
the student's exponential average (Tarvainen and Valpola 2017) and what predicts: ``network``. It labels real target
images where it is confident and its views agree; the student learns these under strong augmentation, once the teacher
deserves it. Every step updates the generator, then, several times, the student and the teacher, then the discriminator.
Where the teacher still disagrees with itself on target images after a part of the schedule, translations are not what
these look like: translation is given up, and its time goes to random styles.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from nnunet_uda.data.random_style import StyleAugmentationSettings, restyle_batch, style_transforms
from nnunet_uda.errors import UDAError
from nnunet_uda.losses.adversarial import lsgan_loss
from nnunet_uda.losses.patch_nce import PatchNCELoss, layers_patch_nce
from nnunet_uda.losses.pseudo_label import pseudo_label_loss
from nnunet_uda.losses.style_diversity import style_diversity_loss
from nnunet_uda.networks.patch_discriminator import PatchDiscriminator
from nnunet_uda.networks.patch_projector import PatchProjector
from nnunet_uda.networks.style_generator import StyleResnetGenerator
from nnunet_uda.settings import require
from nnunet_uda.training.model_choice import LOW_AGREEMENT
from nnunet_uda.training.pictures import write_panels
from nnunet_uda.training.self_training import Average, SelfTraining, class_shares, seen_in_views
from nnunet_uda.training.translation_settings import TranslationSettings
from nnunet_uda.training.uda_trainer import UDATrainer, frozen, middle_slice

UPDATES_WITHOUT_TRANSLATION = {2: 6, 3: 10}
"""By dimension, what takes as long as a step with translation: in 3D a generator costs more beside a segmenter."""


@dataclass(frozen=True)
class CASTSettings(StyleAugmentationSettings, TranslationSettings):
    """Settings under ``uda.cast``; those of random styles are RandomStyleTrainer's, those of the GAN are CISFA's but
    for ``generator_skips``, ``semantic_weight`` (of the student's loss on translations, for the generator) and a rate
    that falls to zero; what each of these changes is in docs/results.md.

    ``translation``, ``style_codes``, ``random_styles`` and ``self_training`` switch the parts. ``styled_share`` is the
    share of labelled images that the student learns in a random style, half of them source images and half
    translations; the rest are translations as they are, as target images come at prediction. With half of the images
    in random styles, short schedules ended before the student had learned its labels. ``start_score`` and
    ``plausible_factor``: see ``SelfTraining``; a teacher that starts with 0.7 teaches its errors (docs/results.md).
    ``ramp_share`` is the share of the schedule over which the weight of pseudo labels rises to
    ``self_training_weight``. A teacher looks at an image ``views`` times. A step updates the student
    ``student_updates`` times, each time on another batch of source images (on the target's once): translations change
    under it, and its own pass is the cheapest part of a step.

    Translation is on trial: after ``trial_share`` of the epochs, and after each one from then on, it is given up for
    the rest of the training where neither the last epoch's agreement on target patches nor its running mean reaches
    ``trial_agreement``. A step without translation updates the student ``updates_without_translation`` times; None is
    what takes about as long: 6 in 2D, 10 in 3D (docs/results.md).
    """

    translation: bool = True
    style_codes: bool = True
    random_styles: bool = True
    self_training: bool = True
    generator_skips: bool = True
    gan_learning_rate: float = 5e-4
    gan_schedule: Literal["constant", "linear"] = "linear"
    image_adversarial_weight: float = 1.0
    patch_contrastive_weight: float = 1.0
    patch_contrastive_temperature: float = 0.2
    foreground_weight: float = 2.0
    semantic_weight: float = 1.0
    style_dim: int = 8
    style_diversity_weight: float = 1.0
    style_diversity_margin: float = 0.1
    styled_share: float = 0.25
    teacher_decay: float = 0.99
    views: int = 2
    student_updates: int = 2
    updates_without_translation: int | None = None
    trial_share: float = 0.3
    trial_agreement: float = LOW_AGREEMENT
    confidence: float = 0.9
    start_score: float = 0.9
    plausible_factor: float = 10.0
    ramp_share: float = 0.1
    self_training_weight: float = 0.25

    def __post_init__(self) -> None:
        for inherited in (StyleAugmentationSettings, TranslationSettings):
            inherited.__post_init__(self)
        for name in ("style_dim", "views", "student_updates", "plausible_factor", "foreground_weight"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        updates = self.updates_without_translation
        require(updates is None or updates >= 1, "updates_without_translation", "null or at least 1", updates)
        for name in ("patch_contrastive_temperature", "style_diversity_margin"):
            require(getattr(self, name) > 0, name, "positive", getattr(self, name))
        for name in ("image_adversarial_weight", "patch_contrastive_weight", "semantic_weight",
                     "style_diversity_weight", "self_training_weight"):  # fmt: skip
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("styled_share", "confidence", "start_score", "ramp_share", "trial_share", "trial_agreement"):
            require(0 <= getattr(self, name) <= 1, name, "between 0 and 1", getattr(self, name))
        require(0 <= self.teacher_decay < 1, "teacher_decay", "at least 0 and below 1", self.teacher_decay)


class Trial(nn.Module):
    """Whether translation has failed; a buffer, so that a checkpoint holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("failed", torch.zeros((), dtype=torch.bool))


class CASTTrainer(UDATrainer):
    """The whole method. ``uda.cast`` in the plans holds its settings (``CASTSettings``).

    ``network`` is the teacher: validation, checkpoints and prediction are its. The student that gradients reach is
    ``networks["student"]``.
    """

    method = "cast"
    method_settings = CASTSettings

    # -- networks ------------------------------------------------------------------------------------------------

    def configure_optimizers(self):
        """nnU-Net's optimiser and schedule, for the student: a copy of the network, which becomes the teacher."""
        teacher, self.network = self.network, copy.deepcopy(self.plain_network)
        try:
            self.student = self.network
            return super().configure_optimizers()
        finally:
            self.network = teacher.requires_grad_(False)

    def build_networks(self) -> dict[str, nn.Module]:
        settings, classes = self.own_settings, self.label_manager.num_segmentation_heads
        foreground_labels = self.label_manager.foreground_labels
        self.labelled_styles = style_transforms(settings, foreground_labels)
        self.unlabelled_styles = style_transforms(settings, ())
        networks: dict[str, nn.Module] = {"student": self.student, "average": Average(settings.teacher_decay)}
        if settings.self_training:
            ramp_epochs = max(1, round(settings.ramp_share * self.num_epochs))
            networks["self_training"] = SelfTraining(classes, settings.confidence, settings.start_score, ramp_epochs)
        if settings.translation:
            networks |= self.build_translation()
        return networks

    def build_translation(self) -> dict[str, nn.Module]:
        settings, channels = self.own_settings, self.num_input_channels
        patch_size = self.configuration_manager.patch_size
        generator = StyleResnetGenerator(
            channels, len(patch_size), settings.generator_width, settings.generator_blocks,
            self.configuration_manager.pool_op_kernel_sizes[1:3],  # the segmenter's own strides: thin axes stay whole
            style_dim=settings.style_dim, skips=settings.generator_skips,
        )  # fmt: skip
        self.patch_contrastive = PatchNCELoss(settings.patch_contrastive_temperature)
        return {
            "trial": Trial(),
            "generator": generator,
            "patch_projector": PatchProjector(
                generator.feature_channels, settings.patch_features, settings.patches, settings.first_patch_layer
            ),
            "image_discriminator": PatchDiscriminator(
                channels, len(patch_size), patch_size, settings.discriminator_width, settings.discriminator_layers
            ),
        }

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        options = {"learning_rate": self.own_settings.gan_learning_rate, "beta1": self.own_settings.gan_beta1}
        if not self.own_settings.translation:
            return {}
        return {
            "generator": self.adam_for("generator", "patch_projector", **options),
            "image_discriminator": self.adam_for("image_discriminator", **options),
        }

    def prepare_network(self) -> None:
        super().prepare_network()
        self.student_encoder, self.student_decoder = self.student.encoder, self.student.decoder
        if self._do_i_compile():
            self.student_encoder, self.student_decoder = map(
                torch.compile, (self.student_encoder, self.student_decoder)
            )

    # -- schedule ------------------------------------------------------------------------------------------------

    def on_train_start(self):
        super().on_train_start()
        if self.own_settings.self_training and self.model_choice.patches is None:
            raise UDAError(
                f"{type(self).__name__} starts self-training by what it sees on fixed target patches, but "
                "'criterion_patches' is 0: give a number, or set cast.self_training=false"
            )
        if self.networks["average"].steps == 0:
            self.student.load_state_dict(self.plain_network.state_dict())  # -pretrained_weights reach the network alone

    @property
    def self_training_weight(self) -> float:
        """Of pseudo labels in this epoch; 0 until the teacher deserves to be a teacher."""
        if not self.own_settings.self_training:
            return 0.0
        return self.own_settings.self_training_weight * self.networks["self_training"].weight

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.network.eval()  # the teacher is never trained
        if self.translates:
            rate = self.own_settings.gan_rate(self.current_epoch / self.num_epochs)
            self.set_rate(rate, "generator", "image_discriminator")

    def on_validation_epoch_end(self, val_outputs: list[dict]):
        super().on_validation_epoch_end(val_outputs)
        if self.translates:
            self.judge_translation()
        if self.own_settings.self_training:
            self.judge_teacher(*(self.model_choice.history[name][-1] for name in ("agreement", "pseudo_dice")))

    def judge_translation(self) -> None:
        """Give translation up where its trial is over and the teacher disagrees with itself on target images.

        The student knows translations as well as the schedule allows; had they the target's looks, it would know what
        to see there.
        """
        settings, finished = self.own_settings, self.current_epoch + 1
        agreement = max(self.model_choice.agreement, self.model_choice.history.get("agreement", [math.nan])[-1])
        if round(settings.trial_share * self.num_epochs) <= finished < self.num_epochs and (
            agreement < settings.trial_agreement
        ):
            self.networks["trial"].failed.fill_(True)
            self.print_to_log_file(
                f"WARNING: translation is given up: on target images agreement is only {agreement:.2f} after "
                f"{finished} epochs (cast.trial_agreement {settings.trial_agreement}). The rest of the training learns "
                "source images in random styles; validation is on source images as they are"
            )

    def judge_teacher(self, agreement: float, pseudo_dice: float) -> None:
        """Start, raise or lower self-training by what the teacher does without a target label.

        Its Dice on translated validation images times its agreement on target images: a teacher may agree with itself
        on what it has not learned yet. And the structures that it is sure of there.
        """
        state = self.networks["self_training"]
        seen = []
        with torch.no_grad():
            for images in self.model_choice.patches.split(self.batch_size):
                probabilities = self._predict(images.to(self.device)).float().softmax(1)
                state.observe_target(probabilities)
                seen.append(probabilities.max(1))
        thresholds, classes = state.thresholds(), self.label_manager.num_segmentation_heads
        sure = [found.masked_fill(confidence <= thresholds[found], -1) for confidence, found in seen]
        shares = class_shares(torch.cat(sure), classes)
        score = state.judge(agreement * pseudo_dice, shares, self.own_settings.plausible_factor)
        state.load_state_dict(self.on_first_rank(state.state_dict))  # of several processes each has seen other batches
        self.print_to_log_file(
            f"teacher: score {score:.4f}, mean {state.score.item():.4f} (self-training from "
            f"{self.own_settings.start_score}), weight of pseudo labels {self.self_training_weight:.2f}"
        )

    # -- a step --------------------------------------------------------------------------------------------------

    def reads_target(self) -> bool:
        return self.translates or self.own_settings.self_training

    def train_on(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor | None) -> None:
        settings, translates, translated = self.own_settings, self.translates, None
        if translates:
            self.update_generator(source, label)
        for update in range(settings.student_updates if translates else self.updates_without_translation):
            if update > 0:
                source, label = self.next_source()
            if translates:
                with torch.no_grad(), self.autocast():  # with the new weights
                    translated = self.networks["generator"](source, self.draw_codes(len(source)))
            self.update_student(source, translated, label, target if update == 0 else None)
            self.update_teacher()
        if translates:
            self.update_discriminator(translated, target)

    @property
    def updates_without_translation(self) -> int:
        """Of the student in a step without translation."""
        number = self.own_settings.updates_without_translation
        return UPDATES_WITHOUT_TRANSLATION[len(self.configuration_manager.patch_size)] if number is None else number

    def draw_codes(self, number: int) -> Tensor:
        """Random style codes; without style codes the middle one."""
        codes = self.networks["generator"].draw_codes(number)
        return codes if self.own_settings.style_codes else torch.zeros_like(codes)

    def update_generator(self, source: Tensor, label: Tensor | list[Tensor]) -> None:
        """Fool the discriminator, keep shapes and what the student needs to find them, listen to the style code."""
        settings, generator = self.own_settings, self.networks["generator"]
        terms = {}
        with self.autocast(), frozen(self.networks["image_discriminator"]):
            features = generator.encode(source)
            code = self.draw_codes(len(source))
            translated = generator.decode(features, code)
            if settings.patch_contrastive_weight > 0:
                loss = layers_patch_nce(
                    self.patch_contrastive, self.networks["patch_projector"], features, generator.encode(translated),
                    self.known(label), settings.foreground_weight,
                )  # fmt: skip
                terms["patch_contrastive"] = settings.patch_contrastive_weight * loss
            if settings.style_codes and settings.style_diversity_weight > 0:
                other_code = self.draw_codes(len(source))
                other = generator.decode(features, other_code)
                loss = style_diversity_loss(translated, other, code, other_code, settings.style_diversity_margin)
                terms["style_diversity"] = settings.style_diversity_weight * loss
            if settings.semantic_weight > 0:
                with frozen(self.student):
                    terms["semantic"] = settings.semantic_weight * self.loss(self.study(translated), label)
            logits = self.networks["image_discriminator"](translated)
            terms["generator_adversarial"] = settings.image_adversarial_weight * lsgan_loss(logits, is_real=True)
        self.update("generator", terms)

    def update_student(
        self, source: Tensor, translated: Tensor | None, label: Tensor | list[Tensor], target: Tensor | None
    ) -> None:
        """Learn source labels on source images and translations, and pseudo labels on target images if there are."""
        if self.own_settings.self_training:
            self.networks["self_training"].observe_source(self.known(label))
        images = self.labelled_images(source, translated, self.finest(label))
        weight = 0.0 if target is None else self.self_training_weight
        seen, pseudo_label = target, None
        if weight > 0:
            pseudo_label = self.pseudo_label(target)
            if self.own_settings.random_styles:  # before autocast, under which a style's products are of mixed types
                seen = restyle_batch(self.unlabelled_styles, target)
        terms = {}
        with self.autocast():
            terms["segmentation"] = self.loss(self.study(images), label)
            if self.own_settings.self_training and target is not None:
                loss = images.new_zeros(())
                if weight > 0:
                    loss = pseudo_label_loss(self.finest(self.study(seen)), pseudo_label)
                terms["self_training"] = weight * loss
        self.update("segmenter", terms, max_norm=12)

    def labelled_images(self, source: Tensor, translated: Tensor | None, label: Tensor) -> Tensor:
        """Every image of the batch once, as the student learns it: as its translation, or in a random style.

        Args:
            source: ``(B, C, *patch)``.
            translated: the same images translated; None without translation, when all get a random style.
            label: ``(B, 1, *patch)``, full resolution.
        """
        images = (source if translated is None else translated).float().clone()
        if self.own_settings.random_styles:
            share = 1.0 if translated is None else self.own_settings.styled_share
            styled, from_source = torch.rand(len(source)) < share, torch.rand(len(source)) < 0.5
            for index in styled.nonzero()[:, 0].tolist():
                part = slice(index, index + 1)
                seen = source[part] if from_source[index] else images[part]
                images[part] = restyle_batch(self.labelled_styles, seen, label[part])
        return images

    def study(self, images: Tensor) -> list[Tensor] | Tensor:
        """The student's logits, a list from fine to coarse with deep supervision."""
        return self.student_decoder(self.student_encoder(images))

    @torch.no_grad()
    def pseudo_label(self, target: Tensor) -> Tensor:
        """The teacher's labels of target images, ``(B, *patch)``, where they can be trusted."""
        state = self.networks["self_training"]
        probabilities, agreed = seen_in_views(
            self._predict, target, self.own_settings.views, self.inference_allowed_mirroring_axes
        )
        state.observe_target(probabilities)
        return state.label(probabilities, agreed)

    def update_discriminator(self, translated: Tensor, target: Tensor) -> None:
        with self.autocast():
            image = self.networks["image_discriminator"]
            loss = lsgan_loss(image(target), is_real=True) + lsgan_loss(image(translated), is_real=False)
        self.update("image_discriminator", {"image_discriminator": 0.5 * loss})

    def update_teacher(self) -> None:
        self.networks["average"].update(self.plain_network, self.student)

    # -- validation and pictures ---------------------------------------------------------------------------------

    @property
    def translates(self) -> bool:
        """Whether translation is a part of the method, and has not been given up."""
        return self.own_settings.translation and not self.networks["trial"].failed.item()

    def translate(self, source: Tensor) -> Tensor:
        """In the middle style, so that validation does not depend on chance."""
        return self.networks["generator"](source) if self.translates else source

    def draw_pictures(self, path: Path) -> None:
        super().draw_pictures(path)
        if self.translates:
            self.draw_styles(path.with_name(f"styles_{path.name}"))

    @torch.no_grad()
    def draw_styles(self, path: Path) -> None:
        """The same source slice in four fixed styles, and which of the teacher's labels of a target slice it trusts."""
        source, _ = self._whole_patch(self.validation_dataset, by_label=True)
        target, _ = self._whole_patch(self.target_dataset, by_label=False)
        generator = self.networks["generator"]
        codes = torch.randn(4, generator.style_dim, generator=torch.Generator().manual_seed(0)).to(source.device)
        with self.autocast():
            styles = [generator(source, code[None]) for code in codes]
        rows = [[("source", middle_slice(source), None), *(("style", middle_slice(image), None) for image in styles)]]
        if self.own_settings.self_training:
            trusted = self.networks["self_training"].label(*seen_in_views(self._predict, target, 1, None))
            shown = middle_slice(target)
            rows.append([("target", shown, None), ("trusted", shown, middle_slice(trusted[:, None]))])
        write_panels(path, rows, len(self.label_manager.foreground_labels))


class CASTNoTranslationTrainer(CASTTrainer):
    """Restyled source images and self-training alone, as after a failed trial."""

    fixed_settings = {"translation": False}


class CASTNoSemanticTrainer(CASTTrainer):
    """The generator does not learn from the student's loss."""

    fixed_settings = {"semantic_weight": 0.0}


class CASTNoStyleTrainer(CASTTrainer):
    """One translation for each image: no style code."""

    fixed_settings = {"style_codes": False}


class CASTNoRandomStyleTrainer(CASTTrainer):
    """Without random styles of source, translated and target images."""

    fixed_settings = {"random_styles": False}


class CASTNoSelfTrainingTrainer(CASTTrainer):
    """Without pseudo labels; the network is still the student's average."""

    fixed_settings = {"self_training": False}
