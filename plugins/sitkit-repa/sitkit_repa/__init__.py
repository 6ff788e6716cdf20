"""Representation alignment: what a network holds in a hidden layer is drawn towards what a frozen encoder sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from sitkit import Batch, Extractor, Loss, RunClassifier, UserError, interpolant_loss, losses

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sitkit import Examples


@final
@losses.register("repa")
@dataclass(frozen=True)
class RepresentationAlignment(Loss):
    """The interpolant's loss - weight * cos(projector(hidden), encoder(data)), the cosine's mean over the tokens.

    layer: the module whose output (b, tokens, width) is aligned, a block of a SiT by default.  encoder: any feature
    extractor, frozen; its fields say which weights.  "spatial" features are cut into one vector a token, "features" are
    compared with the mean over tokens.  The encoder is prepared on the run's data, to which the loss is bound; the run's
    autoencoder must be `identity`, for the encoder sees images.  The projector has three layers and is trained beside
    the network.
    Source: Yu et al. 2024 (arXiv 2410.06940), Eq. 8; weight 0.5 as theirs.
    """

    layer: str = "blocks.1"
    weight: float = 0.5
    width: int = 128
    encoder: Extractor = field(default_factory=RunClassifier)
    reads: Literal["spatial", "features"] = "spatial"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1; got {self.width}.")
        if self.reads not in self.encoder.outputs:
            raise ValueError(f"reads must be of what the encoder gives ({', '.join(self.encoder.outputs)}).")

    @classmethod
    def test_fields(cls) -> Sequence[Mapping[str, Any]]:
        # The laws do not ask how well the encoder sees: one that learns in a moment, and one that does not learn.
        few = {"name": "run-classifier", "steps": 3, "width": 8}
        return {"encoder": few}, {"encoder": "pixels", "reads": "features"}

    @property
    def hidden(self) -> tuple[str, ...]:
        return (self.layer,)

    def prepare(self, data: Examples) -> Loss:
        return BoundAlignment(self, data)

    def per_example(self, batch: Batch) -> Tensor:
        raise UserError("loss 'repa' needs the run's data: prepare it (`loss.prepare(examples)`).")


@final
@dataclass(frozen=True)
class BoundAlignment(Loss):
    """Representation alignment with the data that its encoder is prepared on."""

    name: ClassVar[str] = RepresentationAlignment.name
    rule: RepresentationAlignment
    data: Examples

    @property
    def hidden(self) -> tuple[str, ...]:
        return self.rule.hidden

    def build(self, network: nn.Module, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        import torch

        from sitkit_repa.projector import Projector, hidden_shape

        if self.rule.layer not in dict(network.named_modules()):
            blocks = [name for name, _ in network.named_modules() if name.count(".") == 1]
            raise UserError(
                f"loss 'repa': the network has no layer {self.rule.layer!r}; it has {', '.join(blocks) or 'no blocks'}."
            )
        if self.data.shape != shape:
            raise UserError(
                f"loss 'repa': the encoder sees examples of shape {self.data.shape}, the network states of {shape}: "
                "use the autoencoder 'identity'."
            )
        tokens, width = hidden_shape(network, self.rule.layer, shape)
        device = next(network.parameters()).device
        encoder = self.rule.encoder.build(self.data, device, None)
        with torch.no_grad():
            size = encoder.apply(torch.zeros(1, *shape, device=device))[self.rule.reads].shape[1]
        tokens = tokens if self.rule.reads == "spatial" else 1
        if size % tokens:
            raise UserError(f"loss 'repa': {size} spatial features do not fit {tokens} tokens. Use reads 'features'.")
        return Projector(encoder, self.rule.reads, tokens, width, self.rule.width, size // tokens)

    def per_example(self, batch: Batch) -> Tensor:
        from sitkit_repa.projector import Projector

        path = batch.interpolant, batch.target, batch.weighting
        loss = interpolant_loss(batch.network, *path, batch.data, batch.noise, batch.t, batch.y)
        projector = batch.parts
        if not isinstance(projector, Projector):
            raise UserError("loss 'repa' needs what its `build` gives, as Batch.parts.")
        return loss - self.rule.weight * projector(batch.hidden[self.rule.layer], batch.data)
