"""Similarity-based prototypes (Ye, Ju, Ma and Zhang, arXiv 2510.20596).

Two generators translate, segment and embed: G_S reads source images, G_T target images. A cycle and image
discriminators teach the translation. Source labels teach the segmentation of x_s and of its translation; a
discriminator for each segmentation head aligns those of x_t and of its translation. L_sim pulls embeddings to the
prototype of their class, L_cl pulls prototypes to those of other images, which two dictionaries remember. A step
updates both generators, then all discriminators on the same outputs. On a target image the network averages G_T's
prediction and G_S's on the translation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_uda.data.random_convolution import random_convolution
from nnunet_uda.losses.adversarial import lsgan_loss
from nnunet_uda.losses.boundary import boundary_loss
from nnunet_uda.losses.prototype_contrast import PrototypeDictionary, prototype_contrastive_loss
from nnunet_uda.losses.prototypes import (
    class_prototypes,
    confident_labels,
    inter_class_loss,
    intra_class_loss,
    labels_at,
)
from nnunet_uda.networks.prototype_network import GeneratorOutput, PrototypeNetwork, SegmentingGenerator
from nnunet_uda.settings import parse_settings, require, split_settings
from nnunet_uda.training.embedding_picture import (
    Embeddings,
    load_embeddings,
    save_embeddings,
    write_embedding_picture,
)
from nnunet_uda.training.preview import whole_patch
from nnunet_uda.training.translation import BETA1, patch_discriminator, random_patch_weights
from nnunet_uda.training.uda_trainer import UDATrainer, adam, frozen

RATES = (1, 6, 12, 18)
DISCRIMINATOR_RATE = 2e-4


@dataclass(frozen=True)
class SimilarityPrototypesSettings:
    """Settings under ``uda.similarity_prototypes``. Defaults are the paper's where it gives a value.

    The paper gives ``similarity_weight`` (lambda_1), ``contrastive_weight`` (lambda_2), ``dictionary_size`` (S),
    ``top_k`` (k). ``confidence`` is the probability over which a target pixel's prediction
    counts as its label. Both generators always use Adam; the shared ``segmenter_schedule`` is theirs too.

    CycleGAN's ``cycle_weight`` of 10 is meant for intensities in [-1, 1] and generators without a skip to the output;
    on z-scored images it holds the translation at the identity that it starts from (docs/phantom.md).
    """

    embedding_dim: int = 256
    """Channels of a pixel's vector, at least 1. 64 on a CPU."""
    residual_translation: bool = True
    """A translation is the image and a learned change. false as in CycleGAN, for longer schedules."""
    discriminator_width: int = 64
    """Channels of the discriminators' first layer, at least 1. 32 on a CPU."""
    generator_learning_rate: float = 2e-4
    """Of both generators, positive. More for short schedules."""
    cycle_weight: float = 1.0
    """At least 0: there and back again has to give the image. More where shapes change."""
    image_adversarial_weight: float = 1.0
    """At least 0: how strongly a translation has to look like the target."""
    segmentation_adversarial_weight: float = 0.1
    """At least 0: segmentations of the target have to look like the source's."""
    similarity_weight: float = 0.05
    """At least 0: weight of the similarity of prototypes between the domains."""
    contrastive_weight: float = 0.02
    """At least 0: weight of the contrast of prototypes over the dictionary."""
    boundary_weight: float = 0.0
    """At least 0; 0: no loss of boundaries. For structures whose edges come out ragged."""
    dictionary_size: int = 400
    """Prototypes kept of each class, at least 1."""
    top_k: int = 20
    """How many of them a prototype is compared with, from 1 to dictionary_size."""
    min_positions: int = 8
    """Pixels of a class that make a prototype, at least 1. Fewer for tiny structures."""
    confidence: float = 0.9
    """0 to 1: probability over which a target pixel's prediction counts. Lower where few pixels reach it."""
    warmup_epochs: int = 20
    """Epochs in which target images bring no prototypes, at least 0. A tenth of num_epochs is usual."""
    target_images: bool = True
    """false trains without target images, for the ablation."""
    removed = {"image_decoder_convs": 1, "image_decoder_width": 0.5, "discriminator_layers": 3, "adam_beta1": BETA1,
               "discriminator_learning_rate": DISCRIMINATOR_RATE, "temperature": 1.0}  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "discriminator_width", "dictionary_size", "top_k", "min_positions"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.generator_learning_rate > 0, "generator_learning_rate", "positive", self.generator_learning_rate)
        for name in ("cycle_weight", "image_adversarial_weight", "segmentation_adversarial_weight",
                     "similarity_weight", "contrastive_weight", "boundary_weight", "warmup_epochs"):  # fmt: skip
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        require(0 <= self.confidence <= 1, "confidence", "between 0 and 1", self.confidence)
        require(
            self.top_k <= self.dictionary_size, "top_k",
            f"at most 'dictionary_size' ({self.dictionary_size}), as no class has more entries", self.top_k,
        )  # fmt: skip


