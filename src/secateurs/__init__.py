"""secateurs: prune everything a neural network is made of and fed with."""

from secateurs.api import axes, prune, prune_checkpoint, select, train_with
from secateurs.deploy.block_sparse import to_block_sparse
from secateurs.deploy.delta_file import SparseDelta, load_delta, merge
from secateurs.deploy.semi_structured import pack_semi_structured
from secateurs.errors import DivergedError, InputError, SecateursError
from secateurs.method import Codec, Method, Procedure, Pruner, Selector, TrainingPruner
from secateurs.outcome import Outcome, load, save
from secateurs.parts.budgets import Budget
from secateurs.parts.masks import Masks
from secateurs.recovery import finetune
from secateurs.registry import Paper, Tags, create, list_methods, register
from secateurs.settings import TrainSettings, option
from secateurs.task import Metric, Task, classification, language_modelling, multitask
from secateurs.training.adamr import AdamR
from secateurs.training.keeping import MaskKeeper
from secateurs.training.loop import fit
from secateurs.workspace import Workspace

__version__ = "0.1.0"

__all__ = [
    "AdamR",
    "Budget",
    "Codec",
    "DivergedError",
    "InputError",
    "MaskKeeper",
    "Masks",
    "Method",
    "Metric",
    "Outcome",
    "Paper",
    "Procedure",
    "Pruner",
    "SecateursError",
    "Selector",
    "SparseDelta",
    "Tags",
    "Task",
    "TrainSettings",
    "TrainingPruner",
    "Workspace",
    "axes",
    "classification",
    "create",
    "finetune",
    "fit",
    "language_modelling",
    "list_methods",
    "load",
    "load_delta",
    "merge",
    "multitask",
    "option",
    "pack_semi_structured",
    "prune",
    "prune_checkpoint",
    "register",
    "save",
    "select",
    "to_block_sparse",
    "train_with",
]
