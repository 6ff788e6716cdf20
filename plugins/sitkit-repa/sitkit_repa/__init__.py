"""Representation alignment: a loss that aligns a hidden layer of the network with the features of a frozen encoder."""

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
    """The loss `interpolant` minus weight * cos(projector(hidden), encoder(data)), the mean of the cosine over the tokens.

    The encoder is prepared on the data of the run.  It takes images, so the run must use the autoencoder `identity`.
    The projector is a perceptron of three layers that is trained together with the network.

    Args:
        layer: the module whose output (b, tokens, width) is aligned; by default the second block of a SiT.
        weight: the weight of the alignment; 0.5 as in the paper.
        width: the width of the projector.
        encoder: any feature extractor; its weights are frozen.
        reads: "spatial" compares each token with the features at its place; "features" compares the mean over the
            tokens with the features of the whole image.

    Source: Yu et al. 2024 (arXiv 2410.06940), Eq. 8.
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
            raise ValueError(
                f"reads must be an output of the encoder ({', '.join(self.encoder.outputs)}); got {self.reads!r}."
            )

    @classmethod
    def test_fields(cls) -> Sequence[Mapping[str, Any]]:
        # The laws do not depend on the quality of the encoder, so a short training or no training is enough.
        small = {"name": "run-classifier", "steps": 3, "width": 8}
        return {"encoder": small}, {"encoder": "pixels", "reads": "features"}

    @property
    def hidden(self) -> tuple[str, ...]:
        return (self.layer,)

    def prepare(self, data: Examples) -> Loss:
        return BoundAlignment(self, data)

    def per_example(self, batch: Batch) -> Tensor:
        raise UserError(
            "loss 'repa' needs the data of the run: call `loss.prepare(examples)` and use the loss that it returns."
        )


@final
@dataclass(frozen=True)
class BoundAlignment(Loss):
    """Representation alignment together with the data for its encoder."""

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
                f"loss 'repa': the encoder takes examples of shape {self.data.shape}, but the network takes states of shape "
                f"{shape}: use the autoencoder 'identity'."
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
            raise UserError("loss 'repa' needs its projector: pass the result of `build` as Batch.parts.")
        return loss - self.rule.weight * projector(batch.hidden[self.rule.layer], batch.data)
