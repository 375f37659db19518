"""UUDS: unified uncertain dual prompts (anonymous, under review), with CLIP's encoders.

Target images are translated to the source and segmented from the features that the translation makes. A hard prompt
that names the source domain steers the translation (section 3.1.1), learnable prompts with the class names steer the
segmentation (3.1.2), and the segmentation's own certain pixels supervise both on target images (3.2). There is no
adversary: every step is one update of everything, CLIP included, on the sum of all losses (3.3).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_uda.data.convention import read_domains
from nnunet_uda.data.mixed_slices import MixedSliceLoader
from nnunet_uda.errors import UDAError
from nnunet_uda.files import write_json
from nnunet_uda.losses.domain_discrepancy import domain_discrepancy_loss
from nnunet_uda.losses.patch_nce import PatchNCELoss
from nnunet_uda.losses.structure import shared_information
from nnunet_uda.losses.supervised_contrastive import supervised_contrastive_loss
from nnunet_uda.losses.uncertainty import normalised_entropy, uncertain_segmentation_loss
from nnunet_uda.networks.clip.image_encoder import Encoded
from nnunet_uda.networks.clip.shape import clip_shape
from nnunet_uda.networks.clip.weights import read_clip_weights
from nnunet_uda.networks.patch_projector import PatchProjector
from nnunet_uda.networks.projection_head import ProjectionHead
from nnunet_uda.networks.uuds_network import Generated, UUDSNetwork
from nnunet_uda.settings import parse_settings, require, split_settings
from nnunet_uda.training.preview import as_seen, whole_patch, write_trainers_panels
from nnunet_uda.training.prompt_pictures import write_domain_map, write_prompt_maps
from nnunet_uda.training.start import refuse_unsupported
from nnunet_uda.training.uda_trainer import UDATrainer, frozen

SHOWN_SLICES = 3
MAPPED_SLICES = 24
CONTENT_TEMPERATURE = 0.2


@dataclass(frozen=True)
class UUDSSettings:
    """Settings under ``uda.uuds``. Defaults are the paper's where it gives a value.

    The paper gives the four weights (alpha, beta, gamma and lambda, in this order), Adam's ``learning_rate`` and
    ``weight_decay``, and ``domain_prompt``. ``{source}`` and ``{target}`` in that stand for the names in dataset.json.
    ``threshold`` is chi. ``domain_loss`` and ``uncertainty`` choose between an equation as the text means it (the
    default) and as it is printed.

    Not in the paper, and off by default: ``generator_skips`` gives the image decoder CLIP's finer maps, normalised.
    ``translation_judge`` ``fixed`` lets eq. 2 (and the content constraint) teach the generator alone: the encoder that
    looks at x^{t->s}, x_g^t and T^d are taken as they are. Trained along, they soon tell any translation from x^t, and
    L_DD is nothing. ``adversarial`` makes the encoder an opponent, which the paper does without: it learns to tell
    reconstructed source images from translations by L_DD, and the generator, by eq. 2 with the reconstruction in the
    place of x_g^t, to have them mistaken (a relativistic GAN). ``content_weight`` keeps the translation like its image.

    ``clip_config`` describes a ResNet CLIP that open_clip has no name for, as open_clip's own JSON files do; it takes
    the place of ``clip_model``. ``clip_weights`` is a tag of the hub, a file, a folder, or ``random``.

    The shared settings ``segmenter_optimizer``, ``segmenter_learning_rate`` and ``segmenter_weight_decay`` are not
    read: one optimiser trains everything.
    """

    clip_model: str = "RN50-quickgelu"
    """open_clip's name of a ResNet CLIP."""
    clip_config: dict | None = None
    """A CLIP that has no name there, as open_clip's JSON files describe it; small ones for a CPU."""
    clip_weights: str = "openai"
    """A tag of the hub, a file, a folder, or random."""
    clip_trust_torchscript: bool = False
    """true only for a file whose origin you trust: such files can run code."""
    clip_batch_statistics: Literal["trained", "frozen"] = "trained"
    """frozen: CLIP's batch norms keep their statistics. For small batches and several processes."""
    domain_prompt: str = "A photo of a source domain"
    """May hold {source} and {target}, the names in dataset.json."""
    generator_skips: Literal["none", "normalised"] = "none"
    """normalised gives the image decoder CLIP's finer maps: sharper translations."""
    translation_judge: Literal["trained", "fixed", "adversarial"] = "trained"
    """What CLIP's encoder is to the generator: trained along, fixed, or its opponent, where it translates nothing."""
    domain_weight: float = 1.0
    """alpha, at least 0. Less where translations lose their content."""
    contrastive_weight: float = 1.0
    """beta, at least 0."""
    segmentation_weight: float = 1.0
    """gamma, at least 0."""
    identity_weight: float = 1.0
    """lambda, at least 0. More where a reconstruction differs from its image."""
    domain_temperature: float = 0.07
    """Positive."""
    domain_loss: Literal["similarity", "printed"] = "similarity"
    """Equation 2 as the text means it, or as it is printed."""
    uncertainty: Literal["entropy", "printed"] = "entropy"
    """The uncertainty as the text means it, or as it is printed."""
    threshold: float = 0.2
    """chi, 0 to 1: target pixels more uncertain than this teach nothing. More where all ends in background."""
    warmup_epochs: int = 20
    """Epochs without the uncertain segmentation of target images, at least 0."""
    content_weight: float = 0.0
    """At least 0: keeps a translation like its image. 1 where shapes change."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """One optimiser trains everything; adamw decays weights apart from the steps."""
    learning_rate: float = 1e-4
    """Positive. More for short schedules."""
    weight_decay: float = 0.01
    """At least 0."""
    removed = {"context_vectors": 16, "use_domain_prompt": True, "use_segmentation_prompt": True,
               "use_uncertainty": True, "contrastive_temperature": 0.07, "contrastive_negatives": "all",
               "contrastive_reduction": "mean", "content_temperature": CONTENT_TEMPERATURE, "content_patches": 256,
               "content_layers": "all", "structure_bound": 0.2}  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("domain_temperature", "learning_rate"):
            require(getattr(self, name) > 0, name, "positive", getattr(self, name))
        for name in ("domain_weight", "contrastive_weight", "segmentation_weight", "identity_weight",
                     "content_weight", "warmup_epochs", "weight_decay"):  # fmt: skip
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        require(0 <= self.threshold <= 1, "threshold", "between 0 and 1", self.threshold)
        try:
            self.domain_prompt.format(source="", target="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"'domain_prompt' may hold {{source}} and {{target}} alone in braces, found {self.domain_prompt!r}"
            ) from error

    @property
    def shape(self) -> dict[str, Any]:
        """What CLIP is built from."""
        return clip_shape(self.clip_model, self.clip_config)


@dataclass(frozen=True)
class UUDSAdversarialSettings(UUDSSettings):
    """The same settings under ``uda.uuds`` with other defaults: those with which UUDS translates (docs/phantom.md).

    The generator sees CLIP's finer maps, the encoder opposes it, the content is constrained, L_DD weighs less and L_id
    more. ``threshold`` is high because trusting the surest pixels alone, which are background, ended in background.
    """

    generator_skips: Literal["none", "normalised"] = "normalised"
    translation_judge: Literal["trained", "fixed", "adversarial"] = "adversarial"
    content_weight: float = 1.0
    domain_weight: float = 0.3
    domain_temperature: float = 0.2
    identity_weight: float = 2.0
    threshold: float = 0.6


class UUDSTrainer(UDATrainer[UUDSSettings]):
    """The paper's method. ``uda.uuds`` in the plans holds its settings (``UUDSSettings``).

    Patch, batch, spacing, deep supervision and the widths of both decoders come from the plans, everything up to 1/32
    of the resolution from CLIP. At validation source images take the road of target images (encoded, reconstructed,
    segmented from the features of that): the pseudo Dice says how well the source is segmented, and nothing about the
    target.
    """

    method = "uuds"
    method_settings = UUDSSettings
    network_update = "network"
    domain_prompt = segmentation_prompt = uncertainty = True
    """Parts of the method; its ablations (Table 3) have one of them less."""
    structure_bound = 0.2
    """Normalised mutual information of an image and its translation, below which a collapse is feared."""

    needs_clip_weights = True

    def adopt_settings(self) -> None:
        super().adopt_settings()
        self.initial_lr = self.own_settings.learning_rate
        self.weight_decay = self.own_settings.weight_decay
        if num_outputs(self.configuration_manager) == 1:
            self.enable_deep_supervision = False

    # -- set-up --------------------------------------------------------------------------------------------------

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        where = f"plans {plans_manager.plans_name!r}, key 'uda'"
        _, own = split_settings(plans_manager.plans.get("uda", {}), cls.method, where)
        settings = parse_settings(cls.method_settings, own | cls.fixed_settings, f"{where}.{cls.method}")
        return UUDSNetwork(
            settings.shape,
            num_input_channels,
            num_output_channels,
            configuration_manager.network_arch_init_kwargs["features_per_stage"],
            num_outputs(configuration_manager),
            frozen_statistics=settings.clip_batch_statistics == "frozen",
            domain_prompt=cls.domain_prompt,
            segmentation_prompt=cls.segmentation_prompt,
            normalised_skips=settings.generator_skips == "normalised",
            deep_supervision=enable_deep_supervision,
        )

    def initialize(self) -> None:
        refuse_unsupported(self)
        if len(self.configuration_manager.patch_size) != 2:
            raise UDAError(
                f"{type(self).__name__} trains 2D configurations only: CLIP's image encoder, pretrained on "
                f"photographs, is 2D. Train the configuration 2d (found {self.configuration_name!r}); scans are "
                "segmented slice by slice"
            )
        settings = self.own_settings
        state = None
        if self.needs_clip_weights:  # before anything else is built: what is missing is said at once
            name = settings.clip_model if settings.clip_config is None else None
            state = read_clip_weights(
                settings.shape, name, settings.clip_weights, settings.clip_trust_torchscript, self.print_to_log_file
            )
        super().initialize()
        domains = read_domains(self.dataset_json)
        prompt = settings.domain_prompt.format(source=domains.source, target=domains.target)
        self.plain_network.set_prompts(prompt, self.structures, state)
        self.print_to_log_file(f"Domain prompt: {prompt!r}; segmentation prompts end in {self.structures}")

    def prepare_network(self) -> None:
        if self._do_i_compile():
            self.plain_network.compile()

    def build_networks(self) -> dict[str, nn.Module]:
        settings, network = self.own_settings, self.plain_network
        networks: dict[str, nn.Module] = {}
        if self.segmentation_prompt:
            networks["contrastive_head"] = ProjectionHead(network.channels)
        if settings.content_weight > 0:
            channels = [self.num_input_channels, *network.encoder.channels[:4]]
            networks["patch_projector"] = PatchProjector(channels)
            self.patch_contrastive = PatchNCELoss(CONTENT_TEMPERATURE)
        return networks

    def network_optimizer(self) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW if self.own_settings.optimizer == "adamw" else torch.optim.Adam
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        return kind(parameters, self.initial_lr, weight_decay=self.weight_decay, fused=True)

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        parameters = list(self.networks.parameters())
        if parameters:
            self.optimizer.add_param_group({"params": parameters})
        return {}

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        if not self.enable_deep_supervision:
            return None
        return [[1 / 2**level] * 2 for level in range(num_outputs(self.configuration_manager))]

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Source batches hold slices with and without the object: eq. 4 needs both."""
        training, validation = super().get_dataloaders()
        if isinstance(training, SingleThreadedAugmenter):
            training.data_loader = self._mixed(training.data_loader)
        else:
            training._finish()  # its workers hold copies of nnU-Net's loader; the next batch starts others
            training.generator = self._mixed(training.generator)
        return training, validation

    def _mixed(self, loader: Any) -> MixedSliceLoader:
        return MixedSliceLoader(loader, self.label_manager, self.print_to_log_file)

    # -- a step --------------------------------------------------------------------------------------------------

    def segment(self, images: Tensor) -> list[Tensor] | Tensor:
        return self.network(images)

    def train_on(self, source: Tensor, label: Tensor | list[Tensor], target: Tensor | None) -> None:
        assert target is not None
        settings, network, count = self.own_settings, self.plain_network, len(source)
        terms = {}
        with self.autocast():
            domain, classes = self.prompts()
            both = network.encode(torch.cat([source, target]))
            generated = network.generate(both, domain)
            reconstructed, translated = generated.image.float().split(count)
            of_target = both.part(slice(count, None))
            if self.domain_prompt:
                terms["domain"] = self.domain_loss(both.summary[:count], of_target.summary, domain)  # eq. 1
            if self.encodes_translations:
                terms |= self.translation_terms(target, both, reconstructed, translated, domain)
            segmented = network.segment(both.part(slice(count)), generated.part(slice(count)), classes)
            if self.segmentation_prompt:
                terms["contrastive"] = self.contrastive_loss(segmented.pooled, self.known(label))  # eq. 4
            segmentation = self.loss(segmented.logits, label)
            terms["segmentation"] = settings.segmentation_weight * segmentation
            if self.uncertainty:
                terms["uncertain_segmentation"] = self.uncertain_loss(
                    of_target, generated.part(slice(count, None)), classes
                )
            terms["identity"] = settings.identity_weight * F.l1_loss(reconstructed, source)  # eq. 9
        self.update("network", terms, max_norm=12)
        self.updates.terms["structure"] = shared_information(target, translated)

    def translation_terms(
        self, target: Tensor, both: Encoded, reconstructed: Tensor, translated: Tensor, domain: Tensor | None
    ) -> dict[str, Tensor]:
        """What the encoder says of x^{t->s}: eq. 2, and the content constraint.

        An adversarial judge also sees the reconstructed source images. They bear the same marks of the image decoder
        as translations do: real ones would be told apart by those marks, whatever the contrast.
        """
        settings, network, count = self.own_settings, self.plain_network, len(target)
        terms, judge, of_target = {}, settings.translation_judge, both.part(slice(count, None))
        adversarial = judge == "adversarial" and self.domain_prompt
        seen = torch.cat([reconstructed.detach(), translated]) if adversarial else translated
        with nullcontext() if judge == "trained" else frozen(network.encoder):
            again = network.encode(seen, keep_statistics=True)
        far = of_target.summary
        if adversarial:
            far, again = again.summary[:count], again.part(slice(count, None))
            learnt = network.encode(seen.detach(), keep_statistics=True).summary
            terms["domain_judge"] = self.domain_loss(learnt[:count], learnt[count:], domain)
        if self.domain_prompt:
            prompt = domain
            if judge != "trained" and far is not None and domain is not None:
                far, prompt = far.detach(), domain.detach()
            terms["domain_translated"] = self.domain_loss(again.summary, far, prompt)  # eq. 2
        if settings.content_weight > 0:
            terms["content"] = settings.content_weight * self.content_loss(target, of_target, translated, again)
        return terms

    def labelled_target_loss(self, images: Tensor, label: Tensor | list[Tensor]) -> Tensor:
        """The loss on the path of target images, with this step's prompts."""
        network, (domain, classes) = self.plain_network, self.prompts()
        encoded = network.encode(images)
        return self.loss(
            network.segment(encoded, network.generate(encoded, domain, image=False), classes).logits, label
        )

    @property
    def encodes_translations(self) -> bool:
        settings = self.own_settings
        return (self.domain_prompt and settings.domain_weight > 0) or settings.content_weight > 0

    def prompts(self) -> tuple[Tensor | None, Tensor | None]:
        """T^d and T^s of this step; no text encoder runs where neither is used."""
        if self.domain_prompt or self.segmentation_prompt:
            return self.plain_network.prompts()
        return None, None

    def domain_loss(self, near: Tensor | None, far: Tensor | None, prompt: Tensor | None) -> Tensor:
        """alpha L_DD; with the domain prompt there are all three."""
        assert near is not None and far is not None and prompt is not None
        settings = self.own_settings
        loss = domain_discrepancy_loss(near, far, prompt, settings.domain_temperature, settings.domain_loss)
        return settings.domain_weight * loss

    def contrastive_loss(self, pooled: Tensor, label: Tensor) -> Tensor:
        """beta L_BSCL, the mean over classes; with one class it is eq. 4.

        Args:
            pooled: ``(B, K, c)``, what each class's prompt attends to in the source slices.
            label: ``(B, 1, H, W)``; a slice holds a class where it has a pixel of it. One that has none, but negative
                pixels, where nothing is known, takes no part.
        """
        holds = torch.stack([(label == value).flatten(1).any(1) for value in self.label_manager.foreground_labels], 1)
        certain = holds | (label >= 0).flatten(1).all(1)[:, None]
        vectors = self.networks["contrastive_head"](pooled.flatten(0, 1)[:, :, None]).unflatten(0, pooled.shape[:2])
        losses = [
            supervised_contrastive_loss(vectors[certain[:, k], k], holds[certain[:, k], k])
            for k in range(holds.shape[1])
        ]
        return self.own_settings.contrastive_weight * torch.stack(losses).mean()

    def uncertain_loss(self, of_target: Encoded, generated: Generated, classes: Tensor | None) -> Tensor:
        """gamma L_useg on target images (eqs 5 to 8), 0 during the warm-up, when nothing of it is computed."""
        settings = self.own_settings
        if self.current_epoch < settings.warmup_epochs:
            return torch.zeros((), device=self.device)
        logits = self.finest(self.plain_network.segment(of_target, generated, classes).logits)
        return settings.segmentation_weight * uncertain_segmentation_loss(
            logits, settings.threshold, settings.uncertainty
        )

    def content_loss(self, target: Tensor, of_target: Encoded, translated: Tensor, again: Encoded) -> Tensor:
        """Not in the paper: PatchNCE between x^t and x^{t->s}, on the images and CLIP's maps of them up to layer3."""
        keys, queries = [target, *of_target.levels[:4]], [translated, *again.levels[:4]]
        projector = self.networks["patch_projector"]
        positions = projector.sample_positions(keys)
        pairs = zip(projector(queries, positions), projector(keys, positions), strict=True)
        return torch.stack([self.patch_contrastive(query, key) for query, key in pairs]).mean()

    # -- the loop ------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        structure = self.record.history["structure"][-1]
        if self.current_epoch >= self.own_settings.warmup_epochs and structure < self.structure_bound:
            self.print_to_log_file(
                f"WARNING: translations keep little of their images' structure: their normalised mutual information is "
                f"{structure:.2f}, below {self.structure_bound}. The translation may be collapsing; "
                "uuds.content_weight=1 adds a constraint"
            )

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.plain_network.refresh_prompts()

    def save_checkpoint(self, filename: str) -> None:
        self.plain_network.refresh_prompts()
        super().save_checkpoint(filename)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Load a checkpoint. CLIP's own file is not needed."""
        self.needs_clip_weights = False
        super().load_checkpoint(filename_or_checkpoint)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        super().perform_actual_validation(save_probabilities)
        domain = read_domains(self.dataset_json).source
        note = (
            f"{domain} validation cases on the road of target images (encoded, reconstructed as {domain}, segmented "
            f"from the features of that), against their own {domain} labels: no target label was read"
        )
        if self.local_rank == 0:
            write_json({"validated_on": note}, Path(self.output_folder, "validation", "about.json"))

    # -- pictures ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw_pictures(self, path: Path) -> None:
        """Three files: the panel of all trainers, the prompts' maps over target slices; at the end, t-SNE of x_g."""
        path.parent.mkdir(exist_ok=True)
        self.network.eval()
        source, label = whole_patch(self, self.validation_dataset, by_label=True)
        targets = self.slices(self.target_dataset, SHOWN_SLICES)
        made, predicted, attention, entropy = self.shown(torch.cat([source, targets]))
        image, middle = source[0, 0].cpu().numpy(), targets[0, 0].cpu().numpy()
        rows = [
            [
                ("source", image, None),
                ("reconstructed", made[0], None),
                ("label", image, label[0, 0].cpu().numpy()),
                ("prediction", image, predicted[0]),
            ],
            [("target", middle, None), ("translated", made[1], None), ("prediction", middle, predicted[1])],
        ]
        write_trainers_panels(self, path, rows)
        prompts = self.structures if self.segmentation_prompt else ["none"]
        reader = self.plans_manager.image_reader_writer_class.__name__
        seen = [as_seen(x, reader) for x in (targets[:, 0].cpu().numpy(), made[1:], predicted[1:], attention[1:])]
        write_prompt_maps(
            path.with_name(f"prompts_{path.name}"), *seen, ["domain prompt", *(f"prompt: {name}" for name in prompts)],
            as_seen(entropy[1:], reader), self.own_settings.threshold,
        )  # fmt: skip
        if self.current_epoch == self.num_epochs and self.domain_prompt:
            self.draw_domains(path.with_name("domains.png"))

    def shown(self, images: Tensor) -> tuple[np.ndarray, ...]:
        """Reconstruction or translation, prediction, attention of all prompts and uncertainty, as float arrays."""
        network = self.plain_network
        with self.autocast():
            encoded = network.encode(images)
            generated = network.generate(encoded, network.domain_embedding)
            segmented = network.segment(encoded, generated, network.class_embeddings)
        probabilities = self.finest(segmented.logits).float().softmax(1)
        attention = torch.cat([generated.attention, segmented.attention], 1)
        attention = F.interpolate(attention, scale_factor=32, mode="nearest")
        attention = attention[:, :, : images.shape[2], : images.shape[3]]
        arrays = (generated.image[:, 0], probabilities.argmax(1), attention, normalised_entropy(probabilities)[:, 0])
        return tuple(array.float().cpu().numpy() for array in arrays)

    def draw_domains(self, path: Path) -> None:
        """x_g of source and target, and of source and translated slices, in one t-SNE (the paper's Figure 4)."""
        network = self.plain_network
        summaries = {}
        with self.autocast():
            for name, dataset in (("source", self.validation_dataset), ("target", self.target_dataset)):
                encoded = [network.encode(part) for part in self.slices(dataset, MAPPED_SLICES).split(4)]
                summaries[name] = torch.cat([part.summary for part in encoded])
            again = [network.encode(network.generate(part, network.domain_embedding).image) for part in encoded]
            summaries["translated"] = torch.cat([part.summary for part in again])
        write_domain_map(path, {name: x.float().cpu().numpy() for name, x in summaries.items()})

    def slices(self, dataset: nnUNetBaseDataset, number: int) -> Tensor:
        """Patches around the middle of slices, spread evenly over and inside the cases, ``(number, C, *patch)``."""
        height, width = self.configuration_manager.patch_size
        cases = [dataset.identifiers[i * len(dataset.identifiers) // number] for i in range(number)]
        patches = []
        for index, case in enumerate(cases):
            data = dataset.load_case(case)[0]
            slot = data.shape[1] * (cases[:index].count(case) + 1) // (cases.count(case) + 1)
            corner = [data.shape[2] // 2 - height // 2, data.shape[3] // 2 - width // 2]
            box = [[slot, slot + 1], [corner[0], corner[0] + height], [corner[1], corner[1] + width]]
            patches.append(torch.from_numpy(crop_and_pad_nd(data, box, 0))[:, 0].float())
        return torch.stack(patches).to(self.device)


class UUDSNoDomainPromptTrainer(UUDSTrainer):
    """Table 3, last row: no L_DD, and the DAM attends to all positions alike."""

    domain_prompt = False


class UUDSNoSegmentationPromptTrainer(UUDSTrainer):
    """Table 3, third row: no L_BSCL, and the SAM attends to all positions alike."""

    segmentation_prompt = False


class UUDSNoUncertaintyTrainer(UUDSTrainer):
    """Table 3, second row: no L_useg, so that target images do not teach the segmentation."""

    uncertainty = False


class UUDSAdversarialTrainer(UUDSTrainer):
    """Not in the paper: UUDS with an opponent, the defaults of ``UUDSAdversarialSettings``."""

    method_settings = UUDSAdversarialSettings


def num_outputs(configuration_manager: ConfigurationManager) -> int:
    """Resolutions with logits: the plans' (all stages but the coarsest) where halving the patch gives whole numbers.

    The decoder has five besides the coarsest. A plan may halve fewer times, or one axis only.
    """
    wanted = min(5, configuration_manager.network_arch_init_kwargs["n_stages"] - 1)
    level = 1
    while level < wanted and all(size % 2**level == 0 for size in configuration_manager.patch_size):
        level += 1
    return level