class Passes(NamedTuple):
    """The generators' passes of one step, each image encoded once.

    Attributes:
        source: G_S(x_s); its image is x_{s->t}.
        source_to_target: G_T(x_{s->t}); its image is x_{s->t->s}.
        target: G_T(x_t); its image is x_{t->s}. None where training sees no target image.
        target_to_source: G_S(x_{t->s}); its image is x_{t->s->t}. None likewise.
    """

    source: GeneratorOutput
    source_to_target: GeneratorOutput
    target: GeneratorOutput = None  # type: ignore[assignment] # there, where a target image is asked for
    target_to_source: GeneratorOutput = None  # type: ignore[assignment]


class View(NamedTuple):
    """The embedding of one pass, with its labels and prototypes.

    Attributes:
        dictionary: name of the dictionary that its prototypes go to.
        embedding: ``(B, D, *map)``.
        labels: ``(B, *map)``, -1 where unknown.
        prototypes: ``(B, K, D)``.
        present: ``(B, K)`` bool, which of them exist.
    """

    dictionary: str
    embedding: Tensor
    labels: Tensor
    prototypes: Tensor
    present: Tensor

    def entries(self) -> tuple[Tensor, Tensor]:
        """The existing prototypes ``(N, D)`` and their classes ``(N,)``."""
        return self.prototypes[self.present], self.present.nonzero()[:, 1]


