# Verbs: each command of the command line as a function
# To extend: base classes, and what their methods take
from .data.dataset import Dataset as Dataset
from .data.dataset import Examples as Examples
from .data.dataset import in_memory as in_memory
from .data.latents import Posterior as Posterior
from .evaluation.extractors.classifier import RunClassifier as RunClassifier
from .evaluation.extractors.extractor import Extraction as Extraction
from .evaluation.extractors.extractor import Extractor as Extractor
from .evaluation.extractors.extractor import Outputs as Outputs
from .evaluation.metrics.metric import FeatureMetric as FeatureMetric
from .evaluation.metrics.metric import Measurement as Measurement
from .evaluation.metrics.metric import Metric as Metric
from .evaluation.metrics.metric import generator as generator
from .models.autoencoder import Autoencoder as Autoencoder
from .models.backbone import Backbone as Backbone
from .models.loss import Batch as Batch
from .models.loss import Loss as Loss

# Mathematics
from .models.loss import interpolant_loss as interpolant_loss
from .models.sit import SiT as SiT
from .models.sit import TimestepEmbedder as TimestepEmbedder
from .registry.registry import Component as Component

# Registries
from .registry.registry import Registry as Registry
from .registry.registry import autoencoders as autoencoders
from .registry.registry import backbones as backbones
from .registry.registry import couplings as couplings
from .registry.registry import datasets as datasets
from .registry.registry import diffusions as diffusions
from .registry.registry import extractors as extractors
from .registry.registry import guidances as guidances
from .registry.registry import interpolants as interpolants
from .registry.registry import losses as losses
from .registry.registry import metrics as metrics
from .registry.registry import samplers as samplers
from .registry.registry import targets as targets
from .registry.registry import timesteps as timesteps
from .registry.registry import weightings as weightings

# Data of the verbs
from .runs.config.schema import Config as Config
from .runs.config.sources import SamplingFlags as SamplingFlags
from .runs.config.sources import TrainingFlags as TrainingFlags
from .runs.config.sources import configure as configure
from .runs.evaluate import Evaluation as Evaluation
from .runs.evaluate import evaluate as evaluate
from .runs.likelihood import HeldoutLikelihood as HeldoutLikelihood
from .runs.likelihood import likelihood as likelihood
from .runs.run import Run as Run
from .runs.run import RunSummary as RunSummary
from .runs.run import list_runs as list_runs
from .runs.run import load as load
from .runs.sample import sample as sample
from .runs.sample_set import SampleSet as SampleSet
from .runtime.errors import UserError as UserError
from .runtime.errors import WorkFailed as WorkFailed
from .runtime.progress import Event as Event
from .runtime.progress import Progress as Progress
from .runtime.progress import silent as silent
from .runtime.rng import normal as normal
from .runtime.rng import sample_keys as sample_keys
from .runtime.rng import uniform as uniform
from .solvers.guidance import Branches as Branches
from .solvers.guidance import Gains as Gains
from .solvers.guidance import Guidance as Guidance
from .solvers.guidance import Unguided as Unguided
from .solvers.guidance import is_velocity as is_velocity
from .solvers.guidance import need_null_class as need_null_class
from .solvers.log_density import log_prob as log_prob
from .solvers.ode import FixedStepODE as FixedStepODE
from .solvers.sampler import Plan as Plan
from .solvers.sampler import Problem as Problem
from .solvers.sampler import Sample as Sample
from .solvers.sampler import Sampler as Sampler
from .solvers.sampler import SolveSpec as SolveSpec
from .training.train import train as train
from .transport.coupling import Coupling as Coupling
from .transport.diffusion import Diffusion as Diffusion
from .transport.field import Field as Field
from .transport.field import Readings as Readings
from .transport.interpolant import Coefficients as Coefficients
from .transport.interpolant import Interpolant as Interpolant
from .transport.target import Target as Target
from .transport.target import Velocity as Velocity
from .transport.timestep import LogitNormal as LogitNormal
from .transport.timestep import Timestep as Timestep
from .transport.weighting import Weighting as Weighting
from .transport.weighting import measured_in as measured_in

__version__: str
