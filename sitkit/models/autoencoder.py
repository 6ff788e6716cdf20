"""What the network models: the examples themselves, or the latents of an autoencoder."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, final

from sitkit.data.dataset import SPLIT_SEED, Dataset, Examples, load_examples
from sitkit.data.latents import Posterior
from sitkit.registry import Component, autoencoders, spec
from sitkit.runtime.errors import UserError, require_within
from sitkit.runtime.tensors import digest_of, load_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The prefix of its tensors in a file that also holds other tensors.
PACKED = "autoencoder/"


@dataclass(frozen=True)
class Autoencoder(Component):
    """A fixed pair of maps between images in [-1, 1] and the latents that the network models; it is not trained.

    Class attribute `encodes`: False if the latent is the image itself.
    """

    encodes: ClassVar[bool] = True

    @abstractmethod
    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the latent of an example of this shape.  Raises UserError for a shape without latents."""

    @abstractmethod
    def posterior(self, x: Tensor) -> Posterior:
        """Return the distribution of the latents of x (b, *shape), on the device of x."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Return the images (b, *shape) of latents (b, *latent_shape)."""

    def encode(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return latents (b, *latent_shape) of x (b, *shape): draws for keys (b,) int64, the means without keys."""
        return self.posterior(x).draw(keys)

    def fingerprint(self) -> str:
        """Return the SHA-256 of what determines the maps: of the fields, or of the weights if there are any."""
        return hashlib.sha256(json.dumps(spec(self)).encode()).hexdigest()

    def caveat(self) -> str:
        """Return a warning to show before encoding; empty in most cases."""
        return ""

    def packed(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return (settings, state) of a network that only this machine has, to store it with a run; None without one."""
        return None


@final
@autoencoders.register("identity")
@dataclass(frozen=True)
class Identity(Autoencoder):
    """The example itself."""

    encodes: ClassVar[bool] = False

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def decode(self, z: Tensor) -> Tensor:
        return z

    def posterior(self, x: Tensor) -> Posterior:
        return Posterior(x)


@final
@autoencoders.register("sd-vae")
@dataclass(frozen=True)
class SDVAE(Autoencoder):
    """Stable Diffusion's autoencoder, AutoencoderKL: z = scale (mean - shift + std noise), x = decoder(z / scale + shift).

    shift: the `shift_factor` of the autoencoder's own config; 0 if it has none.
    path: a folder written by `save_pretrained`, a name on the Hugging Face hub, or a run in one file with an autoencoder;
    only safetensors files are read.
    dtype: the type of the network; inputs and outputs are float32.  batch: the number of examples that the network sees
    together; the last example is repeated to fill a batch.  On a CPU the number is 1, so the latent and the image of an
    example do not depend on the other examples, to the bit; from 64 x 64 pixels on this is as fast.
    Source: Rombach et al. 2022, arXiv 2112.10752; the scale is that of DiT and SiT.
    """

    path: str = "stabilityai/sd-vae-ft-ema"
    scale: float = 0.18215
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive and finite; got {self.scale}.")
        require_within(1, 2**24, batch=self.batch)

    def places(self) -> tuple[str, ...]:
        # A name on the hub is no path.
        return ("path",) if Path(self.path).expanduser().exists() else ()

    def content(self) -> str:
        return self.fingerprint()

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        config = self._network().config
        factor = 2 ** (len(config.block_out_channels) - 1)
        if len(shape) != 3 or shape[0] != config.in_channels or shape[1] % factor or shape[2] % factor:
            raise UserError(
                f"autoencoder 'sd-vae' ({self.path}) takes images of {config.in_channels} channels whose sides are "
                f"multiples of {factor}; the examples are of shape {shape}. Set the data's size (and channels), or use "
                "--autoencoder identity."
            )
        return config.latent_channels, shape[1] // factor, shape[2] // factor

    def posterior(self, x: Tensor) -> Posterior:
        moments = self._by_batches(lambda rows: self._network(x.device).encode(rows).latent_dist.parameters, x)
        mean, logvar = moments.chunk(2, 1)
        # The bounds are those of diffusers' DiagonalGaussianDistribution.
        return Posterior(self.scale * (mean - self._shift()), self.scale * (0.5 * logvar.clamp(-30, 20)).exp())

    def decode(self, z: Tensor) -> Tensor:
        return self._by_batches(
            lambda rows: self._network(z.device).decode(rows).sample, z / self.scale + self._shift()
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of the weights, the scale and the shift."""
        return _digest(self.path, self.scale, self._shift())

    def caveat(self) -> str:
        """Return a warning if the scale differs from the published one."""
        published = self._network().config.scaling_factor
        if math.isclose(self.scale, published, rel_tol=1e-2):
            return ""
        return (
            f"{self.path} was saved with scaling_factor {published:.5g}, which brings its latents to a standard deviation of "
            f"about 1; with autoencoder.scale {self.scale:.5g} it is {self.scale / published:.2g}. To use its own: "
            f"--set autoencoder.scale={published:.5g}"
        )

    def packed(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if not Path(self.path).expanduser().exists():
            return None
        network = _network(self.path, "float32", "cpu")
        settings = json.loads(network.to_json_string())
        return {key: value for key, value in settings.items() if not key.startswith("_")}, network.state_dict()

    def _shift(self) -> float:
        return float(getattr(self._network().config, "shift_factor", None) or 0.0)

    def _network(self, device: torch.device | str = "cpu") -> Any:
        return _network(self.path, self.dtype, str(device))

    def _by_batches(self, apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        import torch

        size = 1 if x.device.type == "cpu" else self.batch
        parts = []
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            for rows in x.split(size):
                missing = size - len(rows)
                full = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
                parts.append(apply(full.to(getattr(torch, self.dtype)))[: len(rows)].float())
        return torch.cat(parts)


@functools.lru_cache(maxsize=4)
def _network(path: str, dtype: str, device: str) -> Any:
    """Return the AutoencoderKL of a folder or a name on the hub, without gradients.  Raises UserError with the reason."""
    import torch

    if device != "cpu":
        return _network(path, dtype, "cpu").to(device=device, copy=True)
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.utils import logging
    except ImportError as error:
        raise UserError(f"autoencoder 'sd-vae' needs diffusers ({error}): pip install 'sitkit[latents]'") from None
    local = Path(path).expanduser()
    logging.set_verbosity_error()
    if local.is_file():
        return _unpacked(local, AutoencoderKL).to(getattr(torch, dtype)).eval().requires_grad_(False)
    if local.exists() and not (local / "config.json").is_file():
        raise UserError(f"{path}: no autoencoder: AutoencoderKL.save_pretrained writes config.json into its folder.")
    if not local.exists() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise UserError(f"{path}: there is no such folder, and a name on the Hugging Face hub is owner/name.")
    try:
        loaded: Any = AutoencoderKL.from_pretrained(
            str(local) if local.exists() else path,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers, safetensors and the hub raise many kinds.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "" if local.exists() else " Without a network give a folder: --set autoencoder.path=FOLDER."
        raise UserError(f"{path}: the autoencoder cannot be read: {reason}{remedy}") from None
    network, info = loaded
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise UserError(f"{path}: the weights do not fit config.json: {len(wrong)} names differ, the first {wrong[0]}.")
    return network.to(getattr(torch, dtype)).eval().requires_grad_(False)


def _unpacked(path: Path, kind: Any) -> Any:
    """Return the network that is stored in the file of a run.  Raises UserError if there is none or it is damaged."""
    header, tensors = load_tensors(path)
    settings = header.get("autoencoder")
    if settings is None:
        raise UserError(f"{path}: this file holds no autoencoder.")
    state = {name.removeprefix(PACKED): tensor for name, tensor in tensors.items() if name.startswith(PACKED)}
    network = kind.from_config(settings)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{path}: its autoencoder's weights do not fit: {str(error).splitlines()[-1].strip()}"
        ) from None
    return network


@functools.lru_cache(maxsize=4)
def _digest(path: str, scale: float, shift: float) -> str:
    # Without a shift the digest is that of sitkit 0.1.
    text = f"scale {scale!r}" + (f" shift {shift!r}" if shift else "")
    return digest_of(_network(path, "float32", "cpu").state_dict(), text)


class Prepared(NamedTuple):
    """Loaded examples, the shape that the network models, and the number of classes."""

    examples: Examples
    shape: tuple[int, ...]
    num_classes: int


def prepare_data(dataset: Dataset, autoencoder: Autoencoder) -> Prepared:
    """Load a data set.  Raises UserError for examples that the autoencoder cannot take."""
    examples = load_examples(dataset)
    return Prepared(examples, modelled_shape(autoencoder, examples), examples.num_classes)


# The number of training examples whose standard deviations are measured; of images that an autoencoder must encode first.
STD_EXAMPLES, ENCODED_EXAMPLES = 1000, 8


@functools.lru_cache(maxsize=4)
def median_std(autoencoder: Autoencoder, examples: Examples) -> float | None:
    """Return the median standard deviation of what the network models; None for examples that are not here or all equal.

    It is over the pixels (the coordinates of points, the channels of latents) that vary, of a fixed random subset of the
    training examples.
    """
    import numpy as np
    import torch

    encoded = examples.encoder is None and autoencoder.encodes
    index = examples.train
    if not len(index):
        return examples.std
    # Streams are read in their own order.
    shuffled = np.random.default_rng(SPLIT_SEED).permutation
    index = shuffled(index) if examples.order is None else examples.order(SPLIT_SEED, 0)
    with torch.no_grad():
        x = modelled(autoencoder, examples, examples.read(index[: ENCODED_EXAMPLES if encoded else STD_EXAMPLES]))
    latents = encoded or examples.encoder is not None
    rows = x.double().movedim(1, -1).flatten(0, -2) if latents and x.ndim > 2 else x.double().flatten(1)
    stds = rows.std(0, correction=0)
    varying = stds[stds > 0]
    return float(varying.median()) if len(varying) else None


def modelled_shape(autoencoder: Autoencoder, examples: Examples) -> tuple[int, ...]:
    """Return the shape that the network models: that of the latents, or of the examples if they are latents already.

    Raises UserError if the examples are latents of another autoencoder, or have no latents.
    """
    if examples.encoder is None:
        return autoencoder.latent_shape(examples.shape)
    if examples.encoder != autoencoder.fingerprint():
        raise UserError(
            f"The data are latents of the autoencoder with fingerprint {examples.encoder[:12]}, not of autoencoder "
            f"{autoencoder.name!r} as it is configured ({autoencoder.fingerprint()[:12]}). Configure the autoencoder that "
            "encoded them, with its path and scale, or encode the images again."
        )
    return examples.shape


def modelled(autoencoder: Autoencoder, examples: Examples, x: Tensor, keys: Tensor | None = None) -> Tensor:
    """Return what the network models of x (b, *shape): the latents, or x itself if it holds latents already."""
    return autoencoder.encode(x, keys) if examples.encoder is None else x
