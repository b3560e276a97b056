"""M learners that share a network and look at different parts of an image (ABE)."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from pml_ext.learners import learner_similarity
from pml_ext.modes import in_mode
from pml_ext.pml_internals import ModuleWithRecords
from pml_ext.precision import full_precision, upcast_half
from pml_ext.refused import leaves_no_trace_where_refused
from pml_ext.trunks.backbone_weights import Weights, load_weights, timm_model
from pml_ext.trunks.cut_backbone import cut_backbone, cut_points
from pml_ext.trunks.model_names import check_backbone, check_model_name, name_of_timm_model, refuse_timm_options
from pml_ext.trunks.stage_copy import copy_stage
from pml_ext.validation import check_count, shown

_USUAL_SPLITS = ("maxpool3", "layer2")  # GoogLeNet, ResNets


class AttentionEnsemble(ModuleWithRecords):
    r"""Give each learner its own mask on the features of a shared stem, and embed the result by a shared head.

    $$b_m(x) = \frac{W\, G(S(x) \odot A_m(S(x)))}{\lVert W\, G(S(x) \odot A_m(S(x))) \rVert}$$

    $S$: stem. $A_m$: attention trunk, 1 x 1 convolution of learner m and a sigmoid; one number for each channel and
    position. $G$: head. The embedding is $b_1, \ldots, b_M$ side by side: one 2-D tensor, as PML takes it.
    The M masked maps are folded into the batch, so that G runs once; in training, its batch norms see all learners
    together. Mask convolutions and $W$ are drawn by Xavier's rule, each learner's for itself: learners that coincide
    would stay so.

    Args:
        stem: $S$: images to one map ``(B, C, H, W)``.
        attention: The trunk of $A$: the stem's map to a map ``(B, A, H, W)`` of the same grid.
        head: $G$: a map like the stem's to ``(B, F)``; ends after pooling.
        num_learners: M >= 1.
        embedding_size: Size of the embedding of all learners together, a multiple of M.
        share_attention_trunk: Whether learners share the attention trunk and differ in their 1 x 1 convolutions only.
            Otherwise each gets a copy of it.
        input_size: Channels, height and width of an image, for the dry run that determines the widths. Images of other
            sizes may be given later, where stem and head take them.
        checkpoint: Whether to run G twice instead of keeping its activations for backward: time for memory. Running
            statistics see each batch once.
        collect_stats: Whether to collect statistics, as in PML. With statistics, ``learner_similarity`` is the mean
            cosine between two learners of one image of the last batch.

    Attributes:
        out_features: ``embedding_size``, as in timm.
        attention: The attention trunks, one or M.
        mask_conv: The 1 x 1 convolutions of all learners as one, learner by learner.
        linear: $W$, shared.
        backbone: Stem and head, for ``param_groups`` and ``freeze_batch_norm``.

    Shape:
        - images: ``(B, *input_size)``. Output: ``(B, embedding_size)``; each slice of ``embedding_size / M`` has
          length 1.

    Raises:
        TypeError: If stem, attention or head is not a module.
        ValueError: If an argument breaks a rule, or stem, attention and head do not fit together.

    Examples:
        >>> stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU())
        >>> attention = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())
        >>> head = nn.Sequential(nn.Conv2d(8, 10, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> trunk = AttentionEnsemble(stem, attention, head, 4, embedding_size=32, input_size=(3, 32, 32))
        >>> images = torch.randn(2, 3, 32, 32)
        >>> trunk(images).shape, trunk.masks(images).shape
        (torch.Size([2, 32]), torch.Size([2, 4, 8, 8, 8]))

    Source:
        Kim, Goyal, Chawla, Lee, Kwon: "Attention-based Ensemble for Deep Metric Learning", ECCV 2018. Two independent
        ports share the attention trunk; the paper's text that we have does not say.
    """

    def __init__(
        self,
        stem: nn.Module,
        attention: nn.Module,
        head: nn.Module,
        num_learners: int = 8,
        embedding_size: int = 512,
        *,
        share_attention_trunk: bool = True,
        input_size: tuple[int, int, int] = (3, 224, 224),
        checkpoint: bool = False,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__(collect_stats=collect_stats)
        for name, part in (("stem", stem), ("attention", attention), ("head", head)):
            if not isinstance(part, nn.Module):
                cure = "AttentionEnsemble.from_backbone makes the three of a name"
                raise TypeError(f"{name} must be a torch.nn.Module, got {shown(part)}: {cure}")
        check_count("num_learners", num_learners)
        check_count("embedding_size", embedding_size)
        if embedding_size % num_learners:
            rule = f"a multiple of num_learners = {num_learners}"
            raise ValueError(f"embedding_size must be {rule}, got {embedding_size}")
        _check_input_size(input_size)
        channels, attention_channels, in_features = _widths(stem, attention, head, input_size)
        self.stem = stem
        trunks = 1 if share_attention_trunk else num_learners
        self.attention = nn.ModuleList([attention, *(copy.deepcopy(attention) for _ in range(trunks - 1))])
        self.head = head
        masks = num_learners * channels
        self.mask_conv = nn.Conv2d(trunks * attention_channels, masks, 1, groups=trunks)
        with torch.no_grad():
            for weight in self.mask_conv.weight.chunk(num_learners):  # each learner's, or fan_out would be that of all
                nn.init.xavier_uniform_(weight)
        self.linear = nn.Linear(in_features, embedding_size // num_learners)
        nn.init.xavier_uniform_(self.linear.weight)
        for bias in (self.mask_conv.bias, self.linear.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        self.num_learners = num_learners
        self.out_features = embedding_size
        self.checkpoint = checkpoint
        self.record("num_learners", "out_features", statistics=["learner_similarity"])

    @classmethod
    def from_backbone(
        cls,
        backbone: str | nn.Module,
        split: str | int | None = None,
        num_learners: int = 8,
        embedding_size: int = 512,
        pretrained: bool = False,
        *,
        share_attention_trunk: bool = True,
        input_size: tuple[int, int, int] = (3, 224, 224),
        checkpoint: bool = False,
        collect_stats: bool | None = None,
        weights: Weights = None,
        **timm_kwargs: Any,
    ) -> "AttentionEnsemble":
        """Cut a backbone into stem and head, and copy its next stage, weights included, as attention trunk.

        Args:
            backbone: "googlenet" (torchvision's, the paper's), the name of a timm model, or a module that maps images
                to pooled features ``(B, F)``. Any network with one map ``(B, C, H, W)`` at the cut; not a vision
                transformer.
            split: Name of the module behind which to cut, or a number: 16 cuts a timm model behind its first stage with
                a sixteenth of the image's resolution. The later the cut, the less each learner computes. None:
                "maxpool3" (GoogLeNet), "layer2" (ResNets), or 8.
            num_learners: M >= 1.
            embedding_size: Size of the embedding of all learners together.
            pretrained: Whether weights of the backbone are downloaded.
            share_attention_trunk: As in ``AttentionEnsemble``.
            input_size: As in ``AttentionEnsemble``; its channels are those of the network.
            checkpoint: As in ``AttentionEnsemble``.
            collect_stats: As in ``AttentionEnsemble``.
            weights: Weights of the backbone, all names of which must fit: a file (``.pth``, ``.safetensors``), a state
                dict, or "installed", for "tf_efficientnet_lite0" with the extra ``pretrained``. None for "googlenet".
            **timm_kwargs: Passed to ``timm.create_model``. ``output_stride=8`` for small images.

        Raises:
            TypeError: If ``backbone`` is neither name nor module, or timm's model has no such argument.
            ValueError: If there is no such model or module, it cannot be cut there, or is timm's with a classifier.

        Examples:
            >>> size = (1, 64, 64)
            >>> trunk = AttentionEnsemble.from_backbone("resnet18", num_learners=4, embedding_size=64, input_size=size)
            >>> trunk(torch.randn(2, 1, 64, 64)).shape
            torch.Size([2, 64])
        """
        check_backbone(backbone)
        if "num_classes" in timm_kwargs:
            raise ValueError("num_classes must not be given: the head ends after pooling")
        _check_input_size(input_size)
        if timm_kwargs.get("in_chans", input_size[0]) != input_size[0]:
            raise ValueError(
                f"in_chans must be the channels of input_size, {input_size}, got {timm_kwargs['in_chans']}"
            )
        if isinstance(backbone, str):
            backbone = _create(backbone, pretrained, weights, input_size[0], timm_kwargs)
        else:
            refuse_timm_options(pretrained, timm_kwargs)
            _check_ends_after_pooling(backbone)
            load_weights(backbone, weights)
        if getattr(backbone, "output_fmt", "NCHW") != "NCHW":
            raise ValueError(f"backbone must return maps (B, C, H, W), got a {type(backbone).__name__}, which does not")
        split = _split_of(backbone, split)
        stem, head = cut_backbone(backbone, split)
        features = _features(stem, input_size)
        attention = copy_stage(head, features)
        trunk = cls(
            stem,
            attention,
            head,
            num_learners,
            embedding_size,
            share_attention_trunk=share_attention_trunk,
            input_size=input_size,
            checkpoint=checkpoint,
            collect_stats=collect_stats,
        )
        return trunk.train()  # all of it, whatever mode a given backbone was in

    @property
    def backbone(self) -> nn.ModuleList:
        """Stem and head: what was there before the ensemble."""
        return nn.ModuleList([self.stem, self.head])

    @leaves_no_trace_where_refused
    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings, learner by learner; ``pml_ext.learners.split_learners`` separates them."""
        features = self.stem(images)
        masked = (features.unsqueeze(1) * self._masks(features)).flatten(0, 1)  # (B * M, C, H, W)
        learners = self.linear(self._run_head(masked))
        learners = learners.reshape(images.shape[0], self.num_learners, learners.shape[1])  # (B, M, d)
        with full_precision(images.device):  # in float16 the norm of a row of zeros would give NaN
            learners = nn.functional.normalize(upcast_half(learners), dim=2).to(learners.dtype)
        embeddings: Tensor = learners.flatten(1)
        if self.collect_stats:
            self.learner_similarity = learner_similarity(embeddings, self.num_learners)
        return embeddings

    @leaves_no_trace_where_refused
    def masks(self, images: Tensor) -> Tensor:
        """Return each learner's mask, ``(B, M, C, H, W)``, in 0 to 1."""
        return self._masks(self.stem(images))

    def _masks(self, features: Tensor) -> Tensor:
        attended = torch.cat([trunk(features) for trunk in self.attention], 1)
        if attended.shape[2:] != features.shape[2:]:
            shapes = f"{tuple(features.shape[2:])}, got {tuple(attended.shape[2:])}"
            raise ValueError(f"attention must keep the grid of the stem, {shapes}")
        masks: Tensor = self.mask_conv(attended).sigmoid()
        return masks.reshape(features.shape[0], self.num_learners, *features.shape[1:])

    def _run_head(self, masked: Tensor) -> Tensor:
        if not (self.checkpoint and torch.is_grad_enabled()):
            return self.head(masked)
        pooled: Tensor = run_again_in_backward(
            lambda x: self.head(x.clone()),  # what starts in place would change the input of the second run
            masked,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _buffers_kept(self.head)),
        )
        return pooled


def _check_ends_after_pooling(backbone: Any) -> None:
    """Check that a timm model has no classifier, whose logits would be taken for features."""
    if not callable(getattr(backbone, "get_classifier", None)):
        return
    classifier = backbone.get_classifier()
    if any(isinstance(x, nn.Linear) for x in (classifier if isinstance(classifier, tuple | list) else [classifier])):
        name = name_of_timm_model(backbone)
        raise ValueError(
            f"backbone must end after pooling, got a {type(backbone).__name__} with a classifier: "
            f"backbone.reset_classifier(0), or timm.create_model({name}, num_classes=0)"
        )


def _split_of(backbone: nn.Module, split: str | int | None) -> str:
    """Return the name of the module behind which to cut."""
    if isinstance(split, str):
        return split
    modules = dict(backbone.named_modules())
    info: Any = getattr(backbone, "feature_info", ())
    stages = {x["reduction"]: x["module"] for x in reversed(info) if isinstance(x, dict) and "reduction" in x}
    usual = _USUAL_SPLITS if split is None else ()
    found = next((name for name in (*usual, stages.get(8 if split is None else split)) if name in modules), None)
    if found is None and split is None:
        raise ValueError(f"split must be given for this backbone, one of {', '.join(cut_points(backbone))}")
    if found is None:
        known = ", ".join(map(str, sorted(stages))) or "none: give the name of a module"
        raise ValueError(f"split must be a module's name or one of this backbone's reductions ({known}), got {split!r}")
    return str(found)


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Run a module on copies of its buffers: running statistics do not see a batch twice."""
    kept = [(m, dict(m._buffers)) for m in module.modules()]
    for m, buffers in kept:
        m._buffers.update({name: None if x is None else x.clone() for name, x in buffers.items()})
    try:
        yield
    finally:
        for m, buffers in kept:
            m._buffers.update(buffers)


def _create(name: str, pretrained: bool, weights: Weights, channels: int, timm_kwargs: dict[str, Any]) -> nn.Module:
    """Return a network that ends after pooling."""
    check_model_name(name, others=("googlenet",))
    if name != "googlenet":
        return timm_model(name, pretrained, weights, num_classes=0, **({"in_chans": channels} | timm_kwargs))
    if weights is not None:
        raise ValueError(f"weights must be None for 'googlenet' (pass the network as backbone), got {weights!r:.40}")
    from torchvision.models import GoogLeNet_Weights, googlenet  # on use: only this network is torchvision's

    if channels != 3:
        raise ValueError(f"input_size must have 3 channels for googlenet, got {channels}")
    if pretrained:  # with the auxiliary outputs that its weights have, which it then drops
        google = googlenet(weights=GoogLeNet_Weights.IMAGENET1K_V1, **timm_kwargs)
    else:
        google = googlenet(weights=None, aux_logits=False, init_weights=True, **timm_kwargs)
    google.dropout, google.fc = nn.Identity(), nn.Identity()
    return google


def _check_input_size(input_size: tuple[int, int, int]) -> None:
    if not isinstance(input_size, tuple | list) or len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f"input_size must be (channels, height, width), each >= 1, got {input_size}")


@torch.no_grad()
def _features(stem: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """Return what the stem makes of one image of zeros."""
    like = next(stem.parameters(), torch.empty(0))
    with in_mode(stem):
        features = stem(torch.zeros(1, *input_size, device=like.device, dtype=like.dtype))
    if not isinstance(features, Tensor) or features.ndim != 4:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"stem must give one map (B, C, H, W), got {got}")
    return features


@torch.no_grad()
def _widths(
    stem: nn.Module, attention: nn.Module, head: nn.Module, input_size: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Return the channels of the stem and of the attention trunk, and the width of the head, from a dry run."""
    features = _features(stem, input_size)
    version = features._version
    with in_mode(attention), in_mode(head):
        attended = attention(features)
        if features._version != version:
            raise ValueError("attention must not change the stem's map in place, got one that does (inplace=True?)")
        pooled = head(features)
    if attended.ndim != 4 or attended.shape[2:] != features.shape[2:]:
        shapes = f"{tuple(features.shape)} to (1, A, {features.shape[2]}, {features.shape[3]})"
        raise ValueError(f"attention must keep the grid of the stem, {shapes}, got {tuple(attended.shape)}")
    if pooled.ndim != 2:
        raise ValueError(f"head must end after pooling, with (B, F), got {tuple(pooled.shape)}")
    return features.shape[1], attended.shape[1], pooled.shape[1]
