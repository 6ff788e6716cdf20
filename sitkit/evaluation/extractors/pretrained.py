"""Pretrained extractors: Inception with the FID weights, and DINOv2."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from sitkit.evaluation.extractors.extractor import SPATIAL_CHANNELS, Extraction, Extractor, colours, network_fingerprint
from sitkit.registry import extractors
from sitkit.runtime.errors import UserError, require_within
from sitkit.runtime.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor, device

    from sitkit.data.dataset import Examples


@final
@extractors.register("inception")
@dataclass(frozen=True)
class Inception(Extractor):
    """Inception v3 with the FID weights of 2015: 2,048 pooled features, 1,008 logits, 7 x 17 x 17 spatial features.

    torch-fidelity's network, which resizes to 299 as TensorFlow 1 does. Images are rounded to uint8; grey images get
    three equal channels.  Spatial features: the first 7 channels of the first branch of block 6d, as in ADM's evaluator.
    weights: a file with torch-fidelity's weights; by default they are downloaded.  Needs the extra `inception`.
    Source: Heusel et al. 2017, arXiv 1706.08500; Nash et al. 2021, arXiv 2103.03841 (spatial features).
    """

    outputs: ClassVar[tuple[str, ...]] = ("features", "spatial", "logits")
    weights: str | None = None

    def places(self) -> tuple[str, ...]:
        return ("weights",)

    def require(self, data: Examples | None) -> None:
        if find_spec("torch_fidelity") is None:
            raise UserError("features 'inception' needs torch-fidelity: pip install 'sitkit[inception]'.")
        if self.weights is not None and not Path(self.weights).is_file():
            raise UserError(f"features 'inception': there is no file {self.weights}.")

    def build(
        self, data: Examples | None, device: device, cache: Path | None, progress: Progress = silent
    ) -> Extraction:
        network = self._network().to(device)
        kept: dict[str, Tensor] = {}

        def keep(module: Any, inputs: Any, output: Tensor) -> None:
            kept["spatial"] = output[:, :SPATIAL_CHANNELS].flatten(1)

        network.Mixed_6d.branch1x1.register_forward_hook(keep)

        def apply(x: Tensor) -> dict[str, Tensor]:
            import torch

            levels = ((colours(x.to(device)) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            features, logits = network(levels)
            return {"features": features, "spatial": kept.pop("spatial"), "logits": logits}

        return Extraction(
            network_fingerprint(network, "uint8"),
            self.outputs,
            apply,
            {"weights": self.weights or "torch-fidelity's download"},
        )

    def _network(self) -> Any:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
                FeatureExtractorInceptionV3,
            )
        except (ImportError, RuntimeError) as error:
            # An incompatible version of torchvision raises RuntimeError.
            raise UserError(
                f"features 'inception' needs torch-fidelity: pip install 'sitkit[inception]' ({error})."
            ) from None
        if self.weights is not None:
            _require_plain(Path(self.weights))
        try:
            return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], self.weights)
        except (OSError, RuntimeError) as error:
            where = self.weights or "the weights that torch-fidelity downloads"
            raise UserError(
                f"features 'inception' cannot read {where}: {error} Give a file: features.weights=PATH."
            ) from None


def _require_plain(path: Path) -> None:
    """Raise UserError for a missing file, and for a file with other objects than tensors: torch-fidelity would run its code."""
    import pickle

    import torch

    if not path.is_file():
        raise UserError(f"features 'inception': there is no file {path}.")
    try:
        torch.load(path, weights_only=True, map_location="meta")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a file of plain weights: {str(error).splitlines()[0]}") from None


@final
@extractors.register("dinov2")
@dataclass(frozen=True)
class Dinov2(Extractor):
    """The class token of DINOv2 after the last norm: with `frechet` this is FD-DINOv2.

    model: a name on the Hugging Face hub or a local folder.  Images go from [-1, 1] to [0, 1], are resized to `size` by
    bicubic interpolation with anti-aliasing, clamped, and normalised by ImageNet's mean and deviation; grey images get
    three equal channels.  Needs the extra `dinov2`.
    Source: Oquab et al. 2023, arXiv 2304.07193; Stein et al. 2023, arXiv 2306.04675 (FD-DINOv2, ViT-L/14 at 224).
    """

    model: str = "facebook/dinov2-large"
    size: int = 224

    def __post_init__(self) -> None:
        require_within(1, 2**12, size=self.size)

    def require(self, data: Examples | None) -> None:
        if find_spec("transformers") is None:
            raise UserError("features 'dinov2' needs transformers: pip install 'sitkit[dinov2]'.")

    def build(
        self, data: Examples | None, device: device, cache: Path | None, progress: Progress = silent
    ) -> Extraction:
        import torch

        network = self._network().to(device).eval().requires_grad_(False)
        mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
        deviation = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

        def apply(x: Tensor) -> dict[str, Tensor]:
            x = (colours(x.to(device)) + 1) / 2
            x = torch.nn.functional.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
            states = network(pixel_values=(x.clamp(0, 1) - mean) / deviation).last_hidden_state
            return {"features": states[:, 0]}

        how = f"bicubic with anti-aliasing to {self.size}, ImageNet's mean and deviation"
        return Extraction(network_fingerprint(network, how), self.outputs, apply, {"preprocessing": how})

    def _network(self) -> Any:
        try:
            from transformers import Dinov2Model
        except ImportError:
            raise UserError("features 'dinov2' needs transformers: pip install 'sitkit[dinov2]'.") from None
        try:
            return Dinov2Model.from_pretrained(self.model, use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"features 'dinov2' cannot load {self.model!r}: {reason}") from None
