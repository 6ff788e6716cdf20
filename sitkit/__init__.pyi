# ruff: noqa: I001
# Verbs: each command of the command line as a function
from .runs.config.sources import configure as configure
from .training.train import train as train
from .runs.run import load as load
from .runs.run_folder import list_runs as list_runs
from .runs.sample import sample as sample
from .runs.evaluate import evaluate as evaluate
from .runs.likelihood import likelihood as likelihood
from .models.encode import encode as encode
from .runs.exchange.convert import convert as convert
from .runs.exchange.export import export as export
from .studies.check import check as check
from .studies.ablate import ablate as ablate
from .studies.search import search as search
from .results.explain import explain as explain
from .results.verify import verify as verify
from .results.diff import diff as diff
from .results.losscurve import losscurve as losscurve
from .results.report import report as report
from .testing.certify import certify as certify

# Data of the verbs
from .runs.config.schema import Config as Config
from .runs.config.sources import TrainingFlags as TrainingFlags, SamplingFlags as SamplingFlags
from .runs.run import Run as Run
from .runs.run_folder import RunSummary as RunSummary
from .runs.sample_set import SampleSet as SampleSet
from .runs.evaluate import Evaluation as Evaluation
from .runs.likelihood import HeldoutLikelihood as HeldoutLikelihood
from .studies.status import StudyOutcome as StudyOutcome
from .studies.check import CheckReport as CheckReport
from .studies.search import SearchOutcome as SearchOutcome
from .results.explain import Explanation as Explanation
from .results.verify import Verification as Verification
from .results.diff import Differences as Differences
from .testing.certify import Certificate as Certificate
from .runtime.progress import Event as Event, Progress as Progress, silent as silent
from .runtime.errors import UserError as UserError, WorkFailed as WorkFailed

# Mathematics
from .transport.field import Field as Field, Readings as Readings
from .transport.interpolant import Coefficients as Coefficients
from .solvers.log_density import log_prob as log_prob
from .models.loss import interpolant_loss as interpolant_loss
from .runtime.rng import sample_keys as sample_keys, normal as normal, uniform as uniform

# To extend: base classes, and what their methods take
from .registry.registry import Component as Component
from .transport.interpolant import Interpolant as Interpolant
from .transport.target import Target as Target, Velocity as Velocity
from .transport.weighting import Weighting as Weighting, measured_in as measured_in
from .transport.coupling import Coupling as Coupling
from .transport.timestep import Timestep as Timestep, LogitNormal as LogitNormal
from .transport.diffusion import Diffusion as Diffusion
from .models.loss import Loss as Loss, Batch as Batch
from .solvers.sampler import (
    Sampler as Sampler,
    SolveSpec as SolveSpec,
    Plan as Plan,
    Problem as Problem,
    Sample as Sample,
)
from .solvers.ode import FixedStepODE as FixedStepODE, Tableau as Tableau
from .solvers.guidance import Guidance as Guidance, Unguided as Unguided, Branches as Branches, Gains as Gains
from .solvers.guidance import is_velocity as is_velocity, need_null_class as need_null_class
from .models.backbone import Backbone as Backbone
from .models.sit import SiT as SiT, TimestepEmbedder as TimestepEmbedder
from .models.autoencoder import Autoencoder as Autoencoder
from .data.latents import Posterior as Posterior
from .data.dataset import Dataset as Dataset, Examples as Examples, in_memory as in_memory
from .evaluation.metrics.metric import Metric as Metric, FeatureMetric as FeatureMetric
from .evaluation.metrics.metric import Measurement as Measurement, generator as generator
from .evaluation.extractors.extractor import Extractor as Extractor, Extraction as Extraction, Outputs as Outputs
from .evaluation.extractors.classifier import RunClassifier as RunClassifier

# Registries
from .registry.registry import Registry as Registry
from .registry.registry import interpolants as interpolants
from .registry.registry import targets as targets
from .registry.registry import weightings as weightings
from .registry.registry import losses as losses
from .registry.registry import timesteps as timesteps
from .registry.registry import couplings as couplings
from .registry.registry import diffusions as diffusions
from .registry.registry import samplers as samplers
from .registry.registry import guidances as guidances
from .registry.registry import backbones as backbones
from .registry.registry import autoencoders as autoencoders
from .registry.registry import datasets as datasets
from .registry.registry import metrics as metrics
from .registry.registry import extractors as extractors

__version__: str
