"""Messages between the samples of a batch, for training only (IBC, ICML 2021)."""

from typing import TYPE_CHECKING

from pml_ext.recipes.parts import Method, Parts
from pml_ext.recipes.settings import CODE, OURS, Numbers, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from pml_ext.trunks.intra_batch_refiner import IntraBatchRefiner


def make_refiner(s: Settings) -> "IntraBatchRefiner":
    """Return the refiner of the settings ``num_layers``, ``heads``, ``output`` and ``messages``."""
    from pml_ext.recipes.silent_refiner import SilentRefiner  # on use: torch is slow to load
    from pml_ext.trunks.intra_batch_refiner import IntraBatchRefiner  # on use: torch is slow to load

    kind = IntraBatchRefiner if s.messages else SilentRefiner
    return kind(s.embedding_size, s.num_layers, s.heads, output=s.output)


def _build(s: Settings, num_classes: int, class_embeddings: "Tensor | None") -> Parts:
    """``refined_weight=0`` is the same cross-entropy without refiner; ``messages=False`` one that says nothing."""
    from pml_ext.losses import IntraBatchLoss  # on use: torch is slow to load
    from pml_ext.recipes.backbones import pooled_trunk  # on use: torch is slow to load

    loss = IntraBatchLoss(
        num_classes,
        s.embedding_size,
        refiner=make_refiner(s) if s.refined_weight else None,
        temperature=s.temperature,
        label_smoothing=s.label_smoothing,
        refined_weight=s.refined_weight,
        raw_weight=s.raw_weight,
    )
    return Parts(pooled_trunk(s), loss)


def _paper(layers: int, heads: int, lr: float, decay: float, temperature: float, classes: int, images: int) -> Numbers:
    values = {
        "num_layers": layers,
        "heads": heads,
        "lr": lr,
        "proxy_lr": lr,
        "weight_decay": decay,
        "temperature": temperature,
        "batch_size": classes * images,
        "samples_per_class": images,
    }
    return {name: (value, CODE) for name, value in values.items()}


INTRA_BATCH = Method(
    numbers={
        "all": {
            "num_layers": (1, CODE),
            "heads": (2, CODE),
            "output": ("last", CODE),
            "messages": (True, CODE),
            "temperature": (0.2, CODE),
            "label_smoothing": (0.1, CODE),
            "refined_weight": (1.0, CODE),
            "raw_weight": (1.0, CODE),
        },
        "small": {"proxy_lr": (2e-3, OURS)},
        "finetune": {"proxy_lr": (2e-3, OURS)},
        "paper": {
            "pool_type": ("max", CODE),
            "image_size": (227, CODE),
            "resize": (256, CODE),
            "augmentation": ("crop+erase", CODE),
            "optimizer": ("RAdam", CODE),
            "epochs": (70, CODE),
            "backbone": ("resnet50", CODE),
            "pretrained": (True, CODE),
            "embedding_size": (512, CODE),
            "flip": (True, CODE),
            "schedule": ("step", CODE),
            "milestones": ((30,), "authors' code; (30, 50) is what it means, but its second step does nothing"),
            "gamma": (0.1, CODE),
            "warmup_epochs": (0, CODE),
            "clip_value": (None, CODE),
            "freeze_batch_norm": (False, CODE),
        },
        "paper:cub": _paper(1, 2, 1.5636637e-4, 6.0597e-6, 0.2, 6, 9),
        "paper:cars": _paper(2, 8, 3.6683240e-4, 2.5519e-9, 0.111111, 10, 7) | {"output": ("cat", CODE)},
        "paper:sop": _paper(1, 8, 2.4724715e-4, 2.7650e-13, 0.6046909, 15, 6)
        | {"refined_weight": (1.0, "ours: the authors' configuration for SOP never runs the messages")},
        "paper:inshop": _paper(1, 4, 1.1265975e-4, 1.0555e-7, 0.1859135, 14, 4),
    },
    build=_build,
    summary="plain head, and messages between the images of a batch; IntraBatchLoss",
)