class SimilarityPrototypesTrainer(UDATrainer[SimilarityPrototypesSettings]):
    """The paper's method. ``uda.similarity_prototypes`` in the plans holds its settings.

    ``target_images: false`` trains without any target image: a random convolution of x_s stands for x_{s->t}, and G_T
    learns to segment it and to give x_s back.
    """

    method = "similarity_prototypes"
    method_settings = SimilarityPrototypesSettings
    network_update = "generators"

    def adopt_settings(self) -> None:
        super().adopt_settings()
        self.initial_lr = self.own_settings.generator_learning_rate
        self.needs_target = self.own_settings.target_images

    # -- networks ------------------------------------------------------------------------------------------------

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        where = f"plans {plans_manager.plans_name!r}, key 'uda'"
        _, own = split_settings(plans_manager.plans.get("uda", {}), SimilarityPrototypesTrainer.method, where)
        settings = parse_settings(SimilarityPrototypesSettings, own, where)

        def generator() -> SegmentingGenerator:
            unet = nnUNetTrainer.build_network_architecture(
                plans_manager, configuration_manager, num_input_channels, num_output_channels, True
            )
            return SegmentingGenerator(
                unet, num_input_channels, configuration_manager.patch_size, RATES, settings.embedding_dim,
                settings.residual_translation,
            )  # fmt: skip

        return PrototypeNetwork(generator(), generator(), enable_deep_supervision)

    def prepare_network(self) -> None:
        network = self.plain_network
        self.source_generator, self.target_generator = network.source_generator, network.target_generator
        if self._do_i_compile():
            self.source_generator.compile()
            self.target_generator.compile()

    def build_networks(self) -> dict[str, nn.Module]:
        settings, classes = self.own_settings, self.label_manager.num_segmentation_heads
        memory = (classes, settings.dictionary_size, settings.embedding_dim)
        networks: dict[str, nn.Module] = {
            "source_dictionary": PrototypeDictionary(*memory),
            "target_dictionary": PrototypeDictionary(*memory),
        }
        if self.needs_target:
            for domain in ("source", "target"):
                networks[f"{domain}_image_discriminator"] = patch_discriminator(self, self.num_input_channels)
                networks[f"{domain}_segmentation_discriminator"] = patch_discriminator(self, classes)
        return networks

    def network_optimizer(self) -> torch.optim.Optimizer:
        return adam(self.network.parameters(), self.initial_lr, BETA1)

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            f"{kind}_discriminators": adam(
                [p for network in self.discriminators(kind) for p in network.parameters()],
                DISCRIMINATOR_RATE,
                BETA1,
            )
            for kind in (("image", "segmentation") if self.needs_target else ())
        }

    def discriminators(self, kind: str) -> list[nn.Module]:
        """D_S and D_T of ``kind`` "image" or "segmentation"; none where training sees no target image."""
        return [network for name, network in self.networks.items() if name.endswith(f"_{kind}_discriminator")]

    # -- a step --------------------------------------------------------------------------------------------------

    def segment(self, images: Tensor) -> list[Tensor] | Tensor:
        return self.network(images)

    def train_on(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor | None) -> None:
        passes = self.update_generators(source, label, target)
        if target is not None:
            self.update_image_discriminators(source, target, passes)
            if self.own_settings.segmentation_adversarial_weight > 0:
                self.update_segmentation_discriminators(passes)

    def labelled_target_loss(self, images: Tensor, label: Tensor | list[Tensor]) -> Tensor:
        """The target's generator alone segments them."""
        deep = self.enable_deep_supervision
        outputs = self.target_generator(images, image=False, embedding=False, deep_supervision=deep)
        return self.loss(outputs.segmentation, label)

    @property
    def uses_prototypes(self) -> bool:
        return self.own_settings.similarity_weight > 0 or self.own_settings.contrastive_weight > 0

    def run_generators(self, source: Tensor, target: Tensor | None) -> Passes:
        """All passes of a step."""
        heads = {"embedding": self.uses_prototypes}
        labelled = heads | {"deep_supervision": self.enable_deep_supervision}
        if not self.needs_target:
            of_source = self.source_generator(source, image=False, **labelled)
            restyled = self.restore_background(random_convolution(source), source)
            return Passes(of_source, self.target_generator(restyled, **labelled))
        of_source = self.source_generator(source, **labelled)
        of_target = self.target_generator(target, **heads)
        return Passes(
            of_source,
            self.target_generator(of_source.image, **labelled),
            of_target,
            self.source_generator(of_target.image, **heads),
        )

    def update_generators(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor | None) -> Passes:
        """L_base + lambda_1 L_sim + lambda_2 L_cl; the dictionaries remember the step's prototypes afterwards."""
        settings = self.own_settings
        with self.autocast(), frozen(*self.discriminators("image"), *self.discriminators("segmentation")):
            passes = self.run_generators(source, target)
            terms = {
                "segmentation": self.loss(passes.source.segmentation, label),
                "segmentation_translated": self.loss(passes.source_to_target.segmentation, label),
                "cycle": settings.cycle_weight * self.cycle_loss(source, target, passes),
            }
            if self.needs_target:
                adversarial = self.image_adversarial_loss(passes)
                terms["image_adversarial"] = settings.image_adversarial_weight * adversarial
                if settings.segmentation_adversarial_weight > 0:
                    adversarial = self.segmentation_adversarial_loss(passes)
                    terms["segmentation_adversarial"] = settings.segmentation_adversarial_weight * adversarial
            if settings.boundary_weight > 0:
                boundary = [boundary_loss(self.probabilities(output), self.known(label)) for output in passes[:2]]
                terms["boundary"] = settings.boundary_weight * torch.stack(boundary).sum()
            found = self.find_prototypes(passes, label) if self.uses_prototypes else []
            if settings.similarity_weight > 0:
                terms["similarity"] = settings.similarity_weight * self.similarity_loss(found)
            if settings.contrastive_weight > 0:
                terms["contrastive"] = settings.contrastive_weight * self.contrastive_loss(found)
        self.update("generators", terms)
        for view in found:
            self.networks[view.dictionary].enqueue(*view.entries())
        return passes

    def cycle_loss(self, source: Tensor, target: Tensor | None, passes: Passes) -> Tensor:
        """L1 between an image and its translation back, both ways."""
        loss = F.l1_loss(passes.source_to_target.image.float(), source)
        return loss if target is None else loss + F.l1_loss(passes.target_to_source.image.float(), target)

    def image_adversarial_loss(self, passes: Passes) -> Tensor:
        """Translations look real: x_{s->t} to D_T, x_{t->s} to D_S."""
        of_target, of_source = (self.networks[f"{domain}_image_discriminator"] for domain in ("target", "source"))
        return lsgan_loss(of_target(passes.source.image), is_real=True) + lsgan_loss(
            of_source(passes.target.image), is_real=True
        )

    def segmentation_adversarial_loss(self, passes: Passes) -> Tensor:
        """Unlabelled segmentations look like those learned from labels: x_t like x_{s->t}, x_{t->s} like x_s."""
        of_target, of_source = (self.networks[f"{d}_segmentation_discriminator"] for d in ("target", "source"))
        return lsgan_loss(of_target(self.probabilities(passes.target)), is_real=True) + lsgan_loss(
            of_source(self.probabilities(passes.target_to_source)), is_real=True
        )

    def update_image_discriminators(self, source: Tensor, target: Tensor, passes: Passes) -> None:
        weights = random_patch_weights(self, source)
        of_target, of_source = (self.networks[f"{domain}_image_discriminator"] for domain in ("target", "source"))
        with self.autocast():
            losses = [
                lsgan_loss(of_target(target), is_real=True),
                lsgan_loss(of_target(passes.source.image.detach()), False, weights),
                lsgan_loss(of_source(source), True, weights),
                lsgan_loss(of_source(passes.target.image.detach()), is_real=False),
            ]
        self.update("image_discriminators", {"image_discriminators": 0.5 * torch.stack(losses).sum()})

    def update_segmentation_discriminators(self, passes: Passes) -> None:
        """Segmentations learned from labels are taken for real, those of target images for fake."""
        with self.autocast():
            losses = []
            for domain, real, fake in (
                ("target", passes.source_to_target, passes.target),
                ("source", passes.source, passes.target_to_source),
            ):
                network, of_real = self.networks[f"{domain}_segmentation_discriminator"], self.probabilities(real)
                weights = random_patch_weights(self, of_real)
                losses.append(lsgan_loss(network(of_real.detach()), True, weights))
                losses.append(lsgan_loss(network(self.probabilities(fake).detach()), is_real=False))
        self.update("segmentation_discriminators", {"segmentation_discriminators": 0.5 * torch.stack(losses).sum()})

    def probabilities(self, output: GeneratorOutput) -> Tensor:
        """Full-resolution class probabilities, ``(B, K, *patch)`` float32."""
        return self.finest(output.segmentation).float().softmax(1)

    # -- prototypes ----------------------------------------------------------------------------------------------

    def find_prototypes(self, passes: Passes, label: Tensor | list[Tensor]) -> list[View]:
        """The prototypes of every pass whose labels can be trusted.

        Labels are the ground truth for the source and its translation; for the target and its translation, after the
        warm-up, the generator's own prediction where it is confident. G_S fills the source's dictionary, G_T the
        target's.
        """
        known = labels_at(self.known(label), passes.source.embedding.shape[2:])
        labelled = [
            ("source_dictionary", passes.source.embedding, known),
            ("target_dictionary", passes.source_to_target.embedding, known),
        ]
        confidence = self.own_settings.confidence
        if self.needs_target and self.current_epoch >= self.own_settings.warmup_epochs:
            for name, output in (("target", passes.target), ("source", passes.target_to_source)):
                labelled.append((f"{name}_dictionary", output.embedding, self.pseudo_labels(output, confidence)))
        classes = self.label_manager.num_segmentation_heads
        least = self.own_settings.min_positions
        return [View(*view, *class_prototypes(view[1], view[2], classes, least)) for view in labelled]

    def pseudo_labels(self, output: GeneratorOutput, confidence: float) -> Tensor:
        """The confident predictions at the embedding's positions, ``(B, *patch / 4)``; -1 elsewhere. No gradient."""
        pool: Any = F.adaptive_avg_pool2d if output.embedding.ndim == 4 else F.adaptive_avg_pool3d
        with torch.no_grad():
            probabilities = pool(self.probabilities(output), output.embedding.shape[2:])
            return confident_labels(probabilities, confidence)

    def similarity_loss(self, views: list[View]) -> Tensor:
        """L_sim = L_sc + L_dc, the mean over ``views``."""
        losses = [
            intra_class_loss(view.embedding, view.labels, view.prototypes, view.present)
            + inter_class_loss(view.prototypes, view.present)
            for view in views
        ]
        return torch.stack(losses).mean()

    def contrastive_loss(self, views: list[View]) -> Tensor:
        """L_cl of all prototypes of the step against both dictionaries."""
        prototypes, classes = (torch.cat(parts) for parts in zip(*(view.entries() for view in views), strict=True))
        dictionaries = [self.networks["source_dictionary"], self.networks["target_dictionary"]]
        return prototype_contrastive_loss(prototypes, classes, dictionaries, self.own_settings.top_k)

    # -- validation and pictures ---------------------------------------------------------------------------------

    @property
    def translates(self) -> bool:
        return self.needs_target

    def translate(self, source: Tensor) -> Tensor:
        if not self.needs_target:
            return source
        return self.source_generator(source, segmentation=False, embedding=False).image

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.uses_prototypes and self.current_epoch == 0 and not self.record.steps and self.local_rank == 0:
            Path(self.output_folder, "pictures").mkdir(exist_ok=True)
            save_embeddings(self._embeddings_before, self.sample_embeddings())

    @property
    def _embeddings_before(self) -> Path:
        return Path(self.output_folder, "pictures", "embeddings_before.npz")

    def draw_pictures(self, path: Path) -> None:
        super().draw_pictures(path)
        if self.uses_prototypes and self._embeddings_before.exists():
            names = ["background", *self.structures]
            picture = path.with_name(f"embeddings_{path.name}")
            write_embedding_picture(picture, load_embeddings(self._embeddings_before), self.sample_embeddings(), names)

    @torch.no_grad()
    def sample_embeddings(self) -> dict[str, Embeddings]:
        """Embeddings of one slice a domain; the source's classes are its label, the target's the prediction."""
        self.network.eval()
        sampled = {}
        for domain in ("source", "target") if self.needs_target else ("source",):
            dataset = self.validation_dataset if domain == "source" else self.target_dataset
            image, label = whole_patch(self, dataset, by_label=domain == "source")
            with self.autocast():
                output = getattr(self.plain_network, f"{domain}_generator")(image, image=False)
            embedding = output.embedding
            classes = labels_at(label, embedding.shape[2:]) if domain == "source" else self.pseudo_labels(output, 0.0)
            prototypes, _ = class_prototypes(embedding, classes, self.label_manager.num_segmentation_heads, 1)
            vectors, classes = embedding[0].flatten(1).T, classes[0].flatten()
            step = -(-len(classes) // 1000)
            kept = (classes >= 0).nonzero()[::step, 0]
            sampled[domain] = Embeddings(*(x.cpu().numpy() for x in (vectors[kept], classes[kept], prototypes[0])))
        return sampled


class PrototypesBaselineTrainer(SimilarityPrototypesTrainer):
    """The ablation's first row: L_base alone."""

    fixed_settings = {"similarity_weight": 0.0, "contrastive_weight": 0.0}


class PrototypesNoSimilarityTrainer(SimilarityPrototypesTrainer):
    """Without L_sim."""

    fixed_settings = {"similarity_weight": 0.0}


class PrototypesNoContrastTrainer(SimilarityPrototypesTrainer):
    """Without L_cl: L_base + L_sim."""

    fixed_settings = {"contrastive_weight": 0.0}
